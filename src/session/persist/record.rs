//! The encoding of regions, exclusions, devices and ids as records of eight words. Decoding checks every value: another process,
//! perhaps of another version, wrote it.

use passgate_backends::handover::DomainIds;
use passgate_bindings::units::Offset;
use passgate_bindings::vfio::PciAddress;
use passgate_bindings::{Gpa, PAGE, PageRange};

use super::slots::Record;
use crate::gate::{
    Backing, Cause, DeviceId, ExcludedBy, FileId, InvalidationId, PageState, Reason, RegionId, RegionRecord,
    RegionSpec, Rung,
};

/// Bits 0 to 7 of a region's first word.
const REGION: u64 = 1;
/// The bit in a region's first word that is set if devices may write.
const WRITABLE: u64 = 1 << 32;
/// The bit in a region's first word that is set while the region is being closed.
const CLOSING: u64 = 1 << 33;

/// The first word of an exclusion by an open invalidation.
const OPEN: u64 = 1;
/// Bits 0 to 7 of the first word of an exclusion by a quarantine.
const QUARANTINE: u64 = 2;

/// Encodes a region. The words are: first, number, guest-physical address, length, offset in the file, device and inode of the
/// file, 0. In the first word are the kind (bits 0 to 7), the binary logarithms of the bytes per mapping (8 to 15), of the
/// file's page (16 to 23) and of the bytes per mapping that its owner asked for (24 to 31; 0 for none), the flags (32, 33), and the
/// initial state (40 to 47).
pub(super) fn encode_region(written: &RegionRecord) -> Record {
    let RegionRecord { region, spec, piece, closing } = *written;
    let RegionSpec { gpa, backing, writable, piece: asked, page, initial } = spec;
    let log2 = |size: u64| u64::from(size.checked_ilog2().unwrap_or(0));
    let flag = |set: bool, bit: u64| if set { bit } else { 0 };
    let flags = flag(writable, WRITABLE) | flag(closing, CLOSING);
    let sizes = log2(piece) << 8 | log2(page) << 16 | log2(asked) << 24;
    let first = REGION | sizes | flags | (initial as u64) << 40;
    let file = backing.file;
    [first, region.0.into(), gpa.start().0, gpa.len(), backing.offset.0, file.device, file.inode, 0]
}

/// Decodes a region; none for a record that no region has.
pub(super) fn decode_region(record: &Record) -> Option<RegionRecord> {
    let [first, id, start, len, offset, device, inode, _] = *record;
    let size = |shift: u32| 1_u64.checked_shl((first >> shift & 0xff) as u32).filter(|size| *size >= PAGE);
    let asked = match first >> 24 & 0xff {
        0 => 0,
        _ => size(24)?,
    };
    if first & 0xff != REGION || id == 0 {
        return None;
    }
    let gpa = PageRange::<Gpa>::new(start, len).ok()?;
    // Offset and length must be a page range of the file as well.
    PageRange::<Offset>::new(offset, len).ok()?;
    let spec = RegionSpec {
        gpa,
        backing: Backing { file: FileId { device, inode }, offset: Offset(offset) },
        writable: first & WRITABLE != 0,
        piece: asked,
        page: size(16)?,
        initial: *PageState::ALL.get((first >> 40 & 0xff) as usize)?,
    };
    let region = RegionId(u32::try_from(id).ok()?);
    Some(RegionRecord { region, spec, piece: size(8)?, closing: first & CLOSING != 0 })
}

/// Encodes an exclusion. The words are: first, invalidation, offset in the file, length, device and inode of the file, errno, 0.
/// In the first word are the kind (bits 0 to 7) and, of a quarantine, the cause (8 to 15), the rung (16 to 23), and the device (32
/// to 47) if bit 24 is set.
pub(super) fn encode_exclusion(file: FileId, range: PageRange<Offset>, by: ExcludedBy) -> Record {
    let (first, id, errno) = match by {
        ExcludedBy::Open(id) => (OPEN, id, 0),
        ExcludedBy::Quarantine(id, Reason { cause, device, rung, errno }) => {
            let device = device.map_or(0, |device| 1 << 24 | u64::from(device.0) << 32);
            (QUARANTINE | (cause as u64) << 8 | u64::from(rung.number()) << 16 | device, id, errno)
        }
    };
    let errno = u64::from(errno.cast_unsigned());
    [first, id.0, range.start().0, range.len(), file.device, file.inode, errno, 0]
}

