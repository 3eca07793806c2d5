//! What a session hands on to the next process, and how it goes on from what it was handed.

use std::sync::{Arc, Weak};

use passgate_backends::resume::Ids;
use passgate_bindings::memory::GuestFile;

use super::Session;
use super::fdstore::{FdStore, Kept, Name};
use super::lasting::{Lasting, Left};
use crate::gate::ledger::holds::gaps;
use crate::gate::{Cause, ClientId, DomainId, Event, FileId, HeldBy, InvalidationId, Past, Reason};

/// By what a session outlives its process.
#[derive(Debug)]
pub struct Hold {
    /// Where its files are kept.
    pub store: FdStore,
    /// Where what it knows is kept.
    pub lasting: Lasting,
    /// What an earlier process left there, and the files that were kept for it.
    pub left: Option<(Left, Kept)>,
    /// Where nobody goes on from an earlier process: what stays in quarantine all the same, as events for a gate without
    /// regions, and the files that it is in.
    pub quarantine: Option<(Vec<Event>, Kept)>,
}

impl Session {
    /// Goes on from where another process ended.
    pub(super) fn go_on(&mut self, left: Left, mut kept: Kept) {
        let Left { mut past, asides, .. } = left;
        for region in &mut past.regions {
            let aside = asides.iter().find(|(id, _)| *id == region.region).map(|(_, aside)| *aside);
            if let Err(error) = self.files.again(region, aside, &mut kept) {
                log::error!("the memory at {} was not kept ({error}): it is closed", region.spec.gpa);
                region.closing = true;
            }
        }
        let ledger = self.lasting.as_ref().and_then(Lasting::id);
        let on_disk =
            self.records.as_mut().map(|records| records.take_left_beside(ledger)).unwrap_or_default();
        join_quarantine(&mut past, on_disk);
        for (file, ..) in &past.holds {
            self.files.hold_again(*file, &mut kept);
        }
        self.gate.resume(past, &mut self.effects);
        // Before any of the effects: what is doubtful is being taken away, and is none of this.
        for (index, domain) in self.domains.iter().enumerate() {
            for range in self.gate.live(DomainId(index as u16)) {
                domain.resumed(range);
            }
        }
        if let Some(lasting) = &mut self.lasting {
            lasting.resumed(&self.gate, &self.effects);
        }
        self.write_quarantine();
        for name in kept.names() {
            if let (Name::Memory(_) | Name::Private(_), Some(store)) = (&name, &self.store) {
                store.remove(name);
            }
        }
    }

    /// Has the disk say what is in quarantine, and that the ledger has it.
    pub(super) fn write_quarantine(&mut self) {
        if let (Some(records), Some(lasting)) = (&mut self.records, &self.lasting) {
            records.go_on(&self.gate.quarantined_ranges().collect::<Vec<_>>(), lasting.id());
        }
    }

    /// The ids are such, and all files of domain and devices are kept.
    pub fn complete(&self, ids: Ids) {
        if let Some(lasting) = &self.lasting {
            let natures = self.gate.natures();
            let named = self.devices.iter().zip(natures);
            let names: Vec<_> =
                named.map(|(device, (_, nature))| (device.name().to_owned(), !nature.ats)).collect();
            // Of software devices nothing outlives the process.
            lasting.complete(ids, if ids == Ids::Nothing { &[] } else { &names });
        }
    }

    /// Has a file that is not needed kept no longer.
    pub(super) fn let_go(&self, name: &Name) {
        let needed = match name {
            Name::Memory(file) => self.files.get(*file).is_some(),
            Name::Private(file) => self.files.has_private(*file),
            _ => true,
        };
        if let Some(store) = self.store.as_ref().filter(|_| !needed) {
            store.remove(name.clone());
        }
    }

    /// Lets go of a file that nothing needs. Asked of the gate again, because it may have come back since the gate said so.
    pub(super) fn forget(&mut self, file: FileId) {
        if self.gate.knows(file) || self.files.is_adding(file) {
            return;
        }
        self.files.forget(file);
        self.let_go(&Name::Memory(file));
    }

    /// The files of guest memory.
    pub fn guest_files(&self) -> Vec<Weak<GuestFile>> {
        self.files.all().iter().map(Arc::downgrade).collect()
    }

    /// Whether memory of an earlier daemon's clients waits for somebody to come back for it.
    pub fn has_orphans(&self) -> bool {
        self.gate.has_orphans()
    }

