//! One VM: its gate, its files, its domains and devices. Runs the gate's effects.
//!
//! A session does nothing by itself: its owner feeds it events and asks it what is [`Next`]. Calls that may block
//! are handed out ([`Next::Call`]); the session is never inside one. So whoever owns the session can always answer in
//! time. The session has no thread and reads the time from a [`Clock`] only, so that a test decides the order of all
//! that happens.

mod call;
mod canonical;
mod clock;
pub mod fdstore;
mod files;
pub mod guardian;
mod held;
mod joined;
pub mod lasting;
mod pool;
mod receipts;
mod resume;
mod start;
mod timers;

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::RangeInclusive;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_backends::{Device, Domain, Ticket};
use passgate_bindings::{Gpa, Iova, PageRange};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::gate::{
    Admits, Answer, Caller, DeviceId, DomainId, Effect, Effects, Event, FileId, Gate, InvalidationId, JobId,
    Notice, Outcome, Policy, QuarantineStatus, Receipt, RegionSpec, Said, Snapshot, Step, Verdict,
};
use crate::observe::metrics::{self, Meter};
use crate::observe::records::Records;
use crate::protocol::verbs::{AddMemory, Totals};

pub use call::{Call, Examined, Returned};
pub use clock::{Clock, SystemClock};
use fdstore::{FdStore, Name};
pub use files::BorderError;
use files::Files;
use held::HeldAnswers;
use lasting::Lasting;
pub use pool::{Pool, Task};
use receipts::Receipts;
pub use resume::Hold;
use start::{can, start};
use timers::Timers;

/// How long nothing happens at a place until it is quiet, at least ([`Event::Quiet`]).
const MOMENT: Duration = Duration::from_secs(1);

/// How long a region waits for those to be closed that are in its way: longer than the gate gives a close
/// ([`Policy::close_deadline_ns`]).
const CLOSE_WAIT: Duration = Duration::from_secs(3);

/// What a session wants of its owner.
#[derive(Debug)]
pub enum Next {
    /// Nothing, until the next event.
    Idle,
    /// Run this call and give [`Session::returned`] its result: here and now where it [is small](Call::is_small), else
    /// on another thread.
    Call(Call),
    /// Answer a request.
    Answer(Caller, Answer),
    /// Tell a client that the memory it passed will not do.
    Refused(Caller, BorderError),
    /// Tell everybody who listens.
    Notice(Notice),
}

/// A region that waits for another to be closed.
#[derive(Debug)]
struct Waiting {
    caller: Caller,
    spec: RegionSpec,
    /// Added then, whatever is in its way.
    until: Instant,
}

/// What somebody who knows better has accepted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trust<'a> {
    /// Devices that bear faults, by their names.
    pub tolerant: &'a [String],
    /// Files of memory that can be shrunk: who does that ends this process by SIGBUS where it touches the memory.
    pub unsealed: bool,
}

/// One VM.
#[derive(Debug)]
pub struct Session {
    gate: Gate,
    effects: Effects,
    /// How far `effects` have been executed.
    done: usize,
    domains: Vec<Arc<dyn Domain>>,
    devices: Vec<Arc<dyn Device>>,
    /// The IOVAs that the devices can use; none where that is not known.
    usable: Vec<RangeInclusive<Iova>>,
    files: Files,
    held: HeldAnswers,
    /// When the gate is told that a moment has passed.
    quiet: Option<Instant>,
    /// Memory that is being examined, or will not do.
    border: VecDeque<Next>,
    /// Regions that are added once what is in their way has been closed.
    waiting: Vec<Waiting>,
    /// When to wake the gate, and for what.
    timers: Timers,
    tickets: HashMap<(DomainId, Ticket), JobId>,
    /// The devices, by their places, of which everybody was told that the host wants them back.
    wanted: HashSet<usize>,
    /// Tickets that ended before their unmap had returned to us.
    early: HashSet<(DomainId, Ticket)>,
    receipts: Receipts,
    totals: Totals,
    meter: Meter,
    clock: Arc<dyn Clock>,
    records: Option<Records>,
    lasting: Option<Lasting>,
    store: Option<FdStore>,
}

