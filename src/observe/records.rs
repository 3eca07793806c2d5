//! What a session writes down in its state directory: the audit log, and its quarantine.
//!
//! One directory belongs to one daemon at a time: it holds a lock on it for as long as it lives.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::audit::{self, Log, LogOptions};
use super::keep::Keep;
use crate::error::{Error, Result};
use crate::gate::{Effect, Event, Notice, Policy, QuarantineStatus};

/// Where a session writes things down, and how much of it.
#[derive(Debug, Clone)]
pub struct StateOptions {
    /// The directory; made (mode 0700) where it is missing.
    pub dir: PathBuf,
    /// Bytes of one file of the audit log.
    pub audit_segment: u64,
    /// Files of the audit log that are kept.
    pub audit_keep: usize,
}

impl StateOptions {
    /// The defaults, in `dir`: eight files of 64 MiB.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), audit_segment: 64 << 20, audit_keep: 8 }
    }
}

/// What a session writes down.
#[derive(Debug)]
pub struct Records {
    log: Log,
    keep: Keep,
    /// What the last daemon left in quarantine, until it is taken.
    left: Vec<Event>,
    _lock: File,
}

impl Records {
    /// Takes the directory, reads what the last daemon left there, and begins a log for a session with this policy
    /// over `iommu` and these devices, which goes on from an earlier daemon's where it is `resumed`. `EAGAIN` where another daemon has the directory.
    pub fn open(
        options: &StateOptions,
        policy: Policy,
        iommu: &str,
        devices: Vec<String>,
        resumed: bool,
    ) -> Result<Self> {
        let failed = |mend| move |source: io::Error| Error::State { path: options.dir.clone(), source, mend };
        let writable = ": it must be a directory that is writable, or its parent must be";
        DirBuilder::new().recursive(true).mode(0o700).create(&options.dir).map_err(failed(writable))?;
        let lock = File::open(&options.dir).map_err(failed(writable))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
            Errno::WOULDBLOCK => {
                failed(": another daemon uses it; give each a --state-dir of its own")(errno.into())
            }
            errno => failed("")(errno.into()),
        })?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(failed(": /proc is not mounted"))?
            .trim()
            .to_owned();
        let keep = Keep::new(&options.dir, boot.clone());
        let left = keep.load()?;
        if !left.is_empty() {
            log::warn!("{}: {} ranges are still in quarantine", options.dir.display(), left.len());
        }
        let log = LogOptions {
            segment: options.audit_segment,
            patience: audit::PATIENCE,
            keep: options.audit_keep,
            policy,
            boot,
            iommu: iommu.to_owned(),
            devices,
            resumed,
        };
        let log = Log::open(&options.dir, log).map_err(failed(writable))?;
        Ok(Self { log, keep, left, _lock: lock })
    }

    /// What the last daemon left in quarantine, for a gate without regions.
    pub fn take_left(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.left)
    }

    /// This is in quarantine, as an earlier daemon's ledger had it.
    pub fn go_on(&mut self, quarantine: &[QuarantineStatus]) {
        self.left.clear();
        self.keep.save(quarantine);
    }

    /// Takes down an event that the gate is about to be told.
    pub fn before(&mut self, event: &Event) {
        self.log.begin(event);
    }

    /// Writes down what the gate made of it, before any of it is done. Whatever happens in between, the quarantine on
    /// disk is never less than the log's.
    pub fn after(&mut self, effects: &[Effect], quarantine: impl FnOnce() -> Vec<QuarantineStatus>) {
        let (mut more, mut less) = (false, false);
        for effect in effects {
            match effect {
                Effect::Notice(Notice::Quarantined { .. }) => more = true,
                Effect::Notice(Notice::Freed { .. } | Notice::Released { .. }) => less = true,
                _ => {}
            }
        }
        if more {
            self.keep.save(&quarantine());
            self.log.finish(effects);
        } else {
            self.log.finish(effects);
            if less {
                self.keep.save(&quarantine());
            }
        }
    }

    /// Lines of the log that could not be written.
    pub fn dropped(&self) -> u64 {
        self.log.dropped()
    }
}
