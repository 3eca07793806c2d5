//! One machine, the daemons that run on it one after the other, and their clients.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use passgate::gate::{
    Caller, ClientId, Door, Event, FileId, ORPHANS, Outcome as Converted, PageState, Performer, RegionStatus,
    Rung, UnmapResult,
};
use passgate::session::fdstore::{FdStore, Name, StoredFds as KeptFiles};
use passgate::session::persist::PersistentState;
use passgate::session::{Call, Next, Persistence, Returned, Session, Trust};
use passgate_backends::handover::DomainIds;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange, identity};
use passgate_client::protocol::verbs::AddMemory;

use crate::action::{Action, Ending};
use crate::canonical::{self, Fingerprint};
use crate::clock::{self, ManualClock};
use crate::config::{Config, DEADLINE_NS};
use crate::kernel::{Kernel, Outcome};
use crate::ledger;
use crate::oracle::{BrokenPromise, CheckResult, Content, Oracle, Region, RequestKind, broken};

/// The second connection, which may begin conversions and owns no memory.
const SECOND_CLIENT: ClientId = ClientId(2);
/// The operator's connection.
const OPERATOR: ClientId = ClientId(3);
/// The id of the VM's first connection; later connections of a VM count up from it.
const FIRST_VM_CLIENT: u32 = 10;
/// The first guest-physical page of the region, and of the second region.
const REGION_STARTS: [u64; 2] = [16, 64];
/// The number of steps within which a world without new requests must come to rest.
const MAX_REST_STEPS: usize = 400;
/// The number of timers in a row, without a call between, after which a world counts as at rest: a session with fragmented
/// mappings has a tick every second for ever.
const MAX_IDLE_TICKS: u32 = 16;
/// The time within which an end must be answered, in nanoseconds: its answer may wait for the maps that follow it.
const END_DEADLINE_NS: u64 = 500_000_000;

pub struct World<'a> {
    config: &'a Config,
    kernel: Arc<Kernel>,
    clock: Arc<ManualClock>,
    now: Instant,
    session: Session,
    ledger: Option<OwnedFd>,
    oracle: Oracle,
    /// Calls that the kernel has not executed.
    calls: Vec<Call>,
    /// Results that were not delivered to the session.
    results: Vec<Returned>,
    /// The VM's connection, if there is one.
    vm: Option<ClientId>,
    has_second: bool,
    budget: Budget,
    last_cookie: u64,
    /// True while the session has events to which it has not reacted.
    is_pending: bool,
}

/// The actions that remain possible on this path.
#[derive(Debug)]
struct Budget {
    /// The conversions that were begun, a bit for each.
    begun: u64,
    faults: u8,
    kills: u8,
    removals: u8,
    releases: u8,
    may_add: bool,
    /// The number of VM connections after the first.
    connections: u32,
}

/// Returns the guest's memory: one file for all worlds, because its bytes are never read.
fn guest_file() -> &'static GuestFile {
    static FILE: OnceLock<GuestFile> = OnceLock::new();
    FILE.get_or_init(|| GuestFile::memfd("search", 16 * PAGE).expect("a small memfd"))
}

fn guest_fd() -> OwnedFd {
    guest_file().as_fd().try_clone_to_owned().expect("a descriptor")
}

fn file_id() -> FileId {
    static ID: OnceLock<FileId> = OnceLock::new();
    *ID.get_or_init(|| {
        let found = identity::identify(guest_fd()).expect("a memfd");
        FileId { device: found.device, inode: found.inode }
    })
}

