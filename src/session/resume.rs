//! A session's handover from one process to the next, and the files that the service manager stores for it.

use std::sync::{Arc, Weak};

use passgate_backends::resume::Ids;
use passgate_bindings::memory::GuestFile;

use super::Session;
use super::fdstore::{FdStore, Kept, Name};
use super::persist::{Lasting, Left};
use crate::gate::ledger::holds::gaps;
use crate::gate::{Cause, ClientId, DomainId, Event, FileId, HeldBy, InvalidationId, Past, Reason};

/// The means by which a session outlives its process.
#[derive(Debug)]
pub struct Hold {
    /// The store of its descriptors.
    pub store: FdStore,
    /// The ledger and the records beside it.
    pub lasting: Lasting,
    /// The state that an earlier process left in the ledger, and the descriptors that were stored for it.
    pub left: Option<(Left, Kept)>,
    /// If no state of an earlier process is taken over: the ranges that stay in quarantine all the same, as events for a gate
    /// without regions, and the files that they are in.
    pub quarantine: Option<(Vec<Event>, Kept)>,
}

impl Session {
    /// Resumes from the state that another process left. The session's gate must have its domain and devices, and no memory.
    pub(super) fn resume_from(&mut self, left: Left, mut kept: Kept) {
        let Left { mut past, region_infos, .. } = left;
        for region in &mut past.regions {
            let info = region_infos.iter().find(|(id, _)| *id == region.region).map(|(_, info)| *info);
            if let Err(error) = self.files.restore_region(region, info, &mut kept) {
                log::error!("the memory at {} was not kept ({error}): it is closed", region.spec.gpa);
                region.closing = true;
            }
        }
        let ledger = self.persistent.as_ref().and_then(Lasting::id);
        let on_disk =
            self.records.as_mut().map(|records| records.take_quarantine_beyond(ledger)).unwrap_or_default();
        add_quarantine_on_disk(&mut past, on_disk);
        for (file, ..) in &past.holds {
            self.files.restore_file(*file, &mut kept);
        }
        self.gate.resume(past, &mut self.effects);
        // Before any effect is executed, so that the domain knows the mappings before the first call over them. What is in
        // doubt is being unmapped, and is not among the live ranges.
        for (index, domain) in self.domains.iter().enumerate() {
            for range in self.gate.live(DomainId(index as u16)) {
                domain.resumed(range);
            }
        }
        if let Some(persistent) = &mut self.persistent {
            persistent.record_all(&self.gate, &self.effects);
        }
        self.write_quarantine();
        // The descriptors that no region or quarantine has taken are not needed any more.
        for name in kept.names() {
            if let (Name::Memory(_) | Name::Private(_), Some(store)) = (&name, &self.fd_store) {
                store.remove(name);
            }
        }
    }

    /// Writes all that is in quarantine to the disk, with the number of the ledger that has it, too.
    pub(super) fn write_quarantine(&mut self) {
        if let (Some(records), Some(persistent)) = (&mut self.records, &self.persistent) {
            records.rewrite_quarantine(&self.gate.quarantined_ranges().collect::<Vec<_>>(), persistent.id());
        }
    }

    /// Completes the records for the next process, with the ids of the domain's kernel objects. The files of domain and devices
    /// must be stored before.
    pub fn complete(&self, ids: Ids) {
        if let Some(persistent) = &self.persistent {
            let natures = self.gate.natures();
            let named = self.devices.iter().zip(natures);
            let names: Vec<_> =
                named.map(|(device, (_, nature))| (device.name().to_owned(), !nature.ats)).collect();
            // Nothing of a software domain outlives its process: the next daemon assigns new devices.
            persistent.complete(ids, if ids == Ids::Nothing { &[] } else { &names });
        }
    }

    /// Removes a file from the descriptor store, unless it is needed.
    pub(super) fn remove_stored(&self, name: &Name) {
        let needed = match name {
            Name::Memory(file) => self.files.get(*file).is_some(),
            Name::Private(file) => self.files.has_private(*file),
            _ => true,
        };
        if let Some(store) = self.fd_store.as_ref().filter(|_| !needed) {
            store.remove(name.clone());
        }
    }