    /// Whether this client may say what pages are that a conversion left in quarantine ([`crate::gate::Gate::may_settle`]).
    pub fn may_settle(&self, client: ClientId, invalidation: InvalidationId) -> bool {
        self.gate.may_settle(client, invalidation)
    }
}

/// Adds what the state directory has in quarantine and the ledger has not. Nobody here can prove anything of it: it stays
/// until it is released.
fn join_quarantine(past: &mut Past, on_disk: Vec<Event>) {
    for event in on_disk {
        let Event::Quarantine { file, range, invalidation, reason } = event else { continue };
        let mut held: Vec<_> = past
            .holds
            .iter()
            .filter(|(of, held, _)| *of == file && held.overlaps(range))
            .map(|(_, held, _)| *held)
            .collect();
        held.sort_unstable();
        let missing: Vec<_> = gaps(range, held.into_iter()).collect();
        if missing.is_empty() {
            continue;
        }
        log::warn!(
            "{} ranges are in quarantine on disk and not in the ledger: they stay there",
            missing.len()
        );
        let id = InvalidationId(invalidation.0.clamp(1, u64::MAX / 2));
        past.last_invalidation = past.last_invalidation.max(id.0);
        let reason = Reason { cause: Cause::OwnerUnknown, ..reason };
        past.holds.extend(missing.into_iter().map(|range| (file, range, HeldBy::Quarantine(id, reason))));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::Arc;

    use passgate_backends::iommu::sim::{Memory, Sim};
    use passgate_backends::{Device, Domain, Entered, Nature, Segment, StopClass, Window, Windowed};
    use passgate_bindings::memory::GuestFile;
    use passgate_bindings::{Gpa, Iova, PAGE, PageRange, identity};

    use super::*;
    use crate::gate::{Answer, Caller, DeviceId, Door, Event, Gate, Outcome, PageState, Performer, Policy};
    use crate::gate::{QuarantineStatus, Step};
    use crate::observe::records::{Records, StateOptions};
    use crate::protocol::verbs::AddMemory;
    use crate::session::lasting::{LoadError, holds_in};
    use crate::session::start::start;
    use crate::session::{Next, SystemClock, Trust};

    const CALLER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };

    fn session(domain: Arc<dyn Domain>, lasting: Lasting) -> Session {
        session_of(domain, vec![], lasting)
    }

    fn session_of(domain: Arc<dyn Domain>, devices: Vec<Arc<dyn Device>>, lasting: Lasting) -> Session {
        let clock = Arc::new(SystemClock);
        let (policy, trust) = (Policy::default(), Trust::default());
        let mut session = Session::new(policy, domain, devices, trust, clock, None, None);
        // As `Session::new` does with a hold, but without a service manager.
        session.gate = Gate::new(Policy::default());
        session.gate.keep_in(lasting.store().clone());
        session.lasting = Some(lasting);
        let start = start(&*session.domains[0], &session.devices, &[]);
        start.into_iter().for_each(|event| session.handle(event));
        session
    }

    /// Does everything there is to do; the answers.
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

    fn open(window: &Window) -> Vec<u64> {
        let enters = |page: &u64| {
            let entered = window.enter(0, &[Segment { iova: Iova(page * PAGE), len: 1 }]);
            window.leave(0);
            entered == Entered::In
        };
        (0..16).filter(enters).collect()
    }

    #[test]
    fn what_is_known_of_ats_outlives_the_process() {
        let [caches, plain] = ["0000:00:01.0", "0000:00:02.0"];
        let nature = |device, ats| Event::DeviceNature { device: DeviceId(device), ats, tdi: false };
        for (read, unused) in [
            (vec![], vec![plain]),
            (vec![nature(1, true)], vec![]),
            (vec![nature(0, false), nature(1, true), nature(1, false)], vec![caches, plain]),
        ] {
            let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
            let device = |name, ats| {
                let nature = Nature { ats, tdi: false };
                Arc::new(sim.device(name, StopClass::DETACH, nature)) as Arc<dyn Device>
            };
            let devices = vec![device(caches, true), device(plain, false)];
            let lasting = Lasting::new().unwrap();
            let ledger = lasting.fd().unwrap().try_clone_to_owned().unwrap();
            let mut session = session_of(Arc::new(sim), devices, lasting);
            session.complete(Ids::Type1 { entries: 1 });
            read.into_iter().for_each(|event| session.handle(event));
            drop(session);
            let (_, left) = Lasting::open(ledger).unwrap();
            assert_eq!(
                (left.devices, left.ats_unused),
                (vec![caches.into(), plain.into()], unused.iter().map(|name| (*name).to_owned()).collect())
            );
        }
    }

    #[test]
    fn what_only_the_disk_has_in_quarantine_joins_what_the_ledger_has_and_lasts() {
        let file = FileId { device: 1, inode: 2 };
        let range = |page: u64, pages: u64| PageRange::new(page * PAGE, pages * PAGE).unwrap();
        let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Step::Unmap, errno: 16 };
        let in_ledger = (file, range(2, 2), HeldBy::Quarantine(InvalidationId(4), reason));
        let mut past = Past { holds: vec![in_ledger], last_invalidation: 5, ..Past::default() };
        let on_disk = |page, pages, invalidation| Event::Quarantine {
            file,
            range: range(page, pages),
            invalidation: InvalidationId(invalidation),
            reason,
        };
        join_quarantine(&mut past, vec![on_disk(2, 2, 4)]);
        assert_eq!((past.holds.len(), past.last_invalidation), (1, 5), "it is the same");
        join_quarantine(&mut past, vec![on_disk(1, 4, 9)]);
        let unknown = HeldBy::Quarantine(InvalidationId(9), Reason { cause: Cause::OwnerUnknown, ..reason });
        let joined = [in_ledger, (file, range(1, 1), unknown), (file, range(4, 1), unknown)];
        assert_eq!((&past.holds[..], past.last_invalidation), (&joined[..], 9));
    }

    fn records(dir: &std::path::Path, resumed: bool) -> crate::error::Result<Records> {
        Records::open(&StateOptions::at(dir), Policy::default(), "sim", Vec::new(), resumed)
    }

    #[test]
    fn only_quarantine_that_the_ledger_may_not_have_joins_it_from_disk() {
        for named in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let lasting = Lasting::new().unwrap();
            lasting.complete(Ids::Type1 { entries: 65_535 }, &[]);
            let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Step::Unmap, errno: 16 };
            let (file, range) = (FileId { device: 1, inode: 2 }, PageRange::new(2 * PAGE, PAGE).unwrap());
            let held = QuarantineStatus { file, range, invalidation: InvalidationId(4), reason };
            // The ledger has it no more: the daemon has ended before it could write that down on disk.
            let mut first = records(dir.path(), false).unwrap();
            first.go_on(&[held], if named { lasting.id() } else { Lasting::new().unwrap().id() });
            drop(first);
            let fd = lasting.fd().unwrap().try_clone_to_owned().unwrap();
            drop(lasting);
            let (lasting, left) = Lasting::open(fd).unwrap();
            let (store, _removed) = FdStore::detached();
            let left = Some((left, Kept::of(BTreeMap::new())));
            let hold = Hold { store, lasting, left, quarantine: None };
            let domain = Arc::new(Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap());
            let opened = Some(records(dir.path(), true).unwrap());
            let (policy, clock) = (Policy::default(), Arc::new(SystemClock));
            let session =
                Session::new(policy, domain, Vec::new(), Trust::default(), clock, opened, Some(hold));
            assert_eq!(session.snapshot().quarantine.is_empty(), named);
            drop(session);
            // Who goes on without the ledger has what the disk says, and the ledger has not that.
            let mut without = records(dir.path(), false).unwrap();
            assert_eq!(without.take_left().is_empty(), named);
            drop(without);
            let mut again = records(dir.path(), true).unwrap();
            assert_eq!(again.take_left_beside(Some(1)).is_empty(), named);
        }
    }

    #[test]
    fn ledger_that_was_never_complete_is_not_read_as_empty() {
        let lasting = Lasting::new().unwrap();
        let fd = || lasting.fd().unwrap().try_clone_to_owned().unwrap();
        assert!(matches!(holds_in(fd()), Err(LoadError::Incomplete)));
        lasting.complete(Ids::Nothing, &[]);
        assert!(holds_in(fd()).unwrap().is_empty());
    }

    #[test]
    fn quarantine_of_a_ledger_that_nobody_goes_on_from_is_written_to_disk() {
        let dir = tempfile::tempdir().unwrap();
        let reason = Reason { cause: Cause::ClientGone, device: None, rung: Step::Unmap, errno: 0 };
        let (file, range) = (FileId { device: 1, inode: 2 }, PageRange::new(2 * PAGE, PAGE).unwrap());
        let held = Event::Quarantine { file, range, invalidation: InvalidationId(4), reason };
        let (store, _removed) = FdStore::detached();
        let quarantine = Some((vec![held.clone()], Kept::of(BTreeMap::new())));
        let hold = Hold { store, lasting: Lasting::new().unwrap(), left: None, quarantine };
        let domain = Arc::new(Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap());
        let clock = Arc::new(SystemClock);
        let opened = Some(records(dir.path(), false).unwrap());
        let trust = Trust::default();
        drop(Session::new(Policy::default(), domain, Vec::new(), trust, clock, opened, Some(hold)));
        assert_eq!(records(dir.path(), false).unwrap().take_left(), [held]);
    }

    #[test]
    fn full_disk_keeps_no_daemon_from_going_on_from_its_ledger() {
        let dir = tempfile::tempdir().unwrap();
        // As on a full disk the new file cannot be made.
        std::fs::create_dir(dir.path().join("quarantine.new")).unwrap();
        assert!(records(dir.path(), false).is_err());
        records(dir.path(), true).unwrap();
    }

    #[test]
    fn unreadable_quarantine_stays_until_the_ledgers_is_written_in_its_place() {
        let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Step::Unmap, errno: 16 };
        let (file, range) = (FileId { device: 1, inode: 2 }, PageRange::new(2 * PAGE, PAGE).unwrap());
        let held = QuarantineStatus { file, range, invalidation: InvalidationId(4), reason };
        for set_aside in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("quarantine.json");
            let mut first = records(dir.path(), false).unwrap();
            first.go_on(&[held], None);
            drop(first);
            match set_aside {
                true => std::fs::rename(&path, dir.path().join("quarantine.incomplete")).unwrap(),
                false => std::fs::write(&path, "damaged").unwrap(),
            }
            // One that has the ledger ends before it has written that down: the next does not start without the ledger.
            drop(records(dir.path(), true).unwrap());
            assert!(records(dir.path(), false).is_err(), "set aside: {set_aside}");
            let mut resumed = records(dir.path(), true).unwrap();
            resumed.go_on(&[held], Some(7));
            drop(resumed);
            assert_eq!(records(dir.path(), false).unwrap().take_left().len(), 1, "set aside: {set_aside}");
        }
    }

    #[test]
    fn directory_of_a_daemon_that_made_no_file_without_a_quarantine_is_taken() {
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
        assert!(records(dir.path(), false).is_err(), "what this version has written is missing");
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.contains("\"format\":1,"));
        std::fs::write(&log, text.replace("\"format\":1,", "")).unwrap();
        for path in files().filter(|path| *path != log) {
            std::fs::remove_file(path).unwrap();
        }
        records(dir.path(), false).unwrap();
    }

    #[test]
    fn a_domain_is_told_what_is_mapped_and_nothing_else() {
        let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let file = GuestFile::memfd("resume", 8 * PAGE).unwrap();
        let (fd, lasting) = (file.as_fd().try_clone_to_owned().unwrap(), Lasting::new().unwrap());
        let ledger: OwnedFd = lasting.fd().unwrap().try_clone_to_owned().unwrap();
        lasting.complete(Ids::Type1 { entries: 65_535 }, &[]);
        let mut first = session(Arc::new(sim.clone()), lasting);
        first.add_memory(CALLER, AddMemory::shared(0, 8 * PAGE), vec![fd.try_clone().unwrap()]);
        settle(&mut first);
        let private = begin(&mut first, 2, PageState::Private);
        end(&mut first, private);
        begin(&mut first, 5, PageState::Private); // and nobody ever ends it
        assert_eq!(sim.mapping_count(), 6);
        drop(first);

        let window = Window::new(1, 1);
        let domain = Arc::new(Windowed::new(Arc::new(sim.clone()), Arc::clone(&window)));
        // Who does not go on from it has what was held all the same.
        let holds = holds_in(ledger.try_clone().unwrap()).unwrap();
        let [(file, held, HeldBy::Open(_))] = holds[..] else { panic!("{holds:?}") };
        assert_eq!((held.start().0 / PAGE, held.pages()), (5, 1));
        let (lasting, left) = Lasting::open(ledger).unwrap();
        let mut second = session(domain, lasting);
        let found = identity::identify(&fd).unwrap();
        assert_eq!(file, FileId { device: found.device, inode: found.inode });
        let name = Name::Memory(FileId { device: found.device, inode: found.inode });
        assert!(open(&window).is_empty());
        second.go_on(left, Kept::of(BTreeMap::from([(name, vec![fd])])));
        assert_eq!(open(&window), [0, 1, 3, 4, 6, 7]);
        settle(&mut second);
        assert_eq!(open(&window), [0, 1, 3, 4, 6, 7]);
    }
}
