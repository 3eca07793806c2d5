//! Regions, holds and devices as records, and back. What comes back is checked: another process wrote it.

use passgate_backends::resume::Ids;
use passgate_bindings::units::Offset;
use passgate_bindings::vfio::PciAddress;
use passgate_bindings::{Gpa, PAGE, PageRange};

use super::slots::Line;
use crate::gate::{
    Backing, Cause, DeviceId, FileId, HeldBy, InvalidationId, PageState, Reason, RegionId, RegionSpec, Step,
    Written,
};

/// The first word of a region: what it is, then piece, page and a given piece as powers of two, flags, its number.
const REGION: u64 = 1;
const WRITABLE: u64 = 1 << 32;
const CLOSING: u64 = 1 << 33;

/// The first word of a hold: what it is, cause, rung, whether there is a device, the device, errno.
const OPEN: u64 = 1;
const QUARANTINE: u64 = 2;

pub(super) fn of_region(written: &Written) -> Line {
    let Written { region, spec, piece, closing } = *written;
    let RegionSpec { gpa, backing, writable, piece: asked, page, initial } = spec;
    let log2 = |size: u64| u64::from(size.checked_ilog2().unwrap_or(0));
    let flag = |set: bool, bit: u64| if set { bit } else { 0 };
    let flags = flag(writable, WRITABLE) | flag(closing, CLOSING);
    let sizes = log2(piece) << 8 | log2(page) << 16 | log2(asked) << 24;
    let first = REGION | sizes | flags | (initial as u64) << 40;
    let file = backing.file;
    [first, region.0.into(), gpa.start().0, gpa.len(), backing.offset.0, file.device, file.inode, 0]
}

pub(super) fn region(line: &Line) -> Option<Written> {
    let [first, id, start, len, offset, device, inode, _] = *line;
    let size = |shift: u32| 1_u64.checked_shl((first >> shift & 0xff) as u32).filter(|size| *size >= PAGE);
    let asked = match first >> 24 & 0xff {
        0 => 0,
        _ => size(24)?,
    };
    if first & 0xff != REGION || id == 0 {
        return None;
    }
    let gpa = PageRange::<Gpa>::new(start, len).ok()?;
    // The pages of the file must be such as well.
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
    Some(Written { region, spec, piece: size(8)?, closing: first & CLOSING != 0 })
}

pub(super) fn of_hold(file: FileId, range: PageRange<Offset>, by: HeldBy) -> Line {
    let (first, id, errno) = match by {
        HeldBy::Open(id) => (OPEN, id, 0),
        HeldBy::Quarantine(id, Reason { cause, device, rung, errno }) => {
            let device = device.map_or(0, |device| 1 << 24 | u64::from(device.0) << 32);
            (QUARANTINE | (cause as u64) << 8 | (rung as u64) << 16 | device, id, errno)
        }
    };
    let errno = u64::from(errno.cast_unsigned());
    [first, id.0, range.start().0, range.len(), file.device, file.inode, errno, 0]
}

pub(super) fn hold(line: &Line) -> Option<(FileId, PageRange<Offset>, HeldBy)> {
    let [first, id, start, len, device, inode, errno, _] = *line;
    let range = PageRange::new(start, len).ok()?;
    let (file, id) = (FileId { device, inode }, InvalidationId(id));
    let by = match first & 0xff {
        OPEN if first == OPEN => HeldBy::Open(id),
        QUARANTINE => {
            let cause = (first >> 8 & 0xff).checked_sub(1)?;
            let device = (first >> 24 & 1 == 1).then_some(DeviceId((first >> 32) as u16));
            let reason = Reason {
                cause: *Cause::ALL.get(cause as usize)?,
                device,
                rung: *Step::LADDER.get((first >> 16 & 0xff) as usize)?,
                errno: u32::try_from(errno).ok()?.cast_signed(),
            };
            HeldBy::Quarantine(id, reason)
        }
        _ => return None,
    };
    (id.0 != 0).then_some((file, range, by))
}

/// A conversion that was open at a restart, and is not settled.
pub(super) fn of_unended(id: InvalidationId) -> Line {
    [1, id.0, 0, 0, 0, 0, 0, 0]
}

pub(super) fn unended(line: &Line) -> Option<InvalidationId> {
    let [first, id, ..] = *line;
    (first == 1 && id != 0).then_some(InvalidationId(id))
}

/// What a session must know of a region that the gate need not: whether passgate is its sole mapper, and its private
/// side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::session) struct Aside {
    pub(in crate::session) sole_mapper: bool,
    pub(in crate::session) private: Option<FileId>,
}

pub(super) fn of_aside(region: RegionId, aside: Aside) -> Line {
    let Aside { sole_mapper, private } = aside;
    let first = 1 | u64::from(sole_mapper) << 8 | u64::from(private.is_some()) << 9;
    let FileId { device, inode } = private.unwrap_or(FileId { device: 0, inode: 0 });
    [first, region.0.into(), device, inode, 0, 0, 0, 0]
}

pub(super) fn aside(line: &Line) -> Option<(RegionId, Aside)> {
    let [first, id, device, inode, ..] = *line;
    let private = (first >> 9 & 1 == 1).then_some(FileId { device, inode });
    Some((RegionId(u32::try_from(id).ok()?), Aside { sole_mapper: first >> 8 & 1 == 1, private }))
}

/// The domain's ids; the first record of all, without which there is nothing to go on with.
pub(super) fn of_ids(ids: Ids, devices: usize) -> Line {
    let [kind, value] = ids.words();
    [1, kind, value, devices as u64, 0, 0, 0, 0]
}

