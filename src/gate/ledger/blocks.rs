//! The allocator of a store's memory: blocks of 2 KiB, each a node, a part of a table, or sixteen leaves.
//!
//! Its records lie in process memory only. When a store is opened they are rebuilt by walking everything that the roots
//! reach, so that a block that was half linked or half unlinked when a process died is simply free.

/// The number of words of a block, and of a node.
pub(super) const BLOCK_WORDS: usize = 256;
/// The number of bytes of a block.
pub(super) const BLOCK_BYTES: u64 = BLOCK_WORDS as u64 * 8;
/// The number of leaves of a block.
pub(super) const LEAVES: u32 = 16;
/// The number of words of a leaf.
pub(super) const LEAF_WORDS: usize = BLOCK_WORDS / LEAVES as usize;

/// Marks a block that is a node or a part of a table, or whose leaves are all in use.
const WHOLE: u16 = u16::MAX;

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// One bit per leaf in use.
    used: u16,
    /// For a node: the block in which the last leaf below it was allocated or freed, or 0.
    near: u32,
}

/// The blocks in use. Nodes and leaves are named by *unit*: the number of the 128 bytes of the memory that they start at.
#[derive(Debug)]
pub(super) struct Blocks {
    /// The blocks used so far; those behind were never touched.
    blocks: Vec<Block>,
    /// The numbers of those that are free.
    free: Vec<u32>,
    /// The maximum number of blocks.
    limit: u32,
}

impl Blocks {
    /// Returns `limit` blocks, of which the first `header` are in use.
    pub(super) fn new(header: u32, limit: u32) -> Self {
        let block = Block { used: WHOLE, near: 0 };
        Self { blocks: vec![block; header as usize], free: Vec::new(), limit }
    }

    /// Returns the number of blocks ever used, and the bytes of process memory of these records.
    pub(super) fn footprint(&self) -> (usize, usize) {
        let process = self.blocks.capacity() * size_of::<Block>() + self.free.capacity() * size_of::<u32>();
        (self.blocks.len(), process)
    }

    /// Returns the number of free blocks.
    pub(super) fn room(&self) -> u64 {
        u64::from(self.limit) - self.blocks.len() as u64 + self.free.len() as u64
    }

    /// Allocates a block for a node. Returns its unit.
    pub(super) fn take(&mut self) -> Option<u32> {
        self.take_block(WHOLE).map(|block| block * LEAVES)
    }

    fn take_block(&mut self, used: u16) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None if self.blocks.len() < self.limit as usize => {
                self.blocks.push(Block::default());
                self.blocks.len() as u32 - 1
            }
            None => return None,
        };
        self.blocks[block as usize] = Block { used, near: 0 };
        Some(block)
    }

    /// Allocates a leaf below the node `parent`, in a block with others of its leaves where one has room: neighbours are read
    /// together, and no node ever takes more blocks than its leaves could fill. `siblings` are its leaves' units. Returns the
    /// leaf's unit.
    pub(super) fn take_leaf(&mut self, parent: u32, siblings: impl Iterator<Item = u32>) -> Option<u32> {
        let parent = parent / LEAVES;
        let near = self.blocks.get(parent as usize).map_or(0, |block| block.near);
        let open = |blocks: &[Block], at: u32| blocks.get(at as usize).is_some_and(|b| b.used != WHOLE);
        let block = if near != 0 && open(&self.blocks, near) && self.blocks[near as usize].used != 0 {
            near
        } else {
            let mut others = siblings.map(|unit| unit / LEAVES);
            match others.find(|block| open(&self.blocks, *block)) {
                Some(block) => block,
                None => self.take_block(0).or_else(|| self.any_open())?,
            }
        };
        if let Some(parent) = self.blocks.get_mut(parent as usize) {
            parent.near = block;
        }
        let used = &mut self.blocks[block as usize].used;
        let leaf = used.trailing_ones();
        *used |= 1 << leaf;
        Some(block * LEAVES + leaf)
    }

    /// Returns a block with room beside another node's leaves: the last resort of a full store.
    fn any_open(&self) -> Option<u32> {
        self.blocks.iter().position(|block| block.used != WHOLE && block.used != 0).map(|at| at as u32)
    }

    /// Frees the block at `unit`. Returns true if it was in use.
    pub(super) fn give(&mut self, unit: u32) -> bool {
        match self.blocks.get_mut((unit / LEAVES) as usize) {
            Some(block) if block.used == WHOLE && unit.is_multiple_of(LEAVES) => {
                block.used = 0;
                self.free.push(unit / LEAVES);
                true
            }
            _ => false,
        }
    }

    /// Frees the leaf at `unit`, below the node `parent`.
    pub(super) fn give_leaf(&mut self, unit: u32, parent: u32) {
        let (at, bit) = (unit / LEAVES, 1 << (unit % LEAVES));
        let Some(block) = self.blocks.get_mut(at as usize).filter(|block| block.used & bit != 0) else {
            return;
        };
        block.used &= !bit;
        let empty = block.used == 0;
        if empty {
            self.free.push(at);
        }
        if let Some(parent) = self.blocks.get_mut((parent / LEAVES) as usize) {
            parent.near = if empty { 0 } else { at };
        }
    }

    /// Allocates `count` adjacent blocks. Returns the number of the first.
    pub(super) fn take_row(&mut self, count: u32) -> Option<u32> {
        let mut first = 0;
        for (at, block) in self.blocks.iter().enumerate() {
            if block.used != 0 {
                first = at as u32 + 1;
            } else if at as u32 + 1 - first == count {
                break;
            }
        }
        let end = first.checked_add(count).filter(|end| *end <= self.limit)?;
        self.free.retain(|block| !(first..end).contains(block));
        self.blocks.resize(self.blocks.len().max(end as usize), Block::default());
        for block in &mut self.blocks[first as usize..end as usize] {
            *block = Block { used: WHOLE, near: 0 };
        }
        Some(first)
    }

    /// Marks the block at `unit` as in use when a store is opened. Returns false if it cannot be.
    pub(super) fn claim(&mut self, unit: u32) -> bool {
        unit.is_multiple_of(LEAVES) && self.found(unit / LEAVES, WHOLE)
    }

    /// Marks the leaf at `unit` as in use when a store is opened. Returns false if it cannot be.
    pub(super) fn claim_leaf(&mut self, unit: u32) -> bool {
        self.found(unit / LEAVES, 1 << (unit % LEAVES))
    }

    fn found(&mut self, at: u32, bits: u16) -> bool {
        if at >= self.limit {
            return false;
        }
        if self.blocks.len() <= at as usize {
            self.blocks.resize(at as usize + 1, Block::default());
        }
        let block = &mut self.blocks[at as usize];
        let free = block.used & bits == 0;
        block.used |= bits;
        free
    }

    /// Ends the opening of a store: everything in use is marked, the rest is free.
    pub(super) fn claimed(&mut self) {
        let free = self.blocks.iter().enumerate().filter(|(_, block)| block.used == 0);
        self.free = free.map(|(at, _)| at as u32).rev().collect();
    }
}
