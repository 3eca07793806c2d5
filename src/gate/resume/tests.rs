//! Every scene is killed after each of its steps, with the call under way done or not done, and goes on in another
//! gate over the same ledger. A kernel of its own keeps what devices reach; nothing here looks at what a gate believes.

use std::collections::{BTreeMap, BTreeSet};

use passgate_bindings::words::{self, Words};

use super::super::*;
use super::*;

const OWNER: ClientId = ClientId(1);
const OPERATOR: ClientId = ClientId(9);
const DOMAIN: DomainId = DomainId(0);
const DEVICE: DeviceId = DeviceId(0);
const FILE: FileId = FileId { device: 1, inode: 7 };
const PAGES: u64 = 8;
/// The first pages of the two aliases of the file.
const ALIASES: [u64; 2] = [0, 64];
/// Steps after which a scene must have come to rest.
const MAX_STEPS: usize = 400;

/// A device's fences, and the platform.
#[derive(Debug, Clone, Copy)]
struct Host {
    platform: Platform,
    hitless: Hitless,
    cut: bool,
    ats: bool,
}

const HOSTS: [Host; 4] = [
    Host { platform: Platform::Contained, hitless: Hitless::Off, cut: false, ats: false },
    Host { platform: Platform::Contained, hitless: Hitless::Prefer, cut: false, ats: false },
    Host { platform: Platform::Contained, hitless: Hitless::Prefer, cut: true, ats: false },
    Host { platform: Platform::Strict, hitless: Hitless::Prefer, cut: false, ats: true },
];

/// The pages that devices reach: each with the start of its mapping, and the page of the file behind it.
#[derive(Debug, Clone, Default)]
struct Kernel {
    pages: BTreeMap<u64, (u64, u64)>,
    /// Unmaps so far, and those that fail.
    unmaps: u64,
    fails: BTreeSet<u64>,
}

impl Kernel {
    fn map(&mut self, iova: PageRange<Iova>, piece: u64, offset: Offset) {
        let (first, end) = (iova.start().0 / PAGE, iova.end().0 / PAGE);
        let grid = piece / PAGE;
        for page in first..end {
            let start = (page / grid * grid).max(first);
            let old = self.pages.insert(page, (start, offset.0 / PAGE + page - first));
            assert_eq!(old, None, "page {page} is mapped twice");
        }
    }

    fn unmap(&mut self, iova: PageRange<Iova>, cut: bool) -> UnmapResult {
        self.unmaps += 1;
        let (first, end) = (iova.start().0 / PAGE, iova.end().0 / PAGE);
        let starts = |page: u64| self.pages.get(&page).map(|(start, _)| *start);
        let split = |page: u64| page > 0 && starts(page).is_some() && starts(page) == starts(page - 1);
        if self.fails.contains(&self.unmaps) || (!cut && (split(first) || split(end))) {
            return UnmapResult::Failed { errno: 16, bytes: 0 };
        }
        let gone: Vec<u64> = self.pages.range(first..end).map(|(page, _)| *page).collect();
        // The rest behind the range is a mapping of its own.
        if split(end) {
            let old = starts(end);
            self.pages
                .range_mut(end..)
                .filter(|(_, (at, _))| Some(*at) == old)
                .for_each(|(_, at)| at.0 = end);
        }
        gone.iter().for_each(|page| _ = self.pages.remove(page));
        UnmapResult::Gone { bytes: gone.len() as u64 * PAGE }
    }
}

/// The state of a page as the owner of the memory knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OwnerView {
    Shared,
    /// It may be changing, or is no longer shared.
    Taken,
}

#[derive(Debug, Clone, Copy)]
enum Request {
    Add(u64),
    Begin(u64, u64),
    /// Ends the first conversion that was granted.
    End(Outcome),
}

struct World {
    host: Host,
    gate: Gate,
    store: Store,
    effects: Effects,
    kernel: Kernel,
    owner_view: BTreeMap<u64, OwnerView>,
    /// Conversions that were begun: their pages, and whether they were granted.
    begun: BTreeMap<InvalidationId, (Vec<u64>, bool)>,
    requested: Option<Vec<u64>>,
    timers: BTreeMap<InvalidationId, Rung>,
    answers: Vec<Answer>,
}

fn range<A: Address>(page: u64, pages: u64) -> PageRange<A> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

fn caller(client: ClientId) -> Caller {
    Caller { client, door: Door::Control, cookie: 1 }
}

