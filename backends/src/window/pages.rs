//! The open pages: a bit for each, over 48 bits of IOVA.
//!
//! A tree of three levels (512 GiB, 1 GiB, page). A branch is allocated when a page in it is opened for the first time
//! and never freed: so a reader needs neither a lock nor a reference count, and 1 GiB of guest memory costs 32 KiB.

use passgate_bindings::PAGE;

use super::sync::{AtomicU64, Ordering};

/// The number of pages in a word.
const PAGES_PER_WORD: u64 = 64;

#[derive(Debug)]
pub(super) struct Pages {
    words: Words,
}

impl Pages {
    pub(super) fn new() -> Self {
        Self { words: Words::new() }
    }

    /// Opens the pages from `start` to before `end`, in bytes, multiples of the page size.
    pub(super) fn open(&self, start: u64, end: u64) {
        for (index, mask) in masks(start, end) {
            self.words.make(index).fetch_or(mask, Ordering::Release);
        }
    }

    /// Closes pages. A SeqCst fence must come between this and a scan of the slots.
    pub(super) fn close(&self, start: u64, end: u64) {
        let mut masks = masks(start, end);
        while let Some((index, mask)) = masks.next() {
            match self.words.get(index) {
                Some(word) => _ = word.fetch_and(!mask, Ordering::Release),
                // No page of this leaf or branch was ever open.
                None => masks.skip_to(self.words.next_branch(index)),
            }
        }
    }

    /// Returns true if every page with a byte from `start` to before `end` is open.
    pub(super) fn all_open(&self, start: u64, end: u64) -> bool {
        masks(start, end).all(|(index, mask)| {
            self.words.get(index).is_some_and(|word| word.load(Ordering::Acquire) & mask == mask)
        })
    }
}

/// Returns the index of each word, with a mask of its bits, for the pages with a byte from `start` to before `end`.
fn masks(start: u64, end: u64) -> Masks {
    Masks { page: start / PAGE, end: end.div_ceil(PAGE) }
}

struct Masks {
    page: u64,
    end: u64,
}

impl Masks {
    fn skip_to(&mut self, index: u64) {
        self.page = self.page.max(index * PAGES_PER_WORD);
    }
}

impl Iterator for Masks {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.page >= self.end {
            return None;
        }
        let (index, first) = (self.page / PAGES_PER_WORD, self.page % PAGES_PER_WORD);
        let count = (PAGES_PER_WORD - first).min(self.end - self.page);
        self.page += count;
        Some((index, (u64::MAX >> (PAGES_PER_WORD - count)) << first))
    }
}

#[cfg(not(loom))]
use tree::Words;

#[cfg(not(loom))]
mod tree {
    use std::sync::OnceLock;

    use super::{AtomicU64, PAGES_PER_WORD};
    use crate::window::REACH;
    use passgate_bindings::PAGE;

    /// The number of words in a leaf, for 1 GiB.
    const LEAF: u64 = (1 << 30) / PAGE / PAGES_PER_WORD;
    /// The number of leaves in a branch, and of branches.
    const FAN: u64 = 512;
    const _: () = assert!(LEAF * FAN * FAN * PAGES_PER_WORD * PAGE == REACH);

    type Leaf = Box<[AtomicU64]>;
    type Branch = Box<[OnceLock<Leaf>]>;

    #[derive(Debug)]
    pub(super) struct Words {
        branches: Box<[OnceLock<Branch>]>,
    }

    fn boxed<T>(count: u64, one: impl Fn() -> T) -> Box<[T]> {
        (0..count).map(|_| one()).collect()
    }

    impl Words {
        pub(super) fn new() -> Self {
            Self { branches: boxed(FAN, OnceLock::new) }
        }

        /// Returns the word at `index`, which is below [`REACH`]; none if no page of its leaf was ever open.
        pub(super) fn get(&self, index: u64) -> Option<&AtomicU64> {
            let branch = self.branches.get((index / LEAF / FAN) as usize)?.get()?;
            let leaf = branch[(index / LEAF % FAN) as usize].get()?;
            leaf.get((index % LEAF) as usize)
        }

        /// Returns the word at `index`, after allocating its branch and leaf if they do not exist.
        pub(super) fn make(&self, index: u64) -> &AtomicU64 {
            let branch =
                self.branches[(index / LEAF / FAN) as usize].get_or_init(|| boxed(FAN, OnceLock::new));
            let leaf =
                branch[(index / LEAF % FAN) as usize].get_or_init(|| boxed(LEAF, || AtomicU64::new(0)));
            &leaf[(index % LEAF) as usize]
        }

        /// Returns the index of the first word after the leaf or branch that does not exist at `index`.
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
use single_word::Words;

/// The words for loom: one only (64 pages), because each atomic multiplies the number of interleavings.
#[cfg(loom)]
mod single_word {
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
