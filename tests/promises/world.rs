//! The world around one gate: clients, memory, devices, an executor that may reorder, delay and fail every call, and the
//! checker.
//!
//! [`World::apply`] (in `apply.rs`) performs one [`Action`](crate::action::Action). After every event of the gate each promise is
//! judged, and every translation that a device can still use is checked.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use passgate::gate::{
    Answer, CallLimits, Caller, Cause, ClientId, DeviceId, DomainId, Door, Effect, Effects, Event, FileId,
    InvalidationId, Platform, Policy, Reason, Rung, Step, Verdict,
};
use passgate_backends::{DeviceTraits, DomainCaps, Steps};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};
use passgate_sim::iommu::{Fault, FileKey, Memory, Sim};

use crate::action::{CLIENTS, FILE_PAGES, FILES};
use crate::executor::Executor;
use crate::model::Model;
use crate::mutant::{Mutant, Plant};
use crate::oracle::{CheckResult, File, Open, Phase, broken};

/// A device's stop class, and the traits that decide which fences prove anything.
pub type DeviceKind = (Steps, DeviceTraits);

/// The configuration of a world.
#[derive(Debug, Clone)]
pub struct Setup {
    pub policy: Policy,
    /// The capabilities of each domain, and its devices.
    pub domains: Vec<(DomainCaps, Vec<DeviceKind>)>,
    /// True if its devices tolerate DMA faults.
    pub tolerant: bool,
    /// The ranges that an earlier daemon left in quarantine: file, first page, number of pages, invalidation.
    pub earlier_quarantine: Vec<(u8, u16, u16, u64)>,
    /// True if no call will fail.
    pub clean: bool,
    /// True if the gate asks for calls of two pages, and closes regions by two calls at a time.
    pub small_calls: bool,
}

impl Setup {
    fn limits(&self) -> CallLimits {
        match self.small_calls {
            true => CallLimits { call_bytes: 2 * PAGE, close_calls: 2 },
            false => CallLimits::default(),
        }
    }

    /// True if every device with ATS can be detached, where only that is proof.
    fn is_detachable(&self) -> bool {
        let caches = self.domains.iter().flat_map(|(_, devices)| devices).filter(|(_, traits)| traits.ats);
        self.policy.platform == Platform::Contained
            || caches.into_iter().all(|(class, _)| class.has(Step::Detach))
    }
}

/// The word that devices write.
const DMA_PATTERN: u64 = 0xDEAD;

/// A word that the owner wrote to a page that no device may write to.
#[derive(Debug)]
struct Canary {
    invalidation: InvalidationId,
    file: FileKey,
    at: Offset,
    bytes: u64,
}

pub struct World {
    pub gate: Mutant,
    pub model: Model,
    pub executor: Executor,
    pub events: u64,
    /// The number of events of each of [`EVENT_KINDS`].
    pub event_counts: [u64; EVENT_KINDS.len()],
    /// The number of verdicts: done, refused, unknown.
    pub verdicts: [u64; 3],
    /// The latest actions, events and effects as text, if they are to be recorded.
    pub trace: Option<VecDeque<String>>,
    /// The fences that the gate requested, in order.
    pub fences: Vec<Step>,
    /// The number of calls until one that does not return, and true if that one is executed first.
    pub hang_at: Option<(u64, bool)>,
    clock: u64,
    timers: BinaryHeap<Reverse<(u64, u64, InvalidationId, Rung)>>,
    clients: [ClientId; CLIENTS],
    last_client: u32,
    cookies: u64,
    canaries: Vec<Canary>,
    effects: Effects,
}

/// The names under which events are counted.
pub const EVENT_KINDS: [&str; 20] = [
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
    "traits",
];

fn event_kind(event: &Event) -> usize {
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
        Event::FlightEnded { .. } => 9,
        Event::Fenced { .. } => 10,
        Event::Attached { .. } => 11,
        Event::Expired { .. } => 12,
        Event::ClientGone { .. } => 13,
        Event::Quarantine { .. } => 14,
        Event::Release { .. } => 15,
        Event::Quiet => 16,
        Event::Adopt { .. } => 17,
        Event::MustUnmap { .. } => 18,
        Event::DeviceTraits { .. } => 19,
    }
}