impl World {
    fn new(host: Host) -> Self {
        let store = Store::new(Words::memfd("resume", 16 << 20).unwrap()).unwrap();
        let mut world = Self {
            host,
            gate: Gate::new(Policy::default(), words::private),
            store,
            effects: Vec::new(),
            kernel: Kernel::default(),
            owner_view: (0..PAGES).map(|page| (page, OwnerView::Shared)).collect(),
            begun: BTreeMap::new(),
            requested: None,
            timers: BTreeMap::new(),
            answers: Vec::new(),
        };
        world.start();
        world
    }

    fn start(&mut self) {
        let Host { platform, hitless, cut, ats } = self.host;
        self.gate = Gate::new(Policy { platform, hitless, ..Policy::default() }, words::private);
        self.gate.use_store(self.store.clone());
        let caps = DomainCaps { cut, ..DomainCaps::new(1000, 1 << 30) };
        self.tell(Event::DomainAdded { domain: DOMAIN, caps });
        let traits = DeviceTraits { ats, tdi: false, tolerant: false };
        let steps = Steps::of(&[Step::Drain, Step::Detach]);
        self.tell(Event::DeviceAdded { device: DEVICE, domain: DOMAIN, steps, traits });
    }

    fn tell(&mut self, event: Event) {
        self.gate.handle(event, &mut self.effects);
    }

    fn request(&mut self, request: Request) {
        match request {
            Request::Add(at) => {
                let backing = Backing { file: FILE, offset: Offset(0) };
                let (gpa, piece, initial) = (range(at, PAGES), PAGES * PAGE, PageState::Shared);
                let spec = RegionSpec { gpa, backing, writable: true, piece, page: PAGE, initial };
                self.tell(Event::AddRegion { caller: caller(OWNER), spec });
            }
            Request::Begin(page, pages) => {
                let before = self.gate.last().1;
                let (ranges, performer) = (range(page, pages).into(), Performer::Client);
                let (to, deadline_ns) = (PageState::Private, 1 << 40);
                // Before its answer can come.
                self.requested = Some((page..page + pages).collect());
                self.tell(Event::Begin { caller: caller(OWNER), ranges, to, performer, deadline_ns });
                let pages = self.requested.take().unwrap();
                self.begun.insert(InvalidationId(before + 1), (pages, false));
            }
            Request::End(outcome) => {
                let granted = self.begun.iter().find(|(_, (_, granted))| *granted).map(|(id, _)| *id);
                let Some(invalidation) = granted else { return };
                let (pages, _) = self.begun.remove(&invalidation).unwrap();
                if outcome == Outcome::NotCommitted {
                    pages.iter().for_each(|page| _ = self.owner_view.insert(*page, OwnerView::Shared));
                }
                self.tell(Event::End { caller: caller(OWNER), invalidation, outcome });
            }
        }
    }

    /// Executes the next effect; false where there is none. `told` says whether the gate hears what came of it.
    fn step(&mut self, told: bool) -> bool {
        if self.effects.is_empty() {
            // Time is what is left.
            let Some((invalidation, rung)) = self.timers.pop_first() else { return false };
            self.tell(Event::Expired { invalidation, rung });
            return true;
        }
        let event = match self.effects.remove(0) {
            Effect::Map { job, iova, piece, offset, .. } => {
                self.kernel.map(iova, piece, offset);
                Event::Mapped { job, result: MapResult::Mapped }
            }
            Effect::Unmap { job, iova, .. } => {
                let result = self.kernel.unmap(iova, self.host.cut);
                Event::Unmapped { job, result, took_ns: 1 }
            }
            Effect::Fence { job, .. } => Event::Fenced { job, errno: 0, took_ns: 1 },
            Effect::Attach { job, .. } => Event::Attached { job, errno: 0 },
            Effect::Arm { invalidation, rung, .. } => {
                self.timers.insert(invalidation, rung);
                return true;
            }
            Effect::Receipt(receipt) => {
                self.timers.remove(&receipt.invalidation);
                return true;
            }
            Effect::Answer { answer, .. } => {
                if let Answer::Verdict { invalidation, verdict } = answer {
                    self.timers.remove(&invalidation);
                    if verdict == Verdict::Done
                        && let Some((pages, granted)) = self.begun.get_mut(&invalidation)
                    {
                        *granted = true;
                        pages.iter().for_each(|page| _ = self.owner_view.insert(*page, OwnerView::Taken));
                    }
                }
                self.answers.push(answer);
                return true;
            }
            _ => return true,
        };
        if told {
            self.tell(event);
        }
        true
    }

