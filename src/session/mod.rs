//! One VM: its gate, its files, its domains and devices. Executes the gate's effects.
//!
//! A session does nothing by itself: its owner passes it events and asks for the [`Next`] step. Calls that may block are returned to
//! the owner ([`Next::Call`]); the session never makes one. So the owner can always answer clients in time. The session has
//! no thread and reads the time from a [`Clock`] only, so that a test controls the order of everything that happens.

mod admission;
mod call;
mod canonical;
mod clock;
mod coalesce;
mod convert;
mod deferred;
mod delayed_answers;
mod effect_queue;
pub mod fdstore;
mod files;
pub mod guardian;
mod hardware;
pub mod persist;
mod pool;
pub mod quarantine_file;
mod receipts;
pub mod records;
mod resume;
mod statistics;
mod status;
mod storage;
mod tickets;
mod timers;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_backends::{Device, Domain};
use passgate_bindings::{Gpa, Iova, PageRange, words};

use crate::gate::{
    Answer, CallLimits, Caller, DeviceId, DmaAccess, Effect, Event, Gate, InvalidationId, Notice, Outcome,
    Policy, QuarantineStatus, Receipt, ReportedEnd, Rung, Snapshot,
};
use crate::observe::events::Names;
use crate::observe::metrics::{self, Meter};
use crate::protocol::verbs::Totals;

pub use call::{Call, Examined, Returned};
pub use clock::{Clock, SystemClock};
use deferred::DeferredRegions;
use delayed_answers::DelayedAnswers;
use effect_queue::EffectQueue;
use fdstore::Name;
pub use files::BorderError;
use files::Files;
use hardware::Hardware;
pub use pool::{Pool, Task};
use records::Records;
pub use resume::Persistence;
use statistics::Statistics;
pub use status::adopted;
use storage::Storage;
use tickets::Tickets;
use timers::Timers;

/// The time between two [`Event::Quiet`], while there are fragmented mappings.
const QUIET_INTERVAL: Duration = Duration::from_secs(1);

/// The next step that a session asks of its owner.
#[derive(Debug)]
pub enum Next {
    /// Nothing until the next event.
    Idle,
    /// Run this call and pass its result to [`Session::returned`]: at once on this thread if it [is small](Call::is_small), else
    /// on another thread.
    Call(Call),
    /// Answer a request.
    Answer(Caller, Answer),
    /// Answer a request to add memory that was refused before the gate got it.
    Refused(Caller, BorderError),
    /// Report to every listener.
    Notice(Notice),
}

/// The risks that the operator has accepted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trust<'a> {
    /// The names of the devices that tolerate gaps in their DMA.
    pub tolerant: &'a [String],
    /// True if guest memory may be in files that can be shrunk. This process dies by SIGBUS if it accesses a page beyond the new
    /// end.
    pub unsealed: bool,
}

/// One VM. Each part keeps its state to itself; what is here runs the gate's effects on them.
#[derive(Debug)]
pub struct Session {
    gate: Gate,
    effects: EffectQueue,
    /// Steps that no effect asks for: examinations of memory and their refusals, unmaps and maps that are tried one by one, and
    /// devices that the host wants back. They come before the effects.
    queued_steps: VecDeque<Next>,
    hardware: Hardware,
    tickets: Tickets,
    files: Files,
    deferred_regions: DeferredRegions,
    delayed_answers: DelayedAnswers,
    timers: Timers,
    statistics: Statistics,
    storage: Storage,
    clock: Arc<dyn Clock>,
}

