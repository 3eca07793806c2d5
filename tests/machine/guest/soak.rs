//! Writes and verifies until told to stop: several threads over raw blocks, several over files.
//!
//! Says once a second how far it is, also while it verifies, and at the end what is on the disk, by sums that the other side
//! checks. It never stops before each kind of thread has done something. A call that takes longer than [`HANGS`] is a
//! failure, said at once.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};

use super::channel::Channel;
use super::files::Folder;
use super::raw::Blocks;
use super::{DISK, Wrong};

/// How long a call may take before it counts as hanging.
const HANGS: Duration = Duration::from_secs(60);
/// MiB of the file system, from the start of the disk on.
const FILE_SYSTEM: u64 = 128;
/// The first block behind it.
const RAW: u64 = FILE_SYSTEM << 8;
/// Where it is mounted.
const MOUNTED: &str = "/disk";

/// What the threads share: when to stop, what they have done, and since when each waits.
#[derive(Debug)]
pub struct Watch {
    pub stop: AtomicBool,
    pub raw: AtomicU64,
    pub files: AtomicU64,
    /// Blocks and files read again at the end.
    pub verified: AtomicU64,
    begun: Instant,
    /// Every call under way, by the milliseconds at which it began.
    calls: Mutex<Vec<u64>>,
    slowest: AtomicU64,
    /// When it was last said how far it is, in milliseconds.
    reported: AtomicU64,
    channel: Channel,
}

impl Watch {
    fn new(channel: &Channel) -> Self {
        Self {
            stop: AtomicBool::new(false),
            raw: AtomicU64::new(0),
            files: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            begun: Instant::now(),
            calls: Mutex::new(Vec::new()),
            slowest: AtomicU64::new(0),
            reported: AtomicU64::new(0),
            channel: channel.clone(),
        }
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    fn calls(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        self.calls.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes a call that is watched.
    pub fn timed<T>(&self, call: impl FnOnce() -> T) -> T {
        let since = self.now();
        self.calls().push(since);
        let answer = call();
        let mut calls = self.calls();
        if let Some(mine) = calls.iter().position(|&began| began == since) {
            calls.swap_remove(mine);
        }
        self.slowest.fetch_max(self.now() - since, Ordering::Relaxed);
        answer
    }

    fn hanging(&self) -> Option<u64> {
        let oldest = self.calls().iter().copied().min()?;
        let waits = self.now() - oldest;
        (waits > HANGS.as_millis() as u64).then_some(waits)
    }

    fn says(&self) -> Value {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "raw": read(&self.raw), "files": read(&self.files), "verified": read(&self.verified),
            "slowest_ms": read(&self.slowest),
        })
    }

    /// True once there is something of each kind to verify.
    fn has_done_each(&self) -> bool {
        self.raw.load(Ordering::Relaxed) > 0 && self.files.load(Ordering::Relaxed) > 0
    }

    /// Says how far it is, once a second at most. It needs no timer for that: one of an emulated processor may be late.
    pub fn report_at_times(&self) {
        let (now, last) = (self.now(), self.reported.load(Ordering::Relaxed));
        if now >= last + 1000 {
            self.reported.store(now, Ordering::Relaxed);
            self.report();
        }
    }

    /// Says how far it is. A call that hangs ends the guest: its thread cannot be ended.
    fn report(&self) {
        let channel = &self.channel;
        channel.say(&json!({ "progress": self.says() }));
        if let Some(ms) = self.hanging() {
            channel.say(&json!({ "failed": format!("a call has taken {ms} ms and goes on") }));
            std::thread::sleep(Duration::from_secs(5));
            let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
        }
    }
}