impl<'a> World<'a> {
    /// Returns a world whose VM has added its memory.
    pub fn new(config: &'a Config) -> CheckResult<Self> {
        let kernel = Kernel::new(config.machine);
        let clock = Arc::new(ManualClock::new());
        let (session, ledger) = first_daemon(config, &kernel, &clock);
        let mut world = Self {
            config,
            kernel,
            clock,
            now: clock::start(),
            session,
            ledger,
            oracle: Oracle::new(config.pages),
            calls: Vec::new(),
            results: Vec::new(),
            vm: Some(ClientId(FIRST_VM_CLIENT)),
            has_second: true,
            budget: Budget {
                begun: 0,
                faults: config.faults,
                kills: config.kills,
                removals: config.removals,
                releases: config.releases,
                may_add: config.adds_alias,
                connections: 0,
            },
            last_cookie: 0,
            is_pending: false,
        };
        world.drain()?;
        for start in &REGION_STARTS[..1 + usize::from(config.alias)] {
            world.add_region(*start);
            world.drain()?;
            while !world.calls.is_empty() {
                world.execute(0, Outcome::Done);
                for returned in std::mem::take(&mut world.results) {
                    world.deliver(returned);
                }
                world.drain()?;
            }
        }
        Ok(world)
    }

    /// Returns the world after `path`.
    pub fn replay(config: &'a Config, path: &[Action]) -> CheckResult<Self> {
        let mut world = Self::new(config)?;
        path.iter().try_for_each(|action| world.act(*action))?;
        Ok(world)
    }

    fn caller(&mut self, client: ClientId) -> Caller {
        self.last_cookie += 1;
        Caller { client, door: Door::Control, cookie: self.last_cookie }
    }

    fn after(&self, ns: u64) -> Option<Instant> {
        Some(self.now + Duration::from_nanos(ns))
    }

    fn add_region(&mut self, start: u64) {
        let Some(client) = self.vm else { return };
        let caller = self.caller(client);
        let memory = AddMemory {
            piece: self.config.piece * PAGE,
            sole_mapper: true,
            ..AddMemory::shared(start * PAGE, self.config.pages * PAGE)
        };
        self.oracle.add_request(caller, RequestKind::Add, None);
        self.session.add_memory(caller, memory, vec![guest_fd()]);
    }

    /// Returns every action that is possible next.
    pub fn enabled(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        let Budget { begun, faults, kills, removals, releases, may_add, .. } = self.budget;
        for nth in 0..self.calls.len() {
            let outcomes = if faults > 0 { self.faults_of(&self.calls[nth]) } else { Vec::new() };
            let outcomes = std::iter::once(Outcome::Done).chain(outcomes);
            actions.extend(outcomes.map(|outcome| Action::Call(nth as u8, outcome)));
        }
        actions.extend((0..self.results.len()).map(|nth| Action::Result(nth as u8)));
        let flights = self.kernel.state().flights.len();
        actions.extend((0..flights).map(|nth| Action::FlightEnds(nth as u8)));
        for (nth, conversion) in self.config.conversions.iter().enumerate() {
            let client = if conversion.by_second { self.has_second } else { self.vm.is_some() };
            let is_begun = begun >> nth & 1 == 1 && !self.config.repeats;
            if client && !is_begun && !(self.config.repeats && self.oracle.is_begun(conversion.pages)) {
                actions.push(Action::Begin(nth as u8));
            }
        }
        for nth in 0..self.oracle.granted.len() {
            actions.extend(self.config.endings.iter().map(|ending| Action::End(nth as u8, *ending)));
        }
        if self.config.time && !self.is_pending && self.session.next_deadline().is_some() {
            actions.push(Action::Tick);
        }
        if self.config.deaths && self.vm.is_some() {
            actions.push(Action::ClientDies);
        }
        if self.config.second_dies && self.has_second {
            actions.push(Action::SecondDies);
        }
        if removals > 0
            && let Some(vm) = self.vm
        {
            let removable = |(_, region): &(usize, &Region)| region.owner == vm && !region.closing;
            let regions = self.oracle.regions.iter().enumerate().filter(removable);
            actions.extend(regions.map(|(nth, _)| Action::Remove(nth as u8)));
        }
        if may_add && self.vm.is_some() {
            actions.push(Action::AddAlias);
        }
        if releases > 0 {
            for (nth, id) in self.oracle.quarantines().into_iter().enumerate() {
                let settles = self.vm.is_some_and(|vm| self.session.may_settle(vm, id));
                for to in &self.config.released_as {
                    actions.push(Action::Release(nth as u8, *to));
                    if settles {
                        actions.push(Action::Settle(nth as u8, *to));
                    }
                }
            }
        }
        if self.vm.is_none() && self.session.has_orphans() {
            actions.extend([Action::Adopt, Action::GiveUp]);
        } else if self.vm.is_none() && self.config.repeats {
            actions.push(Action::Connect);
        }
        if self.is_pending {
            actions.push(Action::Drain);
        }
        // After a kill an unanswered release may have taken effect or not, which the oracle could not know.
        if kills > 0 && !self.oracle.waits_for_release() {
            let masks = if self.config.splits_calls { 1 } else { 1 << self.calls.len().min(4) };
            actions.extend((0..masks).map(Action::Kill));
        }
        actions
    }

