//! The drive as the disk of a stock VMM's guest: QEMU is the front-end, a Linux guest writes and verifies, and then the data is
//! read through the kernel's own driver.
//!
//! `PASSGATE_SOAK` sets the seconds that each guest works (12), `PASSGATE_BLK_KILLS` the number of kills of the back-end (10),
//! `PASSGATE_HOTPLUGS` the number of times that memory is added to the guest and removed (1).

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};
use passgate_client::{Answer, Client, Outcome, PageState};
use serde_json::{Value, json};

use super::rig::UNHURRIED;
use crate::daemon::{TIMEOUT, wait_until};
use crate::nested::back_end::{BackEnd, PASSGATE, Which};
use crate::nested::disk::Disk;
use crate::nested::guest::{Guest, RESERVED};
use crate::nested::pattern::Random;
use crate::nested::{drive, missing};
use crate::service_manager::ServiceManager;

/// The number of virtqueues, each with its own queue of the drive: the guest has two processors.
const QUEUES: u32 = 2;

/// The longest time that a guest may be without progress.
const STALL_TIMEOUT: Duration = Duration::from_secs(180);

/// The largest number of pages of one conversion.
const MAX_PAGES: u64 = 64;

/// Returns the number in an environment variable, or the default.
fn env_number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|set| set.parse().ok()).unwrap_or(default)
}

/// Returns the number of seconds that a guest works.
fn soak_seconds() -> u64 {
    env_number("PASSGATE_SOAK", 12)
}

/// Returns the number of times that memory is added and removed.
fn hotplugs() -> u64 {
    env_number("PASSGATE_HOTPLUGS", 1)
}

/// Returns why passgate cannot serve a guest here, if it cannot.
pub fn no_guest() -> Option<&'static str> {
    static HELP: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let help = std::process::Command::new(PASSGATE).args(["vhost-user-blk", "--help"]).output();
        help.is_ok_and(|help| help.status.success())
    });
    missing().or_else(|| (!*HELP).then_some("this passgate has no vhost-user-blk"))
}

fn passgate(iommu: &str) -> BackEnd {
    BackEnd::start(Which::Passgate(vec!["--iommu".into(), iommu.into()]), &drive(), QUEUES)
}

/// Lets the guest work while `action` runs, and for [`soak_seconds`] at least. It is told to stop: if it stopped by itself, its
/// result would be dropped by `action`, which waits for other messages.
fn soak_beside(guest: &mut Guest, action: impl FnOnce(&mut Guest)) {
    let started = Instant::now();
    guest.send(&json!({ "do": "soak", "seconds": 3600 }));
    action(guest);
    std::thread::sleep(Duration::from_secs(soak_seconds()).saturating_sub(started.elapsed()));
    guest.send(&json!({ "do": "stop" }));
}

/// Waits until the guest has stopped and verified; returns its result, and appends the files that it lists to `listed`.
fn result(guest: &mut Guest, listed: &mut Vec<Value>) -> Value {
    let (mut since, mut before) = (Instant::now(), [0; 3]);
    loop {
        let remaining = STALL_TIMEOUT.checked_sub(since.elapsed()).expect("the guest does not end its work");
        let Some(mut message) = guest.next_message(remaining) else { continue };
        let done = ["raw", "files", "verified"].map(|kind| message["progress"][kind].as_u64().unwrap_or(0));
        if done > before || message["files"].is_array() {
            (since, before) = (Instant::now(), done.max(before));
        }
        if let Some(files) = message["files"].as_array_mut() {
            listed.append(files);
        } else if message["soak"].is_object() {
            eprintln!("the guest: {}", message["soak"]);
            return message["soak"].take();
        }
    }
}

/// Verifies blocks and files through the kernel's driver; the blocks first, because the mount may write to the disk.
fn verify_on_host(soaked: &Value, listed: &[Value]) -> Disk {
    assert!(soaked["did"]["raw"].as_u64().unwrap() > 0 && soaked["did"]["files"].as_u64().unwrap() > 0);
    assert_eq!(soaked["files"].as_u64().unwrap(), listed.len() as u64);
    let disk = Disk::bind(&drive());
    assert_eq!(disk.checksum(soaked), soaked["sum"], "the blocks are not what the guest has written");
    disk.verify_files(listed);
    disk
}

/// The control of the other trials, with QEMU's own back-end; and the verification detects one changed block.
pub fn stock_back_end() {
    let mut back_end = BackEnd::start(Which::Stock { thread: false }, &drive(), QUEUES);
    let mut guest = Guest::boot(&back_end.socket(), QUEUES);
    soak_beside(&mut guest, |guest| {
        for _ in 0..hotplugs() {
            guest.add_memory("dimm1");
            guest.remove_memory("dimm1");
        }
    });
    let mut listed = Vec::new();
    let soaked = result(&mut guest, &mut listed);
    guest.off();
    back_end.end();
    let disk = verify_on_host(&soaked, &listed);
    disk.corrupt_block(soaked["first"].as_u64().unwrap() + 3);
    assert_ne!(disk.checksum(&soaked), soaked["sum"], "the verification does not detect a corrupt block");
}

