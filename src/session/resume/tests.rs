use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use passgate_backends::{Device, DeviceTraits, Domain, Entered, Segment, Steps, Window, Windowed};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::words;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange, identity};
use passgate_sim::iommu::{Memory, Sim};

use super::*;
use crate::gate::{Answer, Caller, DeviceId, Door, Event, Gate, Outcome, PageState, Performer, Policy};
use crate::gate::{QuarantineStatus, Rung};
use crate::protocol::verbs::AddMemory;
use crate::session::persist::{LoadError, read_exclusions};
use crate::session::records::{Records, StateOptions};
use crate::session::{Next, SystemClock, Trust};

const CALLER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };

fn session(domain: Arc<dyn Domain>, persistent: PersistentState) -> Session {
    session_of(domain, vec![], persistent)
}

fn session_of(
    domain: Arc<dyn Domain>,
    devices: Vec<Arc<dyn Device>>,
    persistent: PersistentState,
) -> Session {
    let clock = Arc::new(SystemClock);
    let (policy, trust) = (Policy::default(), Trust::default());
    let mut session = Session::new(policy, domain, devices, trust, clock, None, None);
    // As `Session::new` does with a `Persistence`, but without a service manager.
    session.gate = Gate::new(Policy::default(), words::private);
    session.gate.use_store(persistent.store().clone());
    session.storage.set_persistent(persistent);
    session.hardware.initial_events(&[]).into_iter().for_each(|event| session.handle(event));
    session
}

/// Runs the session until it is idle. Returns its answers.
fn settle(session: &mut Session) -> Vec<Answer> {
    let mut answers = Vec::new();
    loop {
        match session.next_step() {
            Next::Idle => return answers,
            Next::Call(call) => session.returned(call.run()),
            Next::Answer(_, answer) => answers.push(answer),
            Next::Refused(_, error) => panic!("{error}"),
            Next::Notice(_) => {}
        }
    }
}

fn page(page: u64) -> PageRange<Gpa> {
    PageRange::new(page * PAGE, PAGE).unwrap()
}

fn begin(session: &mut Session, at: u64, to: PageState) -> InvalidationId {
    let (ranges, performer) = (page(at).into(), Performer::Client);
    session.handle(Event::Begin { caller: CALLER, ranges, to, performer, deadline_ns: 1 << 40 });
    match settle(session)[..] {
        [Answer::Verdict { invalidation, .. }] => invalidation,
        ref other => panic!("{other:?}"),
    }
}

fn end(session: &mut Session, invalidation: InvalidationId) {
    session.handle(Event::End { caller: CALLER, invalidation, outcome: Outcome::Committed });
    settle(session);
}

/// The pages that the window admits.
fn admitted(window: &Window) -> Vec<u64> {
    let enters = |page: &u64| {
        let entered = window.enter(0, &[Segment { iova: Iova(page * PAGE), len: 1 }]);
        window.leave(0);
        entered == Entered::In
    };
    (0..16).filter(enters).collect()
}

#[test]
fn ats_state_outlives_the_process() {
    let [caches, plain] = ["0000:00:01.0", "0000:00:02.0"];
    let traits = |device, ats| Event::DeviceTraits { device: DeviceId(device), ats, tdi: false };
    for (read, unused) in [
        (vec![], vec![plain]),
        (vec![traits(1, true)], vec![]),
        (vec![traits(0, false), traits(1, true), traits(1, false)], vec![caches, plain]),
    ] {
        let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let device = |name, ats| {
            let traits = DeviceTraits { ats, ..DeviceTraits::default() };
            Arc::new(sim.device(name, Steps::DETACH, traits)) as Arc<dyn Device>
        };
        let devices = vec![device(caches, true), device(plain, false)];
        let persistent = PersistentState::new().unwrap();
        let ledger = persistent.fd().unwrap().try_clone_to_owned().unwrap();
        let mut session = session_of(Arc::new(sim), devices, persistent);
        session.complete(DomainIds::Type1 { entries: 1 });
        read.into_iter().for_each(|event| session.handle(event));
        drop(session);
        let (_, left) = PersistentState::open(ledger).unwrap();
        assert_eq!(
            (left.devices, left.ats_unused),
            (vec![caches.into(), plain.into()], unused.iter().map(|name| (*name).to_owned()).collect())
        );
    }
}