    /// Returns the faults that this call may have here, without those that have the same effect as another.
    fn faults_of(&self, call: &Call) -> Vec<Outcome> {
        let state = self.kernel.state();
        let (faults, skipped) = match call {
            Call::Map { iova, piece, .. } => {
                let is_one = iova.len() <= *piece;
                (&self.config.map_faults, is_one.then_some(Outcome::FailsHalf))
            }
            Call::Unmap { iova, .. } => {
                let is_one = state.mappings.iter().filter(|m| iova.contains(iova_of(m.start))).count() < 2;
                (&self.config.unmap_faults, is_one.then_some(Outcome::FailsHalf))
            }
            Call::Fence { .. } | Call::Replace { .. } => (&self.config.fence_faults, None),
            Call::Attach { .. } => {
                let is_out = state.device_states.iter().all(|device| !device.attached);
                (&self.config.attach_faults, is_out.then_some(Outcome::FailsOut))
            }
            Call::Convert { .. } => (&self.config.convert_faults, None),
            Call::Examine { .. } => return Vec::new(),
        };
        // After a restart the gate does not know how many bytes a range in doubt has, so it cannot detect a short unmap.
        let is_settled = self.budget.kills < self.config.kills;
        let is_possible =
            |fault: &Outcome| Some(*fault) != skipped && !(is_settled && *fault == Outcome::Short);
        faults.iter().copied().filter(is_possible).collect()
    }

    /// Performs one action, and judges its results.
    pub fn act(&mut self, action: Action) -> CheckResult {
        match action {
            Action::Begin(nth) => self.begin(nth),
            Action::End(nth, ending) => {
                let granted = self.oracle.end(nth.into(), ending);
                let outcome = match ending {
                    Ending::Committed => Converted::Committed,
                    Ending::NotCommitted => Converted::NotCommitted,
                    Ending::Unknown => Converted::Unknown { errno: 5, offset: 0 },
                };
                let caller = self.caller(granted.client);
                self.oracle.add_request(caller, RequestKind::End, self.after(END_DEADLINE_NS));
                self.session.handle(Event::End { caller, invalidation: granted.id, outcome });
            }
            Action::Call(nth, outcome) => self.execute(nth.into(), outcome),
            Action::Result(nth) => {
                let returned = self.results.remove(nth.into());
                self.deliver(returned);
            }
            Action::FlightEnds(nth) => {
                self.kernel.state().end_flight(nth.into());
                self.session.poll_domains();
                self.renew_removals();
            }
            Action::Tick => {
                if let Some(due) = self.session.next_deadline() {
                    self.now = self.now.max(due);
                    self.clock.set(self.now);
                    self.session.expire(self.now);
                }
            }
            Action::ClientDies => {
                if let Some(client) = self.vm.take() {
                    // The event loop drops the examination of memory whose client is gone.
                    self.calls.retain(|call| !matches!(call, Call::Examine { .. }));
                    self.results.retain(|result| !matches!(result, Returned::Examined { .. }));
                    self.oracle.client_dies(client);
                    self.session.handle(Event::ClientGone { client });
                }
            }
            Action::SecondDies => {
                self.has_second = false;
                self.oracle.client_dies(SECOND_CLIENT);
                self.session.handle(Event::ClientGone { client: SECOND_CLIENT });
            }
            Action::Remove(nth) => {
                self.budget.removals -= 1;
                let Region { id: region, owner, .. } = self.oracle.regions[usize::from(nth)];
                let caller = self.caller(owner);
                self.oracle.add_request(caller, RequestKind::Remove(region), self.after(DEADLINE_NS));
                self.session.handle(Event::RemoveRegion { caller, region });
            }
            Action::AddAlias => {
                self.budget.may_add = self.config.repeats;
                self.add_region(REGION_STARTS[1]);
            }
            Action::Connect => {
                self.budget.connections += 1;
                self.vm = Some(ClientId(FIRST_VM_CLIENT + self.budget.connections));
                self.add_region(REGION_STARTS[0]);
            }
            Action::Release(nth, to) => self.release(OPERATOR, nth, to),
            Action::Settle(nth, to) => self.release(self.vm.unwrap_or(OPERATOR), nth, to),
            Action::Adopt => {
                self.budget.connections += 1;
                let client = ClientId(FIRST_VM_CLIENT + self.budget.connections);
                self.vm = Some(client);
                let caller = self.caller(client);
                self.oracle.add_request(caller, RequestKind::Adopt, self.after(0));
                self.session.handle(Event::Adopt { caller });
            }
            Action::GiveUp => {
                let orphans = self.oracle.regions.iter_mut().filter(|region| region.owner == ORPHANS);
                orphans.for_each(|region| region.closing = true);
                self.session.handle(Event::ClientGone { client: ORPHANS });
            }
            Action::Kill(done) => self.kill(done)?,
            Action::Drain => {}
        }
        self.is_pending = self.config.batches && !matches!(action, Action::Drain | Action::Kill(_));
        if !self.is_pending {
            self.drain()?;
            self.oracle.resumed();
        }
        if matches!(action, Action::Kill(_)) {
            self.oracle.learn(&self.session.snapshot().quarantine);
        }
        self.check()
    }

