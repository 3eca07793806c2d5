//! A namespace's last blocks, for DMA of given bytes (NVM command set specification 1.0, 4.1.5.1).

use super::CHUNK;

/// The blocks that may be overwritten.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scratch {
    pub(super) first: u64,
    /// Bytes of a block.
    pub(super) block: u64,
}

/// The last blocks of a namespace, from what it says it is; none where it has too few, or of a size that is not known.
pub(super) fn scratch(space: &[u8]) -> Option<Scratch> {
    let size = u64::from_le_bytes(space.get(..8)?.try_into().ok()?);
    let format = usize::from(space.get(26)? & 0xf);
    let shift = *space.get(128 + format * 4 + 2)?;
    let block = (9..=12).contains(&shift).then(|| 1 << shift)?;
    let first = size.checked_sub(CHUNK as u64 / block)?;
    Some(Scratch { first, block })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scratch_blocks_are_the_last() {
        let mut space = vec![0; 4096];
        space[..8].copy_from_slice(&1000u64.to_le_bytes());
        space[26] = 1;
        space[128 + 4 + 2] = 9;
        let found = scratch(&space).unwrap();
        assert_eq!((found.first, found.block), (992, 512));
        space[128 + 4 + 2] = 12;
        assert_eq!(scratch(&space).unwrap().first, 999);
        space[128 + 4 + 2] = 13;
        assert!(scratch(&space).is_none(), "a block is longer than a transfer");
        space[128 + 4 + 2] = 9;
        space[..8].copy_from_slice(&7u64.to_le_bytes());
        assert!(scratch(&space).is_none(), "too few blocks");
    }
}
