//! Quarantine on disk: what must not be handed out outlives the daemon, however it ends.
//!
//! `quarantine.json` in the state directory is written anew, and renamed into place, before the answer that a change
//! comes with leaves the process. The next daemon there takes it over before it takes any memory. It holds for one boot
//! of the kernel: after another no device reaches old pages, and files have other identities. That is also why it is
//! not forced to the disk: a process that dies takes nothing back, and a machine that goes down makes it void.
//!
//! A file that says nothing is not a quarantine of nothing. `boot-ID` beside it says that a daemon has used the directory
//! on this boot: from then on a quarantine that is missing, empty, damaged or of another boot is *unknown*, and the start
//! is refused with the remedy. A daemon that cannot write down what it has put into quarantine sets the file aside
//! (`quarantine.incomplete`), which needs no room on the disk, and so refuses the next daemon's start.

use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use passgate_bindings::PageRange;
use passgate_bindings::units::Offset;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::private;
use crate::error::{Error, Result};
use crate::gate::{Event, FileId, InvalidationId, QuarantineStatus, Reason};

/// The file's name in the state directory.
pub const FILE: &str = "quarantine.json";
/// Its name where something could not be written down in it.
pub const INCOMPLETE: &str = "quarantine.incomplete";
/// The start of a name that says on which boot the directory was used.
const MARK: &str = "boot-";
/// The version of the format that this file describes. A file without one is version 0, and reads the same.
const VERSION: u64 = 1;
/// Bytes of the file at most: the gate holds 65 536 ranges, of some hundred bytes each.
const MAX_BYTES: u64 = 64 << 20;

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    #[serde(default)]
    version: u64,
    /// The kernel's boot.
    boot: String,
    quarantine: Vec<Range>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Range {
    file: FileId,
    range: PageRange<Offset>,
    invalidation: InvalidationId,
    reason: Reason,
}

/// The quarantine of one session on disk.
#[derive(Debug)]
pub struct Keep {
    dir: PathBuf,
    path: PathBuf,
    boot: String,
    /// Set while the file is set aside.
    incomplete: bool,
}

impl Keep {
    /// The quarantine in `dir`, which is this process's own, on this boot of the kernel.
    pub fn new(dir: &Path, boot: String) -> Self {
        Self { dir: dir.to_owned(), path: dir.join(FILE), boot, incomplete: false }
    }

    /// What the last daemon left, as events for a gate without regions. What cannot be read is an error where a daemon
    /// has used the directory on this boot, because something in it may still be reachable. `used` says that one has,
    /// where nothing here does.
    pub fn load(&self, used: bool) -> Result<Vec<Event>> {
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
                Ok(Vec::new())
            }
        };
        let bytes = match private::read(&self.path, MAX_BYTES) {
            Err(error) if error.kind() == ErrorKind::NotFound && !used => return Ok(Vec::new()),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return void("it is gone, and a daemon has used the directory on this boot");
            }
            result => result.map_err(|error| failed(&self.path, error))?,
        };
        if bytes.iter().all(|byte| *byte == 0) {
            return void("it is empty, as after a crash of the machine");
        }
        let kept: Kept = serde_json::from_slice(&bytes).map_err(|error| failed(&self.path, error.into()))?;
        if kept.version > VERSION {
            let why = format!("it is of version {}, this passgate reads up to {VERSION}", kept.version);
            return Err(failed(&self.path, io::Error::other(why)));
        }
        if kept.boot != self.boot {
            return void(&format!("{} ranges of another boot of this machine", kept.quarantine.len()));
        }
        let event = |Range { file, range, invalidation, reason }| Event::Quarantine {
            file,
            range,
            invalidation,
            reason,
        };
        Ok(kept.quarantine.into_iter().map(event).collect())
    }

    /// Writes down what was taken over, and that the directory is used on this boot: from here on a quarantine that is
    /// missing is one that was lost. `ENOSPC` where there is no room for it.
    pub fn begin(&mut self, left: &[Event]) -> Result<()> {
        let mend = ": the quarantine must be written down there; make room, or name another --state-dir";
        let failed = |path: &Path, source| Error::State { path: path.to_owned(), source, mend };
        let range = |event: &Event| match event {
            Event::Quarantine { file, range, invalidation, reason } => {
                Some(Range { file: *file, range: *range, invalidation: *invalidation, reason: *reason })
            }
            _ => None,
        };
        self.replace(left.iter().filter_map(range).collect()).map_err(|error| failed(&self.path, error))?;
        let mark = self.mark();
        match self.create(&mark) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            result => _ = result.map_err(|error| failed(&mark, error))?,
        }
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

    /// Writes down all that is in quarantine now. Where that fails it is logged, and where `more` is in quarantine than
    /// the file says, the file is set aside: the next daemon must not take it for the whole.
    pub fn save(&mut self, now: &[QuarantineStatus], more: bool) {
        let range = |status: &QuarantineStatus| Range {
            file: status.file,
            range: status.range,
            invalidation: status.invalidation,
            reason: status.reason,
        };
        let path = self.path.display();
        let Err(error) = self.replace(now.iter().map(range).collect()) else {
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

    fn replace(&self, quarantine: Vec<Range>) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let bytes = serde_json::to_vec(&Kept { version: VERSION, boot: self.boot.clone(), quarantine })?;
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.create(&new)?.write_all(&bytes)?;
        std::fs::rename(&new, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use passgate_bindings::PAGE;
    use rustix::fs::{FileType, Mode};

    use super::*;
    use crate::gate::{Cause, Step};

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
        keep.save(&[status(3)], true);
        (dir, keep)
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
    fn a_quarantine_that_cannot_be_read_is_unknown_and_never_empty() {
        type Spoil = fn(&Path);
        let spoils: [(&str, Spoil); 12] = [
            ("gone", |file| std::fs::remove_file(file).unwrap()),
            ("empty", |file| std::fs::write(file, "").unwrap()),
            ("zeroes", |file| std::fs::write(file, [0; 64]).unwrap()),
            ("cut", |file| {
                let bytes = std::fs::read(file).unwrap();
                std::fs::write(file, &bytes[..bytes.len() - 1]).unwrap();
            }),
            ("newer", |file| {
                let text = std::fs::read_to_string(file).unwrap();
                std::fs::write(file, text.replace("\"version\":1", "\"version\":2")).unwrap();
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
            let (dir, keep) = used();
            spoil(&dir.path().join(FILE));
            let error = keep.load(false).expect_err(what).to_string();
            assert!(error.contains("move the directory away"), "{what}: {error}");
        }
    }

    #[test]
    fn an_older_format_is_read() {
        let (dir, keep) = used();
        let text = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        std::fs::write(dir.path().join(FILE), text.replace("\"version\":1,", "")).unwrap();
        assert_eq!(keep.load(false).unwrap().len(), 1);
        // Without a mark too, as an older daemon leaves it.
        std::fs::remove_file(keep.mark()).unwrap();
        assert_eq!(keep.load(false).unwrap().len(), 1);
        std::fs::write(dir.path().join(FILE), "").unwrap();
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
        keep.save(&[status(3), status(4)], true);
        let error = keep.load(false).unwrap_err().to_string();
        assert!(error.contains(INCOMPLETE) && error.contains("could not write"), "{error}");
        assert!(keep.begin(&[]).is_err(), "a daemon that cannot write does not start");
        // It comes to itself.
        std::fs::remove_dir(&obstacle).unwrap();
        keep.save(&[status(3), status(4)], true);
        assert_eq!(keep.load(false).unwrap().len(), 2);
    }
}