    fn begin(&mut self, nth: u8) {
        let conversion = self.config.conversions[usize::from(nth)];
        self.budget.begun |= 1 << nth;
        let client = if conversion.by_second { SECOND_CLIENT } else { self.vm.unwrap_or(SECOND_CLIENT) };
        let caller = self.caller(client);
        let first = u64::from(conversion.pages.trailing_zeros());
        let count = u64::from(conversion.pages.count_ones());
        let own = self.oracle.regions.iter().find(|region| region.owner == client && !region.closing);
        let start = own.map_or(REGION_STARTS[0], |region| region.start);
        let range = PageRange::<Gpa>::new((start + first) * PAGE, count * PAGE).expect("pages");
        let kind = RequestKind::Begin {
            pages: conversion.pages,
            to: conversion.to,
            by_passgate: conversion.by_passgate,
        };
        self.oracle.add_request(caller, kind, self.after(DEADLINE_NS));
        let performer = if conversion.by_passgate { Performer::Passgate } else { Performer::Client };
        self.session.handle(Event::Begin {
            caller,
            ranges: range.into(),
            to: conversion.to,
            performer,
            deadline_ns: DEADLINE_NS,
        });
    }

    fn release(&mut self, client: ClientId, nth: u8, to: PageState) {
        self.budget.releases -= 1;
        let invalidation = self.oracle.quarantines()[usize::from(nth)];
        let caller = self.caller(client);
        self.oracle.add_request(caller, RequestKind::Release(invalidation, to), self.after(0));
        self.session.handle(Event::Release { caller, invalidation, to });
    }

    /// The kernel executes a call.
    fn execute(&mut self, nth: usize, outcome: Outcome) {
        let call = self.calls.remove(nth);
        if outcome != Outcome::Done {
            self.budget.faults -= 1;
        }
        let returned = match call {
            Call::Convert { invalidation, .. } => {
                let outcome = match outcome {
                    Outcome::Done => Converted::Committed,
                    Outcome::Fails => Converted::NotCommitted,
                    _ => Converted::Unknown { errno: 5, offset: 0 },
                };
                Returned::Fact { event: Event::Converted { invalidation, outcome }, ticket: None }
            }
            call => {
                self.kernel.set_next_outcome(outcome);
                call.run()
            }
        };
        if self.config.splits_calls {
            self.results.push(returned);
        } else {
            self.deliver(returned);
        }
    }

