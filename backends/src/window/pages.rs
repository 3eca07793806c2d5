//! Which pages are open: one bit each, 48 bits of IOVA.
//!
//! A tree of three levels (512 GiB, 1 GiB, page), of which only what was ever open exists. Branches are never taken
//! away again: a reader needs no lock and no counter, and 1 GiB of guest memory costs 32 KiB.

use passgate_bindings::PAGE;

use super::sync::{AtomicU64, Ordering};

/// Pages in a word.
const BITS: u64 = 64;

#[derive(Debug)]
pub(super) struct Pages {
    words: Words,
}

impl Pages {
    pub(super) fn new() -> Self {
        Self { words: Words::new() }
    }

    /// Opens the pages from `start` to before `end`, bytes on page boundaries.
    pub(super) fn open(&self, start: u64, end: u64) {
        for (index, mask) in masks(start, end) {
            self.words.make(index).fetch_or(mask, Ordering::Release);
        }
    }

    /// Closes them. A fence comes between this and any look at the slots.
    pub(super) fn close(&self, start: u64, end: u64) {
        let mut masks = masks(start, end);
        while let Some((index, mask)) = masks.next() {
            match self.words.get(index) {
                Some(word) => _ = word.fetch_and(!mask, Ordering::Release),
                // Nothing of this branch was ever open.
                None => masks.skip_to(self.words.next_branch(index)),
            }
        }
    }

    /// Whether every page that holds a byte from `start` to before `end` is open.
    pub(super) fn all_open(&self, start: u64, end: u64) -> bool {
        masks(start, end).all(|(index, mask)| {
            self.words.get(index).is_some_and(|word| word.load(Ordering::Acquire) & mask == mask)
        })
    }
}

/// The words, and the bits in each, of the pages that hold a byte from `start` to before `end`.
fn masks(start: u64, end: u64) -> Masks {
    Masks { page: start / PAGE, end: end.div_ceil(PAGE) }
}

struct Masks {
    page: u64,
    end: u64,
}

impl Masks {
    fn skip_to(&mut self, index: u64) {
        self.page = self.page.max(index * BITS);
    }
}

impl Iterator for Masks {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.page >= self.end {
            return None;
        }
        let (index, first) = (self.page / BITS, self.page % BITS);
        let count = (BITS - first).min(self.end - self.page);
        self.page += count;
        Some((index, (u64::MAX >> (BITS - count)) << first))
    }
}

#[cfg(not(loom))]
use tree::Words;

#[cfg(not(loom))]
mod tree {
    use std::sync::OnceLock;

    use super::{AtomicU64, BITS};
    use crate::window::REACH;
    use passgate_bindings::PAGE;

    /// Words in a leaf: 1 GiB.
    const LEAF: u64 = (1 << 30) / PAGE / BITS;
    /// Leaves in a branch, and branches.
    const FAN: u64 = 512;
    const _: () = assert!(LEAF * FAN * FAN * BITS * PAGE == REACH);

    type Leaf = Box<[AtomicU64]>;
    type Branch = Box<[OnceLock<Leaf>]>;

    #[derive(Debug)]
    pub(super) struct Words {
        branches: Box<[OnceLock<Branch>]>,
    }

    fn many<T>(count: u64, one: impl Fn() -> T) -> Box<[T]> {
        (0..count).map(|_| one()).collect()
    }

    impl Words {
        pub(super) fn new() -> Self {
            Self { branches: many(FAN, OnceLock::new) }
        }

        /// The word at `index`, below [`REACH`]; none where nothing near it was ever open.
        pub(super) fn get(&self, index: u64) -> Option<&AtomicU64> {
            let branch = self.branches.get((index / LEAF / FAN) as usize)?.get()?;
            let leaf = branch[(index / LEAF % FAN) as usize].get()?;
            leaf.get((index % LEAF) as usize)
        }

        pub(super) fn make(&self, index: u64) -> &AtomicU64 {
            let branch =
                self.branches[(index / LEAF / FAN) as usize].get_or_init(|| many(FAN, OnceLock::new));
            let leaf = branch[(index / LEAF % FAN) as usize].get_or_init(|| many(LEAF, || AtomicU64::new(0)));
            &leaf[(index % LEAF) as usize]
        }

        /// The first word after the leaf or branch that is missing at `index`.
        pub(super) fn next_branch(&self, index: u64) -> u64 {
            let made = |branch: &OnceLock<Branch>| branch.get().is_some();
            let span = if self.branches.get((index / LEAF / FAN) as usize).is_some_and(made) {
                LEAF
            } else {
                LEAF * FAN
            };
            (index / span + 1) * span
        }
    }
}

#[cfg(loom)]
use few::Words;

/// For the model: 64 pages, for each atomic costs it interleavings.
#[cfg(loom)]
mod few {
    use super::AtomicU64;

    #[derive(Debug)]
    pub(super) struct Words(AtomicU64);

    impl Words {
        pub(super) fn new() -> Self {
            Self(AtomicU64::new(0))
        }

        pub(super) fn get(&self, index: u64) -> Option<&AtomicU64> {
            (index == 0).then_some(&self.0)
        }

        pub(super) fn make(&self, index: u64) -> &AtomicU64 {
            assert_eq!(index, 0, "the model has 64 pages");
            &self.0
        }

        pub(super) fn next_branch(&self, index: u64) -> u64 {
            index + 1
        }
    }
}