pub(super) fn ids(line: &Line) -> Option<(Ids, usize)> {
    let [first, kind, value, devices, ..] = *line;
    if first != 1 || devices > u64::from(u16::MAX) {
        return None;
    }
    Some((Ids::from_words([kind, value])?, devices as usize))
}

/// The word of a device's name that says whether its ATS is known to be off while it is attached. It is 0 in a ledger of
/// a version that did not write it: nothing is known then.
pub(super) const ATS_WORD: usize = 7;
const ATS_UNUSED: u64 = 1;

pub(super) fn ats_word(unused: bool) -> u64 {
    if unused { ATS_UNUSED } else { 0 }
}

/// A device's name, of at most 48 bytes: a PCI address has 12. And whether its ATS is known to be off while it is
/// attached.
pub(super) fn of_name(nth: usize, name: &str, ats_unused: bool) -> Line {
    let mut words = [0; 8];
    words[ATS_WORD] = ats_word(ats_unused);
    let len = name.len().min(48);
    words[0] = 2 | (len as u64) << 8 | (nth as u64) << 16;
    for (at, byte) in name.bytes().take(len).enumerate() {
        words[1 + at / 8] |= u64::from(byte) << (at % 8 * 8);
    }
    words
}

pub(super) fn name(line: &Line) -> Option<(usize, String, bool)> {
    let (len, nth) = ((line[0] >> 8 & 0xff) as usize, (line[0] >> 16) as usize);
    let bytes: Vec<u8> = line[1..7].iter().flat_map(|word| word.to_le_bytes()).take(len).collect();
    let name = String::from_utf8(bytes).ok()?;
    name.parse::<PciAddress>().ok()?;
    (line[0] & 0xff == 2).then_some((nth, name, line[ATS_WORD] == ATS_UNUSED))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> Written {
        let backing = Backing { file: FileId { device: 7, inode: u64::MAX }, offset: Offset(3 * PAGE) };
        let gpa = PageRange::new(1 << 40, 1 << 40).unwrap();
        let spec =
            RegionSpec { gpa, backing, writable: true, piece: 0, page: PAGE, initial: PageState::Private };
        Written { region: RegionId(u32::MAX), spec, piece: 2 << 20, closing: false }
    }

    #[test]
    fn a_damaged_record_of_an_open_conversion_is_none() {
        assert_eq!(unended(&of_unended(InvalidationId(9))), Some(InvalidationId(9)));
        for [first, id] in [[0, 9], [2, 9], [1, 0]] {
            assert_eq!(unended(&[first, id, 0, 0, 0, 0, 0, 0]), None);
        }
    }

    #[test]
    fn what_is_written_comes_back() {
        let mut all = vec![written()];
        all.push(Written {
            closing: true,
            spec: RegionSpec { writable: false, piece: 1 << 30, ..all[0].spec },
            ..all[0]
        });
        for one in all {
            assert_eq!(region(&of_region(&one)), Some(one));
        }
        let (file, range) = (FileId { device: 1, inode: 2 }, PageRange::new(PAGE, 5 * PAGE).unwrap());
        let mut holds = vec![HeldBy::Open(InvalidationId(9))];
        for cause in Cause::ALL {
            for (device, errno) in [(None, -1), (Some(DeviceId(0)), 0), (Some(DeviceId(u16::MAX)), 14)] {
                let reason = Reason { cause, device, rung: Step::Reset, errno };
                holds.push(HeldBy::Quarantine(InvalidationId(u64::MAX), reason));
            }
        }
        for by in holds {
            assert_eq!(hold(&of_hold(file, range, by)), Some((file, range, by)));
        }
        for one in
            [Aside { sole_mapper: true, private: None }, Aside { sole_mapper: false, private: Some(file) }]
        {
            assert_eq!(aside(&of_aside(RegionId(4), one)), Some((RegionId(4), one)));
        }
        assert_eq!(ids(&of_ids(Ids::Type1 { entries: 9 }, 3)), Some((Ids::Type1 { entries: 9 }, 3)));
        for unused in [false, true] {
            let line = of_name(3, "0000:04:1f.7", unused);
            assert_eq!(name(&line), Some((3, "0000:04:1f.7".to_owned(), unused)));
        }
    }

    /// Whatever the words are, they are no region or hold that could not be.
    #[test]
    fn what_is_damaged_is_none() {
        let line = of_region(&written());
        for (at, value) in
            [(0, 0), (0, 2), (0, 1), (1, 0), (1, 1 << 32), (2, 7), (2, u64::MAX - 7), (3, 0), (4, 1)]
        {
            let mut bad = line;
            bad[at] = value;
            assert_eq!(region(&bad), None, "{at} {value}");
        }
        let file = FileId { device: 1, inode: 2 };
        let reason = Reason { cause: Cause::OwnerUnknown, device: None, rung: Step::Unmap, errno: 0 };
        let by = HeldBy::Quarantine(InvalidationId(3), reason);
        let line = of_hold(file, PageRange::new(0, PAGE).unwrap(), by);
        for (at, value) in
            [(0, 0), (0, 2), (0, 1 << 32 | 1), (0, 2 | 10 << 8), (1, 0), (3, 0), (3, 5), (6, 1 << 32)]
        {
            let mut bad = line;
            bad[at] = value;
            assert_eq!(hold(&bad), None, "{at} {value}");
        }
        assert_eq!(ids(&[1, 7, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(name(&of_name(0, "soft:0", true)), None);
    }
}
