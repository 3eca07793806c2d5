//! Writes and verifies until it is to stop: several threads use raw blocks, several use files.
//!
//! Reports its progress once a second, also while it verifies, and at the end the contents of the disk, as checksums that the
//! host verifies. It does not stop before each kind of thread has done something. A call that takes longer than
//! [`HANG_LIMIT`] is reported as a failure at once.

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
use super::{DISK, Failure};

/// The time after which a call counts as hanging.
const HANG_LIMIT: Duration = Duration::from_secs(60);
/// The size of the file system, which begins at the start of the disk, in MiB.
const FILE_SYSTEM_MIB: u64 = 128;
/// The number of the first block behind the file system.
const FIRST_RAW_BLOCK: u64 = FILE_SYSTEM_MIB << 8;
/// The directory at which the file system is mounted.
const MOUNT_POINT: &str = "/disk";

/// The shared state of the threads: the request to stop, the numbers of operations, and the calls in progress.
#[derive(Debug)]
pub struct Progress {
    pub stop: AtomicBool,
    pub raw: AtomicU64,
    pub files: AtomicU64,
    /// The number of blocks and files verified at the end.
    pub verified: AtomicU64,
    started: Instant,
    /// The start time of every call in progress, in milliseconds since `started`.
    calls: Mutex<Vec<u64>>,
    /// The duration of the slowest call so far, in milliseconds.
    slowest: AtomicU64,
    /// The time of the last report, in milliseconds since `started`.
    reported: AtomicU64,
    channel: Channel,
}