    /// Delivers the result of a call to the session.
    fn deliver(&mut self, returned: Returned) {
        if let Returned::Fact { event: Event::Converted { invalidation, outcome }, .. } = returned {
            self.oracle.converted(invalidation, outcome);
        }
        // The event loop drops memory whose client is gone meanwhile.
        if let Returned::Examined { caller, .. } = &returned
            && self.vm != Some(caller.client)
        {
            return;
        }
        let gone = |event: &Event| matches!(event, Event::Unmapped { result: UnmapResult::Gone { .. }, .. });
        let progresses = match &returned {
            Returned::Fact { event, .. } => gone(event),
            Returned::Facts(events) => events.iter().any(gone),
            _ => false,
        };
        self.session.returned(returned);
        if progresses {
            self.renew_removals();
        }
        self.record_regions();
    }

    /// Something was unmapped: the deadline of a removal begins anew, at the end of the part that is running.
    fn renew_removals(&mut self) {
        let due = self.after(DEADLINE_NS + DEADLINE_NS / (Rung::LADDER.len() as u64 + 1));
        self.oracle.renew_removals(due);
    }

    /// Records the regions that were added: at once, or after a region in their way was closed.
    fn record_regions(&mut self) {
        let snapshot = self.session.snapshot().regions;
        let is_new = |one: &&RegionStatus| {
            !one.closing && self.oracle.regions.iter().all(|other| other.id != one.region)
        };
        let new: Vec<_> = snapshot
            .iter()
            .filter(is_new)
            .map(|one| Region {
                id: one.region,
                owner: one.owner,
                start: one.spec.gpa.start().0 / PAGE,
                closing: false,
            })
            .collect();
        if !new.is_empty() && snapshot.len() == new.len() {
            // No region showed the file: its pages are what the VM states now.
            self.oracle.reset_to_shared();
        }
        self.oracle.regions.extend(new);
    }

    /// Takes every step that the session emits; its calls are only queued.
    fn drain(&mut self) -> CheckResult {
        loop {
            let next = self.session.next_step();
            if self.oracle.awaits_memory() {
                self.record_regions();
            }
            match next {
                Next::Idle => return Ok(()),
                Next::Call(call) => {
                    self.judge_call(&call)?;
                    self.calls.push(call);
                }
                Next::Answer(caller, answer) => {
                    self.oracle.answered(caller, &answer, &self.kernel.state())?;
                }
                Next::Refused(_, error) => broken!("the memory is refused: {error}"),
                Next::Notice(notice) => self.oracle.noticed(&notice, &self.kernel.state())?,
            }
        }
    }

    fn judge_call(&mut self, call: &Call) -> CheckResult {
        let mask = |first: u64, pages: u64| ((1 << pages) - 1) << first;
        match call {
            Call::Map { iova, offset, .. } => self.oracle.maps(mask(offset.0 / PAGE, iova.pages())),
            Call::Convert { invalidation, pages, to } => {
                let pages = pages
                    .iter()
                    .fold(0, |all, (_, range, _)| all | mask(range.start().0 / PAGE, range.pages()));
                self.oracle.converts(*invalidation, pages, *to, &self.kernel.state())
            }
            _ => Ok(()),
        }
    }

