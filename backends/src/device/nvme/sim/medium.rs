//! The blocks of a simulated drive, and its cache.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks in memory. Those that were never written are zeroes.
#[derive(Debug)]
pub struct Medium {
    block: u32,
    blocks: u64,
    volatile: bool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// What is read.
    now: BTreeMap<u64, Vec<u8>>,
    /// What is on the medium where that differs: none for zeroes.
    before: BTreeMap<u64, Option<Vec<u8>>>,
    /// Blocks that were given up and not written since.
    given_up: BTreeSet<u64>,
}

impl Medium {
    pub(super) fn new(block: u32, blocks: u64, volatile: bool) -> Self {
        Self { block, blocks, volatile, inner: Mutex::default() }
    }

    /// Bytes of a block.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// How many there are.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// What a command would read.
    pub fn read(&self, first: u64, blocks: u64) -> Vec<u8> {
        let inner = self.lock();
        let zeroes = vec![0; self.block as usize];
        let block = |at| inner.now.get(&at).unwrap_or(&zeroes).iter().copied();
        (first..first + blocks).flat_map(block).collect()
    }

    /// What is there once the power has failed.
    pub fn durable(&self, first: u64, blocks: u64) -> Vec<u8> {
        let inner = self.lock();
        let zeroes = vec![0; self.block as usize];
        let block = |at| {
            let before = inner.before.get(&at).map(Option::as_ref);
            before.unwrap_or_else(|| inner.now.get(&at)).unwrap_or(&zeroes).iter().copied()
        };
        (first..first + blocks).flat_map(block).collect()
    }

    /// Puts whole blocks on the medium, past the cache, as no command does.
    pub fn write(&self, first: u64, bytes: &[u8]) {
        self.put(first, bytes, true);
    }

    /// Whether this block was given up and not written since.
    pub fn is_given_up(&self, block: u64) -> bool {
        self.lock().given_up.contains(&block)
    }

    /// Writes whole blocks; `through` for past the cache.
    pub(super) fn put(&self, first: u64, bytes: &[u8], through: bool) {
        let mut inner = self.lock();
        for (at, block) in (first..).zip(bytes.chunks(self.block as usize)) {
            inner.set(at, Some(block.to_vec()), self.volatile && !through);
            inner.given_up.remove(&at);
        }
    }

    /// Blocks read as zeroes from now on; `through` for past the cache.
    pub(super) fn clear(&self, first: u64, blocks: u64, give_up: bool, through: bool) {
        let mut inner = self.lock();
        for at in first..first + blocks {
            inner.set(at, None, self.volatile && !through);
            if give_up {
                inner.given_up.insert(at);
            }
        }
    }

    /// What is in the cache goes to the medium.
    pub(super) fn flush(&self) {
        self.lock().before.clear();
    }

    /// What is in the cache is lost.
    pub(super) fn lose(&self) {
        let mut inner = self.lock();
        for (at, before) in std::mem::take(&mut inner.before) {
            inner.set(at, before, false);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn set(&mut self, at: u64, block: Option<Vec<u8>>, cached: bool) {
        let had = match block {
            Some(block) => self.now.insert(at, block),
            None => self.now.remove(&at),
        };
        if cached {
            self.before.entry(at).or_insert(had);
        } else {
            self.before.remove(&at);
        }
    }
}
