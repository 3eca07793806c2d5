//! The four ledgers: passgate's own, and the data structures that it is compared with.

use std::hint::black_box;

use passgate::gate::PageState;
use passgate::gate::ledger::PageMap;
use passgate_bindings::units::Offset;
use passgate_bindings::words;
use passgate_bindings::{PAGE, PageRange};
use rangemap::RangeMap;
use roaring::RoaringBitmap;

/// The number of pages in a tebibyte.
pub(crate) const PAGES: u64 = 1 << 28;

/// The operations of a ledger. All pages are private at first.
pub(crate) trait Ledger {
    const NAME: &'static str;
    fn new() -> Self;
    fn set(&mut self, page: u64, pages: u64, state: PageState);
    /// Returns the number of runs in a range, and of its shared pages. Runs are visited one by one, as mapping needs them.
    fn query(&self, page: u64, pages: u64) -> (u64, u64);
    /// Returns the number of shared, private and hole pages of the whole region.
    fn status(&self) -> [u64; 3];
    fn bytes(&self) -> usize;
}

fn range(page: u64, pages: u64) -> PageRange<Offset> {
    match PageRange::new(page * PAGE, pages * PAGE) {
        Ok(range) => range,
        Err(error) => unreachable!("{error}"),
    }
}

/// Adds one run to the sum.
fn add((runs, shared): (u64, u64), start: u64, end: u64, state: PageState) -> (u64, u64) {
    // The compiler must not replace the visit of each run by counting bits.
    let (start, end) = black_box((start, end));
    (runs + 1, shared + if state == PageState::Shared { end - start } else { 0 })
}

impl Ledger for PageMap {
    const NAME: &'static str = "passgate";

    fn new() -> Self {
        let mut map = PageMap::new(words::private);
        PageMap::set(&mut map, range(0, PAGES), PageState::Private);
        map
    }

    fn set(&mut self, page: u64, pages: u64, state: PageState) {
        PageMap::set(self, range(page, pages), state);
    }

    fn query(&self, page: u64, pages: u64) -> (u64, u64) {
        self.runs(range(page, pages))
            .fold((0, 0), |sum, (run, state)| add(sum, run.start().0, run.end().0, state))
            .in_pages()
    }

    fn status(&self) -> [u64; 3] {
        let [shared, private, hole, _] = self.counts(range(0, PAGES));
        [shared, private, hole]
    }

    fn bytes(&self) -> usize {
        self.footprint()
    }
}

/// Converts a sum from bytes to pages, once instead of for each run.
trait InPages {
    fn in_pages(self) -> Self;
}

impl InPages for (u64, u64) {
    fn in_pages(self) -> Self {
        (self.0, self.1 / PAGE)
    }
}

impl Ledger for RangeMap<u64, PageState> {
    const NAME: &'static str = "rangemap";

    fn new() -> Self {
        let mut map = RangeMap::new();
        map.insert(0..PAGES, PageState::Private);
        map
    }

    fn set(&mut self, page: u64, pages: u64, state: PageState) {
        self.insert(page..page + pages, state);
    }

    fn query(&self, page: u64, pages: u64) -> (u64, u64) {
        let queried = page..page + pages;
        self.overlapping(&queried).fold((0, 0), |sum, (run, state)| {
            add(sum, run.start.max(queried.start), run.end.min(queried.end), *state)
        })
    }

    fn status(&self) -> [u64; 3] {
        self.iter().fold([0; 3], |mut sum, (run, state)| {
            sum[*state as usize] += run.end - run.start;
            sum
        })
    }

    /// A lower bound: a key and a value for each run, without the overhead of the tree.
    fn bytes(&self) -> usize {
        self.iter().count() * 24
    }
}

/// A bitmap of two bits per page, 32 pages per word.
pub(crate) struct Flat(Vec<u64>);

impl Flat {
    const PER_WORD: u64 = 32;
    const LOW: u64 = u64::MAX / 3;

    /// Returns the first page from `page` on whose state is not `state`; `end` if there is none before it.
    fn first_other(&self, page: u64, end: u64, state: u64) -> u64 {
        let mut at = page;
        while at < end {
            let into = at % Self::PER_WORD;
            let differ = (self.0[(at / Self::PER_WORD) as usize] ^ (state * Self::LOW)) >> (2 * into);
            if differ != 0 {
                return end.min(at + u64::from(differ.trailing_zeros()) / 2);
            }
            at += Self::PER_WORD - into;
        }
        end
    }
}

impl Ledger for Flat {
    const NAME: &'static str = "flat bitmap";

    fn new() -> Self {
        Self(vec![PageState::Private as u64 * Self::LOW; (PAGES / Self::PER_WORD) as usize])
    }