    /// The daemon is killed, and the next resumes from the persistent ledger.
    fn kill(&mut self, done: u8) -> CheckResult {
        self.budget.kills -= 1;
        for (nth, call) in std::mem::take(&mut self.calls).into_iter().enumerate() {
            if done >> nth & 1 == 1 && !matches!(call, Call::Convert { .. }) {
                self.kernel.set_next_outcome(Outcome::Done);
                _ = call.run();
            }
        }
        self.results.clear();
        let was_pending = std::mem::take(&mut self.is_pending);
        self.vm = None;
        self.has_second = false;
        self.oracle.daemon_dies();
        let ledger = self.ledger.as_ref().map(|fd| fd.try_clone().expect("a descriptor"));
        let Some(ledger) = ledger else { broken!("there is no ledger to open") };
        let (persistent, mut state) = match PersistentState::open(ledger) {
            Ok(opened) => opened,
            Err(error) => broken!("the next daemon cannot open the ledger: {error}"),
        };
        self.config.machine.plant.corrupt(&mut state);
        let memory = BTreeMap::from([(Name::Memory(file_id()), vec![guest_fd()])]);
        let (store, _) = FdStore::detached();
        let hold = Persistence {
            store,
            persistent,
            earlier: Some((state, KeptFiles::of(memory))),
            quarantine: None,
        };
        self.session = session(self.config, &self.kernel, &self.clock, Some(hold));
        self.session.complete(IDS);
        let snapshot = self.session.snapshot();
        let is_there = |region: &Region| snapshot.regions.iter().any(|one| one.region == region.id);
        self.oracle.regions.retain(is_there);
        for region in &mut self.oracle.regions {
            let status = snapshot.regions.iter().find(|one| one.region == region.id);
            region.owner = status.map_or(region.owner, |status| status.owner);
        }
        self.oracle.resume(&snapshot.quarantine, was_pending)
    }

    fn check(&mut self) -> CheckResult {
        let state = self.kernel.state();
        self.oracle.check(&state, self.now)?;
        drop(state);
        if self.is_pending {
            return Ok(());
        }
        let quarantine = self.session.snapshot().quarantine;
        for (nth, page) in self.oracle.pages.iter().enumerate() {
            let is_quarantined =
                quarantine.iter().any(|quarantined| quarantined.range.contains(offset_of(nth as u64)));
            if is_quarantined != page.quarantine.is_some() {
                broken!("page {nth}: reported as {:?}, in quarantine: {is_quarantined}", page.quarantine);
            }
        }
        if let Some(vm) = self.vm {
            for id in self.oracle.quarantines() {
                if self.session.may_settle(vm, id) && !self.oracle.may_be_settled(id) {
                    broken!("{vm:?} may settle {id:?}, which was not open when its daemon ended");
                }
            }
        }
        Ok(())
    }

    /// Lets everything in progress end without faults, and judges the state at rest.
    pub fn run_to_rest(&mut self, mut each: impl FnMut(Action, &Self)) -> CheckResult {
        let mut idle_ticks = 0;
        for _ in 0..MAX_REST_STEPS {
            let flights = self.kernel.state().flights.len();
            let action = if self.is_pending {
                Action::Drain
            } else if !self.results.is_empty() {
                Action::Result(0)
            } else if !self.calls.is_empty() {
                Action::Call(0, Outcome::Done)
            } else if flights > 0 {
                Action::FlightEnds(0)
            } else if self.session.next_deadline().is_some() && idle_ticks < MAX_IDLE_TICKS {
                Action::Tick
            } else {
                return self.check_rest();
            };
            idle_ticks = if action == Action::Tick { idle_ticks + 1 } else { 0 };
            self.act(action)?;
            each(action, self);
        }
        broken!("it does not come to rest within {MAX_REST_STEPS} steps")
    }

    fn check_rest(&self) -> CheckResult {
        if let Some(waiting) = self.oracle.waiting() {
            broken!("nothing is in progress, and no answer came to {waiting}");
        }
        let state = self.kernel.state();
        let open = self.oracle.granted.iter().fold(0, |pages, one| pages | one.pages);
        if self.budget.faults < self.config.faults {
            return Ok(());
        }
        for (nth, page) in self.oracle.pages.iter().enumerate() {
            let is_wanted =
                page.content == Content::Shared && page.quarantine.is_none() && open >> nth & 1 == 0;
            for region in self.oracle.regions.iter().filter(|region| !region.closing) {
                let is_mapped = state.maps(region.start + nth as u64);
                if is_wanted && !is_mapped && !self.is_closing(region) {
                    broken!("page {nth} is shared and not excluded, but not mapped for {region:?}");
                }
            }
        }
        // A range in doubt has been reported; its devices and regions may wait for an operator.
        if self.oracle.is_in_doubt() {
            return Ok(());
        }
        if let Some(device) =
            state.device_states.iter().find(|device| !device.attached || device.stopped || device.drained)
        {
            broken!("nothing failed, but a device is not attached and running: {device:?}");
        }
        if let Some(region) = self.oracle.regions.iter().find(|region| region.closing) {
            broken!("nothing failed, but a region is not closed: {region:?}");
        }
        Ok(())
    }

