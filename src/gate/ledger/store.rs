//! The memory that the ledger lies in: nodes, leaves and tables, found again through a small directory of roots.
//!
//! In a memfd it outlives the process. Two rules make a crash at any instruction harmless: a new node is filled before the
//! one word that makes it reachable is written, and an old one is unlinked before its memory is used again. The free
//! parts are not recorded at all (`Blocks`).
//!
//! The contents of memory that another process wrote are checked when it is opened: no entry leads outside it, or in a
//! circle. Nothing here panics on its contents, not even if they are changed afterwards.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use passgate_bindings::words::Words;

use super::blocks::{BLOCK_BYTES, BLOCK_WORDS, Blocks, LEAF_WORDS, LEAVES};
use super::fault::{Full, OpenError};
use super::fill::{FIRST_UNIT, Fill};
use super::leaf::publish;
use super::table::Table;

/// "passgate", as a little-endian word.
const MAGIC: u64 = u64::from_le_bytes(*b"passgate");
/// The version of the layout.
pub(super) const VERSION: u64 = 1;
/// The words of the header: magic, version, length in bytes, slots of the directory ever used.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_LENGTH: usize = 2;
const AT_SLOTS: usize = 3;
/// The first word of the directory.
const DIRECTORY: usize = 8;
/// The number of words of a slot: the root (0: none), then the key.
const SLOT: usize = 4;
/// The number of blocks of header and directory.
const HEADER: u32 = 16;
/// The number of slots of the directory.
const SLOTS: usize = (HEADER as usize * BLOCK_WORDS - DIRECTORY) / SLOT;

/// The maximum number of levels of nodes: 2^54 pages.
pub(super) const LEVELS: u32 = 5;

/// The kind of a root, in its highest byte.
const TREE: u64 = 1;
const TABLE: u64 = 2;

/// The key of a root: its kind, and its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The kind; each user of the store has its own.
    pub kind: u64,
    /// The first word of the owner.
    pub a: u64,
    /// The second word of the owner.
    pub b: u64,
}

/// The source of memory for what ends with the process: each call returns zeroed words for one tree, at least 64 KiB. The gate makes
/// no system call, so its owner says where they come from (`passgate_bindings::words::private`).
pub type Arena = fn() -> Words;

/// A handle to the memory; clones share it.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    words: Words,
    /// Locked only while a node or a leaf is allocated or freed.
    blocks: Mutex<Blocks>,
}

impl Store {
    /// Returns an empty store in `words`, whose contents are lost. `Full` where there is no room for the header.
    pub fn new(words: Words) -> Result<Self, Full> {
        let bytes = words.len() as u64 * 8;
        let limit = limit(&words).ok_or(Full { bytes })?;
        words[AT_MAGIC].store(0, Release);
        words[AT_VERSION].store(VERSION, Release);
        words[AT_LENGTH].store(bytes, Release);
        words[AT_SLOTS].store(0, Release);
        words[AT_MAGIC].store(MAGIC, Release);
        Ok(Self(Arc::new(Inner { words, blocks: Mutex::new(Blocks::new(HEADER, limit)) })))
    }

    /// Opens the store that another process left in `words`.
    pub fn open(words: Words) -> Result<Self, OpenError> {
        let says = |at: usize| words.get(at).map_or(0, |word| word.load(Relaxed));
        let has = words.len() as u64 * 8;
        let limit = limit(&words).filter(|_| says(AT_MAGIC) == MAGIC).ok_or(OpenError::Foreign)?;
        if says(AT_VERSION) != VERSION {
            return Err(OpenError::Version { found: says(AT_VERSION) });
        }
        if says(AT_LENGTH) != has {
            return Err(OpenError::Length { says: says(AT_LENGTH), has });
        }
        let store = Self(Arc::new(Inner { words, blocks: Mutex::new(Blocks::new(HEADER, limit)) }));
        store.walk()?;
        Ok(store)
    }

    /// Returns the memory, whose descriptor can be passed on.
    pub fn words(&self) -> &Words {
        &self.0.words
    }

    /// Returns the bytes of memory that were ever written, with those of the allocator's records.
    pub fn footprint(&self) -> usize {
        let (blocks, process) = self.blocks().footprint();
        // Of the directory only the first page, as long as that is enough.
        (blocks - HEADER as usize) * BLOCK_BYTES as usize + 4096 + process
    }

    /// Returns the number of free bytes.
    pub fn room(&self) -> u64 {
        self.blocks().room() * BLOCK_BYTES
    }

    /// Returns the keys of all roots.
    pub fn keys(&self) -> Vec<Key> {
        self.slots().filter(|at| self.load(*at) != 0).map(|at| self.key(at)).collect()
    }

