//! The quarantine on disk: pages that must not be handed out stay in quarantine, however the daemon ends.
//!
//! `quarantine.json` in the state directory lists what was in quarantine when it was written, and the changes since ([`format`]). A
//! change is appended before the answer that it comes with is sent: a copy into the page cache, whose cost depends on the change and
//! not on the size of the quarantine. A full file is rewritten, with as much room again, and renamed into place. The next daemon in
//! this directory reads the file before it accepts any memory. The file is valid for one boot of the kernel: after another boot
//! no device reaches the old pages, and files have other identities. For the same reason it is not synced to the disk: the page
//! cache outlives the process, and a crash of the machine makes the file void.
//!
//! A missing or empty file is not an empty quarantine. `boot-ID` beside it marks that a daemon has used the directory on this boot:
//! from then on a quarantine that is missing, empty, damaged or of another boot is *unknown*, and the start is refused with the
//! remedy. A daemon that cannot write a new quarantine to the file renames it (`quarantine.incomplete`), which needs no room on the
//! disk, and makes the next daemon refuse its start.

mod format;

use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use passgate_bindings::PAGE;
use passgate_bindings::segment::Segment;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::gate::{Effect, Event, QuarantineStatus};
use crate::regular_file;
use format::{Change, END, Head, Line, Range, VERSION};

/// The name of the file in the state directory.
pub const FILE: &str = "quarantine.json";
/// The name that the file is renamed to if a new quarantine could not be written to it.
pub const INCOMPLETE: &str = "quarantine.incomplete";
/// The prefix of the name of the mark for a boot on which the directory was used.
const MARK: &str = "boot-";
/// The maximum size of the file in bytes.
const MAX_BYTES: u64 = 64 << 20;
/// The minimum size of the file in bytes.
const MIN_BYTES: u64 = 64 << 10;
/// Bytes of the file for each range that is in quarantine when it is written; the range itself takes less than half of them.
const BYTES_PER_RANGE: u64 = 512;
/// The time after which a failed write is tried again, if the file does not lack a range that is in quarantine.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The quarantine file of one session.
#[derive(Debug)]
pub struct QuarantineFile {
    dir: PathBuf,
    path: PathBuf,
    boot: String,
    /// The open file; none if changes cannot be appended to it.
    file: Option<Segment>,
    /// The number of the ledger that is updated before the file at each change.
    ledger: Option<u64>,
    /// True while the file is renamed to [`INCOMPLETE`].
    incomplete: bool,
    /// The time before which a failed write is not tried again.
    retry_at: Option<Instant>,
}

/// The changes of the quarantine by one event.
#[derive(Debug)]
pub struct Changes(Vec<Change>);

impl Changes {
    /// Returns the changes that these effects report.
    pub fn of(effects: &[Effect]) -> Self {
        Self(effects.iter().filter_map(Change::of).collect())
    }

    /// Returns true if there is no change.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns true if a range comes into quarantine.
    pub fn has_more(&self) -> bool {
        self.0.iter().any(|change| matches!(change, Change::Quarantined(_)))
    }
}

impl QuarantineFile {
    /// Returns the quarantine file in `dir`, which this process has locked, for this boot of the kernel. Nothing is read or
    /// written yet.
    pub fn new(dir: &Path, boot: String) -> Self {
        let path = dir.join(FILE);
        Self { dir: dir.to_owned(), path, boot, file: None, ledger: None, incomplete: false, retry_at: None }
    }

    /// Reads the quarantine of the last daemon, as events for a gate without regions. A file that cannot be read is an error if a
    /// daemon has used the directory on this boot, because devices may still reach pages in quarantine. `used` states that one
    /// has, even if there is no mark.
    pub fn load(&self, used: bool) -> Result<Vec<Event>> {
        self.load_with_ledger(used).map(|(events, _)| events)
    }

    /// As [`QuarantineFile::load`]. Returns the number of the ledger that has all of it, too, if one has.
    pub fn load_with_ledger(&self, used: bool) -> Result<(Vec<Event>, Option<u64>)> {
        let head = self.read(used)?;
        let ledger = head.as_ref().and_then(|head| head.ledger);
        Ok((head.into_iter().flat_map(|head| head.quarantine).map(Range::event).collect(), ledger))
    }

