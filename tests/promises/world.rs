//! The world around one gate: clients, memory, devices, a session that takes every liberty, and the checker.
//!
//! [`World::apply`] makes one thing happen. After every event of the gate each promise is judged, and devices
//! reach for every page that any translation still shows them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use passgate::gate::{
    Answer, Backing, Caller, ClientId, DeviceId, DomainId, Door, Effect, Effects, Event, FileId,
    InvalidationId, Outcome, PageState, Performer, Policy, RegionId, RegionSpec, Step, Steps, Verdict,
};
use passgate_backends::iommu::sim::{Fault, FileKey, Memory, Sim};
use passgate_backends::{Capabilities, StopClass};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use crate::action::{Action, CLIENTS, FILE_PAGES, FILES};
use crate::hands::Hands;
use crate::model::Model;
use crate::saboteur::{Plant, Saboteur};
use crate::truth::{File, Kept, Open, Phase, broken};

/// How a world is made.
#[derive(Debug, Clone)]
pub struct Setup {
    pub policy: Policy,
    /// Per domain: mappings at most, longest mapping, the stop class of each device.
    pub domains: Vec<(u64, u64, Vec<StopClass>)>,
    /// Nothing will fail.
    pub clean: bool,
}

/// What devices write.
const MARK: u64 = 0xDEAD;

/// A page that no device may write to: what its owner left there.
#[derive(Debug)]
struct Canary {
    of: InvalidationId,
    file: FileKey,
    at: Offset,
    bytes: u64,
}

pub struct World {
    pub gate: Saboteur,
    pub model: Model,
    pub hands: Hands,
    pub events: u64,
    /// Events by kind, for the report.
    pub kinds: [u64; KINDS.len()],
    /// Verdicts: done, refused, unknown.
    pub verdicts: [u64; 3],
    /// What happened last, where somebody wants to know.
    pub trace: Option<VecDeque<String>>,
    /// This many calls from now, one does not return (done or not).
    pub hang_at: Option<(u64, bool)>,
    clock: u64,
    timers: BinaryHeap<Reverse<(u64, u64, InvalidationId, Step)>>,
    clients: [ClientId; CLIENTS],
    last_client: u32,
    cookies: u64,
    canaries: Vec<Canary>,
    effects: Effects,
}

/// The kinds of events, as they are counted.
pub const KINDS: [&str; 14] = [
    "domain",
    "device",
    "add",
    "remove",
    "begin",
    "end",
    "converted",
    "mapped",
    "unmapped",
    "released",
    "fenced",
    "attached",
    "expired",
    "gone",
];

fn kind(event: &Event) -> usize {
    match event {
        Event::DomainAdded { .. } => 0,
        Event::DeviceAdded { .. } => 1,
        Event::AddRegion { .. } => 2,
        Event::RemoveRegion { .. } => 3,
        Event::Begin { .. } => 4,
        Event::End { .. } => 5,
        Event::Converted { .. } => 6,
        Event::Mapped { .. } => 7,
        Event::Unmapped { .. } => 8,
        Event::Released { .. } => 9,
        Event::Fenced { .. } => 10,
        Event::Attached { .. } => 11,
        Event::Expired { .. } => 12,
        Event::ClientGone { .. } => 13,
    }
}

/// A stop class in the gate's words.
pub fn steps(class: StopClass) -> Steps {
    let has = |flag, step| if class.contains(flag) { Steps::of(&[step]) } else { Steps::default() };
    has(StopClass::CANCEL, Step::Cancel)
        .or(has(StopClass::DETACH, Step::Detach))
        .or(has(StopClass::RESET, Step::Reset))
}

impl World {
    pub fn new(setup: &Setup, plant: Plant) -> Kept<Self> {
        let memory = Memory::new();
        let mut world = Self {
            gate: Saboteur::new(setup.policy, plant),
            model: Model::new(setup.policy, setup.clean),
            hands: Hands::new(memory.clone()),
            events: 0,
            kinds: [0; KINDS.len()],
            verdicts: [0; 3],
            trace: None,
            hang_at: None,
            clock: 0,
            timers: BinaryHeap::new(),
            clients: std::array::from_fn(|slot| ClientId(slot as u32 + 1)),
            last_client: CLIENTS as u32,
            cookies: 0,
            canaries: Vec::new(),
            effects: Effects::new(),
        };
        world.hands.pretends = plant == Plant::PretendUnmaps;
        for _ in 0..FILES {
            let file = Arc::new(GuestFile::memfd("world", FILE_PAGES * PAGE).expect("a memfd"));
            let key = FileKey::of(&file).expect("fstat of a memfd");
            let id = FileId { device: key.device, inode: key.inode };
            world.hands.files.insert(id, (key, file));
            world.model.truth.files.push(File::new(id, key));
        }
        for (index, (max_mappings, max_piece, devices)) in setup.domains.iter().enumerate() {
            let domain = DomainId(index as u16);
            let capabilities = Capabilities {
                max_mappings: *max_mappings,
                max_mapping_len: *max_piece,
                ..Sim::CAPABILITIES
            };
            world.hands.add_bus(domain, Sim::new(capabilities, memory.clone()).expect("an eventfd"));
            world.feed(Event::DomainAdded { domain, max_mappings: *max_mappings, max_piece: *max_piece })?;
            for (n, class) in devices.iter().enumerate() {
                let device = DeviceId((index * 8 + n) as u16);
                world.hands.add_device(index, device, *class);
                world.feed(Event::DeviceAdded { device, domain, steps: steps(*class) })?;
            }
        }
        Ok(world)
    }

