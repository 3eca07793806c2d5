//! The cost of passgate itself per conversion, without any kernel call: gate, ledger and receipt of one 4 KiB page, from begin
//! to verdict and from the end on. The domain executes every call at once.
//!
//! `cargo bench --bench gate`. Medians of batches; the limit of SPECIFICATION.md is one microsecond.

use std::time::Instant;

use passgate::gate::{
    Answer, Backing, Caller, ClientId, DeviceId, DomainCaps, DomainId, Door, Effect, Effects, Event, FileId,
    Gate, InvalidationId, MapResult, OnStuckDma, Outcome, PageState, Performer, Policy, RegionSpec, Step,
    Steps, UnmapResult, Verdict,
};
use passgate_bindings::units::Offset;
use passgate_bindings::words;
use passgate_bindings::{PAGE, PageRange};

/// The number of pages of the region: 4 GiB.
const PAGES: u64 = 1 << 20;
/// The number of pages that are private from the start, spread over the region so that the ledger is not trivial.
const PRIVATE_PAGES: u64 = 4096;
/// The number of conversions measured together, because reading the clock costs a good part of one.
const CONVERSIONS_PER_BATCH: usize = 64;
const BATCHES: usize = 2000;
const LIMIT_NS: f64 = 1000.0;

struct Bench {
    /// True if the domain cuts pages out of large mappings; otherwise each page is a mapping.
    cut: bool,
    gate: Gate,
    effects: Effects,
    cookie: u64,
    receipts: u64,
    random: u64,
}

impl Bench {
    fn new(cut: bool) -> Self {
        let gate =
            Gate::new(Policy { on_stuck_dma: OnStuckDma::Refuse, ..Policy::default() }, words::private);
        let mut bench = Self { cut, gate, effects: Effects::new(), cookie: 0, receipts: 0, random: 1 };
        let domain = DomainId(0);
        let caps = DomainCaps { cut, ..DomainCaps::new(2 * PAGES, 1 << 30) };
        bench.handle(Event::DomainAdded { domain, caps });
        let steps = Steps::of(&[Step::Drain, Step::Reset]);
        bench.handle(Event::DeviceAdded { device: DeviceId(0), domain, steps, traits: Default::default() });
        let spec = RegionSpec {
            gpa: range(0, PAGES),
            backing: Backing { file: FileId { device: 1, inode: 1 }, offset: Offset(0) },
            writable: true,
            piece: if cut { 0 } else { PAGE },
            page: PAGE,
            initial: PageState::Shared,
        };
        let caller = bench.caller();
        bench.handle(Event::AddRegion { caller, spec });
        for _ in 0..PRIVATE_PAGES {
            let page = bench.page();
            bench.convert(page, PageState::Private);
        }
        bench
    }

    fn caller(&mut self) -> Caller {
        self.cookie += 1;
        Caller { client: ClientId(1), door: Door::Channel, cookie: self.cookie }
    }

    /// Returns a random page (xorshift).
    fn page(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % PAGES
    }

    /// Passes an event to the gate and the results of its calls at once. Returns the invalidation that was granted.
    fn handle(&mut self, event: Event) -> Option<InvalidationId> {
        let mut effects = std::mem::take(&mut self.effects);
        effects.clear();
        self.gate.handle(event, &mut effects);
        let (mut granted, mut done) = (None, 0);
        while done < effects.len() {
            let next = match &effects[done] {
                Effect::Map { job, .. } => Some(Event::Mapped { job: *job, result: MapResult::Mapped }),
                Effect::Unmap { job, bytes, .. } => {
                    let result = UnmapResult::Gone { bytes: bytes.unwrap_or_default() };
                    Some(Event::Unmapped { job: *job, result, took_ns: 0 })
                }
                Effect::Answer {
                    answer: Answer::Verdict { invalidation, verdict: Verdict::Done }, ..
                } => {
                    granted = Some(*invalidation);
                    None
                }
                Effect::Receipt(_) => {
                    self.receipts += 1;
                    None
                }
                _ => None,
            };
            done += 1;
            if let Some(event) = next {
                self.gate.handle(event, &mut effects);
            }
        }
        self.effects = effects;
        granted
    }

    /// Performs one conversion as a client does: begin, verdict, end.
    fn convert(&mut self, page: u64, to: PageState) {
        let caller = self.caller();
        let (performer, deadline_ns) = (Performer::Client, 1_000_000_000);
        let granted =
            self.handle(Event::Begin { caller, ranges: range(page, 1).into(), to, performer, deadline_ns });
        let Some(invalidation) = granted else { return };
        let caller = self.caller();
        self.handle(Event::End { caller, invalidation, outcome: Outcome::Committed });
    }

    /// Returns the median time of one conversion in nanoseconds, to private and back to shared.
    fn run(&mut self) -> [f64; 2] {
        let mut times = [Vec::with_capacity(BATCHES), Vec::with_capacity(BATCHES)];
        for _ in 0..BATCHES {
            let pages: [u64; CONVERSIONS_PER_BATCH] = std::array::from_fn(|_| self.page());
            for (times, to) in times.iter_mut().zip([PageState::Private, PageState::Shared]) {
                let started = Instant::now();
                pages.iter().for_each(|page| self.convert(*page, to));
                times.push(started.elapsed().as_nanos() as f64 / CONVERSIONS_PER_BATCH as f64);
            }
        }
        times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        })
    }
}

fn range<A: passgate_bindings::units::Address>(page: u64, pages: u64) -> PageRange<A> {
    match PageRange::new(page * PAGE, pages * PAGE) {
        Ok(range) => range,
        Err(error) => unreachable!("{error}"),
    }
}

fn main() {
    println!("gate: one 4 KiB page of {} GiB, begin + verdict + end, medians", (PAGES * PAGE) >> 30);
    for cut in [false, true] {
        let mut bench = Bench::new(cut);
        let before = bench.receipts;
        let [private, shared] = bench.run();
        let receipts = bench.receipts - before;
        println!("  {}", if bench.cut { "cut out of mappings of 64 MiB" } else { "each page a mapping" });
        for (what, ns) in [("to private (unmapped)", private), ("to shared (mapped again)", shared)] {
            let judgement = if ns <= LIMIT_NS { "kept" } else { "BROKEN" };
            println!("    {what:24} {ns:6.0} ns, {:.2} of the limit: {judgement}", ns / LIMIT_NS);
        }
        println!("    mean of both             {:6.0} ns, {receipts} receipts", (private + shared) / 2.0);
    }
}
