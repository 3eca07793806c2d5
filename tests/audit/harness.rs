//! A gate, its audit log, and an executor of its effects that injects faults: one conversion after the other.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use passgate::gate::{
    Answer, Backing, Caller, ClientId, DeviceId, DomainCaps, DomainId, Door, Effect, Effects, Event, FileId,
    Gate, Hitless, InvalidationId, MapResult, OnStuckDma, Outcome, PageState, Performer, Policy, Ranges,
    RegionSpec, Rung, Step, Steps, UnmapResult, Verdict,
};
use passgate::observe::audit::{Log, LogOptions};
use passgate_bindings::units::{Address, Offset};
use passgate_bindings::words;
use passgate_bindings::{PAGE, PageRange};

/// The length of the file, in pages.
pub const PAGES: u64 = 512;
/// The guest-physical page at which the file is mapped a second time.
pub const ALIAS: u64 = 4096;
/// The distance between the memory of two clients, in pages: a region of a dead client that could not be closed overlaps no
/// other client's.
const CLIENT_SPACING: u64 = 2 * ALIAS;
/// The deadline of every begin.
pub const DEADLINE_NS: u64 = 3_600_000_000_000;

pub const FILE: FileId = FileId { device: 1, inode: 7 };

/// A gate with its log and its executor.
pub struct Harness {
    gate: Gate,
    effects: Effects,
    pub log: Log,
    /// Results of effects, not delivered yet.
    results: VecDeque<Event>,
    /// Results of calls that return late.
    late_results: VecDeque<Event>,
    alarms: Vec<InvalidationId>,
    granted: Vec<(InvalidationId, Caller)>,
    /// The invalidations from which pages may be in quarantine.
    failed: Vec<InvalidationId>,
    client: u32,
    cookie: u64,
    random_state: u64,
    /// One call in this many fails; 0 for none.
    fault_interval: u64,
    /// The number of committed conversions.
    pub conversions: u64,
    /// The number of verdicts: done, any other.
    pub verdicts: [u64; 2],
}

pub fn range<A: Address>(page: u64, pages: u64) -> PageRange<A> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

pub fn options() -> LogOptions {
    LogOptions {
        segment: 64 << 20,
        // A slow disk is not under test.
        new_file_timeout: Duration::from_secs(60),
        keep: 1000,
        policy: Policy { on_stuck_dma: OnStuckDma::Fence, hitless: Hitless::Off, ..Policy::default() },
        boot: "this one".into(),
        iommu: "sim".into(),
        devices: vec!["sim:0".into()],
        resumed: false,
    }
}

impl Harness {
    pub fn new(dir: &Path, fault_interval: u64) -> Self {
        Self::with(dir, options(), fault_interval)
    }

    pub fn with(dir: &Path, options: LogOptions, fault_interval: u64) -> Self {
        let mut harness = Self {
            gate: Gate::new(options.policy, words::private),
            effects: Effects::new(),
            log: Log::open(dir, options).unwrap(),
            results: VecDeque::new(),
            late_results: VecDeque::new(),
            alarms: Vec::new(),
            granted: Vec::new(),
            failed: Vec::new(),
            client: 0,
            cookie: 0,
            random_state: 88172645463325252,
            fault_interval,
            conversions: 0,
            verdicts: [0; 2],
        };
        for domain in [DomainId(0), DomainId(1)] {
            // One domain cuts pages out of large mappings, the other replaces its page table or splits.
            let (cut, replace) = (domain.0 == 0, domain.0 == 1);
            let caps = DomainCaps { cut, replace, ..DomainCaps::new(65_535, 1 << 30) };
            harness.handle(Event::DomainAdded { domain, caps });
            let steps = Steps::of(&[Step::Drain, Step::Detach, Step::Reset]);
            let (device, traits) = (DeviceId(domain.0), Default::default());
            harness.handle(Event::DeviceAdded { device, domain, steps, traits });
        }
        harness.connect();
        harness
    }