#[test]
fn quarantine_only_on_disk_is_added_until_an_operator_releases_it() {
    let file = FileId { device: 1, inode: 2 };
    let range = |page: u64, pages: u64| PageRange::new(page * PAGE, pages * PAGE).unwrap();
    let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Rung::Unmap, errno: 16 };
    let in_ledger = (file, range(2, 2), ExcludedBy::Quarantine(InvalidationId(4), reason));
    let mut past =
        RecordedState { exclusions: vec![in_ledger], last_invalidation: 5, ..RecordedState::default() };
    let on_disk = |page, pages, invalidation| Event::Quarantine {
        file,
        range: range(page, pages),
        invalidation: InvalidationId(invalidation),
        reason,
    };
    add_quarantine_on_disk(&mut past, vec![on_disk(2, 2, 4)]);
    assert_eq!((past.exclusions.len(), past.last_invalidation), (1, 5), "it is the same");
    add_quarantine_on_disk(&mut past, vec![on_disk(1, 4, 9)]);
    let unknown = ExcludedBy::Quarantine(InvalidationId(9), Reason { cause: Cause::OwnerUnknown, ..reason });
    let both = [in_ledger, (file, range(1, 1), unknown), (file, range(4, 1), unknown)];
    assert_eq!((&past.exclusions[..], past.last_invalidation), (&both[..], 9));
}

fn records(dir: &std::path::Path, resumed: bool) -> crate::error::Result<Records> {
    Records::open(&StateOptions::at(dir), Policy::default(), "sim", Vec::new(), resumed)
}

#[test]
fn quarantine_on_disk_is_added_only_if_the_ledger_may_not_have_it() {
    for named in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let persistent = PersistentState::new().unwrap();
        persistent.complete(DomainIds::Type1 { entries: 65_535 }, &[]);
        let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Rung::Unmap, errno: 16 };
        let (file, range) = (FileId { device: 1, inode: 2 }, PageRange::new(2 * PAGE, PAGE).unwrap());
        let quarantined = QuarantineStatus { file, range, invalidation: InvalidationId(4), reason };
        // The ledger does not have it any more: the daemon ended before it could write that to the disk.
        let mut first = records(dir.path(), false).unwrap();
        let ledger = if named { persistent.id() } else { PersistentState::new().unwrap().id() };
        first.rewrite_quarantine(&[quarantined], ledger);
        drop(first);
        let fd = persistent.fd().unwrap().try_clone_to_owned().unwrap();
        drop(persistent);
        let (persistent, left) = PersistentState::open(fd).unwrap();
        let (store, _removed) = FdStore::detached();
        let left = Some((left, StoredFds::of(BTreeMap::new())));
        let hold = Persistence { store, persistent, earlier: left, quarantine: None };
        let domain = Arc::new(Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap());
        let opened = Some(records(dir.path(), true).unwrap());
        let (policy, clock) = (Policy::default(), Arc::new(SystemClock));
        let session = Session::new(policy, domain, Vec::new(), Trust::default(), clock, opened, Some(hold));
        assert_eq!(session.snapshot().quarantine.is_empty(), named);
        drop(session);
        // A daemon without that ledger, or with another one, takes what is on the disk.
        let mut without = records(dir.path(), false).unwrap();
        assert_eq!(without.take_quarantine().is_empty(), named);
        drop(without);
        let mut other = records(dir.path(), true).unwrap();
        assert_eq!(other.take_quarantine_beyond(Some(1)).is_empty(), named);
    }
}

#[test]
fn ledger_that_was_never_complete_is_not_read_as_empty() {
    let persistent = PersistentState::new().unwrap();
    let fd = || persistent.fd().unwrap().try_clone_to_owned().unwrap();
    assert!(matches!(read_exclusions(fd()), Err(LoadError::Incomplete)));
    persistent.complete(DomainIds::Nothing, &[]);
    assert!(read_exclusions(fd()).unwrap().is_empty());
}

#[test]
fn quarantine_of_a_ledger_that_is_not_taken_over_is_written_to_disk() {
    let dir = tempfile::tempdir().unwrap();
    let reason = Reason { cause: Cause::ClientGone, device: None, rung: Rung::Unmap, errno: 0 };
    let (file, range) = (FileId { device: 1, inode: 2 }, PageRange::new(2 * PAGE, PAGE).unwrap());
    let event = Event::Quarantine { file, range, invalidation: InvalidationId(4), reason };
    let (store, _removed) = FdStore::detached();
    let quarantine = Some((vec![event.clone()], StoredFds::of(BTreeMap::new())));
    let hold = Persistence { store, persistent: PersistentState::new().unwrap(), earlier: None, quarantine };
    let domain = Arc::new(Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap());
    let clock = Arc::new(SystemClock);
    let opened = Some(records(dir.path(), false).unwrap());
    let trust = Trust::default();
    drop(Session::new(Policy::default(), domain, Vec::new(), trust, clock, opened, Some(hold)));
    assert_eq!(records(dir.path(), false).unwrap().take_quarantine(), [event]);
}

