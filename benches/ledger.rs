//! The ledger's page states against what else one would take: `rangemap`, and a flat bitmap of two bits a page.
//! One tebibyte: random flips of 4 KiB pages, then queries for the runs of equal state in a range.
//!
//! `cargo bench --bench ledger`. Prints nanoseconds, bytes and ratios; all three must give the same answers.

use std::time::Instant;

use passgate::gate::PageState;
use passgate::gate::ledger::PageMap;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};
use rangemap::RangeMap;

/// Pages of a tebibyte.
const PAGES: u64 = 1 << 28;
const FLIPS: usize = 1_000_000;
const QUERIES: usize = 20_000;
/// Operations measured together.
const BATCH: usize = 1000;

/// What each of the three can do.
trait Ledger {
    const NAME: &'static str;
    fn new() -> Self;
    fn set(&mut self, page: u64, state: PageState);
    /// Runs in a range, and pages of it that are shared.
    fn query(&self, page: u64, pages: u64) -> (u64, u64);
    fn bytes(&self) -> usize;
}

fn range(page: u64, pages: u64) -> PageRange<Offset> {
    match PageRange::new(page * PAGE, pages * PAGE) {
        Ok(range) => range,
        Err(error) => unreachable!("{error}"),
    }
}

impl Ledger for PageMap {
    const NAME: &'static str = "passgate";

    fn new() -> Self {
        let mut map = PageMap::new();
        PageMap::set(&mut map, range(0, PAGES), PageState::Shared);
        map
    }

    fn set(&mut self, page: u64, state: PageState) {
        PageMap::set(self, range(page, 1), state);
    }

    fn query(&self, page: u64, pages: u64) -> (u64, u64) {
        self.runs(range(page, pages)).fold((0, 0), |(runs, shared), (run, state)| {
            (runs + 1, shared + if state == PageState::Shared { run.pages() } else { 0 })
        })
    }

    fn bytes(&self) -> usize {
        self.footprint()
    }
}

impl Ledger for RangeMap<u64, PageState> {
    const NAME: &'static str = "rangemap";

    fn new() -> Self {
        let mut map = RangeMap::new();
        map.insert(0..PAGES, PageState::Shared);
        map
    }

    fn set(&mut self, page: u64, state: PageState) {
        self.insert(page..page + 1, state);
    }

    fn query(&self, page: u64, pages: u64) -> (u64, u64) {
        let asked = page..page + pages;
        self.overlapping(&asked).fold((0, 0), |(runs, shared), (run, state)| {
            let len = run.end.min(asked.end) - run.start.max(asked.start);
            (runs + 1, shared + if *state == PageState::Shared { len } else { 0 })
        })
    }

    /// At least: a key, a value and no overhead of the tree.
    fn bytes(&self) -> usize {
        self.iter().count() * 24
    }
}

/// Two bits a page, 32 pages a word.
struct Flat(Vec<u64>);

impl Flat {
    const PER_WORD: u64 = 32;

    fn uniform(state: u64) -> u64 {
        state * (u64::MAX / 3)
    }

