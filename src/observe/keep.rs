//! Quarantine on disk: what must not be handed out outlives the daemon, however it ends.
//!
//! `quarantine.json` in the state directory says what was in quarantine when it was written, and what has changed since
//! ([`format`]). A change is appended before the answer that it comes with leaves the process: a copy into the page
//! cache, which costs what has changed and not what there is. Where the file is full it is written anew and renamed into
//! place, with as much room again. The next daemon there takes it over before it takes any memory. It holds for one boot
//! of the kernel: after another no device reaches old pages, and files have other identities. That is also why it is
//! not forced to the disk: a process that dies takes nothing back, and a machine that goes down makes it void.
//!
//! A file that says nothing is not a quarantine of nothing. `boot-ID` beside it says that a daemon has used the directory
//! on this boot: from then on a quarantine that is missing, empty, damaged or of another boot is *unknown*, and the start
//! is refused with the remedy. A daemon that cannot write down what it has put into quarantine sets the file aside
//! (`quarantine.incomplete`), which needs no room on the disk, and so refuses the next daemon's start.

mod format;

use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use passgate_bindings::PAGE;
use passgate_bindings::segment::Segment;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::private;
use crate::error::{Error, Result};
use crate::gate::{Effect, Event, QuarantineStatus};
use format::{Change, END, Head, Line, Range, VERSION};

/// The file's name in the state directory.
pub const FILE: &str = "quarantine.json";
/// Its name where something could not be written down in it.
pub const INCOMPLETE: &str = "quarantine.incomplete";
/// The start of a name that says on which boot the directory was used.
const MARK: &str = "boot-";
/// Bytes of the file at most.
const MAX_BYTES: u64 = 64 << 20;
/// Bytes of the file at least.
const MIN_BYTES: u64 = 64 << 10;
/// Bytes of the file for each range that is in quarantine when it is written: the range takes less than half of them.
const BYTES_PER_RANGE: u64 = 512;
/// How long until a disk that took nothing is tried again, where the next daemon is kept from no range thereby.
const RETRY: Duration = Duration::from_secs(1);

/// The quarantine of one session on disk.
#[derive(Debug)]
pub struct Keep {
    dir: PathBuf,
    path: PathBuf,
    boot: String,
    /// The file, where changes can be appended to it.
    file: Option<Segment>,
    /// The ledger that is told of each change before the file is.
    ledger: Option<u64>,
    /// Set while the file is set aside.
    incomplete: bool,
    /// Set after a failure: when it is tried again.
    again: Option<Instant>,
}

/// What an event has changed of the quarantine.
#[derive(Debug)]
pub struct Changes(Vec<Change>);

impl Changes {
    /// What these effects tell.
    pub fn of(effects: &[Effect]) -> Self {
        Self(effects.iter().filter_map(Change::of).collect())
    }

    /// True where nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True where something is in quarantine that was not.
    pub fn has_more(&self) -> bool {
        self.0.iter().any(|change| matches!(change, Change::Held(_)))
    }
}

impl Keep {
    /// The quarantine in `dir`, which is this process's own, on this boot of the kernel.
    pub fn new(dir: &Path, boot: String) -> Self {
        let path = dir.join(FILE);
        Self { dir: dir.to_owned(), path, boot, file: None, ledger: None, incomplete: false, again: None }
    }

    /// What the last daemon left, as events for a gate without regions. What cannot be read is an error where a daemon
    /// has used the directory on this boot, because something in it may still be reachable. `used` says that one has,
    /// where nothing here does.
    pub fn load(&self, used: bool) -> Result<Vec<Event>> {
        self.load_with_ledger(used).map(|(events, _)| events)
    }

    /// The same, and which ledger has all of it, where one has.
    pub fn load_with_ledger(&self, used: bool) -> Result<(Vec<Event>, Option<u64>)> {
        let kept = self.read(used)?;
        let ledger = kept.as_ref().and_then(|kept| kept.ledger);
        Ok((kept.into_iter().flat_map(|kept| kept.quarantine).map(Range::event).collect(), ledger))
    }

    /// This ledger is told of each change from now on, before the file is: it has all that is in quarantine.
    pub fn follow(&mut self, ledger: Option<u64>) {
        self.ledger = ledger;
    }

