//! The state of every page of one file: a terabyte in 66 MiB at worst, a few bytes per gibibyte at rest.
//!
//! Two levels: *giants* of 1 GiB, *chunks* of 2 MiB. Each is uniform until it must be split; a split chunk is two
//! bit planes of 512 pages in a slab. What becomes uniform again is folded back at once. Pages that were never
//! set are [`PageState::Unknown`].

use std::collections::BTreeMap;

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{PAGE, PageRange};

use super::PageState;

/// Pages of a chunk.
const CHUNK: u64 = 512;
/// Chunks of a giant.
const CHUNKS: usize = 512;
/// Pages of a giant.
const GIANT: u64 = CHUNK * CHUNKS as u64;
/// Words of one bit plane.
const WORDS: usize = CHUNK as usize / 64;

/// A chunk: a uniform state (the four highest numbers), or an index into the slab.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Chunk(u32);

impl Chunk {
    const UNIFORM: u32 = u32::MAX - 3;

    fn uniform(state: PageState) -> Self {
        Self(Self::UNIFORM + state as u32)
    }

    fn state(self) -> Option<PageState> {
        self.0.checked_sub(Self::UNIFORM).map(|n| PageState::ALL[n as usize])
    }
}

#[derive(Clone)]
enum Giant {
    Uniform(PageState),
    Split(Box<[Chunk; CHUNKS]>),
}

/// Two planes: the low and the high bit of each page's state.
#[derive(Clone, Copy)]
struct Planes {
    low: [u64; WORDS],
    high: [u64; WORDS],
}

impl Planes {
    fn uniform(state: PageState) -> Self {
        let spread = |bit: u8| if state as u8 & bit != 0 { u64::MAX } else { 0 };
        Self { low: [spread(1); WORDS], high: [spread(2); WORDS] }
    }

    fn get(&self, page: u64) -> PageState {
        let (word, bit) = (page as usize / 64, page % 64);
        let low = self.low[word] >> bit & 1;
        let high = self.high[word] >> bit & 1;
        PageState::ALL[(high << 1 | low) as usize]
    }

    /// Sets pages `from..to` of the chunk.
    fn set(&mut self, from: u64, to: u64, state: PageState) {
        for word in from as usize / 64..=(to as usize - 1) / 64 {
            let base = word as u64 * 64;
            let first = from.saturating_sub(base);
            let last = (to - base).min(64);
            let mask = (u64::MAX >> (64 - (last - first))) << first;
            let put = |plane: &mut u64, bit: u8| {
                if state as u8 & bit != 0 { *plane |= mask } else { *plane &= !mask }
            };
            put(&mut self.low[word], 1);
            put(&mut self.high[word], 2);
        }
    }

    /// The first page from `page` on (512 if none) whose state is not `state`.
    fn first_other(&self, page: u64, state: PageState) -> u64 {
        let spread = |bit: u8| if state as u8 & bit != 0 { u64::MAX } else { 0 };
        let mut skip = page % 64;
        for word in page as usize / 64..WORDS {
            let differ = (self.low[word] ^ spread(1)) | (self.high[word] ^ spread(2));
            let differ = differ >> skip << skip;
            if differ != 0 {
                return word as u64 * 64 + u64::from(differ.trailing_zeros());
            }
            skip = 0;
        }
        CHUNK
    }

    fn is_uniform(&self) -> Option<PageState> {
        let state = self.get(0);
        (self.first_other(0, state) == CHUNK).then_some(state)
    }
}

/// The state of every page of one file.
#[derive(Clone, Default)]
pub struct PageMap {
    giants: BTreeMap<u64, Giant>,
    slab: Vec<Planes>,
    free: Vec<u32>,
}

impl PageMap {
    /// A map in which every page is [`PageState::Unknown`].
    pub fn new() -> Self {
        Self::default()
    }

    /// The state of the page at `offset`.
    pub fn get(&self, offset: Offset) -> PageState {
        self.uniform_from(offset.raw() / PAGE).0
    }

    /// Sets every page of `range`.
    pub fn set(&mut self, range: PageRange<Offset>, state: PageState) {
        let (mut page, end) = (range.start().raw() / PAGE, range.end().raw() / PAGE);
        while page < end {
            let stop = end.min((page / GIANT + 1) * GIANT);
            self.set_in_giant(page, stop, state);
            page = stop;
        }
    }

