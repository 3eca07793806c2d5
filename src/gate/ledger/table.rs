//! Tables: records of fixed size in a store, addressed by number, for data that is not by page.

use std::ops::Deref;
use std::sync::atomic::AtomicU64;

use super::blocks::{BLOCK_WORDS, LEAVES};
use super::store::Store;

/// The number of words of a record: 64 bytes.
const LINE: usize = 8;

/// Records of 64 bytes, zero until written. Each word of a record is read and written as a whole; the order of several words
/// is up to the user.
#[derive(Debug, Clone)]
pub struct Table {
    store: Store,
    first: u32,
    blocks: u32,
}

impl Table {
    pub(super) fn new(store: Store, first: u32, blocks: u32) -> Self {
        Self { store, first, blocks }
    }

    /// Returns the number of records.
    pub fn lines(&self) -> usize {
        self.len() / LINE
    }

    /// Returns the eight words of record `line`.
    pub fn line(&self, line: usize) -> Option<&[AtomicU64; LINE]> {
        self.as_chunks().0.get(line)
    }
}

impl Deref for Table {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        self.store.words_at(self.first.saturating_mul(LEAVES), self.blocks as usize * BLOCK_WORDS)
    }
}