    /// No device reaches what its owner may be changing or has taken.
    #[track_caller]
    fn judge(&self, what: &str) {
        for (iova, (_, page)) in &self.kernel.pages {
            assert_ne!(self.owner_view[page], OwnerView::Taken, "{what}: page {page} is reached at {iova}");
        }
    }

    /// Asserts that no page is live that no device may reach, unless it is being unmapped.
    #[track_caller]
    fn judge_ledger(&self, what: &str) {
        for live in self.gate.live(DOMAIN) {
            for part in self.gate.memory.pages_at(live) {
                let excluded = self.gate.memory.excluded(part.file).unwrap();
                let held = excluded.overlapping(part.range).map(|(held, _)| held);
                let states = self.gate.memory.states(part.file, part.range);
                let taken = states.filter(|(_, state)| *state != PageState::Shared);
                for pages in held.chain(taken.map(|(run, _)| run)).filter_map(|r| r.intersection(part.range))
                {
                    let iova = pages.rebase(part.range.start(), live.start());
                    assert!(self.gate.invalidations.is_awaited(iova), "{what}: {iova:?} stays mapped");
                }
            }
        }
    }

    fn settle(&mut self, what: &str) {
        for _ in 0..MAX_STEPS {
            if !self.step(true) {
                return;
            }
            self.judge(what);
        }
        panic!("{what}: it does not come to rest");
    }

    /// The process ends here, and another goes on from what it has written down.
    fn restart(&mut self) {
        let exclusions = self.gate.exclusions_over(FILE, range(0, PAGES));
        let (last_region, last_invalidation) = self.gate.last();
        let past = RecordedState {
            regions: self.gate.written().collect(),
            exclusions: exclusions.into_iter().map(|(range, by)| (FILE, range, by)).collect(),
            unended: self.gate.unended().collect(),
            unmapped: false,
            stopped: self.gate.stopped().collect(),
            last_region,
            last_invalidation,
        };
        let fd = self.store.words().fd().unwrap().try_clone_to_owned().unwrap();
        self.store = Store::open(Words::from_fd(fd).unwrap()).unwrap();
        self.effects.clear();
        self.timers.clear();
        self.answers.clear();
        self.start();
        self.gate.resume(past, &mut self.effects);
        self.begun.clear();
    }

    /// An operator releases a quarantine, as `to`. Returns true if that was granted.
    fn release(&mut self, id: InvalidationId, to: PageState) -> bool {
        let held: Vec<_> = self.gate.snapshot().quarantine;
        let held: Vec<_> = held.iter().filter(|one| one.invalidation == id).map(|one| one.range).collect();
        self.answers.clear();
        self.tell(Event::Release { caller: caller(OPERATOR), invalidation: id, to });
        while !self.effects.is_empty() && self.answers.is_empty() {
            self.step(true);
        }
        let granted = matches!(self.answers.first(), Some(Answer::Released { .. }));
        let owner_view = if to == PageState::Shared { OwnerView::Shared } else { OwnerView::Taken };
        if granted {
            for page in held.iter().flat_map(|range| range.start().0 / PAGE..range.end().0 / PAGE) {
                self.owner_view.insert(page, owner_view);
            }
        }
        granted
    }

    fn quarantined(&self) -> BTreeSet<InvalidationId> {
        self.gate.snapshot().quarantine.iter().map(|one| one.invalidation).collect()
    }
}

/// Two aliases of the file, a conversion that is committed, one that stays open, and one that waits behind it.
const SCENE: [Request; 6] = [
    Request::Add(ALIASES[0]),
    Request::Add(ALIASES[1]),
    Request::Begin(1, 1),
    Request::End(Outcome::Committed),
    Request::Begin(3, 2),
    Request::Begin(6, 1),
];

/// Plays the scene up to step `kill`; false where it is over before.
fn play(world: &mut World, kill: usize, told: bool, what: &str) -> bool {
    let mut steps = 0;
    for request in SCENE {
        world.request(request);
        loop {
            if steps == kill {
                world.step(told);
                return true;
            }
            steps += 1;
            // A fence takes longer than all else: the next request comes before it is over.
            let only_fences = world.effects.iter().all(|effect| matches!(effect, Effect::Fence { .. }));
            if (only_fences && steps % 2 == 0) || world.effects.is_empty() {
                break;
            }
            world.step(true);
            world.judge(what);
        }
    }
    while steps < kill {
        if !world.step(true) {
            return false;
        }
        steps += 1;
        world.judge(what);
    }
    world.step(told);
    true
}