impl Session {
    /// A session over one domain and its devices, whose timers run on `clock`. `records` is where it writes down what
    /// happens, where it does; what is in quarantine there is so here. Devices named in `tolerant` bear faults.
    pub fn new(
        policy: Policy,
        domain: Arc<dyn Domain>,
        devices: Vec<Arc<dyn Device>>,
        trust: Trust<'_>,
        clock: Arc<dyn Clock>,
        mut records: Option<Records>,
        hold: Option<Hold>,
    ) -> Self {
        let mut start = start(&*domain, &devices, trust.tolerant);
        let (lasting, store, left, quarantine) = match hold {
            Some(Hold { store, lasting, left, quarantine }) => (Some(lasting), Some(store), left, quarantine),
            None => (None, None, None, None),
        };
        // What the ledger has of an earlier daemon's quarantine is the same, and more.
        if left.is_none() {
            start.extend(records.as_mut().map(Records::take_left).unwrap_or_default());
        }
        let mut files = Files::new(trust.unsealed);
        if let Some((events, mut kept)) = quarantine {
            for event in &events {
                if let Event::Quarantine { file, .. } = event {
                    files.hold_again(*file, &mut kept);
                }
            }
            start.extend(events);
        }
        let mut session = Self {
            gate: Gate::new(policy),
            effects: Effects::new(),
            meter: Meter::new(domain.name()),
            done: 0,
            usable: domain.usable(),
            domains: vec![domain],
            devices,
            files,
            held: HeldAnswers::default(),
            quiet: None,
            border: VecDeque::new(),
            waiting: Vec::new(),
            timers: Timers::default(),
            tickets: HashMap::new(),
            wanted: HashSet::new(),
            early: HashSet::new(),
            receipts: Receipts::default(),
            totals: Totals::default(),
            clock,
            records,
            lasting,
            store,
        };
        if let Some(lasting) = &session.lasting {
            session.gate.keep_in(lasting.store().clone());
        }
        start.into_iter().for_each(|event| session.handle(event));
        match left {
            Some((left, kept)) => session.go_on(left, kept),
            // The disk has only what it had: no effect tells of what an earlier ledger adds.
            None => session.write_quarantine(),
        }
        session
    }

    /// Takes one event. Ask for [`Session::next_step`] until it is idle.
    pub fn handle(&mut self, event: Event) {
        let mut dropped = Vec::new();
        if let Event::ClientGone { client } = event {
            dropped = self.files.client_gone(client);
            self.waiting.retain(|waiting| waiting.caller.client != client);
        }
        let ends = match event {
            Event::End { invalidation, .. } | Event::Converted { invalidation, .. } => Some(invalidation),
            _ => None,
        };
        let promised = match event {
            // It is the next that the gate begins, where it begins it.
            Event::Begin { performer, deadline_ns, .. } => {
                Some((InvalidationId(self.gate.last().1 + 1), performer, Duration::from_nanos(deadline_ns)))
            }
            _ => None,
        };
        let map = if let Event::Mapped { job, .. } = event { Some(job) } else { None };
        let begun = metrics::begun(&event);
        let from = self.effects.len();
        if let Some(records) = &mut self.records {
            records.before(&event);
        }
        let touched = self.lasting.is_some().then(|| Lasting::touched(&event));
        self.gate.handle(event, &mut self.effects);
        if let (Some(lasting), Some(touched)) = (&mut self.lasting, touched) {
            lasting.follow(touched, &self.gate, self.effects.get(from..).unwrap_or_default());
        }
        self.meter.begun(begun, &self.effects[from..]);
        if let Some((id, performer, deadline)) = promised
            && self.gate.is_open(id)
        {
            let now = self.clock.now();
            self.timers.begin(id, now);
            self.held.begun(id, performer, deadline, now);
        }
        if let Some(records) = &mut self.records {
            let new = self.effects.get(from..).unwrap_or_default();
            records.after(new, || self.gate.quarantined_ranges().collect());
        }
        if self.quiet.is_none() && self.gate.is_frayed() {
            self.quiet = Some(self.clock.now() + MOMENT);
        }
        if let Some(id) = ends {
            self.held.hold(id, &mut self.effects, from, self.clock.now());
        } else if let Some(job) = map {
            self.held.mapped(job, &mut self.effects);
        }
        dropped.into_iter().for_each(|file| self.forget_added(file));
    }