    /// The first page from `page` on, before `end`, whose state is not `state`.
    fn first_other(&self, page: u64, end: u64, state: u64) -> u64 {
        let mut at = page;
        while at < end {
            let into = at % Self::PER_WORD;
            let differ = (self.0[(at / Self::PER_WORD) as usize] ^ Self::uniform(state)) >> (2 * into);
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
        Self(vec![Self::uniform(PageState::Shared as u64); (PAGES / Self::PER_WORD) as usize])
    }

    fn set(&mut self, page: u64, state: PageState) {
        let (word, shift) = ((page / Self::PER_WORD) as usize, 2 * (page % Self::PER_WORD));
        self.0[word] = self.0[word] & !(3 << shift) | (state as u64) << shift;
    }

    fn query(&self, page: u64, pages: u64) -> (u64, u64) {
        let (mut at, end, mut runs, mut shared) = (page, page + pages, 0, 0);
        while at < end {
            let state = self.0[(at / Self::PER_WORD) as usize] >> (2 * (at % Self::PER_WORD)) & 3;
            let next = self.first_other(at, end, state);
            runs += 1;
            shared += if state == PageState::Shared as u64 { next - at } else { 0 };
            at = next;
        }
        (runs, shared)
    }

    fn bytes(&self) -> usize {
        self.0.len() * size_of::<u64>()
    }
}

/// Chance that can be repeated (SplitMix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// What one ledger came to: nanoseconds per flip, per query of 2 MiB, of 1 GiB, at rest of 1 TiB; bytes; answers.
struct Score {
    name: &'static str,
    ns: [f64; 4],
    bytes: [usize; 2],
    answers: (u64, u64),
}

/// The median nanoseconds of one of `count` operations, and what they answered together.
fn time(count: usize, batch: usize, mut operation: impl FnMut() -> (u64, u64)) -> (f64, (u64, u64)) {
    let (mut times, mut sum) = (Vec::new(), (0u64, 0u64));
    for _ in 0..count / batch {
        let started = Instant::now();
        for _ in 0..batch {
            let (runs, shared) = operation();
            sum = (sum.0.wrapping_add(runs), sum.1.wrapping_add(shared));
        }
        times.push(started.elapsed().as_nanos() as f64 / batch as f64);
    }
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], sum)
}

fn score<L: Ledger>() -> Score {
    let mut ledger = L::new();
    let rest = ledger.bytes();
    let mut rng = Rng(1);
    let (whole, first) = time(11, 1, || ledger.query(0, PAGES));
    let (flip, _) = time(FLIPS, BATCH, || {
        let at = rng.next();
        // One in three comes back; what is shared already stays so.
        let state = if at.is_multiple_of(3) { PageState::Shared } else { PageState::Private };
        ledger.set((at >> 8) % PAGES, state);
        (0, 0)
    });
    let mut queries = |pages: u64, count: usize, batch: usize| {
        time(count, batch, || ledger.query(rng.next() % (PAGES / pages) * pages, pages))
    };
    let (small, second) = queries(512, QUERIES, BATCH);
    let (large, third) = queries(1 << 18, QUERIES / 20, 10);
    let answers = (first.0 ^ second.0 ^ third.0, first.1 ^ second.1 ^ third.1);
    Score { name: L::NAME, ns: [flip, small, large, whole], bytes: [rest, ledger.bytes()], answers }
}

fn main() {
    let ours = score::<PageMap>();
    let others = [score::<RangeMap<u64, PageState>>(), score::<Flat>()];
    println!("ledger: 1 TiB, {FLIPS} random flips of 4 KiB; medians");
    println!(
        "{:12} {:>10} {:>12} {:>12} {:>14} {:>12} {:>12}",
        "", "flip", "2 MiB runs", "1 GiB runs", "1 TiB at rest", "bytes first", "bytes after"
    );
    for one in std::iter::once(&ours).chain(&others) {
        let [flip, small, large, whole] = one.ns;
        let [first, after] = one.bytes;
        println!(
            "{:12} {flip:>7.0} ns {small:>9.0} ns {large:>9.0} ns {whole:>11.0} ns {first:>12} {after:>12}",
            one.name
        );
        assert_eq!(one.answers, ours.answers, "{} answers otherwise", one.name);
    }
    for other in &others {
        let ratio = |index: usize| ours.ns[index] / other.ns[index];
        println!(
            "passgate / {}: flip {:.2}, 2 MiB runs {:.2}, 1 GiB runs {:.2}, 1 TiB at rest {:.2}, bytes {:.2}",
            other.name,
            ratio(0),
            ratio(1),
            ratio(2),
            ratio(3),
            ours.bytes[1] as f64 / other.bytes[1] as f64
        );
    }
}
