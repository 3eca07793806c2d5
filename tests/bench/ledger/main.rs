//! The ledger's page states compared with other data structures: `rangemap`, `roaring` (a bitmap per bit of the state) and a
//! flat bitmap of two bits per page, for one tebibyte. It measures:
//!
//! 1. *single calls*: a million random flips of 4 KiB pages, then queries for the runs of equal state in a range;
//! 2. *the mixed trace*: the calls for a confidential guest that boots and runs ([`trace`] states the mix);
//! 3. *the worst case* in bytes; 4. *mappings*: the calls that the gate makes on the ledger of mappings.
//!
//! `cargo bench --bench ledger [-- singles mixed worst mapped]`. Prints processor time, bytes and ratios; all data structures must
//! give the same answers.

mod baselines;
mod mapped;
mod trace;

use std::time::Duration;

use passgate::gate::ledger::{PageMap, Store};
use passgate::gate::{FileId, PageState};
use passgate_bindings::words::Words;
use rangemap::RangeMap;

use baselines::{Flat, Ledger, PAGES, Roaring};
use trace::Call;

const FLIPS: usize = 1_000_000;
const QUERIES: usize = 20_000;
/// The number of operations measured together.
const BATCH: usize = 1000;
/// The number of times that each plays the trace.
const ROUNDS: usize = 5;

/// A reproducible random number generator (SplitMix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Returns the processor time of this thread, which other load on the machine does not affect.
fn now() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The result of one ledger for single calls.
struct Score {
    name: &'static str,
    /// Median nanoseconds per flip, and per query of 2 MiB, of 1 GiB, and of 1 TiB before the flips.
    ns: [f64; 4],
    /// Bytes before the flips, and after them.
    bytes: [usize; 2],
    /// A checksum of all answers.
    answers: (u64, u64),
}

/// Returns the median nanoseconds of one of `count` operations, and the sum of their answers.
fn median_ns(count: usize, batch: usize, mut operation: impl FnMut() -> (u64, u64)) -> (f64, (u64, u64)) {
    let (mut times, mut sum) = (Vec::new(), (0u64, 0u64));
    for _ in 0..count / batch {
        let started = now();
        for _ in 0..batch {
            let (runs, shared) = operation();
            sum = (sum.0.wrapping_add(runs), sum.1.wrapping_add(shared));
        }
        times.push((now() - started).as_nanos() as f64 / batch as f64);
    }
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], sum)
}

fn score<L: Ledger>() -> Score {
    let mut ledger = L::new();
    let rest = ledger.bytes();
    let mut rng = Rng(1);
    let (whole, first) = median_ns(11, 1, || ledger.query(0, PAGES));
    let (flip, _) = median_ns(FLIPS, BATCH, || {
        let at = rng.next();
        // One in three is set to private, which most pages are already.
        let state = if at.is_multiple_of(3) { PageState::Private } else { PageState::Shared };
        ledger.set((at >> 8) % PAGES, 1, state);
        (0, 0)
    });
    let mut queries = |pages: u64, count: usize, batch: usize| {
        median_ns(count, batch, || ledger.query(rng.below(PAGES / pages) * pages, pages))
    };
    let (small, second) = queries(512, QUERIES, BATCH);
    let (large, third) = queries(1 << 18, QUERIES / 20, 10);
    let answers = (first.0 ^ second.0 ^ third.0, first.1 ^ second.1 ^ third.1);
    Score { name: L::NAME, ns: [flip, small, large, whole], bytes: [rest, ledger.bytes()], answers }
}

/// The processor time of one ledger for the trace.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct TraceTime {
    all: Duration,
    /// The time for bursts, for the runs of 1 GiB, and for the status.
    parts: [Duration; 3],
}

/// Plays the trace to one ledger. Returns its time, a checksum of its answers, and its bytes at the end.
fn play_trace<L: Ledger>(calls: &[Call]) -> (TraceTime, (u64, u64), usize) {
    let (mut took, mut answers) = (TraceTime::default(), (0u64, 0u64));
    let started = now();
    // The time includes adding the region.
    let mut ledger = L::new();
    for call in calls {
        let mut rare = |part: usize, call: &mut dyn FnMut()| {
            let started = now();
            call();
            took.parts[part] += now() - started;
        };
        match *call {
            Call::Set(page, 1, state) => ledger.set(page.into(), 1, state),
            Call::Set(page, pages, state) => rare(0, &mut || ledger.set(page.into(), pages.into(), state)),
            Call::Runs(page, 512) => {
                let (runs, shared) = ledger.query(page.into(), 512);
                answers = (answers.0 + runs, answers.1 ^ shared);
            }
            Call::Runs(page, pages) => rare(1, &mut || {
                let (runs, shared) = ledger.query(page.into(), pages.into());
                answers = (answers.0 + runs, answers.1 ^ shared);
            }),
            Call::Status => rare(2, &mut || {
                let [shared, private, hole] = ledger.status();
                answers = (answers.0 + private, answers.1 ^ shared ^ hole);
            }),
        }
    }
    took.all = now() - started;
    (took, answers, ledger.bytes())
}

