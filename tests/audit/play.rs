//! A gate, its log, and hands that do what it wants, now and then badly: one conversion after the other.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use passgate::gate::{
    Able, Answer, Backing, Caller, ClientId, DeviceId, DomainId, Door, Effect, Effects, Event, FileId, Gate,
    Hitless, InvalidationId, MapResult, OnStuckDma, Outcome, PageState, Performer, Policy, Ranges,
    RegionSpec, Step, Steps, UnmapResult, Verdict,
};
use passgate::observe::audit::{Log, LogOptions};
use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{PAGE, PageRange};

/// Pages of the file.
pub const PAGES: u64 = 512;
/// Where the guest sees it a second time, in pages.
pub const ALIAS: u64 = 4096;
/// How far apart the memory of two clients is, in pages: what of a dead one could not be closed is in nobody's way.
const APART: u64 = 2 * ALIAS;
/// What every begin is given.
pub const DEADLINE_NS: u64 = 3_600_000_000_000;

pub const FILE: FileId = FileId { device: 1, inode: 7 };

pub struct Play {
    gate: Gate,
    effects: Effects,
    pub log: Log,
    /// Results that have not come in yet.
    results: VecDeque<Event>,
    /// Results of calls that take their time.
    late: VecDeque<Event>,
    alarms: Vec<InvalidationId>,
    granted: Vec<(InvalidationId, Caller)>,
    /// What there may be in quarantine since.
    failed: Vec<InvalidationId>,
    client: u32,
    cookie: u64,
    random: u64,
    /// One call in so many goes wrong; 0 for none.
    faults: u64,
    /// Conversions that took place.
    pub conversions: u64,
    /// Verdicts: done, not done.
    pub verdicts: [u64; 2],
}

pub fn range<A: Address>(page: u64, pages: u64) -> PageRange<A> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

pub fn options() -> LogOptions {
    LogOptions {
        segment: 64 << 20,
        // A disk that is slow is another story.
        patience: Duration::from_secs(60),
        keep: 1000,
        policy: Policy { on_stuck_dma: OnStuckDma::Fence, hitless: Hitless::Off, ..Policy::default() },
        boot: "this one".into(),
        iommu: "sim".into(),
        devices: vec!["sim:0".into()],
        resumed: false,
    }
}

impl Play {
    pub fn new(dir: &Path, faults: u64) -> Self {
        Self::with(dir, options(), faults)
    }

    pub fn with(dir: &Path, options: LogOptions, faults: u64) -> Self {
        let mut play = Self {
            gate: Gate::new(options.policy),
            effects: Effects::new(),
            log: Log::open(dir, options).unwrap(),
            results: VecDeque::new(),
            late: VecDeque::new(),
            alarms: Vec::new(),
            granted: Vec::new(),
            failed: Vec::new(),
            client: 0,
            cookie: 0,
            random: 88172645463325252,
            faults,
            conversions: 0,
            verdicts: [0; 2],
        };
        for domain in [DomainId(0), DomainId(1)] {
            // One cuts pages out of large mappings, one takes them out of a second page table or splits.
            let (cut, replace) = (domain.0 == 0, domain.0 == 1);
            let able = Able { max_mappings: 65_535, max_piece: 1 << 30, cut, replace };
            play.tell(Event::DomainAdded { domain, able });
            let steps = Steps::of(&[Step::Drain, Step::Detach, Step::Reset]);
            let (device, nature) = (DeviceId(domain.0), Default::default());
            play.tell(Event::DeviceAdded { device, domain, steps, nature });
        }
        play.connect();
        play
    }

