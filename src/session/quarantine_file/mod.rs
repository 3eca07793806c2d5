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
//! remedy. If a newly quarantined range cannot be written, the daemon renames the file to `quarantine.incomplete`. A rename needs no
//! room on the disk, and the next daemon refuses to start while that name exists. A failed write is tried again by time
//! ([`QuarantineFile::retry`]).
//!
//! The session's thread makes these system calls itself: they must have happened before the answer. On a state directory that does
//! not answer, as one on a dead network mount, the session waits with it.

mod format;

use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use passgate_bindings::PAGE;
use passgate_bindings::segment::Segment;
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
/// The time after which a failed write is tried again the first time; it doubles with each failure. The first range that the file
/// lacks is tried at once.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// The maximum of that time: each try serializes all that is in quarantine.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// The quarantine file of one session.
#[derive(Debug)]
pub struct QuarantineFile {
    dir: PathBuf,
    path: PathBuf,
    boot: String,
    /// The open file; none if changes cannot be appended to it.
    file: Option<Segment>,
    /// The id of the persistent ledger, which has every range in quarantine and is updated before this file at each change; none if
    /// there is no such ledger.
    ledger: Option<u64>,
    /// True while no other daemon starts on this directory: the file is renamed to [`INCOMPLETE`], or cannot be read.
    incomplete: bool,
    /// True while the file lacks a range that is in quarantine.
    lacks_range: bool,
    /// The time at which a write that failed is tried again, and the interval before it; none while the file has every change.
    retry: Option<(Instant, Duration)>,
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
    pub fn adds_range(&self) -> bool {
        self.0.iter().any(|change| matches!(change, Change::Quarantined(_)))
    }
}

impl QuarantineFile {
    /// Returns the quarantine file in `dir`, which this process has locked, for this boot of the kernel. Nothing is read or
    /// written yet.
    pub fn new(dir: &Path, boot: String) -> Self {
        let path = dir.join(FILE);
        let dir = dir.to_owned();
        Self { dir, path, boot, file: None, ledger: None, incomplete: false, lacks_range: false, retry: None }
    }

    /// Reads the quarantine of the last daemon, as events for a gate without regions. [`Error::State`] if the file cannot be opened or
    /// parsed. A missing, empty or torn file, or one of another boot, is an error only if a daemon has used the directory on this
    /// boot, because devices may then still reach pages in quarantine; otherwise it is ignored. `used` states that one has, even
    /// if there is no mark.
    pub fn load(&self, used: bool) -> Result<Vec<Event>> {
        self.load_with_ledger(used).map(|(events, _)| events)
    }

    /// As [`QuarantineFile::load`]. Also returns the id of the ledger that has all of it, if one has.
    pub fn load_with_ledger(&self, used: bool) -> Result<(Vec<Event>, Option<u64>)> {
        let head = self.read(used)?;
        let ledger = head.as_ref().and_then(|head| head.ledger);
        Ok((head.into_iter().flat_map(|head| head.quarantine).map(Range::event).collect(), ledger))
    }

    /// Sets the id of the ledger that has all that is in quarantine, and is updated before the file at each change. It is written
    /// with the next head.
    pub fn set_ledger(&mut self, ledger: Option<u64>) {
        self.ledger = ledger;
    }