/// While the guest works, memory is added and removed, and a control connection converts pages that the guest does not use.
pub fn hotplug_and_conversions(iommu: &str) {
    let mut back_end = passgate(iommu);
    let mut guest = Guest::boot(&back_end.socket(), QUEUES);
    let (memory, control) = (guest.memory(), Client::connect(back_end.control()).unwrap());
    let (stop, converted) = (AtomicBool::new(false), AtomicU64::new(0));
    guest.send(&json!({ "do": "soak", "seconds": 3600 }));
    let (mut listed, mut rounds) = (Vec::new(), 0u64);
    let soaked = std::thread::scope(|scope| {
        let converting = scope.spawn(|| convert(control, &memory, &stop, &converted));
        // If a check fails here, the other thread must stop converting.
        let guard = StopOnDrop(&stop);
        let started = Instant::now();
        while rounds < hotplugs() || started.elapsed() < Duration::from_secs(soak_seconds()) {
            if rounds < hotplugs() {
                guest.add_memory("dimm1");
                std::thread::sleep(Duration::from_millis(500)); // the guest allocates there meanwhile
                guest.remove_memory("dimm1");
                rounds += 1;
            } else {
                std::thread::sleep(Duration::from_millis(500));
            }
        }
        guest.send(&json!({ "do": "stop" }));
        let soaked = result(&mut guest, &mut listed);
        drop(guard);
        converting.join().unwrap();
        soaked
    });
    guest.off();
    let mut control = Client::connect(back_end.control()).unwrap();
    let empty = wait_until(TIMEOUT, || control.status().unwrap().quarantine.is_empty());
    assert!(empty, "{}", back_end.log_tail());
    assert_eq!(control.status().unwrap().totals.refused, 0);
    back_end.end();
    let conversions = converted.into_inner();
    eprintln!("{conversions} conversions, {rounds} times memory added and removed");
    assert!(conversions > 0);
    verify_on_host(&soaked, &listed);
}

/// A guest that requires `VIRTIO_F_ACCESS_PLATFORM` negotiates it, and its disk works.
pub fn with_platform_access(iommu: &str) {
    let mut back_end = passgate(iommu);
    let mut guest = Guest::boot_with(&back_end.socket(), QUEUES, ",disable-legacy=on,iommu_platform=on");
    let features = guest.ready["disk"]["features"].as_str().unwrap();
    assert_eq!(features.as_bytes().get(33), Some(&b'1'), "it was not negotiated: {features}");
    soak_beside(&mut guest, |guest| {
        guest.add_memory("dimm1");
        guest.remove_memory("dimm1");
    });
    let mut listed = Vec::new();
    let soaked = result(&mut guest, &mut listed);
    guest.off();
    back_end.end();
    verify_on_host(&soaked, &listed);
}

