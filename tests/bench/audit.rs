//! The cost of the audit log: the same conversions with and without it, in turns.
//!
//! `cargo bench --bench audit`. First through the real daemon (one 4 KiB page of the soft domain: begin, punch, end, as in
//! `passgate demo`), where the log may cost a twentieth of the run; then with the gate alone, which shows the cost of the log
//! lines of one conversion by themselves. `PASSGATE_STATE=DIR` writes the log to DIR instead of TMPDIR.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use passgate::gate::{
    Answer, Backing, Caller, ClientId, DomainCaps, DomainId, Door, Effect, Effects, Event, FileId, Gate,
    InvalidationId, MapResult, Outcome, PageState, Performer, Policy, RegionSpec, UnmapResult, Verdict,
};
use passgate::observe::audit::{Log, LogOptions};
use passgate::serve::{Handle, Options, Server};
use passgate::session::records::StateOptions;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Address, Offset};
use passgate_bindings::words;
use passgate_bindings::{PAGE, PageRange};
use passgate_client::{
    AddMemory, Answer as ClientAnswer, Channel, Client, Outcome as ClientOutcome,
    PageState as ClientPageState,
};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

const PAGES: u64 = 256;
/// The number of conversions in one turn.
const CONVERSIONS_PER_TURN: u64 = 16;
/// The number of turns with the log, and without it.
const TURNS: usize = 3000;
/// The maximum cost of the log, as a fraction of the run without it.
const MAX_LOG_COST: f64 = 0.05;

fn range<A: Address>(page: u64) -> Result<PageRange<A>> {
    Ok(PageRange::new(page * PAGE, PAGE)?)
}

/// A daemon over the soft domain, and its client.
struct Daemon {
    _handle: Handle,
    _client: Client,
    channel: Channel,
    memory: Arc<GuestFile>,
    next: u64,
}

impl Daemon {
    fn new(dir: &Path, state: Option<PathBuf>) -> Result<Self> {
        let domain = SoftDomain::open()?;
        let device = domain.device("soft:0")?;
        let options = Options { state: state.map(StateOptions::at), ..Options::at(dir) };
        let handle = Server::bind(options, domain, vec![device])?.spawn()?;
        let memory = Arc::new(GuestFile::memfd("audit", PAGES * PAGE)?);
        let mut client = Client::connect(handle.path())?;
        client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&*memory])?;
        let channel = client.open_channel()?;
        Ok(Self { _handle: handle, _client: client, channel, memory, next: 0 })
    }

    fn turn(&mut self) -> Result<f64> {
        let started = Instant::now();
        for _ in 0..CONVERSIONS_PER_TURN {
            self.next += 1;
            let page = self.next % PAGES;
            let ClientAnswer::Granted { invalidation } =
                self.channel.begin(range(page)?, ClientPageState::Shared, None)?
            else {
                return Err("not granted".into());
            };
            self.memory.punch(page * PAGE, PAGE)?;
            self.memory.store(page * PAGE, page)?;
            self.channel.end(invalidation, ClientOutcome::Committed)?;
        }
        Ok(started.elapsed().as_nanos() as f64 / CONVERSIONS_PER_TURN as f64)
    }
}

/// The gate with a domain that executes every call at once.
struct GateOnly {
    gate: Gate,
    effects: Effects,
    log: Option<Log>,
    cookie: u64,
}

impl GateOnly {
    fn new(log: Option<Log>) -> Result<Self> {
        let mut bench = Self {
            gate: Gate::new(Policy::default(), words::private),
            effects: Effects::new(),
            log,
            cookie: 0,
        };
        let caps = DomainCaps::new(65_535, 1 << 30);
        bench.handle(Event::DomainAdded { domain: DomainId(0), caps });
        let spec = RegionSpec {
            gpa: PageRange::new(0, PAGES * PAGE)?,
            backing: Backing { file: FileId { device: 1, inode: 1_234_567 }, offset: Offset(0) },
            writable: true,
            piece: PAGE,
            page: PAGE,
            initial: PageState::Shared,
        };
        let caller = bench.caller();
        bench.handle(Event::AddRegion { caller, spec });
        Ok(bench)
    }

    fn caller(&mut self) -> Caller {
        self.cookie += 1;
        Caller { client: ClientId(1), door: Door::Channel, cookie: self.cookie }
    }