#[test]
fn full_disk_does_not_prevent_a_restart_from_the_ledger() {
    let dir = tempfile::tempdir().unwrap();
    // The new file cannot be created, as on a full disk.
    std::fs::create_dir(dir.path().join("quarantine.new")).unwrap();
    assert!(records(dir.path(), false).is_err());
    records(dir.path(), true).unwrap();
}

#[test]
fn unreadable_quarantine_stays_until_the_ledgers_is_written_in_its_place() {
    let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Rung::Unmap, errno: 16 };
    let (file, range) = (FileId { device: 1, inode: 2 }, PageRange::new(2 * PAGE, PAGE).unwrap());
    let held = QuarantineStatus { file, range, invalidation: InvalidationId(4), reason };
    for set_aside in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quarantine.json");
        let mut first = records(dir.path(), false).unwrap();
        first.rewrite_quarantine(&[held], None);
        drop(first);
        match set_aside {
            true => std::fs::rename(&path, dir.path().join("quarantine.incomplete")).unwrap(),
            false => std::fs::write(&path, "damaged").unwrap(),
        }
        // One that has the ledger ends before it has written that down: the next does not start without the ledger.
        drop(records(dir.path(), true).unwrap());
        assert!(records(dir.path(), false).is_err(), "set aside: {set_aside}");
        let mut resumed = records(dir.path(), true).unwrap();
        resumed.rewrite_quarantine(&[held], Some(7));
        drop(resumed);
        assert_eq!(records(dir.path(), false).unwrap().take_quarantine().len(), 1, "set aside: {set_aside}");
    }
}

#[test]
fn directory_of_an_old_version_without_a_quarantine_file_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    drop(records(dir.path(), false).unwrap());
    let files = || std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path());
    let named = |path: &std::path::PathBuf, name: &str| {
        path.file_name().is_some_and(|of| of.to_string_lossy().starts_with(name))
    };
    let log = files().find(|path| named(path, "audit-")).unwrap();
    for path in files().filter(|path| !named(path, "audit-")) {
        std::fs::remove_file(path).unwrap();
    }
    assert!(records(dir.path(), false).is_err(), "a file that this version writes is missing");
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("\"format\":1,"));
    std::fs::write(&log, text.replace("\"format\":1,", "")).unwrap();
    for path in files().filter(|path| *path != log) {
        std::fs::remove_file(path).unwrap();
    }
    records(dir.path(), false).unwrap();
}

#[test]
fn restart_announces_exactly_the_live_ranges_to_the_domain() {
    let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
    let file = GuestFile::memfd("resume", 8 * PAGE).unwrap();
    let (fd, persistent) = (file.as_fd().try_clone_to_owned().unwrap(), PersistentState::new().unwrap());
    let ledger: OwnedFd = persistent.fd().unwrap().try_clone_to_owned().unwrap();
    persistent.complete(DomainIds::Type1 { entries: 65_535 }, &[]);
    let mut first = session(Arc::new(sim.clone()), persistent);
    first.add_memory(CALLER, AddMemory::shared(0, 8 * PAGE), vec![fd.try_clone().unwrap()]);
    settle(&mut first);
    let private = begin(&mut first, 2, PageState::Private);
    end(&mut first, private);
    begin(&mut first, 5, PageState::Private); // still open when the process ends
    assert_eq!(sim.mapping_count(), 6);
    drop(first);

    let window = Window::new(1, 1);
    let domain = Arc::new(Windowed::new(Arc::new(sim.clone()), Arc::clone(&window)));
    // The exclusions can also be read without taking the ledger over.
    let exclusions = read_exclusions(ledger.try_clone().unwrap()).unwrap();
    let [(file, excluded, ExcludedBy::Open(_))] = exclusions[..] else { panic!("{exclusions:?}") };
    assert_eq!((excluded.start().0 / PAGE, excluded.pages()), (5, 1));
    let (persistent, left) = PersistentState::open(ledger).unwrap();
    let mut second = session(domain, persistent);
    let found = identity::identify(&fd).unwrap();
    assert_eq!(file, FileId { device: found.device, inode: found.inode });
    let name = Name::Memory(FileId { device: found.device, inode: found.inode });
    assert!(admitted(&window).is_empty());
    second.resume_from(left, StoredFds::of(BTreeMap::from([(name, vec![fd])])));
    assert_eq!(admitted(&window), [0, 1, 3, 4, 6, 7]);
    settle(&mut second);
    assert_eq!(admitted(&window), [0, 1, 3, 4, 6, 7]);
}
