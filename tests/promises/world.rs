//! The world around one gate: clients, memory, devices, a session that takes every liberty, and the checker.
//!
//! [`World::apply`] makes one thing happen; what, is in `act.rs`. After every event of the gate each promise is judged, and devices
//! reach for every page that any translation still shows them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use passgate::gate::{
    Able, Answer, Caller, Cause, ClientId, DeviceId, DomainId, Door, Effect, Effects, Event, FileId,
    InvalidationId, Platform, Policy, Reason, Step, Steps, Verdict,
};
use passgate_backends::iommu::sim::{Fault, FileKey, Memory, Sim};
use passgate_backends::{Capabilities, Nature, StopClass};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};

use crate::action::{CLIENTS, FILE_PAGES, FILES};
use crate::hands::Hands;
use crate::model::Model;
use crate::saboteur::{Plant, Saboteur};
use crate::truth::{File, Kept, Open, Phase, broken};

/// What a device is: how it can be stopped, and what bears on that.
pub type Kind = (StopClass, Nature);

/// How a world is made.
#[derive(Debug, Clone)]
pub struct Setup {
    pub policy: Policy,
    /// Per domain: what it can do, and its devices.
    pub domains: Vec<(Able, Vec<Kind>)>,
    /// Whether its devices bear faults.
    pub tolerant: bool,
    /// What an earlier daemon left in quarantine: file, first page, pages, since when.
    pub seeds: Vec<(u8, u16, u16, u64)>,
    /// Nothing will fail.
    pub clean: bool,
}

impl Setup {
    /// Whether every device can be detached whose cache must be emptied for proof.
    fn is_detachable(&self) -> bool {
        let caches = self.domains.iter().flat_map(|(_, devices)| devices).filter(|(_, nature)| nature.ats);
        self.policy.platform == Platform::Contained
            || caches.into_iter().all(|(class, _)| class.contains(StopClass::DETACH))
    }
}

/// A domain that can hold so many mappings of so many bytes, and nothing else.
pub const fn able(max_mappings: u64, max_piece: u64) -> Able {
    Able { max_mappings, max_piece, cut: false, replace: false }
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
    /// The fences that the gate asked for, in order.
    pub fences: Vec<Step>,
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
pub const KINDS: [&str; 20] = [
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
    "quarantine",
    "release",
    "quiet",
    "adopt",
    "insists",
    "nature",
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
        Event::Quarantine { .. } => 14,
        Event::Release { .. } => 15,
        Event::Quiet => 16,
        Event::Adopt { .. } => 17,
        Event::Insists { .. } => 18,
        Event::DeviceNature { .. } => 19,
    }
}

/// A stop class in the gate's words.
pub fn steps(class: StopClass) -> Steps {
    let has = |flag, step| if class.contains(flag) { Steps::of(&[step]) } else { Steps::default() };
    has(StopClass::DRAIN, Step::Drain)
        .or(has(StopClass::STOP, Step::Stop))
        .or(has(StopClass::MASTER, Step::Master))
        .or(has(StopClass::DETACH, Step::Detach))
        .or(has(StopClass::RESET, Step::Reset))
}

impl World {
    pub fn new(setup: &Setup, plant: Plant) -> Kept<Self> {
        let memory = Memory::new();
        let mut world = Self {
            gate: Saboteur::new(setup.policy, plant),
            model: Model::new(setup.policy, setup.clean && setup.is_detachable()),
            hands: Hands::new(memory.clone()),
            events: 0,
            kinds: [0; KINDS.len()],
            verdicts: [0; 3],
            trace: None,
            fences: Vec::new(),
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
        for inode in 1..=FILES as u64 {
            let file = Arc::new(GuestFile::memfd("world", FILE_PAGES * PAGE).expect("a memfd"));
            let key = FileKey::of(&file).expect("fstat of a memfd");
            // Not the kernel's number: a seed tells all that happens.
            let id = FileId { device: 1, inode };
            world.hands.files.insert(id, (key, file));
            world.model.truth.files.push(File::new(id, key));
        }
        for (index, (able, devices)) in setup.domains.iter().enumerate() {
            let domain = DomainId(index as u16);
            let capabilities = Capabilities {
                max_mappings: able.max_mappings,
                max_mapping_len: able.max_piece,
                cut: able.cut,
                replace: able.replace,
                ..Sim::CAPABILITIES
            };
            world.hands.add_bus(domain, Sim::new(capabilities, memory.clone()).expect("an eventfd"));
            world.feed(Event::DomainAdded { domain, able: *able })?;
            for (n, (class, nature)) in devices.iter().enumerate() {
                let device = DeviceId((index * 8 + n) as u16);
                world.hands.add_device(index, device, *class, *nature);
                world.feed(Event::DeviceAdded {
                    device,
                    domain,
                    steps: steps(*class),
                    nature: passgate::gate::Nature {
                        ats: nature.ats,
                        tdi: nature.tdi,
                        tolerant: setup.tolerant,
                    },
                })?;
            }
        }
        setup.seeds.iter().try_for_each(|seed| world.sow(*seed))?;
        Ok(world)
    }

    /// An earlier daemon had these pages in quarantine.
    fn sow(&mut self, (file, page, pages, since): (u8, u16, u16, u64)) -> Kept {
        let file = self.model.truth.files[file as usize % FILES].id;
        let page = u64::from(page) % FILE_PAGES;
        let pages = u64::from(pages).clamp(1, FILE_PAGES - page);
        let range = PageRange::new(page * PAGE, pages * PAGE).expect("pages of a small file");
        // The cause is past: it may be one that proof would lift in the daemon that had it.
        let cause = Cause::ALL[since as usize % Cause::ALL.len()];
        let reason = Reason { cause, device: None, rung: Step::Unmap, errno: 0 };
        let invalidation = InvalidationId(since);
        self.feed(Event::Quarantine { file, range, invalidation, reason })
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
            other => {
                if let Effect::Fence { step, .. } = other {
                    self.fences.push(step);
                }
                self.hands.take(other);
            }
        }
        Ok(())
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            if trace.len() >= 300 {
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
                let bytes = (id.0 << 16) | (at.0 / PAGE);
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

    /// A task that can still come back.
    fn task(&self, nth: u16) -> Option<usize> {
        let count = self.hands.tasks.len();
        let index = nth as usize % count.max(1);
        self.hands.tasks.get(index).filter(|task| !task.hangs).map(|_| index)
    }

    fn work(&mut self, index: usize, deliver: bool, fault: Option<Fault>) -> Kept {
        // Where a stale write is contained, the platform answers for what a device has cached.
        let contained = self.model.policy.platform == Platform::Contained;
        let fault = fault.filter(|fault| *fault != Fault::Cached || !contained);
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
}

#[path = "act.rs"]
mod act;
#[path = "rest.rs"]
mod rest;