impl World {
    pub fn new(setup: &Setup, plant: Plant) -> CheckResult<Self> {
        let memory = Memory::new();
        let mut world = Self {
            gate: Mutant::new(setup.policy, setup.limits(), plant),
            model: Model::new(setup.policy, setup.clean && setup.is_detachable()),
            executor: Executor::new(memory.clone()),
            events: 0,
            event_counts: [0; EVENT_KINDS.len()],
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
        world.executor.skips_unmaps = plant == Plant::UnmapsSkipped;
        for inode in 1..=FILES as u64 {
            let file = Arc::new(GuestFile::memfd("world", FILE_PAGES * PAGE).expect("a memfd"));
            let key = FileKey::of(&file).expect("fstat of a memfd");
            // Not the kernel's inode number: the seed alone must decide all that happens.
            let id = FileId { device: 1, inode };
            world.executor.files.insert(id, (key, file));
            world.model.oracle.files.push(File::new(id, key));
        }
        for (index, (caps, devices)) in setup.domains.iter().enumerate() {
            let domain = DomainId(index as u16);
            let DomainCaps { tickets, counts_partial, .. } = Sim::CAPABILITIES;
            let capabilities = DomainCaps { tickets, counts_partial, ..*caps };
            world.executor.add_bus(domain, Sim::new(capabilities, memory.clone()).expect("an eventfd"));
            world.feed(Event::DomainAdded { domain, caps: *caps })?;
            for (n, (class, traits)) in devices.iter().enumerate() {
                let device = DeviceId((index * 8 + n) as u16);
                world.executor.add_device(index, device, *class, *traits);
                world.feed(Event::DeviceAdded {
                    device,
                    domain,
                    steps: *class,
                    traits: DeviceTraits { tolerant: setup.tolerant, ..*traits },
                })?;
            }
        }
        setup.earlier_quarantine.iter().try_for_each(|quarantine| world.restore_quarantine(*quarantine))?;
        Ok(world)
    }

    /// Reports pages to the gate that an earlier daemon had in quarantine.
    fn restore_quarantine(&mut self, (file, page, pages, since): (u8, u16, u16, u64)) -> CheckResult {
        let file = self.model.oracle.files[file as usize % FILES].id;
        let page = u64::from(page) % FILE_PAGES;
        let pages = u64::from(pages).clamp(1, FILE_PAGES - page);
        let range = PageRange::new(page * PAGE, pages * PAGE).expect("pages of a small file");
        // Any cause, also one that proof would lift in the daemon that had it.
        let cause = Cause::ALL[since as usize % Cause::ALL.len()];
        let reason = Reason { cause, device: None, rung: Rung::Unmap, errno: 0 };
        let invalidation = InvalidationId(since);
        self.feed(Event::Quarantine { file, range, invalidation, reason })
    }

    /// Passes one event to the gate, judges its effects, and checks what devices reach.
    pub fn feed(&mut self, event: Event) -> CheckResult {
        self.events += 1;
        self.event_counts[event_kind(&event)] += 1;
        self.model.now = self.clock;
        self.trace_line(|| format!("{event:?}"));
        self.model.record_event(&event);
        let mut effects = std::mem::take(&mut self.effects);
        effects.clear();
        self.gate.handle(event.clone(), &mut effects);
        let gate = &self.gate;
        self.model.learn_ids(&event, &effects, || gate.snapshot())?;
        for effect in effects.drain(..) {
            self.trace_line(|| format!("    {effect:?}"));
            self.model.effect(&effect)?;
            self.accept(effect)?;
        }
        self.effects = effects;
        self.model.judge_obligations(&event)?;
        if std::mem::take(&mut self.model.oracle.dirty) {
            self.executor.check_reachable(&self.model.oracle)?;
        }
        if self.events.is_multiple_of(64) {
            self.model.compare_snapshot(&self.gate.snapshot())?;
        }
        Ok(())
    }

    fn accept(&mut self, effect: Effect) -> CheckResult {
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
                self.write_canaries(invalidation);
            }
            Effect::ForgetFile { file } => {
                let Some((key, _)) = self.executor.files.get(&file) else { return Ok(()) };
                for bus in &self.executor.buses {
                    let mut mapped = None;
                    bus.sim
                        .mappings()
                        .into_iter()
                        .filter(|m| m.file == *key)
                        .for_each(|m| mapped = Some(m.iova));
                    bus.sim.reachable(|m, _| mapped = mapped.or((m.file == *key).then_some(m.iova)));
                    if let Some(iova) = mapped {
                        broken!(8, "{file:?} is forgotten while {:?} maps it at {iova:?}", bus.id);
                    }
                }
            }
            other => {
                if let Effect::Fence { step, .. } = other {
                    self.fences.push(step);
                }
                self.executor.accept(other);
            }
        }
        Ok(())
    }

    fn trace_line(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            if trace.len() >= 300 {
                trace.pop_front();
            }
            trace.push_back(what());
        }
    }

    /// Writes canaries to some of the pages that an invalidation grants to its owner.
    fn write_canaries(&mut self, id: InvalidationId) {
        let Some(open) = self.model.oracle.open(id) else { return };
        let within = |range: &PageRange<Offset>| range.end().0 <= FILE_PAGES * PAGE;
        for (file, range) in open.pages.iter().filter(|(_, range)| within(range)).take(2) {
            let Some((key, _)) = self.executor.files.get(file) else { continue };
            let file = *key;
            for at in [range.start(), Offset(range.end().0 - PAGE)] {
                let bytes = (id.0 << 16) | (at.0 / PAGE);
                self.executor.memory.owner_store(file, at, bytes);
                self.canaries.push(Canary { invalidation: id, file, at, bytes });
            }
        }
    }

    /// Checks that no canary of an invalidation was overwritten, and removes them.
    fn check_canaries(&mut self, id: InvalidationId) -> CheckResult {
        for canary in self.canaries.iter().filter(|canary| canary.invalidation == id) {
            let now = self.executor.memory.owner_load(canary.file, canary.at);
            if now != canary.bytes {
                broken!(1, "{canary:?} was overwritten with {now:#x}");
            }
        }
        self.canaries.retain(|canary| canary.invalidation != id);
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
        let granted = || self.model.oracle.open.iter().filter(|open| open.phase == Phase::Granted);
        let count = granted().count();
        granted().nth(nth as usize % count.max(1)).cloned()
    }

    /// Returns the index of a task that can still return.
    fn task(&self, nth: u16) -> Option<usize> {
        let count = self.executor.tasks.len();
        let index = nth as usize % count.max(1);
        self.executor.tasks.get(index).filter(|task| !task.hangs).map(|_| index)
    }

    fn run_task(&mut self, index: usize, deliver: bool, fault: Option<Fault>) -> CheckResult {
        // Where the platform contains stale writes, a translation cached by a device does no harm.
        let contained = self.model.policy.platform == Platform::Contained;
        let fault = fault.filter(|fault| *fault != Fault::Cached || !contained);
        let done = self.executor.tasks[index].result.is_some();
        match &mut self.hang_at {
            Some((0, executed)) if !done => {
                if *executed {
                    self.executor.execute(index, fault, &mut self.model.oracle)?;
                }
                self.hang_at = None;
                self.executor.tasks[index].hangs = true;
                return Ok(());
            }
            Some((calls, _)) if !done => *calls -= 1,
            _ => {}
        }
        self.executor.execute(index, fault, &mut self.model.oracle)?;
        if !deliver && !done {
            return self.executor.check_reachable(&self.model.oracle);
        }
        match self.executor.take_result(index) {
            Some(event) => self.feed(event),
            None => Ok(()),
        }
    }

    fn flush(&mut self, domain: u8, stuck: bool) {
        let bus = &self.executor.buses[domain as usize % self.executor.buses.len()];
        let _ = if stuck { bus.sim.unstick() } else { bus.sim.flush() };
        self.executor.collect_tickets();
    }

    /// Advances the clock by `ns`; timers expire on their way.
    pub fn advance(&mut self, ns: u64) -> CheckResult {
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
        self.model.check_deadlines()
    }
}

#[path = "apply.rs"]
mod apply;
#[path = "settle.rs"]
mod settle;
