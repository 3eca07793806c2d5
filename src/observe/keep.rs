//! Quarantine on disk: what must not be handed out outlives the daemon, however it ends.
//!
//! `quarantine.json` in the state directory is written anew, and renamed into place, before the answer that a change
//! comes with leaves the process. The next daemon there takes it over before it takes any memory. It holds for one boot
//! of the kernel: after another no device reaches old pages, and files have other identities. That is also why it is
//! not forced to the disk: a process that dies takes nothing back, and a machine that goes down makes it void.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use passgate_bindings::PageRange;
use passgate_bindings::units::Offset;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::gate::{Event, FileId, InvalidationId, QuarantineStatus, Reason};

/// The file's name in the state directory.
pub const FILE: &str = "quarantine.json";

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
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
    path: PathBuf,
    boot: String,
}

impl Keep {
    /// The quarantine in `dir`, which is this process's own, on this boot of the kernel.
    pub fn new(dir: &Path, boot: String) -> Self {
        Self { path: dir.join(FILE), boot }
    }

    /// What the last daemon left, as events for a gate without regions. What is of another boot is left out, and so is
    /// a file without a byte in it, which a machine that went down may leave; one that cannot be read is an error,
    /// because something in it may still be reachable.
    pub fn load(&self) -> Result<Vec<Event>> {
        let mend = ": stop what uses the memory, then remove the file";
        let failed = |source| Error::State { path: self.path.clone(), source, mend };
        let bytes = match std::fs::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            result => result.map_err(failed)?,
        };
        if bytes.iter().all(|byte| *byte == 0) {
            log::warn!("{}: empty, as after a crash of the machine: ignored", self.path.display());
            return Ok(Vec::new());
        }
        let kept: Kept = serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))?;
        if kept.boot != self.boot {
            let count = kept.quarantine.len();
            log::warn!("{}: {count} ranges of another boot of this machine: ignored", self.path.display());
            return Ok(Vec::new());
        }
        let event = |Range { file, range, invalidation, reason }| Event::Quarantine {
            file,
            range,
            invalidation,
            reason,
        };
        Ok(kept.quarantine.into_iter().map(event).collect())
    }

    /// Writes down all that is in quarantine now. A failure is logged: in this daemon the ranges stay quarantined.
    pub fn save(&self, now: &[QuarantineStatus]) {
        let range = |status: &QuarantineStatus| Range {
            file: status.file,
            range: status.range,
            invalidation: status.invalidation,
            reason: status.reason,
        };
        let kept = Kept { boot: self.boot.clone(), quarantine: now.iter().map(range).collect() };
        if let Err(error) = self.replace(&kept) {
            log::error!(
                "{}: {error}: the next daemon will not know of {} quarantined ranges; make room there",
                self.path.display(),
                now.len()
            );
        }
    }

    fn replace(&self, kept: &Kept) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let bytes = serde_json::to_vec(kept)?;
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&bytes)?;
        std::fs::rename(&new, &self.path)
    }
}
