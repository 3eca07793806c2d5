//! The Identify data structures: what a controller and its namespaces are capable of (NVMe Base 2.0, 5.17.2; NVM
//! Command Set 1.0, 4.1.5).

/// The properties of a drive and one of its namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Geometry {
    /// The size of a block, in bytes.
    pub block: u32,
    /// The size of the namespace, in blocks.
    pub blocks: u64,
    /// True if the drive has a volatile write cache: completed writes may be lost until a flush.
    pub volatile_cache: bool,
    /// The largest number of blocks of one Write Zeroes command; 0 if the drive does not have the command.
    pub write_zeroes: u32,
    /// The largest number of blocks of one discard (Dataset Management with one range); 0 if the drive does not have
    /// the command.
    pub discard: u32,
    /// True if the namespace is write-protected.
    pub read_only: bool,
    /// The serial number.
    pub serial: String,
    /// The model number.
    pub model: String,
    /// The namespace identifier.
    pub namespace: u32,
}

/// The properties of a controller that its driver needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ControllerCaps {
    /// The largest transfer of one command, in bytes (MDTS); None if there is no limit.
    pub(super) max_transfer: Option<u64>,
    /// SGL support (SGLS, bits 1:0): 0 no SGLs; 1 data of any alignment and length; 2 address and length are
    /// multiples of 4 bytes.
    pub(super) sgl: u8,
    /// True if the controller has the Doorbell Buffer Config command.
    pub(super) shadow_doorbells: bool,
}