    fn handle(&mut self, event: Event) -> Option<InvalidationId> {
        let mut effects = std::mem::take(&mut self.effects);
        effects.clear();
        let (mut granted, mut done, mut next) = (None, 0, Some(event));
        loop {
            if let Some(event) = next.take() {
                let from = effects.len();
                if let Some(log) = &mut self.log {
                    log.begin(&event);
                }
                self.gate.handle(event, &mut effects);
                if let Some(log) = &mut self.log {
                    log.finish(&effects[from..]);
                }
            }
            let Some(effect) = effects.get(done) else { break };
            done += 1;
            match effect {
                Effect::Map { job, .. } => {
                    next = Some(Event::Mapped { job: *job, result: MapResult::Mapped });
                }
                Effect::Unmap { job, iova, .. } => {
                    let result = UnmapResult::Gone { bytes: iova.len() };
                    next = Some(Event::Unmapped { job: *job, result, took_ns: 4321 });
                }
                Effect::Answer {
                    answer: Answer::Verdict { invalidation, verdict: Verdict::Done }, ..
                } => granted = Some(*invalidation),
                _ => {}
            }
        }
        self.effects = effects;
        granted
    }

    fn turn(&mut self) -> Result<f64> {
        let started = Instant::now();
        for page in 0..CONVERSIONS_PER_TURN {
            let (caller, range) = (self.caller(), range(page % PAGES)?);
            let (to, performer, deadline_ns) = (PageState::Shared, Performer::Client, 1_000_000_000);
            let begun =
                self.handle(Event::Begin { caller, ranges: range.into(), to, performer, deadline_ns });
            let invalidation = begun.ok_or("not granted")?;
            let caller = self.caller();
            self.handle(Event::End { caller, invalidation, outcome: Outcome::Committed });
        }
        Ok(started.elapsed().as_nanos() as f64 / CONVERSIONS_PER_TURN as f64)
    }
}

/// Returns the median time of a turn of each side. The turns alternate and are short, so that other load on the machine affects
/// both sides alike.
fn compare(turns: [&mut dyn FnMut() -> Result<f64>; 2]) -> Result<[f64; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..TURNS {
        for side in [round % 2, (round + 1) % 2] {
            times[side].push(turns[side]()?);
        }
    }
    Ok(times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }))
}

fn main() -> Result {
    // On one processor, because the placement of the two daemons' threads would make more of a difference than the log.
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(rustix::thread::sched_getcpu());
    rustix::thread::sched_setaffinity(None, &cpus)?;
    let directory = tempfile::tempdir()?;
    let state =
        std::env::var_os("PASSGATE_STATE").map_or_else(|| directory.path().join("state"), PathBuf::from);

    let mut without = Daemon::new(&directory.path().join("without"), None)?;
    let mut with = Daemon::new(&directory.path().join("with"), Some(state.clone()))?;
    let [plain, logged] = compare([&mut || without.turn(), &mut || with.turn()])?;
    let ratio = logged / plain - 1.0;
    let judgement = match ratio {
        _ if ratio > MAX_LOG_COST => "BROKEN",
        // The log cannot make the run faster: other load on the machine made the difference.
        _ if ratio < -MAX_LOG_COST => "UNDECIDED, measure on an idle machine",
        _ => "kept",
    };
    println!(
        "audit: one 4 KiB page, begin + punch + end, medians of {TURNS} turns of {CONVERSIONS_PER_TURN}"
    );
    println!(
        "  through the daemon: {plain:7.0} ns without, {logged:7.0} ns with the log: {:+.1} % (limit 5 %): {judgement}",
        ratio * 100.0
    );
    drop((without, with));

    let options = LogOptions {
        segment: 64 << 20,
        new_file_timeout: passgate::observe::audit::NEW_FILE_TIMEOUT,
        keep: 8,
        policy: Policy::default(),
        boot: String::new(),
        iommu: "none".to_owned(),
        devices: Vec::new(),
        resumed: false,
    };
    let mut without = GateOnly::new(None)?;
    let mut with = GateOnly::new(Some(Log::open(&state, options)?))?;
    let [plain, logged] = compare([&mut || without.turn(), &mut || with.turn()])?;
    println!("  gate alone:         {plain:7.0} ns without, {logged:7.0} ns with the log");
    println!("  the lines of one conversion cost {:.0} ns", logged - plain);
    Ok(())
}