    fn set(&mut self, page: u64, pages: u64, state: PageState) {
        let (mut at, end) = (page, page + pages);
        while at < end {
            let into = at % Self::PER_WORD;
            let count = (Self::PER_WORD - into).min(end - at);
            if count == Self::PER_WORD {
                let words = (end - at) / Self::PER_WORD;
                let first = (at / Self::PER_WORD) as usize;
                self.0[first..first + words as usize].fill(state as u64 * Self::LOW);
                at += words * Self::PER_WORD;
                continue;
            }
            let mask = u64::MAX >> (64 - 2 * count) << (2 * into);
            let word = &mut self.0[(at / Self::PER_WORD) as usize];
            *word = *word & !mask | (state as u64 * Self::LOW) & mask;
            at += count;
        }
    }

    fn query(&self, page: u64, pages: u64) -> (u64, u64) {
        let (mut at, end, mut sum) = (page, page + pages, (0, 0));
        while at < end {
            let state = self.0[(at / Self::PER_WORD) as usize] >> (2 * (at % Self::PER_WORD)) & 3;
            let next = self.first_other(at, end, state);
            sum = add(sum, at, next, PageState::ALL[state as usize]);
            at = next;
        }
        sum
    }

    /// Without a branch, so that the compiler can vectorise it.
    fn status(&self) -> [u64; 3] {
        let [mut private, mut hole, mut unknown] = [0u64; 3];
        for word in &self.0 {
            let (low, high) = (word & Self::LOW, word >> 1 & Self::LOW);
            private += u64::from((low & !high).count_ones());
            hole += u64::from((high & !low).count_ones());
            unknown += u64::from((low & high).count_ones());
        }
        [PAGES - private - hole - unknown, private, hole]
    }

    fn bytes(&self) -> usize {
        self.0.len() * size_of::<u64>()
    }
}

/// A roaring bitmap per bit of the state; private, the state of most pages, is 0 in both.
pub(crate) struct Roaring([RoaringBitmap; 2]);

impl Roaring {
    const ZERO: u8 = PageState::Private as u8;
}

impl Ledger for Roaring {
    const NAME: &'static str = "roaring x2";

    fn new() -> Self {
        Self([RoaringBitmap::new(), RoaringBitmap::new()])
    }

    fn set(&mut self, page: u64, pages: u64, state: PageState) {
        let value = state as u8 ^ Self::ZERO;
        for (bit, plane) in self.0.iter_mut().enumerate() {
            match (value >> bit & 1 == 1, pages) {
                (true, 1) => _ = plane.insert(page as u32),
                (false, 1) => _ = plane.remove(page as u32),
                (true, _) => _ = plane.insert_range(page as u32..(page + pages) as u32),
                (false, _) => _ = plane.remove_range(page as u32..(page + pages) as u32),
            }
        }
    }

    fn query(&self, page: u64, pages: u64) -> (u64, u64) {
        let end = page + pages;
        let mut planes = [0, 1].map(|bit| self.0[bit].range(page as u32..end as u32));
        // The current or next range of ones in each plane.
        let mut ones = planes.each_mut().map(|plane| next_ones(plane, end));
        let (mut at, mut from, mut was) = (page, page, None);
        let mut sum = (0, 0);
        while at < end {
            let (mut value, mut next) = (0, end);
            for bit in 0..2 {
                if ones[bit].1 <= at {
                    ones[bit] = next_ones(&mut planes[bit], end);
                }
                let (start, stop) = ones[bit];
                value |= u8::from(start <= at) << bit;
                next = next.min(if start <= at { stop } else { start });
            }
            if let Some(old) = was.filter(|old| *old != value) {
                sum = add(sum, from, at, PageState::ALL[usize::from(old ^ Self::ZERO)]);
                from = at;
            }
            was = Some(value);
            at = next;
        }
        add(sum, from, end, PageState::ALL[usize::from(was.unwrap_or(0) ^ Self::ZERO)])
    }

    fn status(&self) -> [u64; 3] {
        let both = self.0[0].intersection_len(&self.0[1]);
        let (shared, unknown) = (self.0[0].len() - both, self.0[1].len() - both);
        [shared, PAGES - shared - unknown - both, both]
    }

    /// The serialised size, which is a lower bound of the size in memory.
    fn bytes(&self) -> usize {
        self.0.iter().map(RoaringBitmap::serialized_size).sum()
    }
}

fn next_ones(plane: &mut roaring::bitmap::Iter<'_>, end: u64) -> (u64, u64) {
    plane.next_range().map_or((end, end + 1), |ones| (u64::from(*ones.start()), u64::from(*ones.end()) + 1))
}