    /// Returns a new table of at least `lines` records of 64 bytes, all zero, under a key that has none yet.
    pub fn reserve(&self, key: Key, lines: u32) -> Result<Table, Full> {
        let count = u64::from(lines).div_ceil(BLOCK_BYTES / 64).max(1);
        let count = u32::try_from(count).map_err(|_| self.full())?;
        let first = self.blocks().take_row(count).ok_or_else(|| self.full())?;
        let table = Table::new(self.clone(), first, count);
        table.iter().for_each(|word| word.store(0, Relaxed));
        match self.publish(key, TABLE << 56 | u64::from(count) << 32 | u64::from(first)) {
            Ok(_) => Ok(table),
            Err(full) => {
                self.give_row(first, count);
                Err(full)
            }
        }
    }

    /// Returns the table under `key`.
    pub fn table(&self, key: Key) -> Option<Table> {
        let (first, count) = as_table(self.load(self.slot(key)?))?;
        Some(Table::new(self.clone(), first, count))
    }

    /// Removes the tree or table under `key` and frees its memory.
    pub fn remove(&self, key: Key) {
        let Some(at) = self.slot(key) else { return };
        let root = self.load(at);
        self.put(at, 0);
        if let Some((first, count)) = as_table(root) {
            self.give_row(first, count);
        } else if let Some((height, entry)) = as_tree(root) {
            self.free(entry, height, 0);
        }
    }

    /// Returns the slot of the tree under `key`, of a new one (all pages 0) where there is none.
    pub(super) fn tree(&self, key: Key) -> Result<usize, Full> {
        match self.slot(key) {
            Some(at) => Ok(at),
            None => self.publish(key, of_tree(1, 0)),
        }
    }

    /// Returns height and entry of the tree in slot `at`.
    pub(super) fn root(&self, at: usize) -> (u32, u32) {
        as_tree(self.load(at)).unwrap_or((1, 0))
    }

    /// Makes `entry`, at `height`, the tree in slot `at`.
    pub(super) fn set_root(&self, at: usize, height: u32, entry: u32) {
        self.put(at, of_tree(height, entry));
    }

    /// Returns a new node, filled, for entries of 2^`span` pages from page `first` on. It is not linked yet.
    pub(super) fn take_node(&self, fill: Fill, first: u64, span: u32) -> Result<u32, Full> {
        let unit = self.blocks().take().ok_or_else(|| self.full())?;
        let entry = |index: u64| u64::from(fill.below(first + (index << span), span).entry());
        for (index, word) in (0..).step_by(2).zip(self.words_at(unit, BLOCK_WORDS)) {
            word.store(entry(index + 1) << 32 | entry(index), Relaxed);
        }
        Ok(unit)
    }

    /// Returns a new leaf, filled, below the node `parent`, from page `first` on. It is not linked yet.
    pub(super) fn take_leaf(&self, parent: u32, fill: Fill, first: u64) -> Result<u32, Full> {
        let siblings = self.entries(parent).filter(|unit| *unit >= FIRST_UNIT);
        let unit = self.blocks().take_leaf(parent, siblings).ok_or_else(|| self.full())?;
        for (page, word) in (first..).step_by(32).zip(self.words_at(unit, LEAF_WORDS)) {
            word.store(fill.word(page), Relaxed);
        }
        Ok(unit)
    }

    /// Returns entry `index` of the node at `unit`.
    pub(super) fn entry(&self, unit: u32, index: u64) -> u32 {
        let pair = self.load(unit as usize * LEAF_WORDS + (index / 2) as usize);
        (pair >> (index % 2 * 32)) as u32
    }