impl Session {
    /// Returns a session over one domain and its devices, whose timers run on `clock`. It writes its audit log and its quarantine to
    /// `records`, and takes over the quarantine that is there. With `persistence` it outlives its process, and takes over the state
    /// of an earlier one.
    pub fn new(
        policy: Policy,
        domain: Arc<dyn Domain>,
        devices: Vec<Arc<dyn Device>>,
        trust: Trust<'_>,
        clock: Arc<dyn Clock>,
        records: Option<Records>,
        persistence: Option<Persistence>,
    ) -> Self {
        let (persistent, fd_store, earlier, quarantine) = match persistence {
            Some(Persistence { store, persistent, earlier, quarantine }) => {
                (Some(persistent), Some(store), earlier, quarantine)
            }
            None => (None, None, None, None),
        };
        let statistics = Statistics::new(domain.name());
        let hardware = Hardware::new(domain, devices);
        let mut storage = Storage::new(records, persistent, fd_store);
        let mut first_events = hardware.initial_events(trust.tolerant);
        // The ledger of an earlier daemon has this quarantine, too, and more: `resume_from` adds what it may lack.
        if earlier.is_none() {
            first_events.extend(storage.take_quarantine());
        }
        let mut files = Files::new(trust.unsealed);
        if let Some((events, mut kept)) = quarantine {
            for event in &events {
                if let Event::Quarantine { file, .. } = event {
                    files.restore_file(*file, &mut kept);
                }
            }
            first_events.extend(events);
        }
        let mut gate = Gate::new(policy, words::private);
        if let Some(ledger) = storage.ledger() {
            gate.use_store(ledger);
        }
        let mut session = Self {
            gate,
            effects: EffectQueue::default(),
            queued_steps: VecDeque::new(),
            hardware,
            tickets: Tickets::default(),
            files,
            deferred_regions: DeferredRegions::default(),
            delayed_answers: DelayedAnswers::default(),
            timers: Timers::default(),
            statistics,
            storage,
            clock,
        };
        first_events.into_iter().for_each(|event| session.handle(event));
        match earlier {
            Some((earlier, kept)) => session.resume_from(earlier, kept),
            // The quarantine that was read from an earlier ledger is not on the disk yet, and no effect reports it.
            None => session.storage.write_quarantine(&session.gate),
        }
        session
    }

    /// Takes one event. The owner must then call [`Session::next_step`] until it returns [`Next::Idle`].
    pub fn handle(&mut self, event: Event) {
        let mut dropped = Vec::new();
        if let Event::ClientGone { client } = event {
            dropped = self.files.client_gone(client);
            self.deferred_regions.client_gone(client);
        }
        let ends = match event {
            Event::End { invalidation, .. } | Event::Converted { invalidation, .. } => Some(invalidation),
            _ => None,
        };
        let begin = match event {
            // The number that the gate gives to this invalidation, if it does not refuse the begin.
            Event::Begin { performer, deadline_ns, .. } => {
                Some((InvalidationId(self.gate.last().1 + 1), performer, Duration::from_nanos(deadline_ns)))
            }
            _ => None,
        };
        let map = if let Event::Mapped { job, .. } = event { Some(job) } else { None };
        let begun = metrics::begun(&event);
        let from = self.effects.len();
        let touched = self.storage.event(&event);
        self.gate.handle(event, self.effects.list());
        let new = self.effects.since(from);
        // Before any of the effects is executed.
        self.storage.effects(touched, &self.gate, new);
        self.statistics.handled(begun, new);
        if let Some((id, performer, deadline)) = begin
            && self.gate.is_open(id)
        {
            let now = self.clock.now();
            self.timers.begin(id, now);
            self.delayed_answers.begun(id, performer, deadline, now);
        }
        if !self.timers.awaits_quiet() && self.gate.is_fragmented() {
            self.timers.await_quiet(self.clock.now() + QUIET_INTERVAL);
        }
        if let Some(id) = ends {
            self.delayed_answers.delay(id, self.effects.list(), from, self.clock.now());
        } else if let Some(job) = map {
            self.delayed_answers.mapped(job, self.effects.list(), from);
        }
        dropped.into_iter().for_each(|file| self.forget_rejected(file));
    }

    /// Takes the result of a call.
    pub fn returned(&mut self, returned: Returned) {
        match returned {
            Returned::Fact { event, ticket: None } => self.handle(event),
            Returned::Fact { event, ticket: Some((domain, ticket, job)) } => {
                let ended = self.tickets.returned(domain, ticket, job);
                // The result of the unmap first: the gate knows of no operations before.
                self.handle(event);
                if ended {
                    self.handle(Event::FlightEnded { job });
                }
            }
            Returned::Facts(events) => events.into_iter().for_each(|event| self.handle(event)),
            Returned::Separate(calls) => self.queued_steps.extend(calls.into_iter().map(Next::Call)),
            Returned::Examined { caller, memory, files } => self.admit(caller, &memory, files),
        }
    }