/// The reason why a namespace cannot be used as a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NamespaceError {
    /// The namespace does not exist or is inactive.
    #[error("no such namespace, or it is inactive")]
    Absent,
    /// The blocks have metadata.
    #[error("its blocks carry metadata: format it without metadata")]
    Metadata,
    /// The block size is outside 512 bytes to 64 KiB.
    #[error("its block size is not supported: 512 bytes to 64 KiB are")]
    BlockSize,
    /// The blocks are in zones, each of which is written sequentially only.
    #[error(
        "it is a zoned namespace (Zoned Namespace command set), whose zones are written sequentially: not a disk"
    )]
    Zoned,
    /// The namespace stores values by keys, not blocks.
    #[error("it stores keys and values, not blocks (Key Value command set)")]
    KeyValue,
    /// The namespace has another command set, with this Command Set Identifier.
    #[error("its command set ({0:#x}) is not supported: only the NVM command set is")]
    CommandSet(u8),
    /// The controller has several command sets, and does not report the one of the namespace.
    #[error("its controller has several command sets and does not report the one of this namespace")]
    UnknownCommandSet,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|two| two.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|eight| eight.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn u8_at(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

fn text(bytes: &[u8]) -> String {
    let printable = |byte: &u8| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { ' ' };
    bytes.iter().map(printable).collect::<String>().trim().to_owned()
}

/// Returns the size of 2^`exponent` pages of `page` bytes; saturates.
fn page_multiple(page: u64, exponent: u8) -> u64 {
    1u64.checked_shl(exponent.into()).and_then(|pages| pages.checked_mul(page)).unwrap_or(u64::MAX)
}

/// True if the controller has the list of namespace identification descriptors (version 1.3 and later).
pub(super) fn has_descriptors(controller: &[u8]) -> bool {
    u64_at(controller, 80) as u32 >= 0x0001_0300
}

/// Checks that a namespace has the NVM command set, by its identification descriptors (NVMe Base 2.0, 5.17.2.3). Each
/// has a type, a length, two reserved bytes, and a value of this length. A namespace without this
/// descriptor is taken to have the NVM command set, unless the controller has several command sets (`several`).
pub(super) fn check_command_set(descriptors: Option<&[u8]>, several: bool) -> Result<(), NamespaceError> {
    const COMMAND_SET: u8 = 4;
    let mut rest = descriptors.unwrap_or_default();
    while let [kind, len, _, _, behind @ ..] = rest {
        match (*kind, behind) {
            (0, _) => break, // the end of the list
            (COMMAND_SET, [0, ..]) => return Ok(()),
            (COMMAND_SET, [1, ..]) => return Err(NamespaceError::KeyValue),
            (COMMAND_SET, [2, ..]) => return Err(NamespaceError::Zoned),
            (COMMAND_SET, [other, ..]) => return Err(NamespaceError::CommandSet(*other)),
            (COMMAND_SET, []) => return Err(NamespaceError::UnknownCommandSet),
            _ => rest = behind.get(usize::from(*len)..).unwrap_or_default(),
        }
    }
    if several { Err(NamespaceError::UnknownCommandSet) } else { Ok(()) }
}

/// True if Identify with CNS 06h (the limits of [`apply_limits`]) may be sent: version 1.2 or later. Earlier controllers
/// decode only the low bits of CNS, and return another data structure.
pub(super) fn has_limits(controller: &[u8]) -> bool {
    u64_at(controller, 80) as u32 >= 0x0001_0200
}

/// Applies the size limits besides MDTS: of Write Zeroes (WZSL), and of Dataset Management (DMRSL, blocks of one range;
/// DMSL, blocks of one command). `set` is the Identify Controller data of the NVM command set; a limit of 0 is none. `min_page` is as for [`controller_caps`].
pub(super) fn apply_limits(geometry: &mut Geometry, set: &[u8], min_page: u64) {
    let bound = |max: &mut u32, limit: u64| {
        if limit > 0 {
            *max = (*max).min(u32::try_from(limit).unwrap_or(u32::MAX));
        }
    };
    if let wzsl @ 1.. = u8_at(set, 1) {
        // Less than one block makes the limit 0: the command is not used.
        let blocks = page_multiple(min_page, wzsl) / u64::from(geometry.block.max(1));
        geometry.write_zeroes = geometry.write_zeroes.min(u32::try_from(blocks).unwrap_or(u32::MAX));
    }
    bound(&mut geometry.discard, u64_at(set, 4) & 0xffff_ffff);
    bound(&mut geometry.discard, u64_at(set, 8));
}

/// Parses the Identify Controller data. `min_page` is the smallest memory page size in bytes (CAP.MPSMIN).
pub(super) fn controller_caps(controller: &[u8], min_page: u64) -> ControllerCaps {
    let (mdts, sgls) = (u8_at(controller, 77), u8_at(controller, 536));
    ControllerCaps {
        max_transfer: (mdts > 0).then(|| page_multiple(min_page, mdts)),
        sgl: sgls & 3,
        shadow_doorbells: u16_at(controller, 256) & 1 << 8 != 0,
    }
}

/// Parses the Identify Controller data and the Identify Namespace data of namespace `number`.
pub(super) fn geometry(
    controller: &[u8],
    namespace_data: &[u8],
    number: u32,
) -> Result<Geometry, NamespaceError> {
    let blocks = u64_at(namespace_data, 0);
    if blocks == 0 {
        return Err(NamespaceError::Absent);
    }
    // FLBAS: bits 3:0 are the lower four bits of the LBA format's index, bits 6:5 the upper two. The formats are 4 bytes each,
    // from byte 128.
    let lbaf = usize::from(u8_at(namespace_data, 26) & 0xf | u8_at(namespace_data, 26) >> 1 & 0x30);
    let lbaf = 128 + lbaf * 4;
    if u16_at(namespace_data, lbaf) != 0 {
        return Err(NamespaceError::Metadata);
    }
    let shift = u8_at(namespace_data, lbaf + 2);
    let block = (9..=16).contains(&shift).then(|| 1u32 << shift).ok_or(NamespaceError::BlockSize)?;
    let oncs = u16_at(controller, 520);
    let max = |bit: u16, max: u32| if oncs & bit != 0 { max } else { 0 };
    Ok(Geometry {
        block,
        blocks,
        volatile_cache: u8_at(controller, 525) & 1 != 0,
        // A discard has one range, of a 32-bit length; the 16-bit length of Write Zeroes is zero-based.
        discard: max(1 << 2, u32::MAX),
        write_zeroes: max(1 << 3, 1 << 16),
        read_only: u8_at(namespace_data, 99) & 1 != 0,
        serial: text(controller.get(4..24).unwrap_or_default()),
        model: text(controller.get(24..64).unwrap_or_default()),
        namespace: number,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace_data(blocks: u64, shift: u8) -> Vec<u8> {
        let mut namespace_data = vec![0; 4096];
        namespace_data[..8].copy_from_slice(&blocks.to_le_bytes());
        namespace_data[26] = 1;
        namespace_data[128 + 4 + 2] = shift;
        namespace_data
    }

    #[test]
    fn unusable_namespace_is_refused() {
        let mut metadata = namespace_data(1000, 9);
        metadata[128 + 4] = 8;
        for (namespace_data, why) in [
            (namespace_data(0, 9), NamespaceError::Absent),
            (metadata, NamespaceError::Metadata),
            (namespace_data(10, 8), NamespaceError::BlockSize),
            (namespace_data(10, 17), NamespaceError::BlockSize),
            (vec![], NamespaceError::Absent),
        ] {
            assert_eq!(geometry(&[0; 4096], &namespace_data, 1), Err(why));
        }
    }

    #[test]
    fn namespace_of_another_command_set_is_not_a_disk() {
        let uuid = [&[3, 16, 0, 0][..], &[4; 16]].concat();
        let of = |set: u8| [&uuid[..], &[4, 1, 0, 0, set], &[0; 64]].concat();
        for several in [false, true] {
            for (set, fit) in [
                (0, Ok(())),
                (1, Err(NamespaceError::KeyValue)),
                (2, Err(NamespaceError::Zoned)),
                (7, Err(NamespaceError::CommandSet(7))),
            ] {
                assert_eq!(check_command_set(Some(&of(set)), several), fit);
            }
            // A list without the descriptor, a truncated list, an empty list.
            let undetermined = if several { Err(NamespaceError::UnknownCommandSet) } else { Ok(()) };
            for list in [&[uuid.clone(), vec![0; 64]].concat()[..], &[3, 16, 0, 0, 4], &[]] {
                assert_eq!(check_command_set(Some(list), several), undetermined);
            }
            assert_eq!(check_command_set(None, several), undetermined);
            assert_eq!(
                check_command_set(Some(&[4, 1, 0, 0]), several),
                Err(NamespaceError::UnknownCommandSet)
            );
        }
    }

    #[test]
    fn identify_data_is_parsed() {
        let mut controller = vec![0; 4096];
        controller[4..24].copy_from_slice(b"  S3RIAL            ");
        controller[24..30].copy_from_slice(b"model\0");
        controller[77] = 3;
        controller[520] = 0b1100;
        controller[525] = 1;
        controller[536] = 2;
        controller[257] = 1;
        let found = geometry(&controller, &namespace_data(64, 12), 3).unwrap();
        assert_eq!((found.serial.as_str(), found.model.as_str()), ("S3RIAL", "model"));
        assert_eq!((found.block, found.blocks, found.namespace), (4096, 64, 3));
        assert!(found.volatile_cache && !found.read_only);
        assert_eq!((found.write_zeroes, found.discard), (65536, u32::MAX));
        let caps = controller_caps(&controller, 4096);
        assert_eq!(caps, ControllerCaps { max_transfer: Some(32768), sgl: 2, shadow_doorbells: true });
        let mut limited = found.clone();
        apply_limits(&mut limited, &[0; 4096], 4096);
        assert_eq!(limited, found, "0 is no bound");
        let mut set = vec![0; 4096];
        (set[1], set[4], set[8]) = (3, 200, 100);
        apply_limits(&mut limited, &set, 4096);
        assert_eq!((limited.write_zeroes, limited.discard), (8, 100));
        (set[1], set[4], set[8]) = (60, 50, 100);
        apply_limits(&mut limited, &set, 4096);
        assert_eq!((limited.write_zeroes, limited.discard), (8, 50));
        assert!(!has_limits(&controller));
        controller[80..84].copy_from_slice(&0x0001_0200u32.to_le_bytes());
        assert!(has_limits(&controller) && !has_descriptors(&controller));
        controller[80..84].copy_from_slice(&0x0001_0300u32.to_le_bytes());
        assert!(has_descriptors(&controller));
        controller[77] = 60;
        assert_eq!(super::controller_caps(&controller, 4096).max_transfer, Some(u64::MAX));
        controller[77] = 200;
        assert_eq!(super::controller_caps(&controller, 4096).max_transfer, Some(u64::MAX));
    }
}
