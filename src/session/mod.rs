//! One VM: its gate, its files, its domains and devices. Executes the gate's effects.
//!
//! A session does nothing by itself: its owner passes it events and asks for the [`Next`] step. Calls that may block are returned to
//! the owner ([`Next::Call`]); the session never makes one. So the owner can always answer clients in time. The session has
//! no thread and reads the time from a [`Clock`] only, so that a test controls the order of everything that happens.

mod call;
mod canonical;
mod clock;
mod coalesce;
mod delayed_answers;
pub mod fdstore;
mod files;
pub mod guardian;
mod initial_events;
pub mod persist;
mod pool;
pub mod quarantine_file;
mod receipts;
pub mod records;
mod resume;
mod status;
mod timers;

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::RangeInclusive;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_backends::{Device, Domain, Ticket};
use passgate_bindings::words;
use passgate_bindings::{Gpa, Iova, PageRange};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::gate::{
    Admits, Answer, Caller, DeviceId, DomainId, Effect, Effects, Event, FileId, Gate, InvalidationId, JobId,
    Notice, Outcome, Policy, QuarantineStatus, Receipt, RegionSpec, Rung, Said, Snapshot, Verdict,
};
use crate::observe::events::Names;
use crate::observe::metrics::{self, Meter};
use crate::protocol::verbs::{AddMemory, Totals};

pub use call::{Call, Examined, Returned};
pub use clock::{Clock, SystemClock};
use coalesce::EXECUTED;
use delayed_answers::DelayedAnswers;
use fdstore::{FdStore, Name};
pub use files::BorderError;
use files::Files;
use initial_events::initial_events;
use persist::PersistentState;
pub use pool::{Pool, Task};
use receipts::Receipts;
use records::Records;
pub use resume::Persistence;
pub use status::adopted;
use timers::Timers;

/// The time between two [`Event::Quiet`], while there are fragmented mappings.
const QUIET_INTERVAL: Duration = Duration::from_secs(1);

/// The time that a new region waits for the regions in its way to be closed: longer than the gate's deadline for a close
/// ([`Policy::close_deadline_ns`]).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

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