/// Every scene, killed after every step, with the call of that step done and not told, and with it told.
fn each_kill(mut then: impl FnMut(World, &str)) {
    let mut kills = 0;
    for host in HOSTS {
        for told in [false, true] {
            for kill in 0.. {
                let what = format!("{host:?}, killed after step {kill}, told: {told}");
                let mut world = World::new(host);
                if !play(&mut world, kill, told, &what) {
                    break;
                }
                kills += 1;
                then(world, &what);
            }
        }
    }
    assert!(kills > 100, "{kills}");
}

#[test]
fn kill_at_any_step_leaves_no_excluded_page_mapped_and_no_reachable_page_released() {
    for to in [PageState::Private, PageState::Hole, PageState::Shared] {
        each_kill(|mut world, what| {
            world.restart();
            world.judge_ledger(what);
            // At once, and while its removal is under way.
            for wait in [0, 1, 2, usize::MAX] {
                for _ in 0..wait.min(MAX_STEPS) {
                    world.step(true);
                    world.judge(what);
                }
                for id in world.quarantined() {
                    world.release(id, to);
                    world.judge(what);
                }
            }
            world.settle(what);
            assert_eq!(
                world.quarantined(),
                BTreeSet::new(),
                "{what}: nothing is left mapped, so all of it is released"
            );
            // Shared pages are mapped again, at every alias, and nothing else is.
            for (at, (_, region)) in ALIASES.iter().zip(world.gate.memory.regions()) {
                let mapped: Vec<bool> =
                    (0..PAGES).map(|p| world.kernel.pages.contains_key(&(at + p))).collect();
                let shared: Vec<bool> =
                    (0..PAGES).map(|page| world.owner_view[&page] == OwnerView::Shared).collect();
                assert!(!region.is_being_added());
                assert_eq!(mapped, shared, "{what}");
            }
        });
    }
}

#[test]
fn unmap_error_after_a_restart_allows_release_only_as_shared() {
    each_kill(|mut world, what| {
        world.restart();
        world.kernel.fails = (world.kernel.unmaps + 1..world.kernel.unmaps + 1000).collect();
        world.settle(what);
        for id in world.quarantined() {
            let reached = world.gate.reached_since(id).is_some();
            assert_eq!(world.release(id, PageState::Private), !reached, "{what}");
            world.judge(what);
        }
        // The kernel comes to itself: as shared they come free, and a begin unmaps them before it is done.
        world.kernel.fails.clear();
        for id in world.quarantined() {
            assert!(world.release(id, PageState::Shared), "{what}");
        }
        world.settle(what);
        world.judge(what);
    });
}

#[test]
fn second_kill_during_a_restart_ends_as_one_restart() {
    each_kill(|mut world, what| {
        world.restart();
        for again in 0..6 {
            for _ in 0..again {
                world.step(again % 2 == 0);
                world.judge(what);
            }
            world.restart();
            world.judge_ledger(what);
        }
        for id in world.quarantined() {
            world.release(id, PageState::Private);
        }
        world.settle(what);
        for id in world.quarantined() {
            assert!(world.release(id, PageState::Private), "{what}");
            world.settle(what);
        }
    });
}

#[test]
fn stray_mapping_is_unmapped_before_any_release_as_private() {
    let mut world = World::new(HOSTS[0]);
    world.request(Request::Add(0));
    world.settle("add");
    world.request(Request::Begin(2, 1));
    world.settle("begin");
    // The record of a region is lost, its mapping is not.
    let (stray, piece) = (range(200, 4), 4 * PAGE);
    world.gate.mappings.start_map(DOMAIN, JobId(77), RegionId(77), stray, piece);
    assert!(world.gate.mappings.end_map(DOMAIN, JobId(77), stray, MapResult::Mapped));
    world.kernel.map(stray, piece, Offset(0));
    world.kernel.fails = [world.kernel.unmaps + 1].into();
    world.restart();
    let [id] = world.quarantined().into_iter().collect::<Vec<_>>()[..] else {
        panic!("one conversion was open")
    };
    assert!(!world.release(id, PageState::Private), "its removal is under way");
    world.settle("the removal fails");
    assert!(!world.release(id, PageState::Private), "nobody knows what it shows");
    world.restart();
    world.settle("the removal succeeds");
    assert!(!world.kernel.pages.contains_key(&200));
    assert!(world.release(id, PageState::Private));
    world.settle("released");
}

