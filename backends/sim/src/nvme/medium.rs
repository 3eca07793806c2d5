//! The blocks of a simulated drive, and its write cache.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks in memory, initially zero.
#[derive(Debug)]
pub struct Medium {
    block: u32,
    blocks: u64,
    volatile: bool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The content that commands read. Blocks that are not in it are zero.
    current: BTreeMap<u64, Vec<u8>>,
    /// The content of the medium, for blocks that the cache has newer data of; None for zeroes.
    durable: BTreeMap<u64, Option<Vec<u8>>>,
    /// Blocks that were deallocated and not written since.
    deallocated: BTreeSet<u64>,
}

impl Medium {
    pub(super) fn new(block: u32, blocks: u64, volatile: bool) -> Self {
        Self { block, blocks, volatile, inner: Mutex::default() }
    }

    /// Returns the size of a block, in bytes.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// Returns the number of blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Returns the content that a command would read.
    pub fn read(&self, first: u64, blocks: u64) -> Vec<u8> {
        let inner = self.lock();
        let zeroes = vec![0; self.block as usize];
        let block = |at| inner.current.get(&at).unwrap_or(&zeroes).iter().copied();
        (first..first + blocks).flat_map(block).collect()
    }

    /// Returns the content that remains after a power failure.
    pub fn durable(&self, first: u64, blocks: u64) -> Vec<u8> {
        let inner = self.lock();
        let zeroes = vec![0; self.block as usize];
        let block = |at| {
            let durable = inner.durable.get(&at).map(Option::as_ref);
            durable.unwrap_or_else(|| inner.current.get(&at)).unwrap_or(&zeroes).iter().copied()
        };
        (first..first + blocks).flat_map(block).collect()
    }

    /// Puts whole blocks on the medium, bypassing the cache even without FUA.
    pub fn write(&self, first: u64, bytes: &[u8]) {
        self.write_blocks(first, bytes, true);
    }

    /// True if this block was deallocated and not written since.
    pub fn is_given_up(&self, block: u64) -> bool {
        self.lock().deallocated.contains(&block)
    }

    /// Writes whole blocks; `fua` bypasses the cache.
    pub(super) fn write_blocks(&self, first: u64, bytes: &[u8], fua: bool) {
        let mut inner = self.lock();
        for (at, block) in (first..).zip(bytes.chunks(self.block as usize)) {
            inner.set(at, Some(block.to_vec()), self.volatile && !fua);
            inner.deallocated.remove(&at);
        }
    }

    /// Makes blocks read as zeroes; `fua` bypasses the cache.
    pub(super) fn zero(&self, first: u64, blocks: u64, deallocate: bool, fua: bool) {
        let mut inner = self.lock();
        for at in first..first + blocks {
            inner.set(at, None, self.volatile && !fua);
            if deallocate {
                inner.deallocated.insert(at);
            }
        }
    }

    /// Writes the cache to the medium.
    pub(super) fn flush(&self) {
        self.lock().durable.clear();
    }

    /// Discards the content of the cache.
    pub(super) fn discard_cache(&self) {
        let mut inner = self.lock();
        for (at, durable) in std::mem::take(&mut inner.durable) {
            inner.set(at, durable, false);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn set(&mut self, at: u64, block: Option<Vec<u8>>, cached: bool) {
        let previous = match block {
            Some(block) => self.current.insert(at, block),
            None => self.current.remove(&at),
        };
        if cached {
            self.durable.entry(at).or_insert(previous);
        } else {
            self.durable.remove(&at);
        }
    }
}