    fn arm(&mut self, invalidation: InvalidationId, rung: Rung, after_ns: u64) {
        self.timers.arm(invalidation, rung, Duration::from_nanos(after_ns), self.clock.now());
    }

    /// Returns the outcome of a conversion from its owner's report. For one that is not open the length is not known, and does not
    /// matter: the gate refuses the end.
    pub fn outcome(&self, id: InvalidationId, said: ReportedEnd) -> Outcome {
        said.outcome(self.gate.length_of(id).unwrap_or(u64::MAX))
    }

    /// Returns an error if passgate may not convert this range itself.
    pub fn may_convert(&self, range: PageRange<Gpa>) -> Result<(), BorderError> {
        self.files.may_convert(range)
    }

    /// Returns the access that a device's request gets to this range ([`Gate::admits`]).
    pub fn admits(&self, iova: PageRange<Iova>, writes: bool) -> DmaAccess {
        self.gate.admits(iova, writes)
    }

    /// Returns the next step for the owner.
    pub fn next_step(&mut self) -> Next {
        if let Some(next) = self.queued_steps.pop_front() {
            return next;
        }
        loop {
            if let Some(next) = self.next_effect() {
                return next;
            }
            self.effects.clear();
            if !self.add_deferred() {
                return Next::Idle;
            }
        }
    }

    /// Executes effects up to the next one that needs the owner.
    fn next_effect(&mut self) -> Option<Next> {
        while let Some(effect) = self.effects.take() {
            match effect {
                Effect::Arm { invalidation, rung, after_ns } => self.arm(invalidation, rung, after_ns),
                Effect::Answer { caller, answer } => {
                    self.record_answer(caller, &answer);
                    return Some(Next::Answer(caller, answer));
                }
                Effect::Notice(notice) => {
                    if let Notice::RegionClosed { region } = notice
                        && let Some(private) = self.files.close_region(region)
                    {
                        self.remove_stored(&Name::Private(private));
                    }
                    return Some(Next::Notice(notice));
                }
                Effect::Receipt(receipt) => self.record_receipt(*receipt),
                Effect::ForgetFile { file } => self.forget(file),
                effect => match self.coalesce(effect) {
                    Ok(call) => return Some(Next::Call(call)),
                    // The gate waits for a result of every call that it asks for.
                    Err(failed) => {
                        log::error!("a call was asked for whose file, domain or device is not here");
                        failed.into_iter().for_each(|event| self.handle(event));
                    }
                },
            }
        }
        None
    }

    /// Updates files, timers and counters by an answer that is about to be sent.
    fn record_answer(&mut self, caller: Caller, answer: &Answer) {
        match answer {
            Answer::RegionAdded { region, .. } => {
                let info = self.files.added(caller, *region);
                if let Some(info) = info {
                    self.storage.add_region_info(*region, info);
                }
            }
            Answer::Refused(_) => {
                self.statistics.request_refused();
                if let Some(file) = self.files.refused(caller) {
                    self.forget_rejected(file);
                }
            }
            Answer::Verdict { invalidation, verdict } => {
                self.timers.end(*invalidation);
                self.statistics.answered(*invalidation, *verdict);
            }
            Answer::RegionRemoved { .. }
            | Answer::Ended { .. }
            | Answer::Released { .. }
            | Answer::Adopted { .. } => {}
        }
    }

    /// Stores the receipt of an invalidation that is over.
    fn record_receipt(&mut self, receipt: Receipt) {
        self.timers.end(receipt.invalidation);
        self.delayed_answers.end(receipt.invalidation);
        self.statistics.add_receipt(receipt);
    }

