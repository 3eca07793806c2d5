//! One machine, one daemon after the other on it, and its clients.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use passgate::gate::{
    Caller, ClientId, Door, Event, FileId, ORPHANS, Outcome as Converted, PageState, Performer, RegionStatus,
};
use passgate::protocol::verbs::AddMemory;
use passgate::session::fdstore::{FdStore, Kept as KeptFiles, Name};
use passgate::session::lasting::Lasting;
use passgate::session::{Call, Hold, Next, Returned, Session, Trust};
use passgate_backends::resume::Ids;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange, identity};

use crate::action::{Action, Ending};
use crate::canonical::{self, Fingerprint};
use crate::clock::{self, HandClock};
use crate::config::{Config, DEADLINE_NS};
use crate::kernel::{Kernel, Outcome};
use crate::ledger;
use crate::truth::{Broken, Content, Kept, Region, Truth, What, broken};

/// The second connection, which may begin conversions and owns nothing.
const SECOND: ClientId = ClientId(2);
/// The operator's connection.
const OPERATOR: ClientId = ClientId(3);
/// The connections of the VM count from here, one for each daemon.
const VM: u32 = 10;
/// The first page of the region, and of the second one.
const REGIONS: [u64; 2] = [16, 64];
/// Steps after which what nothing happens to any more has come to rest.
const REST_STEPS: usize = 400;
/// Timers in a row after which nothing comes any more: what frays is looked at every second, whatever is the case.
const MAX_IDLE_TICKS: u32 = 16;
/// An answer to an end may wait for what it maps.
const END_NS: u64 = 500_000_000;

pub struct World<'a> {
    config: &'a Config,
    kernel: Arc<Kernel>,
    clock: Arc<HandClock>,
    now: Instant,
    session: Session,
    ledger: Option<OwnedFd>,
    truth: Truth,
    /// Calls that the kernel has not carried out.
    calls: Vec<Call>,
    /// Results that the session has not heard.
    results: Vec<Returned>,
    /// The VM's connection, while there is one.
    vm: Option<ClientId>,
    has_second: bool,
    budget: Budget,
    last_cookie: u64,
    /// Whether the session has been told something that it has done nothing about.
    is_pending: bool,
}

/// What may still happen.
#[derive(Debug)]
struct Budget {
    /// Conversions that were begun, a bit for each.
    begun: u64,
    faults: u8,
    kills: u8,
    removals: u8,
    releases: u8,
    may_add: bool,
    /// Connections of VMs so far.
    connections: u32,
}