    fn read(&self, used: bool) -> Result<Option<Head>> {
        let remedy = ": which memory was in quarantine is unknown; stop every VM and device that may use it, then move the directory away";
        let failed = |path: &Path, source| Error::State { path: path.to_owned(), source, remedy };
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
        let remedy = ": the quarantine must be written down there; make room, or name another --state-dir";
        let failed = |path: &Path, source| Error::State { path: path.to_owned(), source, remedy };
        let ranges = quarantine.iter().filter_map(Range::of_event).collect();
        self.replace(ranges).map_err(|error| failed(&self.path, error))?;
        let mark = self.mark();
        self.ensure_file(&mark).map_err(|error| failed(&mark, error))?;
        // `read` would have refused one of this boot.
        _ = std::fs::remove_file(self.dir.join(INCOMPLETE));
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let other = entry.file_name().to_str().is_some_and(|name| name.starts_with(MARK));
            if other && entry.path() != mark {
                _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    /// Begins without the quarantine on the disk, because the ledger has it. The unreadable file stays in place, so that a daemon
    /// without the ledger refuses to start until [`QuarantineFile::save`] has replaced it.
    pub fn begin_unread(&mut self) {
        self.begin_unwritten();
        self.incomplete = true;
    }

    /// Begins although nothing could be written: the ledger has the quarantine, and [`QuarantineFile::retry`] writes it later. The
    /// directory is marked as used on this boot.
    pub fn begin_unwritten(&mut self) {
        let mark = self.mark();
        if let Err(error) = self.ensure_file(&mark) {
            log::error!("{}: {error}", mark.display());
        }
        self.lacks_range = true;
        self.retry = Some((Instant::now() + RETRY_INTERVAL, RETRY_INTERVAL));
    }

    /// Creates a file, unless it exists.
    fn ensure_file(&self, path: &Path) -> io::Result<()> {
        match self.create(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            created => created.map(drop),
        }
    }

    /// Writes the changes. `current` returns all that is in quarantine after them; it is called only if the file must be rewritten.
    pub fn change(&mut self, changes: Changes, current: impl FnOnce() -> Vec<QuarantineStatus>) {
        let adds = changes.adds_range();
        let appended = self.append(&Line::Changes(changes.0));
        // The rewrite is tried at once for the first range that the file lacks. It can wait if the file has a range too many (the next
        // daemon finds more in quarantine than there is), and after a failure.
        let due = match self.retry_at() {
            None => !appended,
            Some(retry_at) => retry_at <= Instant::now() || (adds && !appended && !self.lacks_range),
        };
        self.lacks_range |= adds && !appended;
        if due {
            self.save(&current());
        }
    }

    /// Returns the time at which [`QuarantineFile::retry`] must be called; none while the file has every change.
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry.map(|(at, _)| at)
    }

    /// Writes the file again if an earlier write failed and its time is due at `now`.
    pub fn retry(&mut self, now: Instant, current: impl FnOnce() -> Vec<QuarantineStatus>) {
        if self.retry_at().is_some_and(|retry_at| retry_at <= now) {
            self.save(&current());
        }
    }

    /// Appends a line. Returns false if no file is open, or if there is no room for the line and [`END`]: then nothing is appended.
    fn append(&mut self, line: &Line) -> bool {
        let Some(file) = &mut self.file else { return false };
        let Ok(mut line) = serde_json::to_vec(line) else { return false };
        line.push(b'\n');
        #[cfg(test)]
        tests::WRITTEN_BYTES.set(tests::WRITTEN_BYTES.get() + line.len() as u64);
        file.room() >= (line.len() + END.len()) as u64 && file.append(&line)
    }

    /// As [`QuarantineFile::save`], for a quarantine of which the file may lack a range.
    pub fn save_new(&mut self, current: &[QuarantineStatus]) {
        self.lacks_range = true;
        self.save(current);
    }

    /// Rewrites the file with all that is in quarantine now. The first failure is logged. If the file then lacks a range, it is renamed
    /// to [`INCOMPLETE`]: the next daemon must not take it for the whole quarantine.
    pub fn save(&mut self, current: &[QuarantineStatus]) {
        let written = self.replace(current.iter().map(Range::from).collect());
        let path = self.path.display();
        let Err(error) = written else {
            (self.lacks_range, self.retry) = (false, None);
            if let Err(error) = self.ensure_file(&self.mark()) {
                log::warn!("{}: {error}", self.mark().display());
            }
            if std::mem::take(&mut self.incomplete) {
                log::info!("{path}: written again");
                _ = std::fs::remove_file(self.dir.join(INCOMPLETE));
            }
            return;
        };
        let interval = self.retry.map_or(RETRY_INTERVAL, |(_, last)| (2 * last).min(MAX_RETRY_INTERVAL));
        let is_first = self.retry.replace((Instant::now() + interval, interval)).is_none();
        let count = current.len();
        if !self.lacks_range {
            if is_first {
                log::warn!(
                    "{path}: {error}: the next daemon will find more in quarantine than these {count} ranges"
                );
            }
            return;
        }
        self.file = None;
        if is_first {
            log::error!(
                "{path}: {error}: not all of {count} quarantined ranges are in it, so no other daemon starts here; make room"
            );
        }
        if !self.incomplete {
            self.set_aside(is_first);
        }
    }

    /// Makes the next daemon refuse its start: renames the file to [`INCOMPLETE`], or creates that name if there is no file. A failure
    /// is logged if `logs`; the next rewrite tries it again.
    fn set_aside(&mut self, logs: bool) {
        let aside = self.dir.join(INCOMPLETE);
        let renamed = match std::fs::rename(&self.path, &aside) {
            Err(error) if error.kind() == ErrorKind::NotFound => self.ensure_file(&aside),
            renamed => renamed,
        };
        match renamed {
            Ok(()) => self.incomplete = true,
            Err(error) if logs => log::error!(
                "{}: cannot rename it to {INCOMPLETE}: {error}; remove it, or the next daemon takes it for the whole quarantine",
                self.path.display()
            ),
            Err(_) => {}
        }
    }

    /// Returns the path of the mark for this boot.
    fn mark(&self) -> PathBuf {
        // The kernel's boot identifier is hexadecimal with dashes. Any other character is dropped, so that the path stays in `dir`.
        let boot: String = self.boot.chars().filter(char::is_ascii_alphanumeric).collect();
        self.dir.join(format!("{MARK}{boot}"))
    }

    /// Creates a file; an error if the name exists, whatever it is.
    fn create(&self, path: &Path) -> io::Result<std::fs::File> {
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    }

    /// Writes a new file with this quarantine, and renames it into place.
    fn replace(&mut self, quarantine: Vec<Range>) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let room = quarantine.len() as u64 * BYTES_PER_RANGE;
        let bytes = room.clamp(MIN_BYTES, MAX_BYTES).next_multiple_of(PAGE);
        let head = Head { version: VERSION, boot: self.boot.clone(), bytes, ledger: self.ledger, quarantine };
        let mut line = serde_json::to_vec(&head)?;
        line.push(b'\n');
        if (line.len() + END.len()) as u64 > bytes {
            return Err(Errno::FBIG.into());
        }
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
pub(crate) mod tests;