    /// Returns the time at which [`Session::expire`] must be called next, at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let delayed = self.delayed_answers.next_deadline();
        let retry = self.storage.quarantine_retry_at();
        [self.timers.next(), delayed, self.deferred_regions.next_deadline(), retry]
            .into_iter()
            .flatten()
            .min()
    }

    /// Handles every alarm and deadline that is due at `now`. Deferred regions are added by the next [`Session::next_step`].
    pub fn expire(&mut self, now: Instant) {
        while let Some((invalidation, rung)) = self.timers.take_due(now) {
            self.handle(Event::Expired { invalidation, rung });
        }
        self.delayed_answers.expire(now, self.effects.list());
        self.deferred_regions.expire(now);
        self.storage.retry_quarantine(now, &self.gate);
        if self.timers.take_quiet(now) {
            self.handle(Event::Quiet);
        }
    }

    /// Returns the descriptors that become readable when [`Session::poll_domains`] must be called.
    pub fn wakes(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.hardware.domains().filter_map(|(_, domain)| domain.wake())
    }

    /// Takes the tickets whose operations have ended from every domain.
    pub fn poll_domains(&mut self) {
        let (mut ended, mut jobs) = (Vec::new(), Vec::new());
        for (id, domain) in self.hardware.domains() {
            domain.poll(&mut ended);
            jobs.extend(ended.drain(..).filter_map(|ticket| self.tickets.ended(id, ticket)));
        }
        jobs.into_iter().for_each(|job| self.handle(Event::FlightEnded { job }));
    }

    /// Returns the descriptors that become readable when the host wants a device back (`VFIO_PCI_REQ_IRQ_INDEX`).
    pub fn requests(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.hardware.requests()
    }

    /// Returns the names of the devices that the host wants back, and reports them to every listener. Each is returned once.
    pub fn wanted(&mut self) -> Vec<String> {
        let wanted = self.hardware.newly_wanted();
        let notices = wanted.iter().map(|device| Next::Notice(Notice::DeviceWanted { device: *device }));
        self.queued_steps.extend(notices);
        wanted.into_iter().map(|device| self.device_name(device).to_owned()).collect()
    }

    /// Returns the state of the gate.
    pub fn snapshot(&self) -> Snapshot {
        self.gate.snapshot()
    }

    /// Returns the guest-physical address of the first page of a quarantined range, while a region covers it.
    pub fn gpa_of(&self, status: &QuarantineStatus) -> Option<Gpa> {
        self.gate.gpa_of(status.file, status.range)
    }

    /// Returns the number of regions, including those that are being closed.
    pub fn region_count(&self) -> usize {
        self.gate.region_count()
    }

    /// Returns true while a close waits for proof: each ends in time, or goes on as long as it progresses.
    pub fn is_closing(&self) -> bool {
        self.gate.is_closing()
    }

    /// Returns the totals since the start.
    pub fn totals(&self) -> Totals {
        self.statistics.totals()
    }

    /// Returns the counters and histograms.
    pub fn meter(&self) -> &Meter {
        self.statistics.meter()
    }

    /// Returns the evidence of one invalidation; none if it is not over, or its receipt was dropped.
    pub fn receipt(&self, id: InvalidationId) -> Option<&Receipt> {
        self.statistics.receipt(id)
    }

    /// Returns the number of lines of the audit log that could not be written.
    pub fn audit_dropped(&self) -> u64 {
        self.storage.dropped()
    }

    /// Sets the sizes in which the gate asks for calls, for tests with small regions.
    pub fn set_call_limits(&mut self, limits: CallLimits) {
        self.gate.set_call_limits(limits);
    }

    /// Returns the domain that devices are in.
    pub fn domain(&self) -> Option<&Arc<dyn Domain>> {
        self.hardware.domains().map(|(_, domain)| domain).next()
    }

    /// Returns the devices, in the order of their numbers.
    pub fn devices(&self) -> &[Arc<dyn Device>] {
        self.hardware.devices()
    }

    /// Returns the name of a device; `?` for one that the session does not have.
    pub fn device_name(&self, id: DeviceId) -> &str {
        self.hardware.device(id).map_or("?", |device| device.name())
    }

    /// Returns true if the device has the fence of this rung, or the rung is no fence.
    pub fn can(&self, id: DeviceId, rung: Rung) -> bool {
        let has = |device: &Arc<dyn Device>| rung.fence().is_none_or(|step| device.stop_class().has(step));
        self.hardware.device(id).is_some_and(has)
    }
}

impl Names for Session {
    fn device(&self, id: DeviceId) -> &str {
        self.device_name(id)
    }
}

#[cfg(test)]
mod tests;