/// The guest's memory: one file for all worlds, for nobody looks at its bytes.
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
    /// A world whose VM has added its memory.
    pub fn new(config: &'a Config) -> Kept<Self> {
        let kernel = Kernel::new(config.machine);
        let clock = Arc::new(HandClock::new());
        let (session, ledger) = first_daemon(config, &kernel, &clock);
        let mut world = Self {
            config,
            kernel,
            clock,
            now: clock::start(),
            session,
            ledger,
            truth: Truth::new(config.pages),
            calls: Vec::new(),
            results: Vec::new(),
            vm: Some(ClientId(VM)),
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
        for start in &REGIONS[..1 + usize::from(config.alias)] {
            world.add_region(*start);
            world.drain()?;
            while !world.calls.is_empty() {
                world.carry_out(0, Outcome::Done);
                for returned in std::mem::take(&mut world.results) {
                    world.hear(returned);
                }
                world.drain()?;
            }
        }
        Ok(world)
    }

    /// A world in which this has happened.
    pub fn replay(config: &'a Config, path: &[Action]) -> Kept<Self> {
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
        self.truth.ask(caller, What::Add, None);
        self.session.add_memory(caller, memory, vec![guest_fd()]);
    }

    /// Everything that may happen next.
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
            if client && !is_begun && !(self.config.repeats && self.truth.is_begun(conversion.pages)) {
                actions.push(Action::Begin(nth as u8));
            }
        }
        for nth in 0..self.truth.granted.len() {
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
            let removable = |(_, region): &(usize, &Region)| region.owner == vm && !region.going;
            let regions = self.truth.regions.iter().enumerate().filter(removable);
            actions.extend(regions.map(|(nth, _)| Action::Remove(nth as u8)));
        }
        if may_add && self.vm.is_some() {
            actions.push(Action::AddAlias);
        }
        if releases > 0 {
            for (nth, id) in self.truth.quarantines().into_iter().enumerate() {
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
        // Of a release that nobody was told of the operator would have to ask.
        if kills > 0 && !self.truth.waits_for_release() {
            let masks = if self.config.splits_calls { 1 } else { 1 << self.calls.len().min(4) };
            actions.extend((0..masks).map(Action::Kill));
        }
        actions
    }

    /// How this call may go wrong here; none that comes to the same as another.
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
                let is_out = state.ports.iter().all(|port| !port.attached);
                (&self.config.attach_faults, is_out.then_some(Outcome::FailsOut))
            }
            Call::Convert { .. } => (&self.config.convert_faults, None),
            Call::Examine { .. } => return Vec::new(),
        };
        // What a restart finds in doubt is unmapped once more, and gone where the kernel says that it succeeded.
        let is_settled = self.budget.kills < self.config.kills;
        let is_possible =
            |fault: &Outcome| Some(*fault) != skipped && !(is_settled && *fault == Outcome::Short);
        faults.iter().copied().filter(is_possible).collect()
    }

    /// Does one thing, and judges what comes of it.
    pub fn act(&mut self, action: Action) -> Kept {
        match action {
            Action::Begin(nth) => self.begin(nth),
            Action::End(nth, ending) => {
                let granted = self.truth.end(nth.into(), ending);
                let outcome = match ending {
                    Ending::Committed => Converted::Committed,
                    Ending::NotCommitted => Converted::NotCommitted,
                    Ending::Unknown => Converted::Unknown { errno: 5, offset: 0 },
                };
                let caller = self.caller(granted.client);
                self.truth.ask(caller, What::End, self.after(END_NS));
                self.session.handle(Event::End { caller, invalidation: granted.id, outcome });
            }
            Action::Call(nth, outcome) => self.carry_out(nth.into(), outcome),
            Action::Result(nth) => {
                let returned = self.results.remove(nth.into());
                self.hear(returned);
            }
            Action::FlightEnds(nth) => {
                self.kernel.state().end_flight(nth.into());
                self.session.poll_domains();
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
                    // The loop drops what it finds out of memory that nobody adds any more.
                    self.calls.retain(|call| !matches!(call, Call::Examine { .. }));
                    self.results.retain(|result| !matches!(result, Returned::Examined { .. }));
                    self.truth.client_dies(client);
                    self.session.handle(Event::ClientGone { client });
                }
            }
            Action::SecondDies => {
                self.has_second = false;
                self.truth.client_dies(SECOND);
                self.session.handle(Event::ClientGone { client: SECOND });
            }
            Action::Remove(nth) => {
                self.budget.removals -= 1;
                let Region { id: region, owner, .. } = self.truth.regions[usize::from(nth)];
                let caller = self.caller(owner);
                self.truth.ask(caller, What::Remove(region), self.after(DEADLINE_NS));
                self.session.handle(Event::RemoveRegion { caller, region });
            }
            Action::AddAlias => {
                self.budget.may_add = self.config.repeats;
                self.add_region(REGIONS[1]);
            }
            Action::Connect => {
                self.budget.connections += 1;
                self.vm = Some(ClientId(VM + self.budget.connections));
                self.add_region(REGIONS[0]);
            }
            Action::Release(nth, to) => self.release(OPERATOR, nth, to),
            Action::Settle(nth, to) => self.release(self.vm.unwrap_or(OPERATOR), nth, to),
            Action::Adopt => {
                self.budget.connections += 1;
                let client = ClientId(VM + self.budget.connections);
                self.vm = Some(client);
                let caller = self.caller(client);
                self.truth.ask(caller, What::Adopt, self.after(0));
                self.session.handle(Event::Adopt { caller });
            }
            Action::GiveUp => {
                let orphans = self.truth.regions.iter_mut().filter(|region| region.owner == ORPHANS);
                orphans.for_each(|region| region.going = true);
                self.session.handle(Event::ClientGone { client: ORPHANS });
            }
            Action::Kill(done) => self.kill(done)?,
            Action::Drain => {}
        }
        self.is_pending = self.config.batches && !matches!(action, Action::Drain | Action::Kill(_));
        if !self.is_pending {
            self.drain()?;
            self.truth.resumed();
        }
        if matches!(action, Action::Kill(_)) {
            self.truth.learn(&self.session.snapshot().quarantine);
        }
        self.check()
    }

    fn begin(&mut self, nth: u8) {
        let conversion = self.config.conversions[usize::from(nth)];
        self.budget.begun |= 1 << nth;
        let client = if conversion.by_second { SECOND } else { self.vm.unwrap_or(SECOND) };
        let caller = self.caller(client);
        let first = u64::from(conversion.pages.trailing_zeros());
        let count = u64::from(conversion.pages.count_ones());
        let own = self.truth.regions.iter().find(|region| region.owner == client && !region.going);
        let start = own.map_or(REGIONS[0], |region| region.start);
        let range = PageRange::<Gpa>::new((start + first) * PAGE, count * PAGE).expect("pages");
        let what =
            What::Begin { pages: conversion.pages, to: conversion.to, by_passgate: conversion.by_passgate };
        self.truth.ask(caller, what, self.after(DEADLINE_NS));
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
        let invalidation = self.truth.quarantines()[usize::from(nth)];
        let caller = self.caller(client);
        self.truth.ask(caller, What::Release(invalidation, to), self.after(0));
        self.session.handle(Event::Release { caller, invalidation, to });
    }

    /// The kernel carries out a call.
    fn carry_out(&mut self, nth: usize, outcome: Outcome) {
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
                self.kernel.next(outcome);
                call.run()
            }
        };
        if self.config.splits_calls {
            self.results.push(returned);
        } else {
            self.hear(returned);
        }
    }

    /// The session hears the result of a call.
    fn hear(&mut self, returned: Returned) {
        if let Returned::Fact { event: Event::Converted { invalidation, outcome }, .. } = returned {
            self.truth.converted(invalidation, outcome);
        }
        // Memory of a client that is gone meanwhile comes too late: the loop drops it.
        if let Returned::Examined { caller, .. } = &returned
            && self.vm != Some(caller.client)
        {
            return;
        }
        self.session.returned(returned);
        self.see_regions();
    }

    /// Takes down the regions that have come: at once, or once what was in their way had been closed.
    fn see_regions(&mut self) {
        let snapshot = self.session.snapshot().regions;
        let is_new = |one: &&RegionStatus| {
            !one.closing && self.truth.regions.iter().all(|other| other.id != one.region)
        };
        let new: Vec<_> = snapshot
            .iter()
            .filter(is_new)
            .map(|one| Region {
                id: one.region,
                owner: one.owner,
                start: one.spec.gpa.start().0 / PAGE,
                going: false,
            })
            .collect();
        if !new.is_empty() && snapshot.len() == new.len() {
            // No region showed the file: what its pages are is what the VM says now.
            self.truth.start_anew();
        }
        self.truth.regions.extend(new);
    }

    /// Does all that the session wants done, but for its calls.
    fn drain(&mut self) -> Kept {
        loop {
            let next = self.session.next_step();
            if self.truth.awaits_memory() {
                self.see_regions();
            }
            match next {
                Next::Idle => return Ok(()),
                Next::Call(call) => {
                    self.judge_call(&call)?;
                    self.calls.push(call);
                }
                Next::Answer(caller, answer) => {
                    self.truth.answered(caller, &answer, &self.kernel.state())?;
                }
                Next::Refused(_, error) => broken!("memory is refused: {error}"),
                Next::Notice(notice) => self.truth.noticed(&notice, &self.kernel.state())?,
            }
        }
    }

    fn judge_call(&mut self, call: &Call) -> Kept {
        let mask = |first: u64, pages: u64| ((1 << pages) - 1) << first;
        match call {
            Call::Map { iova, offset, .. } => self.truth.maps(mask(offset.0 / PAGE, iova.pages())),
            Call::Convert { invalidation, pages, to } => {
                let pages = pages
                    .iter()
                    .fold(0, |all, (_, range, _)| all | mask(range.start().0 / PAGE, range.pages()));
                self.truth.converts(*invalidation, pages, *to, &self.kernel.state())
            }
            _ => Ok(()),
        }
    }

    /// The daemon is killed, and the next goes on with what was kept.
    fn kill(&mut self, done: u8) -> Kept {
        self.budget.kills -= 1;
        for (nth, call) in std::mem::take(&mut self.calls).into_iter().enumerate() {
            if done >> nth & 1 == 1 && !matches!(call, Call::Convert { .. }) {
                self.kernel.next(Outcome::Done);
                _ = call.run();
            }
        }
        self.results.clear();
        let was_pending = std::mem::take(&mut self.is_pending);
        self.vm = None;
        self.has_second = false;
        self.truth.daemon_dies();
        let ledger = self.ledger.as_ref().map(|fd| fd.try_clone().expect("a descriptor"));
        let Some(ledger) = ledger else { broken!("nothing is kept") };
        let (lasting, mut left) = match Lasting::open(ledger) {
            Ok(opened) => opened,
            Err(error) => broken!("the next daemon cannot go on: {error}"),
        };
        self.config.machine.plant.spoil(&mut left);
        let memory = BTreeMap::from([(Name::Memory(file_id()), vec![guest_fd()])]);
        let (store, _) = FdStore::detached();
        let hold = Hold { store, lasting, left: Some((left, KeptFiles::of(memory))), quarantine: None };
        self.session = session(self.config, &self.kernel, &self.clock, Some(hold));
        self.session.complete(IDS);
        let snapshot = self.session.snapshot();
        let is_there = |region: &Region| snapshot.regions.iter().any(|one| one.region == region.id);
        self.truth.regions.retain(is_there);
        for region in &mut self.truth.regions {
            let status = snapshot.regions.iter().find(|one| one.region == region.id);
            region.owner = status.map_or(region.owner, |status| status.owner);
        }
        self.truth.resume(&snapshot.quarantine, was_pending)
    }

    fn check(&mut self) -> Kept {
        let state = self.kernel.state();
        self.truth.check(&state, self.now)?;
        drop(state);
        if self.is_pending {
            return Ok(());
        }
        let kept = self.session.snapshot().quarantine;
        for (nth, page) in self.truth.pages.iter().enumerate() {
            let is_kept = kept.iter().any(|held| held.range.contains(offset_of(nth as u64)));
            if is_kept != page.quarantine.is_some() {
                broken!("page {nth}: told as {:?}, kept as quarantined: {is_kept}", page.quarantine);
            }
        }
        if let Some(vm) = self.vm {
            for id in self.truth.quarantines() {
                if self.session.may_settle(vm, id) && !self.truth.may_be_settled(id) {
                    broken!("{vm:?} may settle {id:?}, which was not open when its daemon ended");
                }
            }
        }
        Ok(())
    }

    /// Lets everything that is under way come to its end, and judges what is left.
    pub fn come_to_rest(&mut self, mut each: impl FnMut(Action, &Self)) -> Kept {
        let mut idle_ticks = 0;
        for _ in 0..REST_STEPS {
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
        broken!("it never comes to rest")
    }

    fn check_rest(&self) -> Kept {
        if let Some(waiting) = self.truth.waiting() {
            broken!("nothing is under way, and nobody answers {waiting}");
        }
        let state = self.kernel.state();
        let open = self.truth.granted.iter().fold(0, |pages, one| pages | one.pages);
        if self.budget.faults < self.config.faults {
            return Ok(());
        }
        for (nth, page) in self.truth.pages.iter().enumerate() {
            let is_wanted =
                page.content == Content::Shared && page.quarantine.is_none() && open >> nth & 1 == 0;
            for region in self.truth.regions.iter().filter(|region| !region.going) {
                let is_mapped = state.maps(region.start + nth as u64);
                if is_wanted && !is_mapped && !self.is_closing(region) {
                    broken!(
                        "page {nth} is shared and nothing is in its way, but {region:?} does not show it"
                    );
                }
            }
        }
        // What did not return in time is told, and whoever is told decides.
        if self.truth.is_in_doubt() {
            return Ok(());
        }
        if let Some(port) = state.ports.iter().find(|port| !port.attached || port.silent || port.drained) {
            broken!("nothing went wrong, and a device stays away: {port:?}");
        }
        if let Some(region) = self.truth.regions.iter().find(|region| region.going) {
            broken!("nothing went wrong, and a region stays: {region:?}");
        }
        Ok(())
    }

    fn is_closing(&self, region: &Region) -> bool {
        self.session.snapshot().regions.iter().any(|status| status.region == region.id && status.closing)
    }

    /// What is so, in a few lines, for whoever reads a path.
    pub fn summary(&self) -> String {
        let state = self.kernel.state();
        let calls: Vec<_> = self.calls.iter().map(call_text).collect();
        let snapshot = self.session.snapshot();
        format!(
            "mapped {:?}, devices {:?}\n    calls {calls:?}\n    gate: {:?} {:?}\n    {:?}",
            state.mappings, state.ports, snapshot.devices, snapshot.quarantine, self.truth
        )
    }

    /// What tells this state from others.
    pub fn fingerprint(&self) -> Fingerprint {
        canonical::fingerprint(&self.text(), canonical::time_of(self.now))
    }

    /// Everything that decides how it goes on.
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
            state.ports,
            state.flights,
            self.truth.regions.len(),
            self.truth,
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

/// A call without the objects that it is on.
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

/// The model's domain, to those who go on with it.
pub const IDS: Ids = Ids::Type1 { entries: 65_535 };

fn session(config: &Config, kernel: &Arc<Kernel>, clock: &Arc<HandClock>, hold: Option<Hold>) -> Session {
    let clock = Arc::clone(clock);
    Session::new(config.policy, kernel.domain(), kernel.devices(), Trust::default(), clock, None, hold)
}

fn first_daemon(config: &Config, kernel: &Arc<Kernel>, clock: &Arc<HandClock>) -> (Session, Option<OwnedFd>) {
    if config.kills == 0 {
        return (session(config, kernel, clock, None), None);
    }
    let (lasting, ledger) = ledger::fresh(config.machine.devices);
    let (store, _) = FdStore::detached();
    let session = session(config, kernel, clock, Some(Hold { store, lasting, left: None, quarantine: None }));
    session.complete(IDS);
    (session, Some(ledger))
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