/// Stops the conversions when dropped.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Converts random ranges of the reserved memory to holes, punches them, and converts them back.
fn convert(mut control: Client, memory: &GuestFile, stop: &AtomicBool, converted: &AtomicU64) {
    let mut channel = control.open_channel().unwrap();
    let mut random = Random::new(7);
    let (from, len) = RESERVED;
    while !stop.load(Ordering::Relaxed) {
        let pages = 1 + random.below(MAX_PAGES);
        let first = from / PAGE + random.below(len / PAGE - pages);
        let range = PageRange::<Gpa>::new(first * PAGE, pages * PAGE).unwrap();
        for to in [PageState::Hole, PageState::Shared] {
            match channel.begin(range, to, UNHURRIED).unwrap() {
                Answer::Granted { invalidation } => {
                    if to == PageState::Hole {
                        memory.punch(first * PAGE, pages * PAGE).unwrap();
                    }
                    channel.end(invalidation, Outcome::Committed).unwrap();
                }
                other => panic!("{range:?} is not granted: {other:?}"),
            }
        }
        converted.fetch_add(1, Ordering::Relaxed);
        // Leave processor time to the guest.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The back-end is killed at random points between a request and its answer, and restarted: the guest sees no error.
pub fn back_end_killed(iommu: &str) {
    let mut back_end = passgate(iommu);
    let mut guest = Guest::boot(&back_end.socket(), QUEUES);
    guest.send(&json!({ "do": "soak", "seconds": 3600, "threads": 4 }));
    let mut random = Random::new(u64::from(std::process::id()));
    let kills = env_number("PASSGATE_BLK_KILLS", 10);
    for nth in 0..kills {
        // Without progress between two kills this would test nothing.
        let before = progress(&mut guest, 0);
        progress(&mut guest, before);
        let started = Instant::now();
        std::thread::sleep(Duration::from_micros(random.below(400_000))); // a random point of the guest's work
        back_end.kill();
        let killed = started.elapsed();
        back_end.restart();
        eprintln!(
            "kill {nth}, after {before}: {killed:?} after progress, started again at {:?}",
            started.elapsed()
        );
    }
    let before = progress(&mut guest, 0);
    progress(&mut guest, before);
    guest.send(&json!({ "do": "stop" }));
    let mut listed = Vec::new();
    let soaked = result(&mut guest, &mut listed);
    guest.off();
    back_end.end();
    assert_eq!(u64::from(back_end.starts), kills + 1);
    verify_on_host(&soaked, &listed);
}

/// With `--restart hold` under a service manager, the back-end is killed and terminated: the guest's memory stays mapped for the
/// drive, and the next daemon has it as the same region.
pub fn back_end_restarted(iommu: &str) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("disk");
    let (disk, drive, queues) = (socket.to_str().unwrap(), drive(), QUEUES.to_string());
    let arguments = ["--socket-path", disk, "--device", &drive, "--num-queues", &queues, "--iommu", iommu];
    let arguments = [&arguments[..], &["--restart", "hold"]].concat();
    let mut service =
        ServiceManager::with_command(Path::new(PASSGATE), ["vhost-user-blk", "--control-path"], &arguments);
    service.start();
    let mut guest = Guest::boot(&socket, QUEUES);
    guest.send(&json!({ "do": "soak", "seconds": 3600, "threads": 4 }));
    let assert_progress = |guest: &mut Guest| {
        let before = progress(guest, 0);
        progress(guest, before);
    };
    assert_progress(&mut guest);
    for killed in [true, true, false, true] {
        let regions_before = regions(&service);
        if killed {
            service.kill();
        } else {
            assert!(service.terminate().success());
        }
        eprintln!("killed: {killed}; ready after {:?}", service.start());
        assert_progress(&mut guest);
        if killed {
            assert_eq!(regions(&service), regions_before, "the regions have changed");
        }
    }
    guest.send(&json!({ "do": "stop" }));
    let mut listed = Vec::new();
    let soaked = result(&mut guest, &mut listed);
    guest.off();
    assert!(service.terminate().success());
    service.remove("");
    drop(service);
    verify_on_host(&soaked, &listed);
}

/// Returns the ids of the regions, and the number of mapped bytes.
fn regions(service: &ServiceManager) -> (Vec<u32>, u64) {
    let status = service.client().status().unwrap();
    (status.regions.iter().map(|region| region.region).collect(), status.pinned)
}

/// The VMM is killed while its guest writes: its memory is unmapped from the drive, and the next guest is served as the first
/// one was.
pub fn front_end_killed(iommu: &str) {
    let mut back_end = passgate(iommu);
    let mut files = None;
    for _ in 0..2 {
        let mut guest = Guest::boot(&back_end.socket(), QUEUES);
        guest.send(&json!({ "do": "soak", "seconds": 3600, "threads": 4 }));
        let before = progress(&mut guest, 0);
        progress(&mut guest, before);
        drop(guest);
        let mut control = Client::connect(back_end.control()).unwrap();
        let disconnected =
            wait_until(TIMEOUT, || control.status().unwrap().disk.is_some_and(|disk| !disk.connected));
        assert!(disconnected, "{}", back_end.log_tail());
        // On a slow machine a part of it may take longer than a close may be without progress: then it is quarantined until its unmap
        // returns.
        let mut remaining = || {
            let status = control.status().unwrap();
            (status.regions.len(), status.quarantine.len())
        };
        assert!(wait_until(TIMEOUT, || remaining() == (0, 0)), "{:?}: {}", remaining(), back_end.log_tail());
        // After the first guest the daemon has only its own files open.
        let files = files.get_or_insert_with(|| back_end.open_files());
        wait_until(TIMEOUT, || back_end.open_files() == *files);
        assert_eq!(back_end.open_files(), *files);
    }
    let mut guest = Guest::boot(&back_end.socket(), QUEUES);
    guest.send(&json!({ "do": "soak", "seconds": 5 }));
    let mut listed = Vec::new();
    let soaked = result(&mut guest, &mut listed);
    guest.off();
    back_end.end();
    verify_on_host(&soaked, &listed);
}

/// Waits until the guest has made more than `threshold` requests; returns their number.
fn progress(guest: &mut Guest, threshold: u64) -> u64 {
    loop {
        let message = guest.wait_for("progress", STALL_TIMEOUT);
        let done = message["raw"].as_u64().unwrap() + message["files"].as_u64().unwrap();
        if done > threshold {
            return done;
        }
    }
}