    /// Closes a file that the gate does not need any more ([`crate::gate::Effect::ForgetFile`]). The gate is asked again: another
    /// region of the file may have been added since the effect.
    pub(super) fn forget(&mut self, file: FileId) {
        if self.gate.knows(file) || self.files.is_adding(file) {
            return;
        }
        self.files.forget(file);
        self.remove_stored(&Name::Memory(file));
    }

    /// Returns the open files of guest memory.
    pub fn guest_files(&self) -> Vec<Weak<GuestFile>> {
        self.files.all().iter().map(Arc::downgrade).collect()
    }

    /// Returns true while memory of an earlier daemon's clients waits to be adopted.
    pub fn has_orphans(&self) -> bool {
        self.gate.has_orphans()
    }

    /// Returns true if this client may say what the pages are that a conversion left in quarantine
    /// ([`crate::gate::Gate::may_settle`]).
    pub fn may_settle(&self, client: ClientId, invalidation: InvalidationId) -> bool {
        self.gate.may_settle(client, invalidation)
    }
}

/// Adds to `past` what is in quarantine on disk and is not excluded in the ledger. No event of this process can prove anything
/// about these pages, so they stay in quarantine until an operator releases them.
fn add_quarantine_on_disk(past: &mut Past, on_disk: Vec<Event>) {
    for event in on_disk {
        let Event::Quarantine { file, range, invalidation, reason } = event else { continue };
        let mut excluded: Vec<_> = past
            .holds
            .iter()
            .filter(|(of, excluded, _)| *of == file && excluded.overlaps(range))
            .map(|(_, excluded, _)| *excluded)
            .collect();
        excluded.sort_unstable();
        let missing: Vec<_> = gaps(range, excluded.into_iter()).collect();
        if missing.is_empty() {
            continue;
        }
        log::warn!(
            "{} ranges are in quarantine on disk and not in the ledger: they stay there",
            missing.len()
        );
        // 0 is no invalidation. A number so high that no gate reaches it would leave this one without numbers.
        let id = InvalidationId(invalidation.0.clamp(1, u64::MAX / 2));
        past.last_invalidation = past.last_invalidation.max(id.0);
        // A cause that no proof about mappings lifts.
        let reason = Reason { cause: Cause::OwnerUnknown, ..reason };
        past.holds.extend(missing.into_iter().map(|range| (file, range, HeldBy::Quarantine(id, reason))));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::Arc;

    use passgate_backends::{Device, Domain, Entered, Nature, Segment, StopClass, Window, Windowed};
    use passgate_bindings::memory::GuestFile;
    use passgate_bindings::{Gpa, Iova, PAGE, PageRange, identity};
    use passgate_sim::iommu::{Memory, Sim};

    use super::*;
    use crate::gate::{Answer, Caller, DeviceId, Door, Event, Gate, Outcome, PageState, Performer, Policy};
    use crate::gate::{QuarantineStatus, Step};
    use crate::observe::records::{Records, StateOptions};
    use crate::protocol::verbs::AddMemory;
    use crate::session::initial_events::initial_events;
    use crate::session::persist::{LoadError, holds_in};
    use crate::session::{Next, SystemClock, Trust};

    const CALLER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };

    fn session(domain: Arc<dyn Domain>, persistent: Lasting) -> Session {
        session_of(domain, vec![], persistent)
    }

    fn session_of(domain: Arc<dyn Domain>, devices: Vec<Arc<dyn Device>>, persistent: Lasting) -> Session {
        let clock = Arc::new(SystemClock);
        let (policy, trust) = (Policy::default(), Trust::default());
        let mut session = Session::new(policy, domain, devices, trust, clock, None, None);
        // As `Session::new` does with a `Hold`, but without a service manager.
        session.gate = Gate::new(Policy::default());
        session.gate.keep_in(persistent.store().clone());
        session.persistent = Some(persistent);
        let events = initial_events(&*session.domains[0], &session.devices, &[]);
        events.into_iter().for_each(|event| session.handle(event));
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
            let persistent = Lasting::new().unwrap();
            let ledger = persistent.fd().unwrap().try_clone_to_owned().unwrap();
            let mut session = session_of(Arc::new(sim), devices, persistent);
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
    fn quarantine_only_on_disk_is_added_until_an_operator_releases_it() {
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
        add_quarantine_on_disk(&mut past, vec![on_disk(2, 2, 4)]);
        assert_eq!((past.holds.len(), past.last_invalidation), (1, 5), "it is the same");
        add_quarantine_on_disk(&mut past, vec![on_disk(1, 4, 9)]);
        let unknown = HeldBy::Quarantine(InvalidationId(9), Reason { cause: Cause::OwnerUnknown, ..reason });
        let both = [in_ledger, (file, range(1, 1), unknown), (file, range(4, 1), unknown)];
        assert_eq!((&past.holds[..], past.last_invalidation), (&both[..], 9));
    }

    fn records(dir: &std::path::Path, resumed: bool) -> crate::error::Result<Records> {
        Records::open(&StateOptions::at(dir), Policy::default(), "sim", Vec::new(), resumed)
    }

    #[test]
    fn quarantine_on_disk_is_added_only_if_the_ledger_may_not_have_it() {
        for named in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let persistent = Lasting::new().unwrap();
            persistent.complete(Ids::Type1 { entries: 65_535 }, &[]);
            let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Step::Unmap, errno: 16 };
            let (file, range) = (FileId { device: 1, inode: 2 }, PageRange::new(2 * PAGE, PAGE).unwrap());
            let quarantined = QuarantineStatus { file, range, invalidation: InvalidationId(4), reason };
            // The ledger does not have it any more: the daemon ended before it could write that to the disk.
            let mut first = records(dir.path(), false).unwrap();
            let ledger = if named { persistent.id() } else { Lasting::new().unwrap().id() };
            first.rewrite_quarantine(&[quarantined], ledger);
            drop(first);
            let fd = persistent.fd().unwrap().try_clone_to_owned().unwrap();
            drop(persistent);
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
        let persistent = Lasting::new().unwrap();
        let fd = || persistent.fd().unwrap().try_clone_to_owned().unwrap();
        assert!(matches!(holds_in(fd()), Err(LoadError::Incomplete)));
        persistent.complete(Ids::Nothing, &[]);
        assert!(holds_in(fd()).unwrap().is_empty());
    }

    #[test]
    fn quarantine_of_a_ledger_that_is_not_taken_over_is_written_to_disk() {
        let dir = tempfile::tempdir().unwrap();
        let reason = Reason { cause: Cause::ClientGone, device: None, rung: Step::Unmap, errno: 0 };
        let (file, range) = (FileId { device: 1, inode: 2 }, PageRange::new(2 * PAGE, PAGE).unwrap());
        let event = Event::Quarantine { file, range, invalidation: InvalidationId(4), reason };
        let (store, _removed) = FdStore::detached();
        let quarantine = Some((vec![event.clone()], Kept::of(BTreeMap::new())));
        let hold = Hold { store, lasting: Lasting::new().unwrap(), left: None, quarantine };
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
        let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Step::Unmap, errno: 16 };
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
            assert_eq!(
                records(dir.path(), false).unwrap().take_quarantine().len(),
                1,
                "set aside: {set_aside}"
            );
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
        let (fd, persistent) = (file.as_fd().try_clone_to_owned().unwrap(), Lasting::new().unwrap());
        let ledger: OwnedFd = persistent.fd().unwrap().try_clone_to_owned().unwrap();
        persistent.complete(Ids::Type1 { entries: 65_535 }, &[]);
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
        let holds = holds_in(ledger.try_clone().unwrap()).unwrap();
        let [(file, excluded, HeldBy::Open(_))] = holds[..] else { panic!("{holds:?}") };
        assert_eq!((excluded.start().0 / PAGE, excluded.pages()), (5, 1));
        let (persistent, left) = Lasting::open(ledger).unwrap();
        let mut second = session(domain, persistent);
        let found = identity::identify(&fd).unwrap();
        assert_eq!(file, FileId { device: found.device, inode: found.inode });
        let name = Name::Memory(FileId { device: found.device, inode: found.inode });
        assert!(admitted(&window).is_empty());
        second.resume_from(left, Kept::of(BTreeMap::from([(name, vec![fd])])));
        assert_eq!(admitted(&window), [0, 1, 3, 4, 6, 7]);
        settle(&mut second);
        assert_eq!(admitted(&window), [0, 1, 3, 4, 6, 7]);
    }
}