/// Decodes an exclusion; none for a record that no exclusion has.
pub(super) fn decode_exclusion(record: &Record) -> Option<(FileId, PageRange<Offset>, ExcludedBy)> {
    let [first, id, start, len, device, inode, errno, _] = *record;
    let range = PageRange::new(start, len).ok()?;
    let (file, id) = (FileId { device, inode }, InvalidationId(id));
    let by = match first & 0xff {
        OPEN if first == OPEN => ExcludedBy::Open(id),
        QUARANTINE => {
            let cause = (first >> 8 & 0xff).checked_sub(1)?;
            let device = (first >> 24 & 1 == 1).then_some(DeviceId((first >> 32) as u16));
            let reason = Reason {
                cause: *Cause::ALL.get(cause as usize)?,
                device,
                rung: *Rung::LADDER.get((first >> 16 & 0xff) as usize)?,
                errno: u32::try_from(errno).ok()?.cast_signed(),
            };
            ExcludedBy::Quarantine(id, reason)
        }
        _ => return None,
    };
    (id.0 != 0).then_some((file, range, by))
}

/// Encodes a conversion that was open at a restart and is not settled. The words are: 1, invalidation, six times 0.
pub(super) fn encode_unended(id: InvalidationId) -> Record {
    [1, id.0, 0, 0, 0, 0, 0, 0]
}

/// Decodes a conversion that was open at a restart.
pub(super) fn decode_unended(record: &Record) -> Option<InvalidationId> {
    let [first, id, ..] = *record;
    (first == 1 && id != 0).then_some(InvalidationId(id))
}

/// The properties of a region that the session needs and the gate does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::session) struct StoredRegionInfo {
    /// True if passgate is the only one that maps the region, so that it may convert there.
    pub(in crate::session) sole_mapper: bool,
    /// The file of its private side.
    pub(in crate::session) private: Option<FileId>,
}

/// Encodes the properties of a region. The words are: first, region, device and inode of the private side, four times 0. In the
/// first word bit 0 is set; bit 8 is set for a sole mapper, bit 9 if there is a private side.
pub(super) fn encode_region_info(region: RegionId, info: StoredRegionInfo) -> Record {
    let StoredRegionInfo { sole_mapper, private } = info;
    let first = 1 | u64::from(sole_mapper) << 8 | u64::from(private.is_some()) << 9;
    let FileId { device, inode } = private.unwrap_or(FileId { device: 0, inode: 0 });
    [first, region.0.into(), device, inode, 0, 0, 0, 0]
}

/// Decodes the properties of a region.
pub(super) fn decode_region_info(record: &Record) -> Option<(RegionId, StoredRegionInfo)> {
    let [first, id, device, inode, ..] = *record;
    let private = (first >> 9 & 1 == 1).then_some(FileId { device, inode });
    Some((RegionId(u32::try_from(id).ok()?), StoredRegionInfo { sole_mapper: first >> 8 & 1 == 1, private }))
}

/// Encodes the ids of the domain. The words are: 1, kind, value, number of devices, four times 0. Without this record a ledger is
/// incomplete, and no later process resumes from it.
pub(super) fn encode_ids(ids: DomainIds, devices: usize) -> Record {
    let [kind, value] = ids.words();
    [1, kind, value, devices as u64, 0, 0, 0, 0]
}

/// Decodes the ids of the domain, and the number of its devices.
pub(super) fn decode_ids(record: &Record) -> Option<(DomainIds, usize)> {
    let [first, kind, value, devices, ..] = *record;
    if first != 1 || devices > u64::from(u16::MAX) {
        return None;
    }
    Some((DomainIds::from_words([kind, value])?, devices as usize))
}

/// The word of a device's record that is [`ATS_UNUSED`] if ATS is known to be off while the device is attached. It is 0 in a
/// ledger of a version that did not write it: then the state of ATS is not known.
pub(super) const ATS_WORD: usize = 7;
/// The value of [`ATS_WORD`] for a device whose ATS is off.
const ATS_UNUSED: u64 = 1;
/// The maximum number of bytes of a device's name; a PCI address has 12.
const MAX_NAME_BYTES: usize = 48;

/// Returns the value of [`ATS_WORD`].
pub(super) fn ats_word(unused: bool) -> u64 {
    if unused { ATS_UNUSED } else { 0 }
}

/// Encodes a device: its name, and if its ATS is known to be off while it is attached. The words are: first, six of the name's
/// bytes in little-endian order, [`ATS_WORD`]. In the first word are the kind (bits 0 to 7: 2), the length of the name (8 to 15)
/// and the number of the device (16 and up).
pub(super) fn encode_device(nth: usize, name: &str, ats_unused: bool) -> Record {
    let mut words = [0; 8];
    words[ATS_WORD] = ats_word(ats_unused);
    let len = name.len().min(MAX_NAME_BYTES);
    words[0] = 2 | (len as u64) << 8 | (nth as u64) << 16;
    for (at, byte) in name.bytes().take(len).enumerate() {
        words[1 + at / 8] |= u64::from(byte) << (at % 8 * 8);
    }
    words
}

