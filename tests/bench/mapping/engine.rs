//! passgate's gate on a real domain, without a daemon: each effect is executed as it comes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate::gate::{
    Answer, Backing, Caller, ClientId, DomainId, Door, Effect, Effects, Event, FileId, Gate, Hitless,
    InvalidationId, MapResult, Outcome, PageState, Performer, Policy, Ranges, RegionSpec, UnmapResult,
    Verdict,
};
use passgate_backends::{Domain, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::words;
use passgate_bindings::{PAGE, PageRange};

use super::trace::Step;

pub(crate) struct Engine {
    gate: Gate,
    domain: Arc<dyn Domain>,
    file: Arc<GuestFile>,
    calls: u64,
    max_mappings: u64,
    cookie: u64,
    spent: Duration,
}

impl Engine {
    pub(crate) fn new(domain: Arc<dyn Domain>, file: Arc<GuestFile>, hitless: Hitless) -> Self {
        let gate = Gate::new(Policy { hitless, ..Policy::default() }, words::private);
        let mut engine =
            Self { gate, domain, file, calls: 0, max_mappings: 0, cookie: 0, spent: Duration::ZERO };
        let caps = engine.domain.capabilities();
        engine.handle(Event::DomainAdded { domain: DomainId(0), caps });
        engine
    }

    /// Adds a region of `pages` pages at address 0.
    pub(crate) fn add(&mut self, pages: u64, initial: PageState) {
        let caller = self.caller();
        let spec = RegionSpec {
            gpa: PageRange::new(0, pages * PAGE).unwrap(),
            backing: Backing { file: FileId { device: 1, inode: 1 }, offset: Offset(0) },
            writable: true,
            piece: 0,
            page: PAGE,
            initial,
        };
        self.handle(Event::AddRegion { caller, spec });
        assert_eq!(self.gate.snapshot().regions.len(), 1, "the memory was refused");
    }

    /// Performs one step of a trace: begin, verdict, end.
    pub(crate) fn convert(&mut self, step: &Step) {
        let ranges = Ranges::try_from(step.ranges.clone()).unwrap();
        let began = Instant::now();
        let (caller, to, performer) = (self.caller(), step.to, Performer::Client);
        let granted = self.handle(Event::Begin { caller, ranges, to, performer, deadline_ns: u64::MAX });
        let invalidation = granted.expect("every conversion of the trace is granted");
        let caller = self.caller();
        self.handle(Event::End { caller, invalidation, outcome: Outcome::Committed });
        self.spent += began.elapsed();
        self.max_mappings = self.max_mappings.max(self.mappings());
    }

    /// Returns the number of kernel calls that made or removed mappings: one for each mapping made, and one for each unmap.
    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }

    /// Returns the time of all conversions, without that of reading the gate's state.
    pub(crate) fn spent(&self) -> Duration {
        self.spent
    }

    pub(crate) fn max_mappings(&self) -> u64 {
        self.max_mappings
    }

    pub(crate) fn mappings(&self) -> u64 {
        self.gate.snapshot().mappings[0].used
    }

    fn caller(&mut self) -> Caller {
        self.cookie += 1;
        Caller { client: ClientId(1), door: Door::Channel, cookie: self.cookie }
    }

    fn handle(&mut self, event: Event) -> Option<InvalidationId> {
        let (mut effects, mut granted, mut at) = (Effects::new(), None, 0);
        self.gate.handle(event, &mut effects);
        while let Some(effect) = effects.get(at).cloned() {
            at += 1;
            let next = match effect {
                Effect::Map { job, iova, piece, offset, writable, .. } => {
                    self.calls += (iova.end().0 - 1) / piece - iova.start().0 / piece + 1;
                    self.domain
                        .map(iova, piece, &self.file, offset, writable)
                        .unwrap_or_else(|e| panic!("{e}"));
                    Event::Mapped { job, result: MapResult::Mapped }
                }
                Effect::Unmap { job, iova, .. } => {
                    Event::Unmapped { job, result: self.unmap(|d| d.unmap(iova)), took_ns: 0 }
                }
                Effect::Replace { job, gone, .. } => {
                    Event::Unmapped { job, result: self.unmap(|d| d.replace(&gone)), took_ns: 0 }
                }
                Effect::Answer {
                    answer: Answer::Verdict { invalidation, verdict: Verdict::Done }, ..
                } => {
                    granted = Some(invalidation);
                    continue;
                }
                Effect::Answer { answer: Answer::Refused(refusal), .. } => panic!("{refusal}"),
                _ => continue,
            };
            self.gate.handle(next, &mut effects);
        }
        granted
    }

    fn unmap(&mut self, call: impl FnOnce(&dyn Domain) -> Unmap) -> UnmapResult {
        self.calls += 1;
        match call(&*self.domain) {
            Unmap::Gone { bytes } => UnmapResult::Gone { bytes },
            other => panic!("{other:?}, though no device is at work"),
        }
    }
}