#[test]
fn stopped_devices_are_attached_after_a_restart() {
    let mut world = World::new(HOSTS[3]);
    world.request(Request::Add(0));
    world.settle("add");
    world.request(Request::Begin(2, 1));
    while !matches!(world.effects.first(), Some(Effect::Fence { step: Step::Detach, .. })) {
        assert!(world.step(true), "it is detached first");
    }
    world.step(false);
    world.restart();
    let mut attached = false;
    while !world.effects.is_empty() {
        attached |= matches!(world.effects[0], Effect::Attach { device: DEVICE, .. });
        world.step(true);
    }
    assert!(attached, "the device stays out of its domain");
}

#[test]
fn device_about_to_be_attached_is_attached_after_a_restart() {
    for host in [HOSTS[1], HOSTS[3]] {
        let mut world = World::new(host);
        world.request(Request::Add(0));
        world.settle("add");
        world.request(Request::Begin(2, 1));
        while !matches!(world.effects.first(), Some(Effect::Attach { device: DEVICE, .. })) {
            assert!(world.step(true), "{host:?}: it was stopped for the conversion");
        }
        // Nothing is in doubt: nothing but this is left to do.
        world.restart();
        let attaches = |effect: &Effect| matches!(effect, Effect::Attach { device: DEVICE, .. });
        assert!(world.effects.iter().any(attaches), "{host:?}: {:?}", world.effects);
        world.settle("restart");
        assert_eq!(world.gate.stopped().count(), 0, "{host:?}");
    }
}

#[test]
fn devices_are_stopped_before_a_closing_region_is_unmapped_after_a_restart() {
    for host in HOSTS {
        let mut world = World::new(host);
        world.request(Request::Add(0));
        world.settle("add");
        world.tell(Event::ClientGone { client: OWNER });
        // Nothing of it is done yet.
        world.restart();
        let mut stopped = false;
        while !world.effects.is_empty() {
            match world.effects[0] {
                Effect::Fence { device: DEVICE, .. } => stopped = true,
                Effect::Unmap { .. } => assert!(stopped, "{host:?}: unmapped while the device runs"),
                _ => {}
            }
            world.step(true);
        }
        world.settle("closed");
        assert!(stopped && world.gate.region_count() == 0 && world.kernel.pages.is_empty(), "{host:?}");
    }
}

#[test]
fn page_that_is_not_shared_is_unmapped_after_a_restart() {
    for (host, state) in
        HOSTS.into_iter().zip([PageState::Private, PageState::Hole, PageState::Unknown, PageState::Private])
    {
        let what = format!("{host:?}, {state:?}");
        let mut world = World::new(host);
        ALIASES.into_iter().for_each(|at| world.request(Request::Add(at)));
        world.settle("add");
        // No hold tells of it, only its state.
        world.gate.memory.restore_state(FILE, range(3, 1), state);
        world.restart();
        world.judge_ledger(&what);
        world.settle(&what);
        let mapped: Vec<u64> = world.kernel.pages.keys().copied().collect();
        let others =
            ALIASES.into_iter().flat_map(|at| (0..PAGES).filter(|page| *page != 3).map(move |p| at + p));
        assert_eq!(mapped, others.collect::<Vec<_>>(), "{what}");
    }
}

#[test]
fn numbers_are_not_used_again_after_a_restart() {
    each_kill(|mut world, what| {
        let (region, invalidation) = world.gate.last();
        world.restart();
        let now = world.gate.last();
        assert!(now.0 >= region && now.1 >= invalidation, "{what}: {now:?}");
        let mut open = world.gate.invalidations.iter().map(|(id, _)| id);
        assert!(open.all(|id| id.0 > invalidation), "{what}");
    });
}

/// Does the unmap that the gate has asked for, and tells it this of the bytes that are gone.
fn unmap_with(world: &mut World, result: fn(u64) -> UnmapResult) {
    let at = world.effects.iter().position(|effect| matches!(effect, Effect::Unmap { .. }));
    let Effect::Unmap { job, iova, .. } = world.effects.remove(at.expect("an unmap")) else {
        panic!("it is an unmap")
    };
    let UnmapResult::Gone { bytes } = world.kernel.unmap(iova, world.host.cut) else {
        panic!("the kernel unmaps it")
    };
    world.tell(Event::Unmapped { job, result: result(bytes), took_ns: 1 });
}

#[test]
fn page_with_dma_in_flight_after_a_restart_is_not_released_as_private() {
    let mut world = World::new(HOSTS[0]);
    world.request(Request::Add(0));
    world.settle("add");
    world.request(Request::Begin(2, 1));
    let id = InvalidationId(world.gate.last().1);
    while !matches!(world.effects.first(), Some(Effect::Unmap { .. })) {
        assert!(world.step(true), "it is unmapped");
    }
    world.restart();
    // The mapping is gone; the operations on it never end.
    unmap_with(&mut world, |bytes| UnmapResult::InFlight { bytes });
    world.settle("in flight");
    assert!(!world.release(id, PageState::Private), "a device may still write there");
    world.restart();
    world.settle("the next restart unmaps it");
    assert!(world.release(id, PageState::Private));
    world.settle("released");
}

