//! What a drive says of itself: Identify Controller and Identify Namespace (NVM Express base specification 2.0,
//! 5.17.2.1; NVM command set specification 1.0, 4.1.5.1 and 4.1.5.2).

use super::CHUNK;

/// A drive and one of its namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Geometry {
    /// Bytes of a block.
    pub block: u32,
    /// Blocks of the namespace.
    pub blocks: u64,
    /// Whether what was written may be lost until it is flushed.
    pub volatile_cache: bool,
    /// Blocks that one command zeroes at most; 0 where the drive has no such command.
    pub write_zeroes: u32,
    /// Blocks that one command discards at most; 0 where the drive has no such command.
    pub discard: u32,
    /// Whether the namespace is write-protected.
    pub read_only: bool,
    /// Serial number.
    pub serial: String,
    /// Model number.
    pub model: String,
    /// The namespace's number.
    pub namespace: u32,
}

/// What of a controller's identity its driver needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Abilities {
    /// Bytes of one command at most, by MDTS; none where there is no limit.
    pub(super) most: Option<u64>,
    /// Whether lists of segments are taken: 1 at any byte, 2 at multiples of 4.
    pub(super) sgl: u8,
    /// Whether doorbells may be written to memory.
    pub(super) shadow_doorbells: bool,
}

/// Why a namespace will not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unfit {
    /// It is not there.
    #[error("there is no such namespace, or nothing is in it")]
    Absent,
    /// Metadata.
    #[error("its blocks have metadata: format it without")]
    Metadata,
    /// Block size.
    #[error("its blocks are of an unknown size")]
    Block,
    /// Blocks in zones, which are written from their beginning to their end only.
    #[error("its blocks are written in zones (Zoned Namespace command set), which no ordinary disk is")]
    Zoned,
    /// Keys and values instead of blocks.
    #[error("it has keys and values and no blocks (Key Value command set)")]
    KeyValue,
    /// Another command set.
    #[error("its command set ({0:#x}) is not the NVM command set, and unknown here")]
    CommandSet(u8),
    /// The controller has several command sets, and does not say which is the namespace's.
    #[error("its controller has several command sets and does not say which one is for this namespace")]
    Untold,
}