/// Decodes a device: its number, its name, a PCI address, and true if its ATS is known to be off while it is attached.
pub(super) fn decode_device(record: &Record) -> Option<(usize, String, bool)> {
    let (len, nth) = ((record[0] >> 8 & 0xff) as usize, (record[0] >> 16) as usize);
    let bytes: Vec<u8> = record[1..7].iter().flat_map(|word| word.to_le_bytes()).take(len).collect();
    let name = String::from_utf8(bytes).ok()?;
    name.parse::<PciAddress>().ok()?;
    (record[0] & 0xff == 2).then_some((nth, name, record[ATS_WORD] == ATS_UNUSED))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::Step;

    fn written() -> RegionRecord {
        let backing = Backing { file: FileId { device: 7, inode: u64::MAX }, offset: Offset(3 * PAGE) };
        let gpa = PageRange::new(1 << 40, 1 << 40).unwrap();
        let spec =
            RegionSpec { gpa, backing, writable: true, piece: 0, page: PAGE, initial: PageState::Private };
        RegionRecord { region: RegionId(u32::MAX), spec, piece: 2 << 20, closing: false }
    }

    #[test]
    fn damaged_record_of_an_open_conversion_is_rejected() {
        assert_eq!(decode_unended(&encode_unended(InvalidationId(9))), Some(InvalidationId(9)));
        for [first, id] in [[0, 9], [2, 9], [1, 0]] {
            assert_eq!(decode_unended(&[first, id, 0, 0, 0, 0, 0, 0]), None);
        }
    }

    #[test]
    fn records_survive_encoding() {
        let mut all = vec![written()];
        all.push(RegionRecord {
            closing: true,
            spec: RegionSpec { writable: false, piece: 1 << 30, ..all[0].spec },
            ..all[0]
        });
        for one in all {
            assert_eq!(decode_region(&encode_region(&one)), Some(one));
        }
        let (file, range) = (FileId { device: 1, inode: 2 }, PageRange::new(PAGE, 5 * PAGE).unwrap());
        let mut exclusions = vec![ExcludedBy::Open(InvalidationId(9))];
        for cause in Cause::ALL {
            for (device, errno) in [(None, -1), (Some(DeviceId(0)), 0), (Some(DeviceId(u16::MAX)), 14)] {
                let reason = Reason { cause, device, rung: Rung::Fence(Step::Reset), errno };
                exclusions.push(ExcludedBy::Quarantine(InvalidationId(u64::MAX), reason));
            }
        }
        for by in exclusions {
            assert_eq!(decode_exclusion(&encode_exclusion(file, range, by)), Some((file, range, by)));
        }
        for one in [
            StoredRegionInfo { sole_mapper: true, private: None },
            StoredRegionInfo { sole_mapper: false, private: Some(file) },
        ] {
            assert_eq!(decode_region_info(&encode_region_info(RegionId(4), one)), Some((RegionId(4), one)));
        }
        let ids = DomainIds::Type1 { entries: 9 };
        assert_eq!(decode_ids(&encode_ids(ids, 3)), Some((DomainIds::Type1 { entries: 9 }, 3)));
        for unused in [false, true] {
            let record = encode_device(3, "0000:04:1f.7", unused);
            assert_eq!(decode_device(&record), Some((3, "0000:04:1f.7".to_owned(), unused)));
        }
    }

    /// Words that stand for no possible region, exclusion or device are rejected.
    #[test]
    fn damaged_records_are_rejected() {
        let record = encode_region(&written());
        for (at, value) in
            [(0, 0), (0, 2), (0, 1), (1, 0), (1, 1 << 32), (2, 7), (2, u64::MAX - 7), (3, 0), (4, 1)]
        {
            let mut bad = record;
            bad[at] = value;
            assert_eq!(decode_region(&bad), None, "{at} {value}");
        }
        let file = FileId { device: 1, inode: 2 };
        let reason = Reason { cause: Cause::OwnerUnknown, device: None, rung: Rung::Unmap, errno: 0 };
        let by = ExcludedBy::Quarantine(InvalidationId(3), reason);
        let record = encode_exclusion(file, PageRange::new(0, PAGE).unwrap(), by);
        for (at, value) in
            [(0, 0), (0, 2), (0, 1 << 32 | 1), (0, 2 | 11 << 8), (1, 0), (3, 0), (3, 5), (6, 1 << 32)]
        {
            let mut bad = record;
            bad[at] = value;
            assert_eq!(decode_exclusion(&bad), None, "{at} {value}");
        }
        assert_eq!(decode_ids(&[1, 7, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(decode_device(&encode_device(0, "soft:0", true)), None);
    }
}