    fn read(&self, used: bool) -> Result<Option<Head>> {
        let mend =
            ": which memory was in quarantine is unknown; stop what uses it, then move the directory away";
        let failed = |path: &Path, source| Error::State { path: path.to_owned(), source, mend };
        let used = used || std::fs::symlink_metadata(self.mark()).is_ok();
        let aside = self.dir.join(INCOMPLETE);
        if used && std::fs::symlink_metadata(&aside).is_ok() {
            let why = "the last daemon could not write all of its quarantine down";
            return Err(failed(&aside, io::Error::other(why)));
        }
        let void = |why: &str| match used {
            true => Err(failed(&self.path, io::Error::other(why.to_owned()))),
            false => {
                log::warn!(
                    "{}: {why}: ignored, because no daemon has used it on this boot",
                    self.path.display()
                );
                Ok(None)
            }
        };
        let bytes = match private::read(&self.path, MAX_BYTES) {
            Err(error) if error.kind() == ErrorKind::NotFound && !used => return Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return void("it is gone, and a daemon has used the directory on this boot");
            }
            result => result.map_err(|error| failed(&self.path, error))?,
        };
        if bytes.iter().all(|byte| *byte == 0) {
            return void("it is empty, as after a crash of the machine");
        }
        let kept = match format::read(&bytes) {
            // Whoever writes a version leaves a mark, too: it is of another boot, whose end has torn it.
            Err(error) if !used && format::has_version(&bytes) => return void(&error.to_string()),
            kept => kept.map_err(|error| failed(&self.path, error))?,
        };
        if kept.boot != self.boot {
            return void(&format!("{} ranges of another boot of this machine", kept.quarantine.len()));
        }
        Ok(Some(kept))
    }

    /// Writes down what was taken over, and that the directory is used on this boot: from here on a quarantine that is
    /// missing is one that was lost. `ENOSPC` where there is no room for it.
    pub fn begin(&mut self, left: &[Event]) -> Result<()> {
        let mend = ": the quarantine must be written down there; make room, or name another --state-dir";
        let failed = |path: &Path, source| Error::State { path: path.to_owned(), source, mend };
        let left = left.iter().filter_map(Range::of_event).collect();
        self.replace(left).map_err(|error| failed(&self.path, error))?;
        let mark = self.mark();
        self.make(&mark).map_err(|error| failed(&mark, error))?;
        // Of another boot, and void.
        _ = std::fs::remove_file(self.dir.join(INCOMPLETE));
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let other = entry.file_name().to_str().is_some_and(|name| name.starts_with(MARK));
            if other && entry.path() != mark {
                _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    /// What lies there cannot be read, and stays until [`Keep::save`] has written all that is in quarantine in its place. The
    /// directory is used on this boot all the same: a daemon that ends before that keeps others from starting.
    pub fn begin_unread(&mut self) {
        let mark = self.mark();
        if let Err(error) = self.make(&mark) {
            log::error!("{}: {error}", mark.display());
        }
        self.incomplete = true;
    }

    /// Makes a file that is there from then on, if it was not before.
    fn make(&self, path: &Path) -> io::Result<()> {
        match self.create(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            made => made.map(drop),
        }
    }

    /// Writes down what has changed. `now` is all that is in quarantine now.
    pub fn change(&mut self, changes: Changes, now: impl FnOnce() -> Vec<QuarantineStatus>) {
        let more = changes.has_more();
        if self.append(&Line::Changes(changes.0)) {
            return;
        }
        // The next daemon finds more in quarantine than there is, or does not start at all: that can wait.
        let waits = self.again.is_some_and(|again| Instant::now() < again);
        if !waits || (more && !self.incomplete) {
            self.save(&now(), more);
        }
    }

    /// Appends a line where there is room for it besides the last; whether there was.
    fn append(&mut self, line: &Line) -> bool {
        let Some(file) = &mut self.file else { return false };
        let Ok(mut line) = serde_json::to_vec(line) else { return false };
        line.push(b'\n');
        #[cfg(test)]
        tests::WRITTEN.set(tests::WRITTEN.get() + line.len() as u64);
        file.room() >= (line.len() + END.len()) as u64 && file.append(&line)
    }

    /// Writes down all that is in quarantine now. Where that fails it is logged, and where `more` is in quarantine than
    /// the file says, the file is set aside: the next daemon must not take it for the whole.
    pub fn save(&mut self, now: &[QuarantineStatus], more: bool) {
        let written = self.replace(now.iter().map(Range::from).collect());
        self.again = written.is_err().then(|| Instant::now() + RETRY);
        let path = self.path.display();
        let Err(error) = written else {
            if std::mem::take(&mut self.incomplete) {
                log::info!("{path}: written again");
                _ = std::fs::remove_file(self.dir.join(INCOMPLETE));
            }
            return;
        };
        let count = now.len();
        if !more {
            log::warn!(
                "{path}: {error}: the next daemon will find more in quarantine than these {count} ranges"
            );
            return;
        }
        log::error!(
            "{path}: {error}: {count} ranges in quarantine are not all in it; no other daemon starts here; make room"
        );
        if !std::mem::replace(&mut self.incomplete, true)
            && let Err(error) = std::fs::rename(&self.path, self.dir.join(INCOMPLETE))
        {
            log::error!(
                "{path}: {error}: remove it: the next daemon must not take it for the whole quarantine"
            );
        }
        self.file = None;
    }

    /// Where it says that the directory is used on this boot.
    fn mark(&self) -> PathBuf {
        // The kernel's boot identifier is hexadecimal with dashes; whatever else it is must not lead elsewhere.
        let boot: String = self.boot.chars().filter(char::is_ascii_alphanumeric).collect();
        self.dir.join(format!("{MARK}{boot}"))
    }

    /// A new file, which is no link and nothing that waits.
    fn create(&self, path: &Path) -> io::Result<std::fs::File> {
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).custom_flags(flags).open(path)
    }

    /// Writes the file anew.
    fn replace(&mut self, quarantine: Vec<Range>) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let room = quarantine.len() as u64 * BYTES_PER_RANGE;
        let bytes = room.clamp(MIN_BYTES, MAX_BYTES).next_multiple_of(PAGE);
        let head = Head { version: VERSION, boot: self.boot.clone(), bytes, ledger: self.ledger, quarantine };
        let mut line = serde_json::to_vec(&head)?;
        line.push(b'\n');
        #[cfg(test)]
        tests::WRITTEN.set(tests::WRITTEN.get() + line.len() as u64);
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = match Segment::create(&new, bytes) {
            Ok(mut file) => {
                if !file.append(&line) {
                    return Err(Errno::FBIG.into());
                }
                Some(file)
            }
            // A file system without fallocate: the file is written anew for each change.
            Err(failed) if failed.errno == Errno::OPNOTSUPP => {
                line.extend_from_slice(END);
                self.create(&new)?.write_all(&line)?;
                None
            }
            Err(failed) => return Err(failed.errno.into()),
        };
        std::fs::rename(&new, &self.path)?;
        self.file = file;
        Ok(())
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        if let Some(file) = &mut self.file {
            file.append(END);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;
    use std::os::unix::fs::symlink;

    use passgate_bindings::PageRange;
    use rustix::fs::{FileType, Mode};

    use super::*;
    use crate::gate::{Cause, FileId, InvalidationId, Notice, Reason, Step};

    thread_local! {
        /// Bytes that were written to the file by this thread.
        pub(crate) static WRITTEN: Cell<u64> = const { Cell::new(0) };
    }

    const BOOT: &str = "0b6e-12";

    fn status(page: u64) -> QuarantineStatus {
        QuarantineStatus {
            file: FileId { device: 1, inode: 2 },
            range: PageRange::new(page * PAGE, PAGE).unwrap(),
            invalidation: InvalidationId(page),
            reason: Reason { cause: Cause::OwnerUnknown, device: None, rung: Step::Unmap, errno: 5 },
        }
    }

    /// A directory in which a daemon has put a page into quarantine on this boot.
    fn used() -> (tempfile::TempDir, Keep) {
        let dir = tempfile::tempdir().unwrap();
        let mut keep = Keep::new(dir.path(), BOOT.to_owned());
        assert_eq!(keep.load(false).unwrap(), []);
        keep.begin(&[]).unwrap();
        keep.change(held(3), || panic!("there is room for it"));
        (dir, keep)
    }

    fn held(page: u64) -> Changes {
        let QuarantineStatus { file, range, invalidation, reason } = status(page);
        let gpa = None;
        Changes::of(&[Effect::Notice(Notice::Quarantined { invalidation, file, range, gpa, reason })])
    }

    fn freed(page: u64) -> Changes {
        let QuarantineStatus { file, range, .. } = status(page);
        Changes::of(&[Effect::Notice(Notice::Freed { file, range, gpa: None })])
    }

    /// What another daemon finds in the directory of one that goes on.
    fn found(dir: &Path) -> Result<Vec<Event>> {
        Keep::new(dir, BOOT.to_owned()).load(false)
    }

    #[test]
    fn quarantine_is_read_back_on_its_boot_and_void_on_another() {
        let (dir, keep) = used();
        assert_eq!(keep.load(false).unwrap().len(), 1);
        let mut other = Keep::new(dir.path(), "another".to_owned());
        assert_eq!(other.load(false).unwrap(), []);
        other.begin(&[]).unwrap();
        assert!(!keep.mark().exists() && other.mark().exists());
        // It says so of the other boot, and this one's quarantine is not there any more.
        assert_eq!(other.load(false).unwrap(), []);
    }

    #[test]
    fn quarantine_file_says_what_is_so_after_any_changes_however_its_daemon_ends() {
        for killed in [false, true] {
            let (dir, mut keep) = used();
            let mut truth = std::collections::BTreeMap::from([(3, status(3))]);
            let mut random = 1_u64;
            for nth in 0..3000 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let page = random >> 40 & 0x1ff;
                let change = if truth.remove(&page).is_some() {
                    freed(page)
                } else {
                    truth.insert(page, status(page));
                    held(page)
                };
                keep.change(change, || truth.values().copied().collect());
                if nth % 100 == 0 {
                    let events = truth.values().map(|status| Range::from(status).event());
                    assert_eq!(found(dir.path()).unwrap(), events.collect::<Vec<_>>());
                }
            }
            let before = found(dir.path()).unwrap();
            if killed {
                std::mem::forget(keep)
            } else {
                drop(keep)
            }
            assert_eq!(found(dir.path()).unwrap(), before);
        }
    }

    /// A line is written from its second byte on, and whoever dies in it has not told anybody of it.
    #[test]
    fn line_that_its_daemon_died_in_is_none() {
        let (dir, keep) = used();
        std::mem::forget(keep);
        let before = found(dir.path()).unwrap();
        assert_eq!(before.len(), 1);
        let path = dir.path().join(FILE);
        let bytes = std::fs::read(&path).unwrap();
        let end = bytes.iter().position(|byte| *byte == 0).expect("there is room");
        for torn in [1, 2, 20] {
            let mut bytes = bytes.clone();
            bytes[end + 1..end + 1 + torn].fill(b'x');
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(found(dir.path()).unwrap(), before, "{torn} bytes");
        }
    }

    #[test]
    fn a_quarantine_that_cannot_be_read_is_unknown_and_never_empty() {
        type Spoil = fn(&Path);
        let spoils: [(&str, Spoil); 13] = [
            ("gone", |file| std::fs::remove_file(file).unwrap()),
            ("empty", |file| std::fs::write(file, "").unwrap()),
            ("zeroes", |file| std::fs::write(file, [0; 64]).unwrap()),
            ("cut", |file| {
                let bytes = std::fs::read(file).unwrap();
                std::fs::write(file, &bytes[..bytes.len() - 1]).unwrap();
            }),
            ("cut behind a line", |file| {
                let bytes = std::fs::read(file).unwrap();
                let head = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
                std::fs::write(file, &bytes[..head]).unwrap();
            }),
            ("newer", |file| {
                let text = std::fs::read_to_string(file).unwrap();
                std::fs::write(file, text.replace("\"version\":2", "\"version\":3")).unwrap();
            }),
            ("of another boot", |file| {
                let text = std::fs::read_to_string(file).unwrap();
                std::fs::write(file, text.replace(BOOT, "another")).unwrap();
            }),
            ("a FIFO", |file| {
                std::fs::remove_file(file).unwrap();
                rustix::fs::mknodat(rustix::fs::CWD, file, FileType::Fifo, Mode::RWXU, 0).unwrap();
            }),
            ("a link to what has no end", |file| {
                std::fs::remove_file(file).unwrap();
                symlink("/dev/zero", file).unwrap();
            }),
            ("a link to a good one", |file| {
                let good = file.with_extension("good");
                std::fs::rename(file, &good).unwrap();
                symlink(good, file).unwrap();
            }),
            ("a directory", |file| {
                std::fs::remove_file(file).unwrap();
                std::fs::create_dir(file).unwrap();
            }),
            ("huge", |file| {
                let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
                file.set_len(MAX_BYTES + 1).unwrap();
            }),
            ("no page range", |file| {
                let text = std::fs::read_to_string(file).unwrap();
                std::fs::write(file, text.replace("4096", "4097")).unwrap();
            }),
        ];
        for (what, spoil) in spoils {
            for killed in [false, true] {
                let (dir, keep) = used();
                if killed {
                    std::mem::forget(keep)
                } else {
                    drop(keep)
                }
                spoil(&dir.path().join(FILE));
                let error = found(dir.path()).expect_err(what).to_string();
                assert!(error.contains("move the directory away"), "{what}: {error}");
            }
        }
    }

    #[test]
    fn what_the_crash_of_a_machine_has_torn_stops_no_daemon_on_the_next_boot() {
        type Tear = fn(&mut Vec<u8>);
        let tears: [Tear; 3] =
            [|bytes| bytes.truncate(40), |bytes| bytes[..40].fill(0), |bytes| bytes[200..210].fill(0)];
        for tear in tears {
            let (dir, keep) = used();
            let (file, mark) = (dir.path().join(FILE), keep.mark());
            drop(keep);
            let mut bytes = std::fs::read(&file).unwrap();
            tear(&mut bytes);
            std::fs::write(&file, bytes).unwrap();
            assert!(found(dir.path()).is_err());
            std::fs::remove_file(mark).unwrap();
            assert_eq!(found(dir.path()).unwrap(), []);
        }
    }

    #[test]
    fn an_older_format_is_read() {
        let (dir, keep) = used();
        let mark = keep.mark();
        let old = r#"{"version":1,"boot":"0b6e-12","quarantine":[{"file":{"device":1,"inode":2},"range":[12288,4096],"invalidation":3,"reason":{"cause":"owner-unknown","device":null,"rung":"unmap","errno":5}}]}"#;
        drop(keep);
        for text in [old, &old.replace("\"version\":1,", "")] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            assert_eq!(found(dir.path()).unwrap(), [Range::from(&status(3)).event()]);
        }
        // Without a mark too, as an older daemon leaves it.
        std::fs::remove_file(mark).unwrap();
        assert_eq!(found(dir.path()).unwrap().len(), 1);
        std::fs::write(dir.path().join(FILE), &old.replace("\"version\":1,", "")[..90]).unwrap();
        assert!(found(dir.path()).is_err());
        std::fs::write(dir.path().join(FILE), "").unwrap();
        let keep = Keep::new(dir.path(), BOOT.to_owned());
        assert!(keep.load(true).is_err(), "its log says that it was used on this boot");
        assert_eq!(keep.load(false).unwrap(), [], "a machine that went down leaves it so");
    }

    #[test]
    fn what_cannot_be_written_down_refuses_the_next_start() {
        let (dir, mut keep) = used();
        // No room: the new file cannot be made.
        let obstacle = dir.path().join("quarantine.new");
        std::fs::create_dir(&obstacle).unwrap();
        keep.save(&[], false);
        assert_eq!(keep.load(false).unwrap().len(), 1, "less is in quarantine: the old file is safe");
        keep.change(held(4), || panic!("there is room for it"));
        assert_eq!(keep.load(false).unwrap().len(), 2, "what there is has room");
        let all: Vec<_> = (3..600).map(status).collect();
        let many = all.iter().map(|status| Change::Held(status.into())).collect();
        keep.change(Changes(many), || all.clone());
        let error = keep.load(false).unwrap_err().to_string();
        assert!(error.contains(INCOMPLETE) && error.contains("could not write"), "{error}");
        keep.change(held(4), || panic!("nothing of it is believed, so it can wait"));
        assert!(keep.begin(&[]).is_err(), "a daemon that cannot write does not start");
        // It comes to itself.
        std::fs::remove_dir(&obstacle).unwrap();
        keep.again = Some(Instant::now());
        keep.change(freed(3), || vec![status(4), status(5)]);
        assert_eq!(keep.load(false).unwrap().len(), 2);
    }
}