    fn is_closing(&self, region: &Region) -> bool {
        self.session.snapshot().regions.iter().any(|status| status.region == region.id && status.closing)
    }

    /// Returns the state in a few lines, for a failure's message.
    pub fn summary(&self) -> String {
        let state = self.kernel.state();
        let calls: Vec<_> = self.calls.iter().map(call_text).collect();
        let snapshot = self.session.snapshot();
        format!(
            "mapped {:?}, devices {:?}\n    calls {calls:?}\n    gate: {:?} {:?}\n    {:?}",
            state.mappings, state.device_states, snapshot.devices, snapshot.quarantine, self.oracle
        )
    }

    /// Returns the fingerprint of this state.
    pub fn fingerprint(&self) -> Fingerprint {
        canonical::fingerprint(&self.text(), canonical::time_of(self.now))
    }

    /// Returns everything that decides what can happen next, as text.
    pub fn text(&self) -> String {
        let state = self.kernel.state();
        let mut calls: Vec<String> = self.calls.iter().map(call_text).collect();
        calls.sort_unstable();
        let mut results: Vec<String> = self.results.iter().map(|result| format!("{result:?}")).collect();
        results.sort_unstable();
        format!(
            "{}{:?} {:?} {:?} {:?}\n{:?}\n{calls:?} {results:?}\n{:?} {} {:?} {}",
            self.session.canonical(),
            state.mappings,
            state.device_states,
            state.flights,
            self.oracle.regions.len(),
            self.oracle,
            self.vm,
            self.has_second,
            self.budget,
            self.is_pending,
        )
    }
}

fn iova_of(page: u64) -> passgate_bindings::Iova {
    passgate_bindings::Iova(page * PAGE)
}

fn offset_of(page: u64) -> passgate_bindings::units::Offset {
    passgate_bindings::units::Offset(page * PAGE)
}

/// Returns a call as text, without the domains, devices and files that it holds.
fn call_text(call: &Call) -> String {
    match call {
        Call::Map { job, iova, piece, offset, shares, .. } => {
            format!("map {job:?} {iova:?} {piece} {offset:?} {shares:?}")
        }
        Call::Unmap { job, iova, shares, .. } => format!("unmap {job:?} {iova:?} {shares:?}"),
        Call::Replace { job, gone, .. } => format!("replace {job:?} {gone:?}"),
        Call::Fence { job, device, step, .. } => format!("fence {job:?} {device:?} {step:?}"),
        Call::Attach { job, device, .. } => format!("attach {job:?} {device:?}"),
        Call::Convert { invalidation, to, .. } => format!("convert {invalidation:?} {to:?}"),
        Call::Examine { .. } => "examine".to_owned(),
    }
}

/// The kernel ids of the model's domain, for the daemon that resumes with it.
pub const IDS: DomainIds = DomainIds::Type1 { entries: 65_535 };

fn session(
    config: &Config,
    kernel: &Arc<Kernel>,
    clock: &Arc<ManualClock>,
    hold: Option<Persistence>,
) -> Session {
    let clock = Arc::clone(clock);
    let mut session =
        Session::new(config.policy, kernel.domain(), kernel.devices(), Trust::default(), clock, None, hold);
    session.set_call_limits(config.limits);
    session
}

fn first_daemon(
    config: &Config,
    kernel: &Arc<Kernel>,
    clock: &Arc<ManualClock>,
) -> (Session, Option<OwnedFd>) {
    if config.kills == 0 {
        return (session(config, kernel, clock, None), None);
    }
    let (persistent, ledger) = ledger::fresh(config.machine.devices);
    let (store, _) = FdStore::detached();
    let session = session(
        config,
        kernel,
        clock,
        Some(Persistence { store, persistent, earlier: None, quarantine: None }),
    );
    session.complete(IDS);
    (session, Some(ledger))
}

impl std::fmt::Display for BrokenPromise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