#[test]
fn cached_translation_outlasts_the_unmap_of_a_restart_until_the_detach() {
    let mut world = World::new(HOSTS[3]);
    world.request(Request::Add(0));
    world.request(Request::Begin(2, 1));
    let id = InvalidationId(world.gate.last().1);
    // It is mapped, and the device uses it, before the gate hears of it.
    assert!(matches!(world.effects.first(), Some(Effect::Map { .. })));
    world.step(false);
    world.restart();
    unmap_with(&mut world, |bytes| UnmapResult::Gone { bytes });
    world.tell(Event::Release { caller: caller(OPERATOR), invalidation: id, to: PageState::Private });
    let refused = world.effects.iter().any(|effect| {
        matches!(effect, Effect::Answer { answer: Answer::Refused(Refusal::StillMapped { .. }), .. })
    });
    assert!(refused, "the device is attached: {:?}", world.effects);
    world.settle("detached and attached again");
    assert!(world.release(id, PageState::Private));
    world.settle("released");
}

#[test]
fn soft_quarantine_is_not_lifted_by_an_unmap_of_the_next_daemon() {
    let reason = Reason { cause: Cause::DmaInFlight, device: None, rung: Rung::Unmap, errno: 0 };
    for unmapped in [true, false] {
        let mut world = World::new(HOSTS[0]);
        world.request(Request::Add(0));
        world.settle("add");
        let mut past = RecordedState {
            regions: world.gate.written().collect(),
            exclusions: vec![(FILE, range(2, 1), ExcludedBy::Quarantine(InvalidationId(3), reason))],
            unmapped,
            last_region: 1,
            last_invalidation: 5,
            ..RecordedState::default()
        };
        past.regions[0].closing = false;
        // The process that had the mappings is gone, and they with it; the pages are as they were.
        world.gate = Gate::new(Policy::default(), words::private);
        crate::gate::ledger::Mapped::in_store(&world.store, DOMAIN).unwrap().discard();
        world.kernel.pages.clear();
        world.start();
        world.gate.resume(past, &mut world.effects);
        world.settle("resumed");
        // All that this daemon has mapped around it goes.
        world.tell(Event::RemoveRegion { caller: caller(ORPHANS), region: RegionId(1) });
        world.settle("remove");
        assert!(world.kernel.pages.is_empty() && world.gate.region_count() == 0);
        let left = world.quarantined().contains(&InvalidationId(3));
        assert_eq!(
            left, unmapped,
            "mappings that live on are proof, those of a process that is gone are none"
        );
    }
}

#[test]
fn closing_regions_are_not_adopted() {
    let mut world = World::new(HOSTS[0]);
    world.request(Request::Add(0));
    world.request(Request::Add(64));
    world.settle("add");
    world.kernel.fails = (1..1000).collect();
    world.tell(Event::RemoveRegion { caller: caller(OWNER), region: RegionId(2) });
    world.settle("remove");
    world.restart();
    world.answers.clear();
    world.tell(Event::Adopt { caller: caller(ClientId(2)) });
    world.settle("adopt");
    let adopted = world.answers.iter().find_map(|answer| match answer {
        Answer::Adopted { regions, .. } => Some(regions.iter().map(|r| r.region).collect::<Vec<_>>()),
        _ => None,
    });
    assert_eq!(adopted, Some(vec![RegionId(1)]));
    assert_ne!(world.gate.memory.region(RegionId(2)).unwrap().owner(), ClientId(2));
}

/// Returns the conversions that `client` may settle after it has adopted.
fn adopt(world: &mut World, client: ClientId) -> Vec<u64> {
    world.answers.clear();
    world.tell(Event::Adopt { caller: caller(client) });
    world.settle("adopt");
    let adopted = world.answers.iter().find_map(|answer| match answer {
        Answer::Adopted { unended, .. } => {
            Some(unended.iter().map(|one| one.invalidation.0).collect::<Vec<_>>())
        }
        _ => None,
    });
    let mut unended = adopted.expect("there is memory to adopt");
    unended.dedup();
    assert!(unended.iter().all(|id| world.gate.may_settle(client, InvalidationId(*id))));
    unended
}