    /// Connects another client, with the file at two addresses.
    fn connect(&mut self) {
        self.client += 1;
        // Memory that cannot be added is not under test.
        let fault_interval = std::mem::take(&mut self.fault_interval);
        for at in [0, ALIAS] {
            let spec = RegionSpec {
                gpa: range(self.base() + at, PAGES),
                backing: Backing { file: FILE, offset: Offset(0) },
                writable: true,
                piece: 0,
                page: PAGE,
                initial: PageState::Shared,
            };
            let caller = self.caller();
            self.handle(Event::AddRegion { caller, spec });
        }
        self.deliver_all();
        self.fault_interval = fault_interval;
    }

    /// Returns the first page of the client's memory.
    fn base(&self) -> u64 {
        (u64::from(self.client) - 1) * CLIENT_SPACING
    }

    fn caller(&mut self) -> Caller {
        self.cookie += 1;
        Caller { client: ClientId(self.client), door: Door::Channel, cookie: self.cookie }
    }

    /// Returns a pseudo-random number below `below` (xorshift64).
    fn draw(&mut self, below: u64) -> u64 {
        self.random_state ^= self.random_state << 13;
        self.random_state ^= self.random_state >> 7;
        self.random_state ^= self.random_state << 17;
        self.random_state % below
    }

    /// Returns true if the next call is to fail.
    fn draw_fault(&mut self) -> bool {
        self.fault_interval > 0 && self.draw(self.fault_interval) == 0
    }

    /// Passes an event to the gate and the log, and executes the effects.
    pub fn handle(&mut self, event: Event) {
        let mut effects = std::mem::take(&mut self.effects);
        effects.clear();
        self.log.begin(&event);
        self.gate.handle(event, &mut effects);
        self.log.finish(&effects);
        for effect in &effects {
            self.execute(effect);
        }
        self.effects = effects;
    }

    /// Queues the result of an effect.
    fn execute(&mut self, effect: &Effect) {
        match effect {
            Effect::Map { job, .. } => {
                let result = match self.draw_fault() {
                    true => MapResult::Refused { errno: 12 },
                    false => MapResult::Mapped,
                };
                self.results.push_back(Event::Mapped { job: *job, result });
            }
            Effect::Unmap { job, iova, bytes, .. } => self.unmap(*job, bytes.unwrap_or(iova.len())),
            Effect::Replace { job, bytes, .. } => self.unmap(*job, *bytes),
            Effect::Fence { job, .. } => {
                let errno = if self.draw_fault() { 5 } else { 0 };
                self.results.push_back(Event::Fenced { job: *job, errno, took_ns: 900 });
            }
            Effect::Attach { job, .. } => self.results.push_back(Event::Attached { job: *job, errno: 0 }),
            Effect::Convert { invalidation, .. } => {
                let outcome = match self.draw_fault() {
                    true => Outcome::Unknown { errno: 5, offset: 0 },
                    false => Outcome::Committed,
                };
                self.results.push_back(Event::Converted { invalidation: *invalidation, outcome });
            }
            Effect::Arm { invalidation, .. } => self.alarms.push(*invalidation),
            Effect::Answer { caller, answer: Answer::Verdict { invalidation, verdict } } => match verdict {
                Verdict::Done => {
                    self.verdicts[0] += 1;
                    self.granted.push((*invalidation, *caller));
                }
                _ => {
                    self.verdicts[1] += 1;
                    self.failed.push(*invalidation);
                }
            },
            _ => {}
        }
    }

    fn unmap(&mut self, job: passgate::gate::JobId, bytes: u64) {
        let unmapped = |result| Event::Unmapped { job, result, took_ns: 1234 };
        if !self.draw_fault() {
            return self.results.push_back(unmapped(UnmapResult::Gone { bytes }));
        }
        match self.draw(4) {
            0 => self.results.push_back(unmapped(UnmapResult::Failed { errno: 16, bytes: 0 })),
            1 => self.results.push_back(unmapped(UnmapResult::Gone { bytes: bytes / 2 / PAGE * PAGE })),
            2 => self.late_results.push_back(unmapped(UnmapResult::Gone { bytes })),
            _ => {
                self.results.push_back(unmapped(UnmapResult::InFlight { bytes }));
                self.late_results.push_back(Event::FlightEnded { job });
            }
        }
    }