/// A new region that waits for the regions in its way to be closed.
#[derive(Debug)]
struct DeferredRegion {
    caller: Caller,
    spec: RegionSpec,
    /// The time at which it is added in any case; the gate refuses it if a region is still in its way.
    deadline: Instant,
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

/// One VM.
#[derive(Debug)]
pub struct Session {
    gate: Gate,
    effects: Effects,
    /// The number of `effects` that were executed.
    executed: usize,
    domains: Vec<Arc<dyn Domain>>,
    devices: Vec<Arc<dyn Device>>,
    /// The IOVAs that the devices can use, ascending and apart; empty if they are not known.
    usable_iova: Vec<RangeInclusive<Iova>>,
    files: Files,
    delayed_answers: DelayedAnswers,
    /// The time of the next [`Event::Quiet`]; none while no mapping is fragmented.
    quiet_at: Option<Instant>,
    /// Steps that no effect asks for: examinations of memory and their refusals, unmaps and maps that are tried one by one, and
    /// devices that the host wants back. They come before the effects.
    queued_steps: VecDeque<Next>,
    /// New regions that wait for the regions in their way to be closed.
    deferred_regions: Vec<DeferredRegion>,
    timers: Timers,
    /// The unmaps with operations in flight, by the ticket of these.
    tickets: HashMap<(DomainId, Ticket), JobId>,
    /// The indices of the devices that the host wants back, once that is reported.
    reported_wanted: HashSet<usize>,
    /// Tickets that ended before the result of their unmap arrived.
    early_tickets: HashSet<(DomainId, Ticket)>,
    receipts: Receipts,
    totals: Totals,
    meter: Meter,
    clock: Arc<dyn Clock>,
    records: Option<Records>,
    persistent: Option<PersistentState>,
    fd_store: Option<FdStore>,
}

impl Session {
    /// Returns a session over one domain and its devices, whose timers run on `clock`. It writes its audit log and its quarantine to
    /// `records`, and takes over the quarantine that is there. With `hold` it outlives its process, and takes over the state of
    /// an earlier one.
    pub fn new(
        policy: Policy,
        domain: Arc<dyn Domain>,
        devices: Vec<Arc<dyn Device>>,
        trust: Trust<'_>,
        clock: Arc<dyn Clock>,
        mut records: Option<Records>,
        hold: Option<Persistence>,
    ) -> Self {
        let mut first_events = initial_events(&*domain, &devices, trust.tolerant);
        let (persistent, fd_store, left, quarantine) = match hold {
            Some(Persistence { store, persistent, earlier: left, quarantine }) => {
                (Some(persistent), Some(store), left, quarantine)
            }
            None => (None, None, None, None),
        };
        // The ledger of an earlier daemon has this quarantine, too, and more: `resume_from` adds what it may lack.
        if left.is_none() {
            first_events.extend(records.as_mut().map(Records::take_quarantine).unwrap_or_default());
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
        let mut session = Self {
            gate: Gate::new(policy, words::private),
            effects: Effects::new(),
            meter: Meter::new(domain.name()),
            executed: 0,
            usable_iova: domain.usable(),
            domains: vec![domain],
            devices,
            files,
            delayed_answers: DelayedAnswers::default(),
            quiet_at: None,
            queued_steps: VecDeque::new(),
            deferred_regions: Vec::new(),
            timers: Timers::default(),
            tickets: HashMap::new(),
            reported_wanted: HashSet::new(),
            early_tickets: HashSet::new(),
            receipts: Receipts::default(),
            totals: Totals::default(),
            clock,
            records,
            persistent,
            fd_store,
        };
        if let Some(persistent) = &session.persistent {
            session.gate.keep_in(persistent.store().clone());
        }
        first_events.into_iter().for_each(|event| session.handle(event));
        match left {
            Some((left, kept)) => session.resume_from(left, kept),
            // The quarantine that was read from an earlier ledger is not on the disk yet, and no effect reports it.
            None => session.write_quarantine(),
        }
        session
    }

    /// Takes one event. The owner must then call [`Session::next_step`] until it returns [`Next::Idle`].
    pub fn handle(&mut self, event: Event) {
        let mut dropped = Vec::new();
        if let Event::ClientGone { client } = event {
            dropped = self.files.client_gone(client);
            self.deferred_regions.retain(|deferred| deferred.caller.client != client);
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
        if let Some(records) = &mut self.records {
            records.record_event(&event);
        }
        let touched = self.persistent.is_some().then(|| PersistentState::touched(&event));
        self.gate.handle(event, &mut self.effects);
        // The records for the next process, and those on disk, are written before any of the effects is executed.
        if let (Some(persistent), Some(touched)) = (&mut self.persistent, touched) {
            persistent.record_changes(touched, &self.gate, self.effects.get(from..).unwrap_or_default());
        }
        self.meter.begun(begun, &self.effects[from..]);
        if let Some((id, performer, deadline)) = begin
            && self.gate.is_open(id)
        {
            let now = self.clock.now();
            self.timers.begin(id, now);
            self.delayed_answers.begun(id, performer, deadline, now);
        }
        if let Some(records) = &mut self.records {
            let new = self.effects.get(from..).unwrap_or_default();
            records.record_effects(new, || self.gate.quarantined_ranges().collect());
        }
        if self.quiet_at.is_none() && self.gate.is_fragmented() {
            self.quiet_at = Some(self.clock.now() + QUIET_INTERVAL);
        }
        if let Some(id) = ends {
            self.delayed_answers.delay(id, &mut self.effects, from, self.clock.now());
        } else if let Some(job) = map {
            self.delayed_answers.mapped(job, &mut self.effects);
        }
        dropped.into_iter().for_each(|file| self.forget_rejected(file));
    }

    /// Closes the file and the private side of a region that was not added, unless they are needed.
    fn forget_rejected(&mut self, (file, private): (FileId, Option<FileId>)) {
        self.forget(file);
        if let Some(private) = private {
            self.remove_stored(&Name::Private(private));
        }
    }

    /// Takes the result of a call.
    pub fn returned(&mut self, returned: Returned) {
        match returned {
            Returned::Fact { event, ticket: None } => self.handle(event),
            Returned::Fact { event, ticket: Some((domain, ticket, job)) } => {
                let ended = self.early_tickets.remove(&(domain, ticket));
                if !ended {
                    self.tickets.insert((domain, ticket), job);
                }
                // The result of the unmap first: the gate knows of no operations before.
                self.handle(event);
                if ended {
                    self.handle(Event::Released { job });
                }
            }
            Returned::Facts(events) => events.into_iter().for_each(|event| self.handle(event)),
            Returned::Separate(calls) => self.queued_steps.extend(calls.into_iter().map(Next::Call)),
            Returned::Examined { caller, memory, files } => {
                let reserved: Vec<_> = self.devices.iter().filter_map(|device| device.reserved()).collect();
                let stored: Vec<_> = if self.fd_store.is_some() {
                    files.iter().enumerate().filter_map(|(nth, file)| file.store_name(nth)).collect()
                } else {
                    Vec::new()
                };
                match self.files.admit(caller, &memory, files, &reserved, &self.usable_iova) {
                    Ok(spec) => self.add_region(caller, spec),
                    Err(error) => {
                        stored.into_iter().for_each(|name| self.remove_stored(&name));
                        self.queued_steps.push_back(Next::Refused(caller, error));
                    }
                }
            }
        }
    }

    fn arm(&mut self, invalidation: InvalidationId, rung: Rung, after_ns: u64) {
        self.timers.arm(invalidation, rung, Duration::from_nanos(after_ns), self.clock.now());
    }

    /// Takes a client's memory: it is examined by a call, then checked, then passed to the gate.
    pub fn add_memory(&mut self, caller: Caller, memory: AddMemory, fds: Vec<OwnedFd>) {
        let store = self.fd_store.clone();
        let in_use = self.files.all();
        self.queued_steps.push_back(Next::Call(Call::Examine { caller, memory, fds, in_use, store }));
    }

    /// Returns the outcome of a conversion from its owner's report. For one that is not open the length is not known, and does not
    /// matter: the gate refuses the end.
    pub fn outcome(&self, id: InvalidationId, said: Said) -> Outcome {
        said.outcome(self.gate.length_of(id).unwrap_or(u64::MAX))
    }

    /// Returns an error if passgate may not convert this range itself.
    pub fn may_convert(&self, range: PageRange<Gpa>) -> Result<(), BorderError> {
        self.files.may_convert(range)
    }

    /// Returns the access that a device's request gets to this range ([`Gate::admits`]).
    pub fn admits(&self, iova: PageRange<Iova>, writes: bool) -> Admits {
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
            self.executed = 0;
            if !self.add_deferred() {
                return Next::Idle;
            }
        }
    }

    /// Executes effects up to the next one that needs the owner.
    fn next_effect(&mut self) -> Option<Next> {
        while let Some(effect) = self.effects.get_mut(self.executed) {
            self.executed += 1;
            match std::mem::replace(effect, EXECUTED) {
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

    /// Closes examined files of a request that is not pursued any more, and removes them from the descriptor store unless they
    /// are needed.
    pub fn unwanted(&mut self, files: Vec<Examined>) {
        let names: Vec<_> = files.iter().enumerate().filter_map(|(nth, file)| file.store_name(nth)).collect();
        // With their claims, which would prevent the removal.
        drop(files);
        if self.fd_store.is_some() {
            names.iter().for_each(|name| self.remove_stored(name));
        }
    }

    /// Returns true if a region that is not being closed overlaps `gpa`.
    pub fn is_taken(&self, gpa: PageRange<Gpa>) -> bool {
        self.gate.is_taken(gpa)
    }

    /// Adds a region, or defers it while a region in its way is being closed.
    fn add_region(&mut self, caller: Caller, spec: RegionSpec) {
        if self.gate.waits_for_close(caller.client, &spec) {
            let deadline = self.clock.now() + CLOSE_TIMEOUT;
            self.deferred_regions.push(DeferredRegion { caller, spec, deadline });
        } else {
            self.handle(Event::AddRegion { caller, spec });
        }
    }

    /// Adds the deferred regions that need not wait any more, or whose deadline has passed. Returns true if there were any.
    fn add_deferred(&mut self) -> bool {
        let before = self.deferred_regions.len();
        if before == 0 {
            return false;
        }
        let now = self.clock.now();
        // One by one: each that is added may be in the way of the next.
        while let Some(at) = self.deferred_regions.iter().position(|deferred| {
            deferred.deadline <= now || !self.gate.waits_for_close(deferred.caller.client, &deferred.spec)
        }) {
            let DeferredRegion { caller, spec, .. } = self.deferred_regions.remove(at);
            self.handle(Event::AddRegion { caller, spec });
        }
        self.deferred_regions.len() < before
    }

    fn domain_of(&self, id: DomainId) -> Option<Arc<dyn Domain>> {
        self.domains.get(usize::from(id.0)).cloned()
    }

    /// Updates files, timers and counters by an answer that is about to be sent.
    fn record_answer(&mut self, caller: Caller, answer: &Answer) {
        match answer {
            Answer::RegionAdded { region, .. } => {
                let info = self.files.added(caller, *region);
                if let (Some(persistent), Some(info)) = (&mut self.persistent, info) {
                    persistent.add_region_info(*region, info);
                }
            }
            Answer::Refused(_) => {
                self.meter.wrong();
                if let Some(file) = self.files.refused(caller) {
                    self.forget_rejected(file);
                }
            }
            Answer::Verdict { invalidation, verdict } => {
                self.timers.end(*invalidation);
                self.meter.answered(*invalidation, *verdict);
                match verdict {
                    Verdict::Done => self.totals.done += 1,
                    Verdict::Refused { .. } => self.totals.refused += 1,
                    Verdict::Unknown { .. } => self.totals.unknown += 1,
                }
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
        self.meter.receipt(&receipt);
        if receipt.steps.iter().any(|step| step.in_flight) {
            self.totals.late_dma_waited += 1;
        }
        self.receipts.push(receipt);
    }

    /// Returns the time at which [`Session::expire`] must be called next, at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let deferred = self.deferred_regions.iter().map(|deferred| deferred.deadline);
        let others = [self.timers.next(), self.delayed_answers.next_deadline(), self.quiet_at];
        others.into_iter().flatten().chain(deferred).min()
    }

    /// Handles every alarm and deadline that is due at `now`. Deferred regions are added by the next [`Session::next_step`].
    pub fn expire(&mut self, now: Instant) {
        while let Some((invalidation, rung)) = self.timers.take_due(now) {
            self.handle(Event::Expired { invalidation, rung });
        }
        self.delayed_answers.expire(now, &mut self.effects);
        if self.quiet_at.is_some_and(|when| when <= now) {
            self.quiet_at = None;
            self.handle(Event::Quiet);
        }
    }

    /// Returns the descriptors that become readable when [`Session::poll_domains`] must be called.
    pub fn wakes(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.domains.iter().filter_map(|domain| domain.wake())
    }

    /// Takes the tickets whose operations have ended from every domain.
    pub fn poll_domains(&mut self) {
        let mut ended = Vec::new();
        for index in 0..self.domains.len() {
            self.domains[index].poll(&mut ended);
            let domain = DomainId(index as u16);
            for ticket in ended.drain(..) {
                match self.tickets.remove(&(domain, ticket)) {
                    Some(job) => self.handle(Event::Released { job }),
                    // The result of the unmap has not arrived yet: another thread made the call.
                    None => _ = self.early_tickets.insert((domain, ticket)),
                }
            }
        }
    }

    /// Returns the descriptors that become readable when the host wants a device back (`VFIO_PCI_REQ_IRQ_INDEX`).
    pub fn requests(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.devices.iter().filter_map(|device| device.wanted())
    }

    /// Returns the names of the devices that the host wants back, and reports them to every listener. Each is returned once.
    pub fn wanted(&mut self) -> Vec<String> {
        let is_requested = |device: &Arc<dyn Device>| {
            // Polled and not read: it must stay readable for whoever else polls it.
            let ready = |request| {
                poll(&mut [PollFd::from_borrowed_fd(request, PollFlags::IN)], Some(&Timespec::default()))
            };
            device.wanted().is_some_and(|request| ready(request).is_ok_and(|count| count > 0))
        };
        let mut names = Vec::new();
        for (index, device) in self.devices.iter().enumerate().filter(|(_, device)| is_requested(device)) {
            if !self.reported_wanted.insert(index) {
                continue;
            }
            names.push(device.name().to_owned());
            let device = DeviceId(u16::try_from(index).unwrap_or(u16::MAX));
            self.queued_steps.push_back(Next::Notice(Notice::DeviceWanted { device }));
        }
        names
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

    /// Returns the totals since the start.
    pub fn totals(&self) -> Totals {
        Totals { wrong: self.meter.requests_wrong(), ..self.totals }
    }

    /// Returns the counters and histograms.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Returns the evidence of one invalidation; none if it is not over, or its receipt was dropped.
    pub fn receipt(&self, id: InvalidationId) -> Option<&Receipt> {
        self.receipts.get(id)
    }

    /// Returns the number of lines of the audit log that could not be written.
    pub fn audit_dropped(&self) -> u64 {
        self.records.as_ref().map_or(0, Records::dropped)
    }

    /// Returns the domain that devices are in.
    pub fn domain(&self) -> Option<&Arc<dyn Domain>> {
        self.domains.first()
    }

    /// Returns the devices, in the order of their numbers.
    pub fn devices(&self) -> &[Arc<dyn Device>] {
        &self.devices
    }

    /// Returns the name of a device; `?` for one that the session does not have.
    pub fn device_name(&self, id: DeviceId) -> &str {
        self.devices.get(usize::from(id.0)).map_or("?", |device| device.name())
    }

    /// Returns true if the device has the fence of this rung, or the rung is no fence.
    pub fn can(&self, id: DeviceId, rung: Rung) -> bool {
        let has = |device: &Arc<dyn Device>| rung.fence().is_none_or(|step| device.stop_class().has(step));
        self.devices.get(usize::from(id.0)).is_some_and(has)
    }
}

impl Names for Session {
    fn device(&self, id: DeviceId) -> &str {
        self.device_name(id)
    }
}

#[cfg(test)]
mod tests;
