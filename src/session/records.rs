//! The files that a session writes in its state directory: the audit log, and its quarantine.
//!
//! A directory is used by one daemon at a time, which has it locked (flock) for as long as it lives.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::quarantine_file::{Changes, QuarantineFile};
use crate::error::{Error, Result};
use crate::gate::{Effect, Event, Policy, QuarantineStatus};
use crate::observe::audit::{self, Log, LogOptions};

/// The options of a state directory.
#[derive(Debug, Clone)]
pub struct StateOptions {
    /// The directory; created with mode 0700 if it is missing.
    pub dir: PathBuf,
    /// Bytes of one file of the audit log.
    pub audit_segment: u64,
    /// The maximum number of files of the audit log; the oldest is removed.
    pub audit_keep: usize,
}

impl StateOptions {
    /// Returns the defaults for `dir`: eight files of 64 MiB.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), audit_segment: 64 << 20, audit_keep: 8 }
    }
}

/// The write permissions of group and others (`S_IWGRP | S_IWOTH`).
const OTHERS_WRITE: u32 = 0o022;
/// The sticky bit (`S_ISVTX`): only the owner of a file may rename or remove it.
const STICKY: u32 = 0o1000;

/// Returns true if the newest log in the directory was written on this boot: then a daemon has used the directory, even if there is
/// no boot mark.
fn logged_on(dir: &Path, boot: &str) -> bool {
    let newest = audit::files::list(dir).unwrap_or_default().into_iter().rev();
    let heads = newest.filter_map(|(_, path)| audit::reader::head(&path).ok().flatten());
    // A daemon of format 0 created the quarantine file with its first quarantine only, so a missing file is no loss.
    heads.take(1).any(|head| head.boot == boot && head.format > 0)
}

/// The audit log and the quarantine file of a session.
#[derive(Debug)]
pub struct Records {
    log: Log,
    quarantine_file: QuarantineFile,
    /// The quarantine of the last daemon, until it is taken.
    earlier_quarantine: Vec<Event>,
    /// The id of the ledger that has all of it, if one has.
    earlier_ledger: Option<u64>,
    _lock: File,
}

impl Records {
    /// Locks the directory, reads the quarantine of the last daemon, and begins an audit log for a session with this policy over
    /// `iommu` and these devices. With `resumed` the session resumes from an earlier daemon's ledger. `EAGAIN` if another daemon has
    /// the directory, `EACCES` if other users may write to it. If the quarantine cannot be read, it is an error, unless the
    /// session is resumed: then the ledger has it.
    pub fn open(
        options: &StateOptions,
        policy: Policy,
        iommu: &str,
        devices: Vec<String>,
        resumed: bool,
    ) -> Result<Self> {
        let failed =
            |remedy| move |source: io::Error| Error::State { path: options.dir.clone(), source, remedy };
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
            let remedy = ": others may write there, and so lift a quarantine: chmod go-w it, or name another --state-dir";
            return Err(failed(remedy)(Errno::ACCESS.into()));
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
        let mut quarantine_file = QuarantineFile::new(&options.dir, boot.clone());
        let loaded = quarantine_file.load_with_ledger(logged_on(&options.dir, &boot));
        let (earlier_quarantine, earlier_ledger) = match loaded {
            // The file stays until the ledger's quarantine is written in its place ([`Records::rewrite_quarantine`]): a daemon
            // that ends before that must leave nothing that the next could take for the whole quarantine.
            Err(error) if resumed => {
                log::error!("{error} (the ledger that was kept has it)");
                quarantine_file.begin_unread();
                (Vec::new(), None)
            }
            loaded => {
                let (quarantine, ledger) = loaded?;
                // Nothing has changed yet. A session that does not resume from that ledger does not update it either.
                quarantine_file.set_ledger(ledger.filter(|_| resumed));
                match quarantine_file.begin(&quarantine) {
                    // A full disk must not stop a VM whose ledger has everything. A later change that cannot be written is
                    // marked on the disk.
                    Err(error) if resumed => {
                        log::error!("{error} (the ledger that was kept has it)");
                        quarantine_file.begin_unwritten();
                    }
                    begun => begun?,
                }
                (quarantine, ledger)
            }
        };
        if !earlier_quarantine.is_empty() {
            let count = earlier_quarantine.len();
            log::warn!("{}: {count} ranges are still in quarantine", options.dir.display());
        }
        let log = LogOptions {
            segment: options.audit_segment,
            new_file_timeout: audit::NEW_FILE_TIMEOUT,
            keep: options.audit_keep,
            policy,
            boot,
            iommu: iommu.to_owned(),
            devices,
            resumed,
        };
        let log = Log::open(&options.dir, log).map_err(failed(writable))?;
        Ok(Self { log, quarantine_file, earlier_quarantine, earlier_ledger, _lock: lock })
    }

    /// Takes the quarantine of the last daemon, as events for a gate without regions.
    pub fn take_quarantine(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.earlier_quarantine)
    }

    /// Takes the quarantine of the last daemon that the ledger with this id may not have. If the file names this ledger, there is
    /// none: that ledger was updated before the file at each change, so a range that only the file has was lifted, and the daemon
    /// ended before it could write that to the file.
    pub fn take_quarantine_beyond(&mut self, ledger: Option<u64>) -> Vec<Event> {
        let quarantine = self.take_quarantine();
        if ledger.is_some() && ledger == self.earlier_ledger { Vec::new() } else { quarantine }
    }

    /// Writes all that is in quarantine to the file. `ledger` is the id of the ledger that has all of it and is updated before the
    /// file from now on.
    pub fn rewrite_quarantine(&mut self, quarantine: &[QuarantineStatus], ledger: Option<u64>) {
        self.earlier_quarantine.clear();
        self.quarantine_file.set_ledger(ledger);
        self.quarantine_file.save_new(quarantine);
    }

    /// Records an event that the gate is about to take. [`Records::record_effects`] must follow.
    pub fn record_event(&mut self, event: &Event) {
        self.log.begin(event);
    }

    /// Writes the effects of the event, before any of them is executed. `quarantine` returns all that is in quarantine; it is called
    /// only if the file must be rewritten.
    pub fn record_effects(&mut self, effects: &[Effect], quarantine: impl FnOnce() -> Vec<QuarantineStatus>) {
        let changes = Changes::of(effects);
        // A range is added to the file before the log and removed after it, so the file never lacks one that the log has.
        if changes.adds_range() {
            self.quarantine_file.change(changes, quarantine);
            self.log.finish(effects);
        } else {
            self.log.finish(effects);
            if !changes.is_empty() {
                self.quarantine_file.change(changes, quarantine);
            }
        }
    }

    /// Returns the time at which [`Records::retry_quarantine`] must be called.
    pub fn quarantine_retry_at(&self) -> Option<Instant> {
        self.quarantine_file.retry_at()
    }

    /// Writes the quarantine file again if that failed before, and its time is due at `now`.
    pub fn retry_quarantine(&mut self, now: Instant, quarantine: impl FnOnce() -> Vec<QuarantineStatus>) {
        self.quarantine_file.retry(now, quarantine);
    }

    /// Returns the number of lines of the log that could not be written.
    pub fn dropped(&self) -> u64 {
        self.log.dropped()
    }
}