#[test]
fn adopter_settles_only_conversions_open_at_the_restart() {
    let mut world = World::new(HOSTS[0]);
    world.request(Request::Add(0));
    // Another client shows the same file, converts there, and dies between begin and end.
    let stranger = ClientId(5);
    let backing = Backing { file: FILE, offset: Offset(0) };
    let (gpa, initial) = (range(64, PAGES), PageState::Shared);
    let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
    world.tell(Event::AddRegion { caller: caller(stranger), spec });
    world.settle("add");
    let (ranges, performer) = (range(64 + 5, 1).into(), Performer::Client);
    let to = PageState::Private;
    world.tell(Event::Begin { caller: caller(stranger), ranges, to, performer, deadline_ns: 1 << 40 });
    world.settle("begin");
    let theirs = world.gate.last().1;
    world.tell(Event::ClientGone { client: stranger });
    world.settle("gone");
    world.request(Request::Begin(2, 1));
    world.settle("begin");
    let own = world.gate.last().1;
    // Also after a second restart, and after one that nobody has adopted at.
    world.restart();
    world.settle("restart");
    for client in [11, 12] {
        world.restart();
        world.settle("restart");
        assert_eq!(adopt(&mut world, ClientId(client)), [own]);
        assert!(!world.gate.may_settle(ClientId(client), InvalidationId(theirs)), "it did not begin it");
        assert!(!world.gate.may_settle(OPERATOR, InvalidationId(own)), "it has not adopted it");
    }
    // The adopter dies: whoever comes after it did not begin it either.
    world.tell(Event::ClientGone { client: ClientId(12) });
    world.settle("gone");
    world.request(Request::Add(0));
    world.settle("add");
    world.restart();
    world.settle("restart");
    assert_eq!(adopt(&mut world, ClientId(13)), [0; 0]);
    assert!(!world.gate.may_settle(ClientId(13), InvalidationId(own)));
}

#[test]
fn adopter_settles_no_page_that_only_an_alias_shows() {
    let mut world = World::new(HOSTS[0]);
    let spec = |gpa: u64, file: u64| {
        let backing = Backing { file: FileId { device: 1, inode: file }, offset: Offset(0) };
        let (gpa, initial) = (range(gpa, 1), PageState::Shared);
        RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial }
    };
    // Two aliases of one page, and beside them a page of another client's: one conversion over both.
    for (client, gpa, file) in [(OWNER, 0, 7), (OWNER, 64, 7), (ClientId(5), 1, 8)] {
        world.tell(Event::AddRegion { caller: caller(client), spec: spec(gpa, file) });
    }
    world.settle("add");
    world.requested = Some(vec![0]);
    let (ranges, performer, to) = (range(0, 2).into(), Performer::Client, PageState::Private);
    world.tell(Event::Begin { caller: caller(OWNER), ranges, to, performer, deadline_ns: 1 << 40 });
    world.settle("begin");
    let id = InvalidationId(world.gate.last().1);
    let gate = &mut world.gate;
    let exclusions: Vec<_> = [7, 8]
        .map(|inode| FileId { device: 1, inode })
        .into_iter()
        .flat_map(|file| {
            gate.exclusions_over(file, range(0, 1)).into_iter().map(move |(r, by)| (file, r, by))
        })
        .collect();
    assert_eq!(exclusions.len(), 2);
    let past = RecordedState {
        regions: gate.written().filter(|written| written.spec.backing.file.inode == 7).collect(),
        exclusions,
        last_region: 3,
        last_invalidation: id.0,
        ..RecordedState::default()
    };
    resume_from(&mut world, past);
    assert_eq!(adopt(&mut world, ClientId(11)), [0; 0]);
    assert!(!world.gate.may_settle(ClientId(11), id), "one of its pages is nobody's");
}

/// Goes on from `past` in another process, in which nothing is mapped.
fn resume_from(world: &mut World, past: RecordedState) {
    world.store = Store::new(Words::memfd("resume", 16 << 20).unwrap()).unwrap();
    world.kernel.pages.clear();
    world.effects.clear();
    world.timers.clear();
    world.start();
    world.gate.resume(past, &mut world.effects);
    world.settle("resumed");
}