    /// Delivers every queued result but the late ones.
    fn deliver_results(&mut self) {
        while let Some(event) = self.results.pop_front() {
            self.handle(event);
        }
    }

    /// Delivers every queued result.
    pub fn deliver_all(&mut self) {
        self.deliver_results();
        while let Some(event) = self.late_results.pop_front() {
            self.handle(event);
            self.deliver_results();
        }
    }

    /// Begins, and lets parts of the deadline expire until the verdict comes. Returns the invalidation that was granted to the
    /// client, if one was.
    pub fn begin(
        &mut self,
        page: u64,
        pages: u64,
        to: PageState,
        performer: Performer,
    ) -> Option<InvalidationId> {
        self.begin_ranges(range(self.base() + page, pages).into(), to, performer)
    }

    fn begin_ranges(
        &mut self,
        ranges: Ranges,
        to: PageState,
        performer: Performer,
    ) -> Option<InvalidationId> {
        let caller = self.caller();
        self.alarms.clear();
        self.handle(Event::Begin { caller, ranges, to, performer, deadline_ns: DEADLINE_NS });
        self.deliver_results();
        let armed_invalidation = self.alarms.first().copied();
        for rung in Rung::LADDER {
            // Where nothing was mapped the verdict comes at once, and no alarm is armed.
            match self.granted.pop() {
                Some((id, _)) if performer == Performer::Client => return Some(id),
                Some(_) => {
                    self.conversions += 1;
                    return None;
                }
                None => self.handle(Event::Expired { invalidation: armed_invalidation?, rung }),
            }
            self.deliver_results();
        }
        None
    }

    pub fn end(&mut self, invalidation: InvalidationId, outcome: Outcome) {
        let caller = self.caller();
        self.handle(Event::End { caller, invalidation, outcome });
        self.deliver_results();
        self.conversions += u64::from(outcome == Outcome::Committed);
    }

    /// Performs one random conversion.
    pub fn step(&mut self) {
        let (page, pages) = (self.draw(PAGES - 4), 1 + self.draw(8) / 6);
        let page = if self.draw(8) == 0 { ALIAS + page } else { page };
        let to = match self.draw(3) {
            0 => PageState::Private,
            _ => PageState::Shared,
        };
        let performer = if self.draw(10) == 0 { Performer::Passgate } else { Performer::Client };
        // One in eight is a batch; one that reaches beyond the memory is refused as a whole.
        let extra_ranges = if self.draw(8) == 0 { self.draw(12) } else { 0 };
        let ranges: Vec<_> =
            (0..=extra_ranges).map(|n| range(self.base() + page + n * (pages + 1), pages)).collect();
        let Ok(ranges) = Ranges::try_from(ranges) else { return };
        if let Some(id) = self.begin_ranges(ranges, to, performer) {
            let unknown = self.draw_fault();
            if unknown && self.draw(4) == 0 {
                self.client_dies();
                return;
            }
            if unknown {
                self.failed.push(id);
            }
            let outcome = if unknown { Outcome::Unknown { errno: 5, offset: 0 } } else { Outcome::Committed };
            self.end(id, outcome);
        }
        if self.draw(16) == 0 {
            self.deliver_all();
            self.handle(Event::Quiet);
            self.deliver_all();
            // An operator ends every quarantine, else all memory would soon be in quarantine.
            while let Some(invalidation) = self.failed.pop() {
                let caller = self.caller();
                self.handle(Event::Release { caller, invalidation, to: PageState::Shared });
            }
            self.deliver_all();
        }
    }

    /// Lets the client die between begin and end, and connects another.
    fn client_dies(&mut self) {
        self.handle(Event::ClientGone { client: ClientId(self.client) });
        self.deliver_all();
        let quarantined = self.gate.snapshot().quarantine.into_iter().map(|range| range.invalidation);
        self.failed.extend(quarantined);
        self.connect();
    }
}