    /// A file that came to be added was not.
    fn forget_added(&mut self, (file, private): (FileId, Option<FileId>)) {
        self.forget(file);
        if let Some(private) = private {
            self.let_go(&Name::Private(private));
        }
    }

    /// Takes what came of a call.
    pub fn returned(&mut self, returned: Returned) {
        match returned {
            Returned::Fact { event, ticket: None } => self.handle(event),
            Returned::Fact { event, ticket: Some((domain, ticket, job)) } => {
                let over = self.early.remove(&(domain, ticket));
                if !over {
                    self.tickets.insert((domain, ticket), job);
                }
                self.handle(event);
                if over {
                    self.handle(Event::Released { job });
                }
            }
            Returned::Facts(events) => events.into_iter().for_each(|event| self.handle(event)),
            Returned::Apart(calls) => self.border.extend(calls.into_iter().map(Next::Call)),
            Returned::Examined { caller, memory, files } => {
                let reserved: Vec<_> = self.devices.iter().filter_map(|device| device.reserved()).collect();
                let kept: Vec<_> = if self.store.is_some() {
                    files.iter().enumerate().filter_map(|(nth, file)| file.kept_as(nth)).collect()
                } else {
                    Vec::new()
                };
                match self.files.admit(caller, &memory, files, &reserved, &self.usable) {
                    Ok(spec) => self.add_region(caller, spec),
                    Err(error) => {
                        kept.into_iter().for_each(|name| self.let_go(&name));
                        self.border.push_back(Next::Refused(caller, error));
                    }
                }
            }
        }
    }

    fn arm(&mut self, invalidation: InvalidationId, rung: Step, after_ns: u64) {
        self.timers.arm(invalidation, rung, Duration::from_nanos(after_ns), self.clock.now());
    }

    /// A client's memory, as it came: examined, checked, and added once the gate has admitted it.
    pub fn add_memory(&mut self, caller: Caller, memory: AddMemory, fds: Vec<OwnedFd>) {
        let store = self.store.clone();
        let held = self.files.all();
        self.border.push_back(Next::Call(Call::Examine { caller, memory, fds, held, store }));
    }

    /// Returns how an open conversion of this client's ended, from what its owner says of it. Of one that is not open it does
    /// not matter: the gate refuses the end.
    pub fn outcome(&self, id: InvalidationId, said: Said) -> Outcome {
        said.outcome(self.gate.length_of(id).unwrap_or(u64::MAX))
    }

    /// Whether passgate may convert this range itself.
    pub fn may_convert(&self, range: PageRange<Gpa>) -> Result<(), BorderError> {
        self.files.may_convert(range)
    }

    /// What a request of a device's may come to over this range ([`Gate::admits`]).
    pub fn admits(&self, iova: PageRange<Iova>, writes: bool) -> Admits {
        self.gate.admits(iova, writes)
    }

    /// What to do next.
    pub fn next_step(&mut self) -> Next {
        if let Some(next) = self.border.pop_front() {
            return next;
        }
        loop {
            if let Some(next) = self.next_effect() {
                return next;
            }
            self.effects.clear();
            self.done = 0;
            if !self.add_waiting() {
                return Next::Idle;
            }
        }
    }