#[test]
fn adopter_settles_no_conversion_only_partly_in_its_memory() {
    for (pages, settles) in [(1, false), (2, true)] {
        let mut world = World::new(HOSTS[0]);
        let backing = Backing { file: FILE, offset: Offset(0) };
        let (gpa, initial) = (range(64, pages), PageState::Shared);
        let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
        world.request(Request::Add(0));
        world.tell(Event::AddRegion { caller: caller(OWNER), spec });
        world.settle("add");
        world.request(Request::Begin(0, 2));
        world.settle("begin");
        let id = InvalidationId(world.gate.last().1);
        let exclusions = world.gate.exclusions_over(FILE, range(0, PAGES));
        // The region that it was begun in does not come back, the alias of its first pages does.
        let past = RecordedState {
            regions: world.gate.written().filter(|written| written.region == RegionId(2)).collect(),
            exclusions: exclusions.into_iter().map(|(range, by)| (FILE, range, by)).collect(),
            last_region: 2,
            last_invalidation: id.0,
            ..RecordedState::default()
        };
        resume_from(&mut world, past);
        adopt(&mut world, ClientId(11));
        assert_eq!(world.gate.may_settle(ClientId(11), id), settles, "{pages} of 2 pages");
    }
}

#[test]
fn only_the_adopter_settles_what_it_has_adopted() {
    let mut world = World::new(HOSTS[0]);
    world.request(Request::Add(0));
    world.settle("add");
    world.request(Request::Begin(2, 1));
    world.settle("begin");
    let id = InvalidationId(world.gate.last().1);
    world.restart();
    world.settle("restart");
    let (adopter, other) = (ClientId(11), ClientId(12));
    assert_eq!(adopt(&mut world, adopter), [id.0]);
    // The same pages show in memory of another client's.
    let backing = Backing { file: FILE, offset: Offset(0) };
    let (gpa, initial) = (range(64, PAGES), PageState::Shared);
    let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
    world.tell(Event::AddRegion { caller: caller(other), spec });
    world.settle("add");
    assert!(world.gate.may_settle(adopter, id) && !world.gate.may_settle(other, id));
}

/// An earlier daemon heard of both unmaps of a quarantined page, or of the first alone, and ended before it could say so.
#[test]
fn quarantine_that_was_disproved_when_the_daemon_ended_is_lifted_at_the_restart() {
    for heard in [&ALIASES[..], &ALIASES[..1]] {
        let mut world = World::new(HOSTS[0]);
        world.request(Request::Add(ALIASES[0]));
        world.request(Request::Add(ALIASES[1]));
        world.settle("add");
        world.request(Request::Begin(2, 1));
        world.settle("begin");
        world.request(Request::End(Outcome::Unknown { errno: 5, offset: 0 }));
        world.settle("end");
        let unknown = world.quarantined();
        world.kernel.fails = (1..1000).collect();
        world.request(Request::Begin(5, 1));
        world.settle("begin");
        assert_eq!(world.quarantined().len(), 2);
        for alias in heard {
            let domain = world.gate.mappings.get_mut(DOMAIN).unwrap();
            for run in domain.mapped().runs(range(*alias, PAGES)).collect::<Vec<_>>() {
                domain.end_leftover(run.range, UnmapResult::Gone { bytes: 0 }, false);
                let pages = run.range.start().0 / PAGE..run.range.end().0 / PAGE;
                pages.for_each(|page| _ = world.kernel.pages.remove(&page));
            }
        }
        world.kernel.fails.clear();
        world.restart();
        let lifted = heard.len() == ALIASES.len();
        assert_eq!(world.quarantined() == unknown, lifted, "what nobody proved stays");
        let told = |effect: &Effect| matches!(effect, Effect::Notice(Notice::Freed { .. }));
        assert_eq!(world.effects.iter().any(told), lifted);
        world.settle("resumed");
        assert_eq!(world.quarantined(), unknown);
        assert!(ALIASES.iter().all(|alias| world.kernel.pages.contains_key(&(alias + 5))));
    }
}

/// It was on disk when the ledger began: of what mapped it then nothing is known at any later restart either.
#[test]
fn quarantine_from_before_the_ledger_outlasts_every_restart_whatever_its_cause() {
    for cause in [Cause::UnmapFailed, Cause::CallHangs, Cause::DmaInFlight, Cause::HalfMapped] {
        let mut world = World::new(HOSTS[0]);
        let reason = Reason { cause, device: None, rung: Rung::Unmap, errno: 16 };
        let invalidation = InvalidationId(7);
        world.tell(Event::Quarantine { file: FILE, range: range(2, 1), invalidation, reason });
        ALIASES.into_iter().for_each(|alias| world.request(Request::Add(alias)));
        world.settle("add");
        for _ in 0..3 {
            world.restart();
            world.settle("resumed");
            assert_eq!(world.quarantined(), BTreeSet::from([invalidation]), "{cause:?}");
        }
    }
}