fn word(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|two| two.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|eight| eight.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn byte(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

fn text(bytes: &[u8]) -> String {
    let printable = |byte: &u8| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { ' ' };
    bytes.iter().map(printable).collect::<String>().trim().to_owned()
}

/// 2^`exponent` pages of `page` bytes.
fn times(page: u64, exponent: u8) -> u64 {
    1u64.checked_shl(exponent.into()).and_then(|pages| pages.checked_mul(page)).unwrap_or(u64::MAX)
}

/// True where a controller has the list of namespace identification descriptors (1.3 and later).
pub(super) fn tells_descriptors(controller: &[u8]) -> bool {
    long(controller, 80) as u32 >= 0x0001_0300
}

/// Checks that a namespace's command set is the NVM command set, by its identification descriptors (NVM Express base
/// specification 2.0, 5.17.2.3): type, length, two reserved bytes, and so many bytes of value. Only a controller with
/// several command sets (`several`) must have the descriptor of the command set.
pub(super) fn check_command_set(descriptors: Option<&[u8]>, several: bool) -> Result<(), Unfit> {
    const COMMAND_SET: u8 = 4;
    let mut rest = descriptors.unwrap_or_default();
    while let [kind, len, _, _, behind @ ..] = rest {
        match (*kind, behind) {
            (0, _) => break, // the end of the list
            (COMMAND_SET, [0, ..]) => return Ok(()),
            (COMMAND_SET, [1, ..]) => return Err(Unfit::KeyValue),
            (COMMAND_SET, [2, ..]) => return Err(Unfit::Zoned),
            (COMMAND_SET, [other, ..]) => return Err(Unfit::CommandSet(*other)),
            (COMMAND_SET, []) => return Err(Unfit::Untold),
            _ => rest = behind.get(usize::from(*len)..).unwrap_or_default(),
        }
    }
    if several { Err(Unfit::Untold) } else { Ok(()) }
}

/// Whether a controller can say what bounds commands that move no data: versions before 1.2 take that question for
/// another.
pub(super) fn tells_limits(controller: &[u8]) -> bool {
    long(controller, 80) as u32 >= 0x0001_0200
}

/// Bounds what moves no data, and so is not bound by MDTS, from what a controller says of the NVM command set: WZSL, DMRSL
/// and DMSL. 0 is no bound. `smallest` as for [`abilities`].
pub(super) fn limit(geometry: &mut Geometry, set: &[u8], smallest: u64) {
    let bound = |most: &mut u32, limit: u64| {
        if limit > 0 {
            *most = (*most).min(u32::try_from(limit).unwrap_or(u32::MAX));
        }
    };
    if let zeroes @ 1.. = byte(set, 1) {
        // Where that is not one block there is no such command.
        let blocks = times(smallest, zeroes) / u64::from(geometry.block.max(1));
        geometry.write_zeroes = geometry.write_zeroes.min(u32::try_from(blocks).unwrap_or(u32::MAX));
    }
    bound(&mut geometry.discard, long(set, 4) & 0xffff_ffff);
    bound(&mut geometry.discard, long(set, 8));
}

/// From a controller's identity; `smallest` is its smallest page in bytes (CAP.MPSMIN).
pub(super) fn abilities(controller: &[u8], smallest: u64) -> Abilities {
    let (mdts, sgls) = (byte(controller, 77), byte(controller, 536));
    Abilities {
        most: (mdts > 0).then(|| times(smallest, mdts)),
        sgl: sgls & 3,
        shadow_doorbells: word(controller, 256) & 1 << 8 != 0,
    }
}

/// From the identities of a controller and of namespace `number`.
pub(super) fn geometry(controller: &[u8], space: &[u8], number: u32) -> Result<Geometry, Unfit> {
    let blocks = long(space, 0);
    if blocks == 0 {
        return Err(Unfit::Absent);
    }
    let format = usize::from(byte(space, 26) & 0xf | byte(space, 26) >> 1 & 0x30);
    let format = 128 + format * 4;
    if word(space, format) != 0 {
        return Err(Unfit::Metadata);
    }
    let shift = byte(space, format + 2);
    let block = (9..=16).contains(&shift).then(|| 1u32 << shift).ok_or(Unfit::Block)?;
    let optional = word(controller, 520);
    let most = |bit: u16, most: u32| if optional & bit != 0 { most } else { 0 };
    Ok(Geometry {
        block,
        blocks,
        volatile_cache: byte(controller, 525) & 1 != 0,
        // Dataset Management, one range; Write Zeroes counts blocks in 16 bits.
        discard: most(1 << 2, u32::MAX),
        write_zeroes: most(1 << 3, 1 << 16),
        read_only: byte(space, 99) & 1 != 0,
        serial: text(controller.get(4..24).unwrap_or_default()),
        model: text(controller.get(24..64).unwrap_or_default()),
        namespace: number,
    })
}

/// The blocks that may be overwritten.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scratch {
    pub(super) first: u64,
    /// Bytes of a block.
    pub(super) block: u64,
}

/// The last blocks of a namespace; none where it has too few, or longer ones than a transfer of the exerciser's.
pub(super) fn scratch(geometry: &Geometry) -> Option<Scratch> {
    let (chunk, block) = (CHUNK as u64, u64::from(geometry.block));
    let first = geometry.blocks.checked_sub(chunk / block).filter(|_| block <= chunk)?;
    Some(Scratch { first, block })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(blocks: u64, shift: u8) -> Vec<u8> {
        let mut space = vec![0; 4096];
        space[..8].copy_from_slice(&blocks.to_le_bytes());
        space[26] = 1;
        space[128 + 4 + 2] = shift;
        space
    }

    #[test]
    fn the_scratch_blocks_are_the_last() {
        let scratch = |blocks, shift| {
            scratch(&geometry(&[0; 4096], &space(blocks, shift), 1).unwrap()).map(|s| (s.first, s.block))
        };
        assert_eq!(scratch(1000, 9), Some((992, 512)));
        assert_eq!(scratch(1000, 12), Some((999, 4096)));
        assert_eq!(scratch(1000, 13), None, "a block is longer than a transfer");
        assert_eq!(scratch(7, 9), None, "too few blocks");
    }

    #[test]
    fn a_namespace_that_will_not_do_is_refused() {
        let mut metadata = space(1000, 9);
        metadata[128 + 4] = 8;
        for (space, why) in [
            (space(0, 9), Unfit::Absent),
            (metadata, Unfit::Metadata),
            (space(10, 8), Unfit::Block),
            (space(10, 17), Unfit::Block),
            (vec![], Unfit::Absent),
        ] {
            assert_eq!(geometry(&[0; 4096], &space, 1), Err(why));
        }
    }

    #[test]
    fn only_a_namespace_of_the_nvm_command_set_is_a_disk() {
        let uuid = [&[3, 16, 0, 0][..], &[4; 16]].concat();
        let of = |set: u8| [&uuid[..], &[4, 1, 0, 0, set], &[0; 64]].concat();
        for several in [false, true] {
            for (set, fit) in [
                (0, Ok(())),
                (1, Err(Unfit::KeyValue)),
                (2, Err(Unfit::Zoned)),
                (7, Err(Unfit::CommandSet(7))),
            ] {
                assert_eq!(check_command_set(Some(&of(set)), several), fit);
            }
            // A list without it, one that is cut short, none at all.
            let untold = if several { Err(Unfit::Untold) } else { Ok(()) };
            for list in [&[uuid.clone(), vec![0; 64]].concat()[..], &[3, 16, 0, 0, 4], &[]] {
                assert_eq!(check_command_set(Some(list), several), untold);
            }
            assert_eq!(check_command_set(None, several), untold);
            assert_eq!(check_command_set(Some(&[4, 1, 0, 0]), several), Err(Unfit::Untold));
        }
    }

    #[test]
    fn a_drive_is_what_it_says() {
        let mut controller = vec![0; 4096];
        controller[4..24].copy_from_slice(b"  S3RIAL            ");
        controller[24..30].copy_from_slice(b"model\0");
        controller[77] = 3;
        controller[520] = 0b1100;
        controller[525] = 1;
        controller[536] = 2;
        controller[257] = 1;
        let found = geometry(&controller, &space(64, 12), 3).unwrap();
        assert_eq!((found.serial.as_str(), found.model.as_str()), ("S3RIAL", "model"));
        assert_eq!((found.block, found.blocks, found.namespace), (4096, 64, 3));
        assert!(found.volatile_cache && !found.read_only);
        assert_eq!((found.write_zeroes, found.discard), (65536, u32::MAX));
        let abilities = abilities(&controller, 4096);
        assert_eq!(abilities, Abilities { most: Some(32768), sgl: 2, shadow_doorbells: true });
        let mut limited = found.clone();
        limit(&mut limited, &[0; 4096], 4096);
        assert_eq!(limited, found, "0 is no bound");
        let mut set = vec![0; 4096];
        (set[1], set[4], set[8]) = (3, 200, 100);
        limit(&mut limited, &set, 4096);
        assert_eq!((limited.write_zeroes, limited.discard), (8, 100));
        (set[1], set[4], set[8]) = (60, 50, 100);
        limit(&mut limited, &set, 4096);
        assert_eq!((limited.write_zeroes, limited.discard), (8, 50));
        assert!(!tells_limits(&controller));
        controller[80..84].copy_from_slice(&0x0001_0200u32.to_le_bytes());
        assert!(tells_limits(&controller) && !tells_descriptors(&controller));
        controller[80..84].copy_from_slice(&0x0001_0300u32.to_le_bytes());
        assert!(tells_descriptors(&controller));
        controller[77] = 60;
        assert_eq!(super::abilities(&controller, 4096).most, Some(u64::MAX));
        controller[77] = 200;
        assert_eq!(super::abilities(&controller, 4096).most, Some(u64::MAX));
    }
}