    /// Sets the number of the ledger that has all that is in quarantine, and is updated before the file at each change. It is written
    /// with the next head.
    pub fn set_ledger(&mut self, ledger: Option<u64>) {
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
        let bytes = match regular_file::read(&self.path, MAX_BYTES) {
            Err(error) if error.kind() == ErrorKind::NotFound && !used => return Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return void("it is gone, and a daemon has used the directory on this boot");
            }
            result => result.map_err(|error| failed(&self.path, error))?,
        };
        if bytes.iter().all(|byte| *byte == 0) {
            return void("it is empty, as after a crash of the machine");
        }
        let head = match format::read(&bytes) {
            // A daemon that writes a version also leaves a mark. Without one the file is of another boot, and a crash has torn it.
            Err(error) if !used && format::has_version(&bytes) => return void(&error.to_string()),
            head => head.map_err(|error| failed(&self.path, error))?,
        };
        if head.boot != self.boot {
            return void(&format!("{} ranges of another boot of this machine", head.quarantine.len()));
        }
        Ok(Some(head))
    }

    /// Writes the quarantine that was taken over, and the mark of this boot: from now on a missing file is a lost one. `ENOSPC` if
    /// there is no room for it.
    pub fn begin(&mut self, quarantine: &[Event]) -> Result<()> {
        let mend = ": the quarantine must be written down there; make room, or name another --state-dir";
        let failed = |path: &Path, source| Error::State { path: path.to_owned(), source, mend };
        let ranges = quarantine.iter().filter_map(Range::of_event).collect();
        self.replace(ranges).map_err(|error| failed(&self.path, error))?;
        let mark = self.mark();
        self.ensure_file(&mark).map_err(|error| failed(&mark, error))?;
        // It is of another boot, and void.
        _ = std::fs::remove_file(self.dir.join(INCOMPLETE));
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let other = entry.file_name().to_str().is_some_and(|name| name.starts_with(MARK));
            if other && entry.path() != mark {
                _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    /// Begins on a directory whose quarantine cannot be read: it stays there until [`QuarantineFile::save`] has written all that is in
    /// quarantine in its place. The directory is marked as used on this boot, so that no daemon starts without the ledger
    /// before that.
    pub fn begin_unread(&mut self) {
        let mark = self.mark();
        if let Err(error) = self.ensure_file(&mark) {
            log::error!("{}: {error}", mark.display());
        }
        self.incomplete = true;
    }

    /// Creates a file, unless it exists.
    fn ensure_file(&self, path: &Path) -> io::Result<()> {
        match self.create(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            created => created.map(drop),
        }
    }

    /// Writes the changes. `now` returns all that is in quarantine after them; it is called only if the file must be rewritten.
    pub fn change(&mut self, changes: Changes, now: impl FnOnce() -> Vec<QuarantineStatus>) {
        let more = changes.has_more();
        if self.append(&Line::Changes(changes.0)) {
            return;
        }
        // If the file is incomplete already the next daemon does not start, and if a range was only lifted it finds more in
        // quarantine than there is: either is safe, so the rewrite can wait.
        let waits = self.retry_at.is_some_and(|retry_at| Instant::now() < retry_at);
        if !waits || (more && !self.incomplete) {
            self.save(&now(), more);
        }
    }

    /// Appends a line. Returns false if there is no room for it and [`END`].
    fn append(&mut self, line: &Line) -> bool {
        let Some(file) = &mut self.file else { return false };
        let Ok(mut line) = serde_json::to_vec(line) else { return false };
        line.push(b'\n');
        #[cfg(test)]
        tests::WRITTEN_BYTES.set(tests::WRITTEN_BYTES.get() + line.len() as u64);
        file.room() >= (line.len() + END.len()) as u64 && file.append(&line)
    }

    /// Rewrites the file with all that is in quarantine now. A failure is logged. If then `more` is in quarantine than the file says,
    /// the file is renamed to [`INCOMPLETE`]: the next daemon must not take it for the whole quarantine.
    pub fn save(&mut self, now: &[QuarantineStatus], more: bool) {
        let written = self.replace(now.iter().map(Range::from).collect());
        self.retry_at = written.is_err().then(|| Instant::now() + RETRY_INTERVAL);
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

    /// Returns the path of the mark for this boot.
    fn mark(&self) -> PathBuf {
        // The kernel's boot identifier is hexadecimal with dashes. Any other character is dropped, so that the path stays in `dir`.
        let boot: String = self.boot.chars().filter(char::is_ascii_alphanumeric).collect();
        self.dir.join(format!("{MARK}{boot}"))
    }

    /// Creates a file; an error if the name exists, whatever it is.
    fn create(&self, path: &Path) -> io::Result<std::fs::File> {
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).custom_flags(flags).open(path)
    }

    /// Writes a new file with this quarantine, and renames it into place.
    fn replace(&mut self, quarantine: Vec<Range>) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let room = quarantine.len() as u64 * BYTES_PER_RANGE;
        let bytes = room.clamp(MIN_BYTES, MAX_BYTES).next_multiple_of(PAGE);
        let head = Head { version: VERSION, boot: self.boot.clone(), bytes, ledger: self.ledger, quarantine };
        let mut line = serde_json::to_vec(&head)?;
        line.push(b'\n');
        #[cfg(test)]
        tests::WRITTEN_BYTES.set(tests::WRITTEN_BYTES.get() + line.len() as u64);
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
            // A file system without fallocate: nothing can be appended, and the file is rewritten for each change.
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

impl Drop for QuarantineFile {
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
    use crate::gate::{Cause, FileId, InvalidationId, Notice, Reason, Rung};

    thread_local! {
        /// The number of bytes that this thread has written to the file.
        pub(crate) static WRITTEN_BYTES: Cell<u64> = const { Cell::new(0) };
    }

    const BOOT: &str = "0b6e-12";

    fn status(page: u64) -> QuarantineStatus {
        QuarantineStatus {
            file: FileId { device: 1, inode: 2 },
            range: PageRange::new(page * PAGE, PAGE).unwrap(),
            invalidation: InvalidationId(page),
            reason: Reason { cause: Cause::OwnerUnknown, device: None, rung: Rung::Unmap, errno: 5 },
        }
    }

    /// A directory in which a daemon has put page 3 into quarantine on this boot.
    fn used() -> (tempfile::TempDir, QuarantineFile) {
        let dir = tempfile::tempdir().unwrap();
        let mut file = QuarantineFile::new(dir.path(), BOOT.to_owned());
        assert_eq!(file.load(false).unwrap(), []);
        file.begin(&[]).unwrap();
        file.change(quarantined(3), || panic!("there is room for it"));
        (dir, file)
    }

    fn quarantined(page: u64) -> Changes {
        let QuarantineStatus { file, range, invalidation, reason } = status(page);
        let gpa = None;
        Changes::of(&[Effect::Notice(Notice::Quarantined { invalidation, file, range, gpa, reason })])
    }

    fn freed(page: u64) -> Changes {
        let QuarantineStatus { file, range, .. } = status(page);
        Changes::of(&[Effect::Notice(Notice::Freed { file, range, gpa: None })])
    }

    /// The quarantine that another daemon finds in a directory in use.
    fn found(dir: &Path) -> Result<Vec<Event>> {
        QuarantineFile::new(dir, BOOT.to_owned()).load(false)
    }

    #[test]
    fn quarantine_is_read_back_on_its_boot_and_void_on_another() {
        let (dir, file) = used();
        assert_eq!(file.load(false).unwrap().len(), 1);
        let mut other = QuarantineFile::new(dir.path(), "another".to_owned());
        assert_eq!(other.load(false).unwrap(), []);
        other.begin(&[]).unwrap();
        assert!(!file.mark().exists() && other.mark().exists());
        // The file is of the other boot now, and the quarantine of this one is not in it any more.
        assert_eq!(other.load(false).unwrap(), []);
    }

    #[test]
    fn quarantine_file_is_exact_after_any_changes_however_its_daemon_ends() {
        for killed in [false, true] {
            let (dir, mut file) = used();
            let mut expected = std::collections::BTreeMap::from([(3, status(3))]);
            let mut random = 1_u64;
            for nth in 0..3000 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let page = random >> 40 & 0x1ff;
                let change = if expected.remove(&page).is_some() {
                    freed(page)
                } else {
                    expected.insert(page, status(page));
                    quarantined(page)
                };
                file.change(change, || expected.values().copied().collect());
                if nth % 100 == 0 {
                    let events = expected.values().map(|status| Range::from(status).event());
                    assert_eq!(found(dir.path()).unwrap(), events.collect::<Vec<_>>());
                }
            }
            let before = found(dir.path()).unwrap();
            if killed {
                std::mem::forget(file)
            } else {
                drop(file)
            }
            assert_eq!(found(dir.path()).unwrap(), before);
        }
    }

    /// A line is written from its second byte on, and its first byte last. A daemon that dies before has not sent the answer.
    #[test]
    fn line_torn_by_the_death_of_its_daemon_is_ignored() {
        let (dir, file) = used();
        std::mem::forget(file);
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
    fn unreadable_quarantine_is_unknown_and_never_empty() {
        type Damage = fn(&Path);
        let damages: [(&str, Damage); 13] = [
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
        for (what, damage) in damages {
            for killed in [false, true] {
                let (dir, file) = used();
                if killed {
                    std::mem::forget(file)
                } else {
                    drop(file)
                }
                damage(&dir.path().join(FILE));
                let error = found(dir.path()).expect_err(what).to_string();
                assert!(error.contains("move the directory away"), "{what}: {error}");
            }
        }
    }

    #[test]
    fn file_torn_by_a_machine_crash_does_not_prevent_a_start_on_the_next_boot() {
        type Tear = fn(&mut Vec<u8>);
        let tears: [Tear; 3] =
            [|bytes| bytes.truncate(40), |bytes| bytes[..40].fill(0), |bytes| bytes[200..210].fill(0)];
        for tear in tears {
            let (dir, file) = used();
            let (path, mark) = (dir.path().join(FILE), file.mark());
            drop(file);
            let mut bytes = std::fs::read(&path).unwrap();
            tear(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
            assert!(found(dir.path()).is_err());
            std::fs::remove_file(mark).unwrap();
            assert_eq!(found(dir.path()).unwrap(), []);
        }
    }

    #[test]
    fn older_formats_are_read() {
        let (dir, file) = used();
        let mark = file.mark();
        let old = r#"{"version":1,"boot":"0b6e-12","quarantine":[{"file":{"device":1,"inode":2},"range":[12288,4096],"invalidation":3,"reason":{"cause":"owner-unknown","device":null,"rung":"unmap","errno":5}}]}"#;
        drop(file);
        for text in [old, &old.replace("\"version\":1,", "")] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            assert_eq!(found(dir.path()).unwrap(), [Range::from(&status(3)).event()]);
        }
        // An older daemon leaves no mark.
        std::fs::remove_file(mark).unwrap();
        assert_eq!(found(dir.path()).unwrap().len(), 1);
        std::fs::write(dir.path().join(FILE), &old.replace("\"version\":1,", "")[..90]).unwrap();
        assert!(found(dir.path()).is_err());
        std::fs::write(dir.path().join(FILE), "").unwrap();
        let file = QuarantineFile::new(dir.path(), BOOT.to_owned());
        assert!(file.load(true).is_err(), "the log says that the directory was used on this boot");
        assert_eq!(file.load(false).unwrap(), [], "a crash of the machine leaves an empty file");
    }

    #[test]
    fn quarantine_that_cannot_be_written_refuses_the_next_start() {
        let (dir, mut file) = used();
        // The new file cannot be created, as on a full disk.
        let obstacle = dir.path().join("quarantine.new");
        std::fs::create_dir(&obstacle).unwrap();
        file.save(&[], false);
        assert_eq!(file.load(false).unwrap().len(), 1, "less is in quarantine: the old file is safe");
        file.change(quarantined(4), || panic!("there is room for it"));
        assert_eq!(file.load(false).unwrap().len(), 2, "the open file has room");
        let all: Vec<_> = (3..600).map(status).collect();
        let many = all.iter().map(|status| Change::Quarantined(status.into())).collect();
        file.change(Changes(many), || all.clone());
        let error = file.load(false).unwrap_err().to_string();
        assert!(error.contains(INCOMPLETE) && error.contains("could not write"), "{error}");
        file.change(quarantined(4), || panic!("nothing of it is believed, so it can wait"));
        assert!(file.begin(&[]).is_err(), "a daemon that cannot write does not start");
        // Once the disk has room the file is complete again.
        std::fs::remove_dir(&obstacle).unwrap();
        file.retry_at = Some(Instant::now());
        file.change(freed(3), || vec![status(4), status(5)]);
        assert_eq!(file.load(false).unwrap().len(), 2);
    }
}
