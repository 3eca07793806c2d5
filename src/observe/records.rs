//! What a session writes down in its state directory: the audit log, and its quarantine.
//!
//! One directory belongs to one daemon at a time: it holds a lock on it for as long as it lives.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::audit::{self, Log, LogOptions};
use super::keep::{Changes, Keep};
use crate::error::{Error, Result};
use crate::gate::{Effect, Event, Policy, QuarantineStatus};

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

/// Write permission of anybody but the owner (S_IWGRP, S_IWOTH).
const OTHERS_WRITE: u32 = 0o022;
/// Only a file's owner may rename or remove it (S_ISVTX).
const STICKY: u32 = 0o1000;

/// True where a log in the directory was written on this boot: a daemon has used it, also one that left no mark.
fn logged_on(dir: &Path, boot: &str) -> bool {
    let newest = audit::files::list(dir).unwrap_or_default().into_iter().rev();
    let heads = newest.filter_map(|(_, path)| audit::reader::head(&path).ok().flatten());
    // A daemon of before format 1 made the file with its first quarantine only: that it is missing says nothing.
    heads.take(1).any(|head| head.boot == boot && head.format > 0)
}

/// What a session writes down.
#[derive(Debug)]
pub struct Records {
    log: Log,
    keep: Keep,
    /// What the last daemon left in quarantine, until it is taken.
    left: Vec<Event>,
    /// The ledger that has all of that, where one has.
    left_in: Option<u64>,
    _lock: File,
}

impl Records {
    /// Takes the directory, reads what the last daemon left there, and begins a log for a session with this policy
    /// over `iommu` and these devices, which goes on from an earlier daemon's where it is `resumed`. `EAGAIN` where
    /// another daemon has the directory, `EACCES` where others may write to it. Where what was in quarantine cannot be
    /// read, the start is refused, unless the ledger of the earlier daemon has it.
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
        let owner = rustix::fs::fstat(&lock).map_err(|errno| failed("")(errno.into()))?;
        if owner.st_mode & OTHERS_WRITE != 0 && owner.st_mode & STICKY == 0 {
            let mend = ": others may write there, and so lift a quarantine: chmod go-w it, or name another --state-dir";
            return Err(failed(mend)(Errno::ACCESS.into()));
        }
        if owner.st_mode & OTHERS_WRITE != 0 {
            let dir = options.dir.display();
            log::warn!(
                "{dir}: others may put files there, and so keep a daemon from starting: chmod go-w it"
            );
        }
        let own = rustix::process::geteuid().as_raw();
        if owner.st_uid != own && owner.st_uid != 0 {
            log::warn!(
                "{}: it is user {}'s, who may lift a quarantine: chown it",
                options.dir.display(),
                owner.st_uid
            );
        }
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(failed(": /proc is not mounted"))?
            .trim()
            .to_owned();
        let mut keep = Keep::new(&options.dir, boot.clone());
        let (left, left_in) = match keep.load_with_ledger(logged_on(&options.dir, &boot)) {
            // What lies there stays until what the ledger has is written in its place ([`Records::go_on`]): a daemon that
            // ends before that must leave nothing that the next could take for the whole quarantine.
            Err(error) if resumed => {
                log::error!("{error} (the ledger that was kept has it)");
                keep.begin_unread();
                (Vec::new(), None)
            }
            left => {
                let (left, left_in) = left?;
                // Nothing has changed yet. Who goes on without that ledger tells it of no change.
                keep.follow(left_in.filter(|_| resumed));
                match keep.begin(&left) {
                    // A full disk stops no VM whose ledger has everything. What cannot be saved later says so on the disk.
                    Err(error) if resumed => log::error!("{error} (the ledger that was kept has it)"),
                    begun => begun?,
                }
                (left, left_in)
            }
        };
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
        Ok(Self { log, keep, left, left_in, _lock: lock })
    }

    /// What the last daemon left in quarantine, for a gate without regions.
    pub fn take_left(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.left)
    }

    /// What of that an earlier daemon's `ledger` may not have: nothing where it has been told of each change before the
    /// disk was. What is on the disk alone was lifted then, and the daemon has ended before it could write that down.
    pub fn take_left_beside(&mut self, ledger: Option<u64>) -> Vec<Event> {
        let left = self.take_left();
        if ledger.is_some() && ledger == self.left_in { Vec::new() } else { left }
    }

    /// This is in quarantine, and in `ledger`, which is told of each change from now on before this is.
    pub fn go_on(&mut self, quarantine: &[QuarantineStatus], ledger: Option<u64>) {
        self.left.clear();
        self.keep.follow(ledger);
        self.keep.save(quarantine, true);
    }

    /// Takes down an event that the gate is about to be told.
    pub fn before(&mut self, event: &Event) {
        self.log.begin(event);
    }

    /// Writes down what the gate made of it, before any of it is done. Whatever happens in between, the quarantine on
    /// disk is never less than the log's. `quarantine` is all of it; it is asked for only where the file is full.
    pub fn after(&mut self, effects: &[Effect], quarantine: impl FnOnce() -> Vec<QuarantineStatus>) {
        let changes = Changes::of(effects);
        if changes.has_more() {
            self.keep.change(changes, quarantine);
            self.log.finish(effects);
        } else {
            self.log.finish(effects);
            if !changes.is_empty() {
                self.keep.change(changes, quarantine);
            }
        }
    }

    /// Lines of the log that could not be written.
    pub fn dropped(&self) -> u64 {
        self.log.dropped()
    }
}