    /// Executes effects up to the next that its owner has to do something about.
    fn next_effect(&mut self) -> Option<Next> {
        while let Some(effect) = self.effects.get_mut(self.done) {
            self.done += 1;
            // An executed effect is never looked at again; the cheapest one takes its place.
            match std::mem::replace(effect, joined::NOTHING) {
                Effect::Arm { invalidation, rung, after_ns } => self.arm(invalidation, rung, after_ns),
                Effect::Answer { caller, answer } => {
                    self.note(caller, &answer);
                    return Some(Next::Answer(caller, answer));
                }
                Effect::Notice(notice) => {
                    if let Notice::RegionClosed { region } = notice
                        && let Some(private) = self.files.close_region(region)
                    {
                        self.let_go(&Name::Private(private));
                    }
                    return Some(Next::Notice(notice));
                }
                Effect::Receipt(receipt) => self.remember(*receipt),
                Effect::ForgetFile { file } => self.forget(file),
                effect => match self.join(effect) {
                    Ok(call) => return Some(Next::Call(call)),
                    // What is asked for and cannot be called is answered all the same: the gate waits for it.
                    Err(failed) => {
                        log::error!("a call was asked for whose file, domain or device is not here");
                        failed.into_iter().for_each(|event| self.handle(event));
                    }
                },
            }
        }
        None
    }

    /// Lets go of files that nobody wants to add any more.
    pub fn unwanted(&mut self, files: Vec<Examined>) {
        let names: Vec<_> = files.iter().enumerate().filter_map(|(nth, file)| file.kept_as(nth)).collect();
        drop(files);
        if self.store.is_some() {
            names.iter().for_each(|name| self.let_go(name));
        }
    }

    /// True where a region that is not on its way out lies in `gpa`.
    pub fn is_taken(&self, gpa: PageRange<Gpa>) -> bool {
        self.gate.is_taken(gpa)
    }

    /// Adds a region, or waits with it while what is in its way is being closed.
    fn add_region(&mut self, caller: Caller, spec: RegionSpec) {
        if self.gate.waits_for_close(caller.client, &spec) {
            let until = self.clock.now() + CLOSE_WAIT;
            self.waiting.push(Waiting { caller, spec, until });
        } else {
            self.handle(Event::AddRegion { caller, spec });
        }
    }

    /// Adds the regions that need not wait any more, or have waited for long enough; returns whether there were any.
    fn add_waiting(&mut self) -> bool {
        let before = self.waiting.len();
        if before == 0 {
            return false;
        }
        let now = self.clock.now();
        // One by one: each that is added may be in the way of the next.
        while let Some(at) = self.waiting.iter().position(|waiting| {
            waiting.until <= now || !self.gate.waits_for_close(waiting.caller.client, &waiting.spec)
        }) {
            let Waiting { caller, spec, .. } = self.waiting.remove(at);
            self.handle(Event::AddRegion { caller, spec });
        }
        self.waiting.len() < before
    }

    fn domain_of(&self, id: DomainId) -> Option<Arc<dyn Domain>> {
        self.domains.get(usize::from(id.0)).cloned()
    }