/// Gives every second page of the tebibyte another state than its neighbours.
fn fill_worst<L: Ledger>(ledger: &mut L) {
    for page in (0..PAGES).step_by(2) {
        ledger.set(page, 1, PageState::Shared);
    }
}

fn worst_case_bytes<L: Ledger>() -> usize {
    let mut ledger = L::new();
    fill_worst(&mut ledger);
    ledger.bytes()
}

/// Returns the milliseconds that a new process takes to open the worst-case tebibyte in a memfd.
fn reopen() -> Result<f64, Box<dyn std::error::Error>> {
    let file = FileId { device: 1, inode: 1 };
    let store = Store::new(Words::memfd("ledger", 1 << 27)?)?;
    fill_worst(&mut PageMap::in_store(&store, file)?);
    let fd = store.words().fd().ok_or("a memfd has a descriptor")?.try_clone_to_owned()?;
    drop(store);
    let started = now();
    let store = Store::open(Words::from_fd(fd)?)?;
    let map = PageMap::in_store(&store, file)?;
    let took = now() - started;
    assert_eq!(map.status()[0], PAGES / 2);
    Ok(took.as_secs_f64() * 1e3)
}

fn main() {
    let named: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let parts: [(&str, fn()); 4] =
        [("singles", singles), ("mixed", mixed), ("worst", worst_case), ("mapped", mapped::measure)];
    for (name, part) in parts {
        if named.is_empty() || named.iter().any(|argument| argument == name) {
            part();
        }
    }
}

fn worst_case() {
    println!("\nworst case, every second page shared: bytes");
    for (name, bytes) in
        [(PageMap::NAME, worst_case_bytes::<PageMap>()), (Roaring::NAME, worst_case_bytes::<Roaring>())]
    {
        println!("{name:12} {bytes:>12} ({:.1} MiB)", bytes as f64 / f64::from(1 << 20));
    }
    match reopen() {
        Ok(took) => println!("opened by the next process in {took:.1} ms"),
        Err(error) => println!("not opened again: {error}"),
    }
}

fn singles() {
    let ours = score::<PageMap>();
    let others = [score::<RangeMap<u64, PageState>>(), score::<Flat>(), score::<Roaring>()];
    println!("single calls: 1 TiB, {FLIPS} random flips of 4 KiB; medians");
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
}

fn mixed() {
    let calls = trace::build();
    let mut took = [const { Vec::new() }; 4];
    let mut bytes = [0; 4];
    for _ in 0..ROUNDS {
        let played = [
            play_trace::<PageMap>(&calls),
            play_trace::<RangeMap<u64, PageState>>(&calls),
            play_trace::<Flat>(&calls),
            play_trace::<Roaring>(&calls),
        ];
        for (index, (one, answers, size)) in played.into_iter().enumerate() {
            assert_eq!(answers, played[0].1, "ledger {index} answers otherwise");
            took[index].push(one);
            bytes[index] = size;
        }
    }
    println!("\nmixed trace: {} calls, {} flips of 4 KiB; median of {ROUNDS}", calls.len(), trace::FLIPS);
    println!(
        "{:12} {:>10} {:>16} {:>10} {:>10} {:>10} {:>8} {:>12}",
        "", "all", "flip + its runs", "bursts", "1 GiB", "status", "ratio", "bytes after"
    );
    let names = [PageMap::NAME, RangeMap::<u64, PageState>::NAME, Flat::NAME, Roaring::NAME];
    let medians = took.map(|mut times: Vec<TraceTime>| {
        times.sort();
        times[ROUNDS / 2]
    });
    for ((name, median), bytes) in names.iter().zip(&medians).zip(bytes) {
        let ms = |part: Duration| part.as_secs_f64() * 1e3;
        let [bursts, large, status] = median.parts.map(ms);
        let flip = (ms(median.all) - bursts - large - status) * 1e6 / trace::FLIPS as f64;
        let ratio = ms(median.all) / ms(medians[0].all);
        println!(
            "{name:12} {:>7.0} ms {flip:>13.0} ns {bursts:>7.1} ms {large:>7.1} ms {status:>7.1} ms {ratio:>8.2} {bytes:>12}",
            ms(median.all)
        );
    }
}