impl Progress {
    fn new(channel: &Channel) -> Self {
        Self {
            stop: AtomicBool::new(false),
            raw: AtomicU64::new(0),
            files: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            started: Instant::now(),
            calls: Mutex::new(Vec::new()),
            slowest: AtomicU64::new(0),
            reported: AtomicU64::new(0),
            channel: channel.clone(),
        }
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn calls(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        self.calls.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes a call, and records its start and duration.
    pub fn timed<T>(&self, call: impl FnOnce() -> T) -> T {
        let since = self.now();
        self.calls().push(since);
        let result = call();
        let mut calls = self.calls();
        if let Some(index) = calls.iter().position(|&call_start| call_start == since) {
            calls.swap_remove(index);
        }
        self.slowest.fetch_max(self.now() - since, Ordering::Relaxed);
        result
    }

    /// Returns the duration of the oldest call in progress, in milliseconds, if it counts as hanging.
    fn hanging(&self) -> Option<u64> {
        let oldest = self.calls().iter().copied().min()?;
        let waiting_ms = self.now() - oldest;
        (waiting_ms > HANG_LIMIT.as_millis() as u64).then_some(waiting_ms)
    }

    fn to_json(&self) -> Value {
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

    /// Reports the progress, once a second at most. It needs no timer: one of an emulated processor may be late.
    pub fn report_at_times(&self) {
        let (now, last) = (self.now(), self.reported.load(Ordering::Relaxed));
        if now >= last + 1000 {
            self.reported.store(now, Ordering::Relaxed);
            self.report();
        }
    }

    /// Reports the progress. A hanging call is reported as a failure, and the guest powers off: its thread cannot be ended.
    fn report(&self) {
        let channel = &self.channel;
        channel.send(&json!({ "progress": self.to_json() }));
        if let Some(ms) = self.hanging() {
            channel.send(&json!({ "failed": format!("a call has taken {ms} ms and has not returned") }));
            std::thread::sleep(Duration::from_secs(5));
            let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
        }
    }
}

/// Soaks for `seconds`, or until the command `stop`, but until each kind of thread has done something; with `threads` of each
/// kind, over `blocks` raw blocks.
pub fn run(command: &Value, channel: &Channel, commands: &Receiver<String>) -> Result<Value, Failure> {
    let number = |name: &str, default: u64| command[name].as_u64().unwrap_or(default);
    let (seconds, threads) = (number("seconds", 10), number("threads", 2).max(1));
    let (blocks, seed) = (number("blocks", 2048), number("seed", 1));
    let progress = Progress::new(channel);
    channel.send(&json!({ "progress": progress.to_json() }));
    make_file_system()?;
    let flags = OFlags::DIRECT.bits() as i32;
    let disk = OpenOptions::new().read(true).write(true).custom_flags(flags).open(DISK);
    let disk = disk.map_err(|e| format!("{DISK}: {e}"))?;
    let blocks_per_thread = blocks / threads;
    let mut raw: Vec<_> = (0..threads)
        .map(|nth| {
            Blocks::new(&disk, seed, FIRST_RAW_BLOCK + nth * blocks_per_thread, blocks_per_thread, &progress)
        })
        .collect();
    let mut folders = (0..threads)
        .map(|nth| Folder::new(PathBuf::from(format!("{MOUNT_POINT}/{nth}")), seed + nth, &progress))
        .collect::<Result<Vec<_>, _>>()?;

    let first_failure = Mutex::new(None);
    // The first failure stops all threads.
    let fail = |failure: Failure| {
        progress.stop.store(true, Ordering::Relaxed);
        first_failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(failure);
    };
    std::thread::scope(|scope| {
        let mut workers: Vec<_> =
            raw.iter_mut().map(|b| scope.spawn(|| b.work().map(drop).unwrap_or_else(fail))).collect();
        workers.extend(folders.iter_mut().map(|f| scope.spawn(|| f.work().unwrap_or_else(fail))));
        let mut stop_requested = false;
        while !workers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            stop_requested |= progress.started.elapsed() > Duration::from_secs(seconds);
            if stop_requested && progress.has_done_each() {
                progress.stop.store(true, Ordering::Relaxed);
            }
            match commands.recv_timeout(Duration::from_secs(1)) {
                Ok(line) if line.contains("memory") => {
                    channel.send(
                        &super::memory().map_or_else(|w| json!({ "failed": w }), |k| json!({ "memory": k })),
                    );
                }
                Ok(_) | Err(RecvTimeoutError::Disconnected) => stop_requested = true,
                Err(RecvTimeoutError::Timeout) => {}
            }
            progress.report();
        }
    });
    if let Some(failure) = first_failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(failure);
    }

    let total = verify(&mut raw, &folders)?;
    let listed: Vec<Value> = folders
        .iter()
        .flat_map(|folder| {
            let name = folder.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            folder.files.iter().map(move |(file, (seed, len))| json!([format!("{name}/{file}"), seed, len]))
        })
        .collect();
    unmount(MOUNT_POINT, UnmountFlags::empty()).map_err(|e| format!("unmount: {e}"))?;
    disk.sync_all().map_err(|e| format!("flush: {e}"))?;
    for chunk in listed.chunks(16) {
        channel.send(&json!({ "files": chunk }));
    }
    Ok(
        json!({ "did": progress.to_json(), "first": FIRST_RAW_BLOCK, "blocks": blocks_per_thread * threads, "sum": format!("{total:016x}"), "files": listed.len() }),
    )
}

/// Verifies everything once more, the file system after a new mount. Returns the checksum of all blocks.
fn verify(raw: &mut [Blocks<'_>], folders: &[Folder<'_>]) -> Result<u64, Failure> {
    let mut total = 0;
    for blocks in raw {
        total = blocks.verify(total)?;
    }
    unmount(MOUNT_POINT, UnmountFlags::empty()).map_err(|e| format!("unmount: {e}"))?;
    attach()?;
    folders.iter().try_for_each(Folder::verify)?;
    Ok(total)
}

/// Makes a file system with a journal at the start of the disk, and mounts it.
fn make_file_system() -> Result<(), Failure> {
    let size = format!("{FILE_SYSTEM_MIB}M");
    let made = Command::new("/bin/mke2fs").args(["-q", "-F", "-t", "ext4", DISK, &size]).output();
    let made = made.map_err(|e| format!("mke2fs: {e}"))?;
    if !made.status.success() {
        return Err(format!("mke2fs: {}: {}", made.status, String::from_utf8_lossy(&made.stderr)));
    }
    fs::create_dir_all(MOUNT_POINT).map_err(|e| format!("{MOUNT_POINT}: {e}"))?;
    attach()
}

fn attach() -> Result<(), Failure> {
    let _: File = File::open(DISK).map_err(|e| format!("{DISK}: {e}"))?;
    mount(DISK, MOUNT_POINT, "ext4", MountFlags::empty(), None).map_err(|e| format!("mount: {e}"))
}