    /// Another client, with the file at two places.
    fn connect(&mut self) {
        self.client += 1;
        // Memory that cannot be added is another story.
        let faults = std::mem::take(&mut self.faults);
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
            self.tell(Event::AddRegion { caller, spec });
        }
        self.settle();
        self.faults = faults;
    }

    /// Where the client's memory starts, in pages.
    fn base(&self) -> u64 {
        (u64::from(self.client) - 1) * APART
    }

    fn caller(&mut self) -> Caller {
        self.cookie += 1;
        Caller { client: ClientId(self.client), door: Door::Channel, cookie: self.cookie }
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    fn goes_wrong(&mut self) -> bool {
        self.faults > 0 && self.draw(self.faults) == 0
    }

    /// Tells the gate and the log, and notes what is to be done.
    pub fn tell(&mut self, event: Event) {
        let mut effects = std::mem::take(&mut self.effects);
        effects.clear();
        self.log.begin(&event);
        self.gate.handle(event, &mut effects);
        self.log.finish(&effects);
        for effect in &effects {
            self.take(effect);
        }
        self.effects = effects;
    }

    fn take(&mut self, effect: &Effect) {
        match effect {
            Effect::Map { job, .. } => {
                let result = match self.goes_wrong() {
                    true => MapResult::Refused { errno: 12 },
                    false => MapResult::Mapped,
                };
                self.results.push_back(Event::Mapped { job: *job, result });
            }
            Effect::Unmap { job, iova, bytes, .. } => self.unmap(*job, bytes.unwrap_or(iova.len())),
            Effect::Replace { job, bytes, .. } => self.unmap(*job, *bytes),
            Effect::Fence { job, .. } => {
                let errno = if self.goes_wrong() { 5 } else { 0 };
                self.results.push_back(Event::Fenced { job: *job, errno, took_ns: 900 });
            }
            Effect::Attach { job, .. } => self.results.push_back(Event::Attached { job: *job, errno: 0 }),
            Effect::Convert { invalidation, .. } => {
                let outcome = match self.goes_wrong() {
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
        let told = |result| Event::Unmapped { job, result, took_ns: 1234 };
        if !self.goes_wrong() {
            return self.results.push_back(told(UnmapResult::Gone { bytes }));
        }
        match self.draw(4) {
            0 => self.results.push_back(told(UnmapResult::Failed { errno: 16, bytes: 0 })),
            1 => self.results.push_back(told(UnmapResult::Gone { bytes: bytes / 2 / PAGE * PAGE })),
            2 => self.late.push_back(told(UnmapResult::Gone { bytes })),
            _ => {
                self.results.push_back(told(UnmapResult::InFlight { bytes }));
                self.late.push_back(Event::Released { job });
            }
        }
    }

    /// Every result comes in, but for those that take their time.
    fn work(&mut self) {
        while let Some(event) = self.results.pop_front() {
            self.tell(event);
        }
    }

    /// All of them do.
    pub fn settle(&mut self) {
        self.work();
        while let Some(event) = self.late.pop_front() {
            self.tell(event);
            self.work();
        }
    }

    /// Begins, and waits for the answer, if need be until time has run out; what was granted.
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
        self.tell(Event::Begin { caller, ranges, to, performer, deadline_ns: DEADLINE_NS });
        self.work();
        let armed = self.alarms.first().copied();
        for rung in Step::LADDER {
            // Where nothing was mapped the answer comes at once, and no alarm.
            match self.granted.pop() {
                Some((id, _)) if performer == Performer::Client => return Some(id),
                Some(_) => {
                    self.conversions += 1;
                    return None;
                }
                None => self.tell(Event::Expired { invalidation: armed?, rung }),
            }
            self.work();
        }
        None
    }

    pub fn end(&mut self, invalidation: InvalidationId, outcome: Outcome) {
        let caller = self.caller();
        self.tell(Event::End { caller, invalidation, outcome });
        self.work();
        self.conversions += u64::from(outcome == Outcome::Committed);
    }

    /// One conversion, of something, somehow.
    pub fn step(&mut self) {
        let (page, pages) = (self.draw(PAGES - 4), 1 + self.draw(8) / 6);
        let page = if self.draw(8) == 0 { ALIAS + page } else { page };
        let to = match self.draw(3) {
            0 => PageState::Private,
            _ => PageState::Shared,
        };
        let performer = if self.draw(10) == 0 { Performer::Passgate } else { Performer::Client };
        // Now and then a batch; beyond the memory's end there is none, and it is refused as a whole.
        let more = if self.draw(8) == 0 { self.draw(12) } else { 0 };
        let ranges: Vec<_> = (0..=more).map(|n| range(self.base() + page + n * (pages + 1), pages)).collect();
        let Ok(ranges) = Ranges::try_from(ranges) else { return };
        if let Some(id) = self.begin_ranges(ranges, to, performer) {
            let unknown = self.goes_wrong();
            if unknown && self.draw(4) == 0 {
                self.leave();
                return;
            }
            if unknown {
                self.failed.push(id);
            }
            let outcome = if unknown { Outcome::Unknown { errno: 5, offset: 0 } } else { Outcome::Committed };
            self.end(id, outcome);
        }
        if self.draw(16) == 0 {
            self.settle();
            self.tell(Event::Quiet);
            self.settle();
            // A person looks after what is in quarantine, or there would soon be nothing left.
            while let Some(invalidation) = self.failed.pop() {
                let caller = self.caller();
                self.tell(Event::Release { caller, invalidation, to: PageState::Shared });
            }
            self.settle();
        }
    }

    /// The client dies between begin and end; another comes.
    fn leave(&mut self) {
        self.tell(Event::ClientGone { client: ClientId(self.client) });
        self.settle();
        let last = self.gate.snapshot().quarantine.into_iter().map(|range| range.invalidation);
        self.failed.extend(last);
        self.connect();
    }
}