    /// Returns all entries of the node at `unit`.
    pub(super) fn entries(&self, unit: u32) -> impl Iterator<Item = u32> + Clone + '_ {
        let pairs = self.words_at(unit, BLOCK_WORDS).iter().map(|pair| pair.load(Relaxed));
        pairs.flat_map(|pair| [pair as u32, (pair >> 32) as u32])
    }

    /// Sets entry `index` of the node at `unit`: from now on what it names is reachable.
    pub(super) fn set_entry(&self, unit: u32, index: u64, entry: u32) {
        let at = unit as usize * LEAF_WORDS + (index / 2) as usize;
        let shift = index % 2 * 32;
        let pair = self.load(at) & !(u64::from(u32::MAX) << shift) | u64::from(entry) << shift;
        self.put(at, pair);
    }

    /// Gives back what `entry`, at `height` below the node `parent`, names: nothing leads to it any more.
    pub(super) fn free(&self, entry: u32, height: u32, parent: u32) {
        if entry < FIRST_UNIT {
            return;
        }
        if height == 0 {
            self.blocks().give_leaf(entry, parent);
            return;
        }
        // Read before it is given back: then it may be anyone's.
        let below: Vec<u32> = self.entries(entry).filter(|entry| *entry >= FIRST_UNIT).collect();
        if self.blocks().give(entry) {
            below.into_iter().for_each(|entry| self.free(entry, height - 1, 0));
        }
    }

    /// Returns `count` words from `unit` on; none where that is outside.
    pub(super) fn words_at(&self, unit: u32, count: usize) -> &[std::sync::atomic::AtomicU64] {
        let at = unit as usize * LEAF_WORDS;
        self.0.words.get(at..at + count).unwrap_or_default()
    }

    fn load(&self, at: usize) -> u64 {
        self.0.words.get(at).map_or(0, |word| word.load(Relaxed))
    }

    fn put(&self, at: usize, value: u64) {
        if let Some(word) = self.0.words.get(at) {
            publish(word, value);
        }
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.0.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn full(&self) -> Full {
        Full { bytes: self.0.words.len() as u64 * 8 }
    }

    fn give_row(&self, first: u32, count: u32) {
        let mut blocks = self.blocks();
        for block in first..first.saturating_add(count) {
            blocks.give(block.saturating_mul(LEAVES));
        }
    }

    /// Returns the words at which the slots ever used begin.
    fn slots(&self) -> impl Iterator<Item = usize> + use<> {
        let used = usize::try_from(self.load(AT_SLOTS)).map_or(SLOTS, |used| used.min(SLOTS));
        (0..used).map(|slot| DIRECTORY + slot * SLOT)
    }

    fn key(&self, at: usize) -> Key {
        Key { kind: self.load(at + 1), a: self.load(at + 2), b: self.load(at + 3) }
    }

    fn slot(&self, key: Key) -> Option<usize> {
        self.slots().find(|at| self.load(*at) != 0 && self.key(*at) == key)
    }

    /// Writes a root: its key first, then the word that makes it one.
    fn publish(&self, key: Key, root: u64) -> Result<usize, Full> {
        let used = self.slots().count();
        let at = match self.slots().find(|at| self.load(*at) == 0) {
            Some(at) => at,
            None if used == SLOTS => return Err(self.full()),
            None => {
                let at = DIRECTORY + used * SLOT;
                self.put(at, 0);
                self.put(AT_SLOTS, used as u64 + 1);
                at
            }
        };
        for (word, value) in [key.kind, key.a, key.b].into_iter().enumerate() {
            self.put(at + 1 + word, value);
        }
        self.put(at, root);
        Ok(at)
    }

    /// Claims everything that the roots reach, and checks it.
    fn walk(&self) -> Result<(), OpenError> {
        let used = self.load(AT_SLOTS);
        if used > SLOTS as u64 {
            return Err(OpenError::Damaged { slot: SLOTS, found: used });
        }
        let (mut blocks, mut keys) = (self.blocks(), BTreeSet::new());
        for (slot, at) in self.slots().enumerate() {
            let root = self.load(at);
            if root == 0 {
                continue;
            }
            let damaged = |found: u64| OpenError::Damaged { slot, found };
            if !keys.insert(self.key(at)) {
                return Err(damaged(root));
            }
            if let Some((height, entry)) = as_tree(root) {
                self.claim(&mut blocks, entry, height).map_err(|entry| damaged(entry.into()))?;
            } else {
                let (first, count) = as_table(root).ok_or(damaged(root))?;
                let claimed = |block: u32| block.checked_mul(LEAVES).is_some_and(|unit| blocks.claim(unit));
                if !(first..first.saturating_add(count)).all(claimed) {
                    return Err(damaged(root));
                }
            }
        }
        blocks.claimed();
        Ok(())
    }

    /// Claims everything that `entry`, at `height`, reaches. Returns the first invalid entry as an error.
    fn claim(&self, blocks: &mut Blocks, entry: u32, height: u32) -> Result<(), u32> {
        if entry < FIRST_UNIT {
            return Ok(());
        }
        let possible = if height == 0 { blocks.claim_leaf(entry) } else { blocks.claim(entry) };
        if !possible {
            return Err(entry);
        }
        if height > 0 {
            for below in self.entries(entry) {
                self.claim(blocks, below, height - 1)?;
            }
        }
        Ok(())
    }
}

/// Returns the number of blocks that `words` have room for; none where there is no room for the header.
fn limit(words: &Words) -> Option<u32> {
    // Units are numbered in 32 bits.
    let limit = u32::try_from(words.len() / BLOCK_WORDS).unwrap_or(u32::MAX).min(u32::MAX / LEAVES);
    (limit >= HEADER).then_some(limit)
}

fn of_tree(height: u32, entry: u32) -> u64 {
    TREE << 56 | u64::from(height) << 32 | u64::from(entry)
}

/// Returns height and entry, where `root` is a tree's.
fn as_tree(root: u64) -> Option<(u32, u32)> {
    let height = (root >> 32) as u32 & 0xff_ffff;
    (root >> 56 == TREE && (1..=LEVELS).contains(&height)).then_some((height, root as u32))
}

/// Returns the first block and the number of blocks, where `root` is a table's.
fn as_table(root: u64) -> Option<(u32, u32)> {
    let count = (root >> 32) as u32 & 0xff_ffff;
    (root >> 56 == TABLE && count > 0).then_some((root as u32, count))
}

#[cfg(test)]
pub(super) mod tests;