    /// The longest runs of equal state that make up `range`, in order. Costs by runs, not by pages.
    pub fn runs(
        &self,
        range: PageRange<Offset>,
    ) -> impl Iterator<Item = (PageRange<Offset>, PageState)> + '_ {
        let (mut page, end) = (range.start().raw() / PAGE, range.end().raw() / PAGE);
        std::iter::from_fn(move || {
            if page >= end {
                return None;
            }
            let (state, mut stop) = self.uniform_from(page);
            while stop < end {
                let (next, after) = self.uniform_from(stop);
                if next != state {
                    break;
                }
                stop = after;
            }
            let run = PageRange::between(Offset(page * PAGE), Offset(stop.min(end) * PAGE))?;
            page = stop;
            Some((run, state))
        })
    }

    /// Bytes of memory that the map takes, for budgets and benchmarks.
    pub fn footprint(&self) -> usize {
        let split = self.giants.values().filter(|g| matches!(g, Giant::Split(_))).count();
        self.giants.len() * (size_of::<Giant>() + size_of::<u64>())
            + split * size_of::<[Chunk; CHUNKS]>()
            + self.slab.capacity() * size_of::<Planes>()
            + self.free.capacity() * size_of::<u32>()
    }

    /// The state of `page` and the first page after it, within its chunk or giant, that may differ.
    fn uniform_from(&self, page: u64) -> (PageState, u64) {
        let (giant, within) = (page / GIANT, page % GIANT);
        match self.giants.get(&giant) {
            None => (PageState::Unknown, (giant + 1) * GIANT),
            Some(Giant::Uniform(state)) => (*state, (giant + 1) * GIANT),
            Some(Giant::Split(chunks)) => {
                let start = page - page % CHUNK;
                let chunk = chunks[(within / CHUNK) as usize];
                match chunk.state() {
                    Some(state) => (state, start + CHUNK),
                    None => {
                        let planes = &self.slab[chunk.0 as usize];
                        let state = planes.get(page % CHUNK);
                        (state, start + planes.first_other(page % CHUNK, state))
                    }
                }
            }
        }
    }

    fn set_in_giant(&mut self, page: u64, end: u64, state: PageState) {
        let index = page / GIANT;
        let base = index * GIANT;
        let giant = self.giants.entry(index).or_insert(Giant::Uniform(PageState::Unknown));
        if end - page == GIANT {
            if let Giant::Split(chunks) = giant {
                self.free.extend(chunks.iter().filter(|c| c.state().is_none()).map(|c| c.0));
            }
            *giant = Giant::Uniform(state);
            return;
        }
        if let Giant::Uniform(old) = *giant {
            if old == state {
                return;
            }
            *giant = Giant::Split(Box::new([Chunk::uniform(old); CHUNKS]));
        }
        let Giant::Split(chunks) = giant else { return };
        let mut at = page;
        let mut folded = false;
        while at < end {
            let chunk = &mut chunks[((at - base) / CHUNK) as usize];
            let start = at - at % CHUNK;
            let stop = end.min(start + CHUNK);
            folded |= set_in_chunk(chunk, &mut self.slab, &mut self.free, at - start, stop - start, state);
            at = stop;
        }
        if folded && chunks.iter().all(|c| *c == Chunk::uniform(state)) {
            *giant = Giant::Uniform(state);
        }
    }
}

/// Sets pages `from..to` of one chunk; says whether the chunk is uniform after it.
fn set_in_chunk(
    chunk: &mut Chunk,
    slab: &mut Vec<Planes>,
    free: &mut Vec<u32>,
    from: u64,
    to: u64,
    state: PageState,
) -> bool {
    match chunk.state() {
        Some(old) if old == state => return true,
        Some(_) if to - from == CHUNK => *chunk = Chunk::uniform(state),
        Some(old) => {
            let mut planes = Planes::uniform(old);
            planes.set(from, to, state);
            *chunk = Chunk(match free.pop() {
                Some(index) => {
                    slab[index as usize] = planes;
                    index
                }
                None => {
                    if slab.len() == slab.capacity() {
                        // Grow by an eighth, not by double: the slab is most of the ledger.
                        slab.reserve_exact(slab.len() / 8 + 16);
                    }
                    slab.push(planes);
                    slab.len() as u32 - 1
                }
            });
            return false;
        }
        None => {
            let planes = &mut slab[chunk.0 as usize];
            planes.set(from, to, state);
            match planes.is_uniform() {
                None => return false,
                Some(uniform) => {
                    free.push(chunk.0);
                    *chunk = Chunk::uniform(uniform);
                }
            }
        }
    }
    true
}

impl std::fmt::Debug for PageMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageMap").field("giants", &self.giants.len()).field("slab", &self.slab.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(page: u64, pages: u64) -> PageRange<Offset> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    /// Against a plain vector, over borders of words, chunks and giants.
    #[test]
    fn agrees_with_a_vector_of_states() {
        let pages = GIANT + 3 * CHUNK;
        let mut plain = vec![PageState::Unknown; pages as usize];
        let mut map = PageMap::new();
        let mut seed = 7u64;
        let mut random = |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        for round in 0..4000 {
            let longest = [1, 3, 64, CHUNK, 2 * CHUNK, pages][random(6) as usize];
            let len = 1 + random(longest);
            let start = random(pages - len + 1);
            let state = PageState::ALL[random(4) as usize];
            map.set(range(start, len), state);
            plain[start as usize..(start + len) as usize].fill(state);
            if round % 50 == 0 {
                let mut at = 0;
                for (run, state) in map.runs(range(0, pages)) {
                    assert_eq!(run.start().raw() / PAGE, at);
                    at = run.end().raw() / PAGE;
                    let span = &plain[(run.start().raw() / PAGE) as usize..at as usize];
                    assert!(span.iter().all(|s| *s == state));
                    assert!(plain.get(at as usize).is_none_or(|s| *s != state), "runs are the longest");
                }
                assert_eq!(at, pages);
            }
            let probe = random(pages);
            assert_eq!(map.get(Offset(probe * PAGE)), plain[probe as usize]);
        }
    }

    #[test]
    fn folds_back_to_nothing_at_rest() {
        let mut map = PageMap::new();
        map.set(range(0, 4 * GIANT), PageState::Shared);
        let rest = map.footprint();
        for page in (0..2 * GIANT).step_by(1000) {
            map.set(range(page, 1), PageState::Private);
        }
        for page in (0..2 * GIANT).step_by(1000) {
            map.set(range(page, 1), PageState::Shared);
        }
        assert!(map.giants.values().all(|g| matches!(g, Giant::Uniform(PageState::Shared))));
        assert_eq!(map.free.len(), map.slab.len());
        assert!(rest < 1024);
    }
}