/// Soaks for `seconds`, or until told `stop`, but until each kind of thread has done something; with `threads` of each
/// kind, over `blocks` raw blocks.
pub fn run(asked: &Value, channel: &Channel, told: &Receiver<String>) -> Result<Value, Wrong> {
    let number = |name: &str, default: u64| asked[name].as_u64().unwrap_or(default);
    let (seconds, threads) = (number("seconds", 10), number("threads", 2).max(1));
    let (blocks, seed) = (number("blocks", 2048), number("seed", 1));
    let watch = Watch::new(channel);
    channel.say(&json!({ "progress": watch.says() }));
    make_file_system()?;
    let flags = OFlags::DIRECT.bits() as i32;
    let disk = OpenOptions::new().read(true).write(true).custom_flags(flags).open(DISK);
    let disk = disk.map_err(|e| format!("{DISK}: {e}"))?;
    let share = blocks / threads;
    let mut raw: Vec<_> =
        (0..threads).map(|nth| Blocks::new(&disk, seed, RAW + nth * share, share, &watch)).collect();
    let mut folders = (0..threads)
        .map(|nth| Folder::new(PathBuf::from(format!("{MOUNTED}/{nth}")), seed + nth, &watch))
        .collect::<Result<Vec<_>, _>>()?;

    let wrong = Mutex::new(None);
    // Whatever goes wrong first stops the rest.
    let fails = |what: Wrong| {
        watch.stop.store(true, Ordering::Relaxed);
        wrong.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(what);
    };
    std::thread::scope(|scope| {
        let mut working: Vec<_> =
            raw.iter_mut().map(|b| scope.spawn(|| b.work().map(drop).unwrap_or_else(fails))).collect();
        working.extend(folders.iter_mut().map(|f| scope.spawn(|| f.work().unwrap_or_else(fails))));
        let mut ends = false;
        while !working.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            ends |= watch.begun.elapsed() > Duration::from_secs(seconds);
            if ends && watch.has_done_each() {
                watch.stop.store(true, Ordering::Relaxed);
            }
            match told.recv_timeout(Duration::from_secs(1)) {
                Ok(line) if line.contains("memory") => {
                    channel.say(
                        &super::memory().map_or_else(|w| json!({ "failed": w }), |k| json!({ "memory": k })),
                    );
                }
                Ok(_) | Err(RecvTimeoutError::Disconnected) => ends = true,
                Err(RecvTimeoutError::Timeout) => {}
            }
            watch.report();
        }
    });
    if let Some(what) = wrong.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(what);
    }

    let total = verify(&mut raw, &folders)?;
    let listed: Vec<Value> = folders
        .iter()
        .flat_map(|folder| {
            let name = folder.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            folder.files.iter().map(move |(file, (seed, len))| json!([format!("{name}/{file}"), seed, len]))
        })
        .collect();
    unmount(MOUNTED, UnmountFlags::empty()).map_err(|e| format!("unmount: {e}"))?;
    disk.sync_all().map_err(|e| format!("flush: {e}"))?;
    for some in listed.chunks(16) {
        channel.say(&json!({ "files": some }));
    }
    Ok(
        json!({ "did": watch.says(), "first": RAW, "blocks": share * threads, "sum": format!("{total:016x}"), "files": listed.len() }),
    )
}

/// Reads everything once more, the file system by way of a fresh mount. Returns the sum of all blocks.
fn verify(raw: &mut [Blocks<'_>], folders: &[Folder<'_>]) -> Result<u64, Wrong> {
    let mut total = 0;
    for blocks in raw {
        total = blocks.verify(total)?;
    }
    unmount(MOUNTED, UnmountFlags::empty()).map_err(|e| format!("unmount: {e}"))?;
    attach()?;
    folders.iter().try_for_each(Folder::verify)?;
    Ok(total)
}

/// Makes a file system with a journal at the start of the disk, and mounts it.
fn make_file_system() -> Result<(), Wrong> {
    let size = format!("{FILE_SYSTEM}M");
    let made = Command::new("/bin/mke2fs").args(["-q", "-F", "-t", "ext4", DISK, &size]).output();
    let made = made.map_err(|e| format!("mke2fs: {e}"))?;
    if !made.status.success() {
        return Err(format!("mke2fs: {}: {}", made.status, String::from_utf8_lossy(&made.stderr)));
    }
    fs::create_dir_all(MOUNTED).map_err(|e| format!("{MOUNTED}: {e}"))?;
    attach()
}

fn attach() -> Result<(), Wrong> {
    let _: File = File::open(DISK).map_err(|e| format!("{DISK}: {e}"))?;
    mount(DISK, MOUNTED, "ext4", MountFlags::empty(), None).map_err(|e| format!("mount: {e}"))
}