    fn note(&mut self, caller: Caller, answer: &Answer) {
        match answer {
            Answer::RegionAdded { region, .. } => {
                let aside = self.files.added(caller, *region);
                if let (Some(lasting), Some(aside)) = (&mut self.lasting, aside) {
                    lasting.add_aside(*region, aside);
                }
            }
            Answer::Refused(_) => {
                self.meter.wrong();
                if let Some(file) = self.files.refused(caller) {
                    self.forget_added(file);
                }
            }
            Answer::Verdict { invalidation, verdict } => {
                self.timers.over(*invalidation);
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

    fn remember(&mut self, receipt: Receipt) {
        self.timers.over(receipt.invalidation);
        self.held.over(receipt.invalidation);
        self.meter.receipt(&receipt);
        if receipt.steps.iter().any(|step| step.in_flight) {
            self.totals.late_dma_waited += 1;
        }
        self.receipts.push(receipt);
    }

    /// When the session must be woken next, at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let waiting = self.waiting.iter().map(|waiting| waiting.until);
        let others = [self.timers.next(), self.held.next_deadline(), self.quiet];
        others.into_iter().flatten().chain(waiting).min()
    }

    /// Takes every timer that is over.
    pub fn expire(&mut self, now: Instant) {
        while let Some((invalidation, rung)) = self.timers.take_due(now) {
            self.handle(Event::Expired { invalidation, rung });
        }
        self.held.expire(now, &mut self.effects);
        if self.quiet.is_some_and(|when| when <= now) {
            self.quiet = None;
            self.handle(Event::Quiet);
        }
    }

    /// What becomes readable when a domain has something to say.
    pub fn wakes(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.domains.iter().filter_map(|domain| domain.wake())
    }

    /// Asks every domain which tickets have ended.
    pub fn poll_domains(&mut self) {
        let mut ended = Vec::new();
        for index in 0..self.domains.len() {
            self.domains[index].poll(&mut ended);
            let domain = DomainId(index as u16);
            for ticket in ended.drain(..) {
                match self.tickets.remove(&(domain, ticket)) {
                    Some(job) => self.handle(Event::Released { job }),
                    None => _ = self.early.insert((domain, ticket)),
                }
            }
        }
    }

    /// What becomes readable when the host wants a device back.
    pub fn requests(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.devices.iter().filter_map(|device| device.wanted())
    }

    /// Asks every device whether the host wants it back; the names of those, of which everybody is told. Each is named
    /// once.
    pub fn wanted(&mut self) -> Vec<String> {
        let asked = |device: &Arc<dyn Device>| {
            // It stays readable: a door looks at it too.
            let ready = |request| {
                poll(&mut [PollFd::from_borrowed_fd(request, PollFlags::IN)], Some(&Timespec::default()))
            };
            device.wanted().is_some_and(|request| ready(request).is_ok_and(|count| count > 0))
        };
        let mut names = Vec::new();
        for (index, device) in self.devices.iter().enumerate().filter(|(_, device)| asked(device)) {
            if !self.wanted.insert(index) {
                continue;
            }
            names.push(device.name().to_owned());
            let device = DeviceId(u16::try_from(index).unwrap_or(u16::MAX));
            self.border.push_back(Next::Notice(Notice::DeviceWanted { device }));
        }
        names
    }

    /// What is known now.
    pub fn snapshot(&self) -> Snapshot {
        self.gate.snapshot()
    }

    /// Where the guest sees the first page of what is in quarantine, while a region covers it.
    pub fn gpa_of(&self, held: &QuarantineStatus) -> Option<Gpa> {
        self.gate.gpa_of(held.file, held.range)
    }

    /// The number of regions that are there, also of those that are being closed.
    pub fn region_count(&self) -> usize {
        self.gate.region_count()
    }

    /// Totals since the start.
    pub fn totals(&self) -> Totals {
        Totals { wrong: self.meter.requests_wrong(), ..self.totals }
    }

    /// What is counted and timed.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// The evidence of one invalidation, while it is remembered.
    pub fn receipt(&self, id: InvalidationId) -> Option<&Receipt> {
        self.receipts.get(id)
    }

    /// Lines of the audit log that could not be written.
    pub fn audit_dropped(&self) -> u64 {
        self.records.as_ref().map_or(0, Records::dropped)
    }

    /// The domain that devices are in.
    pub fn domain(&self) -> Option<&Arc<dyn Domain>> {
        self.domains.first()
    }

    /// The devices, in the order of their numbers.
    pub fn devices(&self) -> &[Arc<dyn Device>] {
        &self.devices
    }

    /// A device's name.
    pub fn device_name(&self, id: DeviceId) -> &str {
        self.devices.get(usize::from(id.0)).map_or("?", |device| device.name())
    }

    /// Whether a device can be stopped by this rung.
    pub fn can(&self, id: DeviceId, step: Step) -> bool {
        self.devices.get(usize::from(id.0)).is_some_and(|device| can(&**device, step))
    }
}

#[cfg(test)]
mod border_tests;