    /// Tells the gate one thing, judges what it makes of it, and has the devices look.
    pub fn feed(&mut self, event: Event) -> Kept {
        self.events += 1;
        self.kinds[kind(&event)] += 1;
        self.model.now = self.clock;
        self.note(|| format!("{event:?}"));
        self.model.before(&event);
        let mut effects = std::mem::take(&mut self.effects);
        effects.clear();
        self.gate.handle(event.clone(), &mut effects);
        let gate = &self.gate;
        self.model.learn(&event, &effects, || gate.snapshot())?;
        for effect in effects.drain(..) {
            self.note(|| format!("    {effect:?}"));
            self.model.effect(&effect)?;
            self.take(effect)?;
        }
        self.effects = effects;
        self.model.after(&event)?;
        if std::mem::take(&mut self.model.truth.dirty) {
            self.hands.look(&self.model.truth)?;
        }
        if self.events.is_multiple_of(64) {
            self.model.compare(&self.gate.snapshot())?;
        }
        Ok(())
    }

    fn take(&mut self, effect: Effect) -> Kept {
        if let Effect::Answer { answer: Answer::Verdict { verdict, .. }, .. } = &effect {
            self.verdicts[match verdict {
                Verdict::Done => 0,
                Verdict::Refused { .. } => 1,
                Verdict::Unknown { .. } => 2,
            }] += 1;
        }
        match effect {
            Effect::Arm { invalidation, rung, after_ns } => {
                let at = self.clock.saturating_add(after_ns);
                let sequence = self.timers.len() as u64;
                self.timers.push(Reverse((at, sequence, invalidation, rung)));
            }
            Effect::Answer { answer: Answer::Verdict { invalidation, verdict: Verdict::Done }, .. } => {
                self.stamp(invalidation);
            }
            Effect::ForgetFile { file } => {
                let Some((key, _)) = self.hands.files.get(&file) else { return Ok(()) };
                for bus in &self.hands.buses {
                    let mut left = None;
                    bus.sim
                        .mappings()
                        .into_iter()
                        .filter(|m| m.file == *key)
                        .for_each(|m| left = Some(m.iova));
                    bus.sim.reachable(|m, _| left = left.or((m.file == *key).then_some(m.iova)));
                    if let Some(iova) = left {
                        broken!(8, "{file:?} is let go while {:?} maps it at {iova:?}", bus.id);
                    }
                }
            }
            other => self.hands.take(other),
        }
        Ok(())
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            if trace.len() >= 20000 {
                trace.pop_front();
            }
            trace.push_back(what());
        }
    }

    /// The owner leaves a word in some pages that it was granted.
    fn stamp(&mut self, id: InvalidationId) {
        let Some(open) = self.model.truth.open(id) else { return };
        let within = |range: &PageRange<Offset>| range.end().0 <= FILE_PAGES * PAGE;
        for (file, range) in open.pages.iter().filter(|(_, range)| within(range)).take(2) {
            let Some((key, _)) = self.hands.files.get(file) else { continue };
            let file = *key;
            for at in [range.start(), Offset(range.end().0 - PAGE)] {
                let bytes = id.0 << 16 | at.0 / PAGE;
                self.hands.memory.owner_store(file, at, bytes);
                self.canaries.push(Canary { of: id, file, at, bytes });
            }
        }
    }

    /// Nobody wrote over what the owner left.
    fn canaries_live(&mut self, id: InvalidationId) -> Kept {
        for canary in self.canaries.iter().filter(|canary| canary.of == id) {
            let now = self.hands.memory.owner_load(canary.file, canary.at);
            if now != canary.bytes {
                broken!(1, "{canary:?} was overwritten with {now:#x}");
            }
        }
        self.canaries.retain(|canary| canary.of != id);
        Ok(())
    }

    pub fn caller(&mut self, client: ClientId) -> Caller {
        self.cookies += 1;
        let door = if self.cookies.is_multiple_of(2) { Door::Control } else { Door::Channel };
        Caller { client, door, cookie: self.cookies }
    }

    fn client(&self, slot: u8) -> ClientId {
        self.clients[slot as usize % CLIENTS]
    }

    fn granted(&self, nth: u16) -> Option<Open> {
        let granted = || self.model.truth.open.iter().filter(|open| open.phase == Phase::Granted);
        let count = granted().count();
        granted().nth(nth as usize % count.max(1)).cloned()
    }

    /// Makes one thing happen.
    pub fn apply(&mut self, action: &Action) -> Kept {
        self.note(|| format!("-- {action:?}"));
        match action.clone() {
            Action::Add { client, gpa, pages, file, offset, piece, initial, writable } => {
                let offset = u64::from(offset) % FILE_PAGES;
                let pages = u64::from(pages).clamp(1, FILE_PAGES - offset);
                let files: Vec<FileId> = self.hands.files.keys().copied().collect();
                let file = files[file as usize % FILES];
                let gpa = PageRange::new(u64::from(gpa) * PAGE, pages * PAGE).expect("small numbers");
                let backing = Backing { file, offset: Offset(offset * PAGE) };
                let spec = RegionSpec { gpa, backing, writable, piece: PAGE << (piece % 10), initial };
                let caller = self.caller(self.client(client));
                self.feed(Event::AddRegion { caller, spec })
            }
            Action::Remove { region, stranger } => {
                let regions = &self.model.truth.regions;
                let region = regions.get(region as usize % regions.len().max(1));
                let (id, owner) = region.map_or((RegionId(9999), ClientId(0)), |r| (r.id, r.owner));
                let other = self.client(id.0 as u8);
                let alive = self.clients.contains(&owner);
                let caller = self.caller(if stranger || !alive { other } else { owner });
                self.feed(Event::RemoveRegion { caller, region: id })
            }
            Action::Begin { client, region, page, pages, to, passgate, deadline_ns } => {
                let regions = &self.model.truth.regions;
                let region = regions.get(region as usize % regions.len().max(1));
                let start = region.map_or(u64::from(page), |region| {
                    region.spec.gpa.start().0 / PAGE + u64::from(page) % region.spec.gpa.pages()
                });
                let Ok(range) = PageRange::new(start * PAGE, u64::from(pages.max(1)) * PAGE) else {
                    return Ok(());
                };
                let performer = if passgate { Performer::Passgate } else { Performer::Client };
                let caller = self.caller(self.client(client));
                self.feed(Event::Begin { caller, range, to, performer, deadline_ns })
            }
            Action::Touch { granted } => match self.granted(granted) {
                Some(open) => self.touch(&open),
                None => Ok(()),
            },
            Action::End { granted, outcome, stranger } => self.end(granted, outcome, stranger),
            Action::Gone { client } => {
                let slot = client as usize % CLIENTS;
                let gone = self.clients[slot];
                self.last_client += 1;
                self.clients[slot] = ClientId(self.last_client);
                let of_it = |open: &&Open| open.caller.client == gone && open.phase == Phase::Granted;
                let mine: Vec<_> = self.model.truth.open.iter().filter(of_it).map(|open| open.id).collect();
                for id in mine {
                    self.canaries_live(id)?;
                }
                self.feed(Event::ClientGone { client: gone })
            }
            Action::Work { task, deliver, fault } => match self.task(task) {
                Some(index) => self.work(index, deliver, fault),
                None => Ok(()),
            },
            Action::Hang { task, done } => match self.task(task) {
                Some(index) => {
                    if done {
                        self.hands.execute(index, None, &mut self.model.truth)?;
                    }
                    self.hands.tasks[index].hangs = true;
                    Ok(())
                }
                None => Ok(()),
            },
            Action::Boast { task } => {
                self.task(task).into_iter().for_each(|index| self.hands.boast(index));
                Ok(())
            }
            Action::Flush { domain, stuck } => {
                self.flush(domain, stuck);
                Ok(())
            }
            Action::Advance { ns } => self.advance(ns),
            Action::Settle => self.settle(),
            Action::Dma { domain, device, gpa } => self.dma(domain, device, Iova(u64::from(gpa) * PAGE)),
            Action::AddWild { client, gpa, len, file, offset, piece } => {
                let files: Vec<FileId> = self.hands.files.keys().copied().collect();
                // What is no range, or beyond the numbers of files, never gets past the border.
                let (Ok(gpa), Ok(pages)) = (PageRange::new(gpa, len), PageRange::<Offset>::new(offset, len))
                else {
                    return Ok(());
                };
                let backing = Backing { file: files[file as usize % FILES], offset: pages.start() };
                let spec = RegionSpec { gpa, backing, writable: true, piece, initial: PageState::Shared };
                let caller = self.caller(self.client(client));
                self.feed(Event::AddRegion { caller, spec })
            }
            Action::BeginWild { client, gpa, len, deadline_ns } => {
                let Ok(range) = PageRange::new(gpa, len) else { return Ok(()) };
                let caller = self.caller(self.client(client));
                let (to, performer) = (PageState::Private, Performer::Client);
                self.feed(Event::Begin { caller, range, to, performer, deadline_ns })
            }
            Action::Guess { client, id, outcome } => {
                let caller = self.caller(self.client(client));
                self.feed(Event::End { caller, invalidation: InvalidationId(id), outcome })?;
                let caller = self.caller(self.client(client));
                self.feed(Event::RemoveRegion { caller, region: RegionId(id as u32) })
            }
            Action::Raw(event) => self.feed(event),
        }
    }

    fn touch(&mut self, open: &Open) -> Kept {
        self.canaries_live(open.id)?;
        for (file, range) in &open.pages {
            self.hands.replace(*file, *range, open.id.0);
        }
        if let Some(open) = self.model.truth.open(open.id) {
            open.touched = true;
        }
        self.stamp(open.id);
        self.hands.look(&self.model.truth)
    }

    fn end(&mut self, granted: u16, outcome: Outcome, stranger: bool) -> Kept {
        let Some(open) = self.granted(granted) else { return Ok(()) };
        if stranger {
            let other = self.client(open.id.0 as u8);
            let caller = self.caller(other);
            if other != open.caller.client {
                return self.feed(Event::End { caller, invalidation: open.id, outcome });
            }
        }
        let takes_away = matches!(open.to, PageState::Private | PageState::Hole);
        let outcome = match outcome {
            Outcome::NotCommitted if open.touched => Outcome::Committed,
            other => other,
        };
        if outcome == Outcome::Committed && takes_away && !open.touched {
            self.touch(&open)?;
        }
        self.canaries_live(open.id)?;
        let caller = self.caller(open.caller.client);
        self.feed(Event::End { caller, invalidation: open.id, outcome })
    }

    /// A task that can still come back.
    fn task(&self, nth: u16) -> Option<usize> {
        let count = self.hands.tasks.len();
        let index = nth as usize % count.max(1);
        self.hands.tasks.get(index).filter(|task| !task.hangs).map(|_| index)
    }

    fn work(&mut self, index: usize, deliver: bool, fault: Option<Fault>) -> Kept {
        let done = self.hands.tasks[index].result.is_some();
        match &mut self.hang_at {
            Some((0, executed)) if !done => {
                if *executed {
                    self.hands.execute(index, fault, &mut self.model.truth)?;
                }
                self.hang_at = None;
                self.hands.tasks[index].hangs = true;
                return Ok(());
            }
            Some((left, _)) if !done => *left -= 1,
            _ => {}
        }
        self.hands.execute(index, fault, &mut self.model.truth)?;
        if !deliver && !done {
            return self.hands.look(&self.model.truth);
        }
        match self.hands.finish(index) {
            Some(event) => self.feed(event),
            None => Ok(()),
        }
    }

    fn flush(&mut self, domain: u8, stuck: bool) {
        let bus = &self.hands.buses[domain as usize % self.hands.buses.len()];
        let _ = if stuck { bus.sim.unstick() } else { bus.sim.flush() };
        self.hands.collect();
    }

    /// Time passes; timers go off when they should.
    pub fn advance(&mut self, ns: u64) -> Kept {
        let until = self.clock.saturating_add(ns);
        while let Some(Reverse((at, _, invalidation, rung))) = self.timers.peek().copied()
            && at <= until
        {
            self.timers.pop();
            self.clock = at;
            self.feed(Event::Expired { invalidation, rung })?;
        }
        self.clock = until;
        self.model.now = until;
        self.model.overdue()
    }

    fn dma(&mut self, domain: u8, device: u8, iova: Iova) -> Kept {
        let bus = &self.hands.buses[domain as usize % self.hands.buses.len()];
        let Some((id, device)) = bus.devices.get(device as usize % bus.devices.len().max(1)) else {
            return Ok(());
        };
        let Some(seen) = device.dma(iova) else { return Ok(()) };
        let page = crate::truth::page_range(seen.offset.0 / PAGE);
        let file = self.model.truth.files.iter().find(|file| file.key == seen.file);
        if let Some(file) = file
            && file.first_forbidden(page).is_some()
        {
            broken!(
                1,
                "{id:?} reaches {page:?} of {:?} at {iova:?}: {}",
                file.id,
                file.describe(page.start().0 / PAGE)
            );
        }
        if self.hands.memory.replaced_since(seen.file, page, seen.since) {
            broken!(1, "{id:?} reaches an old frame of {page:?} at {iova:?}");
        }
        if seen.writable {
            self.hands.memory.store(&seen, MARK);
        }
        Ok(())
    }
}

#[path = "rest.rs"]
mod rest;
