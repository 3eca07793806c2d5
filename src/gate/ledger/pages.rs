//! The state of every page of one file: a terabyte takes 66 MiB at worst, a few KiB at rest.
//!
//! Pages that were never set are [`PageState::Unknown`].

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{PAGE, PageRange};

use super::fault::Full;
use super::store::{Arena, Key, Store};
use super::tree::Tree;
use super::{PageState, spans};
use crate::gate::ids::FileId;

/// The kind of this root in a store.
const KIND: u64 = 1;
/// The state of every page of one file.
#[derive(Debug)]
pub struct PageMap(Tree);

impl PageMap {
    /// Returns a map in memory of `arena`, which ends with the process. Every page is [`PageState::Unknown`].
    pub fn new(arena: Arena) -> Self {
        Self(Tree::own(arena))
    }

    /// Returns the map of `file` in `store`: the one that is there, or a new one. Only one may exist per file at a time.
    pub fn in_store(store: &Store, file: FileId) -> Result<Self, Full> {
        Tree::new(store, key(file)).map(Self)
    }

    /// Returns the files that `store` has maps of.
    pub fn files(store: &Store) -> Vec<FileId> {
        let keys = store.keys().into_iter().filter(|key| key.kind == KIND);
        keys.map(|key| FileId { device: key.a, inode: key.b }).collect()
    }

    /// Removes it from the store.
    pub fn discard(self) {
        self.0.discard();
    }

    /// Returns the maximum of bytes that the map takes in the store if only `range` is ever set.
    pub fn worst(range: PageRange<Offset>) -> u64 {
        Tree::worst(pages(range))
    }

    /// Returns the state of the page at `offset`.
    pub fn get(&self, offset: Offset) -> PageState {
        state(self.0.get(offset.raw() / PAGE))
    }

    /// Sets every page of `range`. Where the store has no room to distinguish them from their neighbours, both
    /// become [`PageState::Unknown`]: never mapped, never wrong. It cannot happen in a store with room for [`PageMap::worst`].
    pub fn set(&mut self, range: PageRange<Offset>, state: PageState) {
        self.0.force(pages(range), value(state), value(PageState::Unknown));
    }

    /// Returns the longest runs of equal state that make up `range`, in order. Costs by runs, not by pages.
    pub fn runs(&self, range: PageRange<Offset>) -> Runs<'_> {
        Runs(self.0.spans(pages(range)))
    }

    /// Returns the number of pages of `range` in each state, in the order of [`PageState::ALL`]. Immediate if `range` is all that
    /// was ever set.
    pub fn counts(&self, range: PageRange<Offset>) -> [u64; 4] {
        let counts = self.0.counts(pages(range));
        PageState::ALL.map(|state| counts[usize::from(value(state))])
    }

    /// Returns the bytes of memory that the map takes with all else in its store, for budgets and benchmarks.
    pub fn footprint(&self) -> usize {
        self.0.store().footprint()
    }
}

/// The runs of equal state in a range, in order; see [`PageMap::runs`].
pub struct Runs<'a>(spans::Spans<'a>);

impl Iterator for Runs<'_> {
    type Item = (PageRange<Offset>, PageState);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().and_then(run)
    }

    #[inline]
    fn fold<B, F: FnMut(B, Self::Item) -> B>(self, init: B, mut tell: F) -> B {
        self.0.fold(init, |told, span| match run(span) {
            Some(run) => tell(told, run),
            None => told,
        })
    }
}

#[inline]
fn run((span, value): (std::ops::Range<u64>, u8)) -> Option<(PageRange<Offset>, PageState)> {
    PageRange::between(Offset(span.start * PAGE), Offset(span.end * PAGE)).map(|range| (range, state(value)))
}

#[inline]
fn pages(range: PageRange<Offset>) -> std::ops::Range<u64> {
    range.start().raw() / PAGE..range.end().raw() / PAGE
}

fn key(file: FileId) -> Key {
    Key { kind: KIND, a: file.device, b: file.inode }
}

/// Returns the value in the tree: pages that were never set are 0 there, and unknown.
fn value(state: PageState) -> u8 {
    state as u8 ^ PageState::Unknown as u8
}

#[inline]
fn state(value: u8) -> PageState {
    PageState::ALL[usize::from(value & 3 ^ PageState::Unknown as u8)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use passgate_bindings::words::{self, Words};

    fn range(page: u64, pages: u64) -> PageRange<Offset> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    #[test]
    fn unset_pages_are_unknown_and_states_round_trip() {
        let mut map = PageMap::new(words::private);
        assert_eq!(map.runs(range(7, 9)).collect::<Vec<_>>(), [(range(7, 9), PageState::Unknown)]);
        for (page, state) in (0..).zip(PageState::ALL) {
            map.set(range(2 * page, 2), state);
            assert_eq!(map.get(Offset(2 * page * PAGE)), state);
        }
        assert_eq!(map.counts(range(0, 99)), [2, 2, 2, 93]);
        assert_eq!(map.counts(range(1, 4)), [1, 2, 1, 0]);
        let runs: Vec<_> = map.runs(range(1, 8)).collect();
        let [shared, private, hole, unknown] = PageState::ALL;
        assert_eq!(
            runs,
            [(range(1, 1), shared), (range(2, 2), private), (range(4, 2), hole), (range(6, 3), unknown)]
        );
        assert_eq!(
            runs,
            map.runs(range(1, 8)).fold(vec![], |mut all, run| {
                all.push(run);
                all
            })
        );
    }

    #[test]
    fn page_states_outlive_the_process_by_file() {
        let store = Store::new(Words::memfd("pages", 1 << 20).unwrap()).unwrap();
        let [one, two] = [1, 2].map(|inode| FileId { device: 5, inode });
        let mut map = PageMap::in_store(&store, one).unwrap();
        map.set(range(3, 4), PageState::Shared);
        PageMap::in_store(&store, two).unwrap().set(range(3, 4), PageState::Hole);
        let fd = store.words().fd().unwrap().try_clone_to_owned().unwrap();
        drop((map, store));
        let store = Store::open(Words::from_fd(fd).unwrap()).unwrap();
        assert_eq!(PageMap::files(&store), [one, two]);
        let map = PageMap::in_store(&store, one).unwrap();
        let runs: Vec<_> = map.runs(range(0, 9)).map(|(run, state)| (run.pages(), state)).collect();
        assert_eq!(runs, [(3, PageState::Unknown), (4, PageState::Shared), (2, PageState::Unknown)]);
        map.discard();
        assert_eq!(PageMap::files(&store), [two]);
        assert_eq!(PageMap::in_store(&store, two).unwrap().get(Offset(5 * PAGE)), PageState::Hole);
    }

    #[test]
    fn full_store_makes_pages_unknown() {
        let store = Store::new(Words::anonymous(32 << 10).unwrap()).unwrap();
        let mut map = PageMap::in_store(&store, FileId { device: 1, inode: 1 }).unwrap();
        map.set(range(0, 1 << 18), PageState::Shared);
        assert_eq!(map.get(Offset(0)), PageState::Shared);
        map.set(range(5, 1), PageState::Private);
        assert_eq!(map.counts(range(0, 1 << 18)), [0, 0, 0, 1 << 18]);
        assert!(PageMap::worst(range(0, 1)) > store.room());
    }
}
