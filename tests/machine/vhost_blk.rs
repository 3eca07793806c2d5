//! The drive as a stock VMM's guest has it: QEMU is the front-end, Linux writes and verifies, and what it has written is
//! then read through the kernel's own driver.
//!
//! `PASSGATE_SOAK` is for how many seconds each guest works (12), `PASSGATE_BLK_KILLS` how often the back-end is killed (10),
//! `PASSGATE_HOTPLUGS` how often memory is added to the guest and removed (1).

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use passgate::client::{Answer, Client, Outcome, PageState};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};
use serde_json::{Value, json};

use super::rig::UNHURRIED;
use crate::daemon::{LONG, until};
use crate::keeper::Keeper;
use crate::nested::back_end::{BackEnd, PASSGATE, Which};
use crate::nested::disk::Disk;
use crate::nested::guest::{Guest, RESERVED};
use crate::nested::pattern::Numbers;
use crate::nested::{drive, missing};

/// Virtqueues, each with its own queue of the drive: the guest has two processors.
const QUEUES: u32 = 2;

/// How long a guest may be without any progress before it has come to a stop.
const STOPPED: Duration = Duration::from_secs(180);

/// Pages of one conversion.
const LONGEST: u64 = 64;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|set| set.parse().ok()).unwrap_or(default)
}

fn soak() -> u64 {
    setting("PASSGATE_SOAK", 12)
}

/// How often memory is added and removed.
fn hotplugs() -> u64 {
    setting("PASSGATE_HOTPLUGS", 1)
}

/// Why passgate cannot serve a guest here.
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

/// Has the guest work while this happens, and for [`soak`] at least. It is told to stop, because whoever waits for something
/// else of it would miss that it has stopped by itself.
fn soaks_beside(guest: &mut Guest, happens: impl FnOnce(&mut Guest)) {
    let begun = Instant::now();
    guest.tell(&json!({ "do": "soak", "seconds": 3600 }));
    happens(guest);
    std::thread::sleep(Duration::from_secs(soak()).saturating_sub(begun.elapsed()));
    guest.tell(&json!({ "do": "stop" }));
}

/// What the guest found on its disk at the end, once it has stopped by itself.
fn result(guest: &mut Guest, listed: &mut Vec<Value>) -> Value {
    let (mut since, mut before) = (Instant::now(), [0; 3]);
    loop {
        let left = STOPPED.checked_sub(since.elapsed()).expect("the guest does not come to an end");
        let Some(mut said) = guest.next(left) else { continue };
        let done = ["raw", "files", "verified"].map(|kind| said["progress"][kind].as_u64().unwrap_or(0));
        if done > before || said["files"].is_array() {
            (since, before) = (Instant::now(), done.max(before));
        }
        if let Some(files) = said["files"].as_array_mut() {
            listed.append(files);
        } else if said["soak"].is_object() {
            eprintln!("the guest: {}", said["soak"]);
            return said["soak"].take();
        }
    }
}

/// Reads everything through the kernel's driver; the blocks first, so that nothing is written by the mount.
fn judge(soaked: &Value, listed: &[Value]) -> Disk {
    assert!(soaked["did"]["raw"].as_u64().unwrap() > 0 && soaked["did"]["files"].as_u64().unwrap() > 0);
    assert_eq!(soaked["files"].as_u64().unwrap(), listed.len() as u64);
    let disk = Disk::take(&drive());
    assert_eq!(disk.sum(soaked), soaked["sum"], "the blocks are not what the guest has written");
    disk.files(listed);
    disk
}

/// The rig itself, by QEMU's own back-end: what the others rest on, and that the judge sees one changed block.
pub fn stock_back_end() {
    let mut back_end = BackEnd::start(Which::Stock { thread: false }, &drive(), QUEUES);
    let mut guest = Guest::boot(&back_end.socket(), QUEUES);
    soaks_beside(&mut guest, |guest| {
        for _ in 0..hotplugs() {
            guest.add_memory("dimm1");
            guest.remove_memory("dimm1");
        }
    });
    let mut listed = Vec::new();
    let soaked = result(&mut guest, &mut listed);
    guest.off();
    back_end.end();
    let disk = judge(&soaked, &listed);
    disk.spoil(soaked["first"].as_u64().unwrap() + 3);
    assert_ne!(disk.sum(&soaked), soaked["sum"], "the judge does not see a spoilt block");
}

/// While the guest works, memory comes and goes and a control connection converts pages beside those in use.
pub fn works_while_memory_changes(iommu: &str) {
    let mut back_end = passgate(iommu);
    let mut guest = Guest::boot(&back_end.socket(), QUEUES);
    let (memory, control) = (guest.memory(), Client::connect(back_end.control()).unwrap());
    let (stop, converted) = (AtomicBool::new(false), AtomicU64::new(0));
    guest.tell(&json!({ "do": "soak", "seconds": 3600 }));
    let (mut listed, mut rounds) = (Vec::new(), 0u64);
    let soaked = std::thread::scope(|scope| {
        let converting = scope.spawn(|| convert(control, &memory, &stop, &converted));
        // Whatever fails here must not leave the other thread converting.
        let guard = Stops(&stop);
        let begun = Instant::now();
        while rounds < hotplugs() || begun.elapsed() < Duration::from_secs(soak()) {
            if rounds < hotplugs() {
                guest.add_memory("dimm1");
                std::thread::sleep(Duration::from_millis(500)); // the guest allocates there meanwhile
                guest.remove_memory("dimm1");
                rounds += 1;
            } else {
                std::thread::sleep(Duration::from_millis(500));
            }
        }
        guest.tell(&json!({ "do": "stop" }));
        let soaked = result(&mut guest, &mut listed);
        drop(guard);
        converting.join().unwrap();
        soaked
    });
    guest.off();
    let mut control = Client::connect(back_end.control()).unwrap();
    assert!(until(LONG, || control.status().unwrap().quarantine.is_empty()), "{}", back_end.said());
    assert_eq!(control.status().unwrap().totals.refused, 0);
    back_end.end();
    let conversions = converted.into_inner();
    eprintln!("{conversions} conversions, {rounds} times memory added and removed");
    assert!(conversions > 0);
    judge(&soaked, &listed);
}

/// A guest that takes no device without `VIRTIO_F_ACCESS_PLATFORM` has it, and its disk is what it is for others.
pub fn with_the_platform_feature(iommu: &str) {
    let mut back_end = passgate(iommu);
    let mut guest = Guest::boot_with(&back_end.socket(), QUEUES, ",disable-legacy=on,iommu_platform=on");
    let features = guest.ready["disk"]["features"].as_str().unwrap();
    assert_eq!(features.as_bytes().get(33), Some(&b'1'), "it was not negotiated: {features}");
    soaks_beside(&mut guest, |guest| {
        guest.add_memory("dimm1");
        guest.remove_memory("dimm1");
    });
    let mut listed = Vec::new();
    let soaked = result(&mut guest, &mut listed);
    guest.off();
    back_end.end();
    judge(&soaked, &listed);
}

/// Stops the converting when dropped.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Converts parts of the reserved memory at random, there and back, and really takes the pages away in between.
fn convert(mut control: Client, memory: &GuestFile, stop: &AtomicBool, converted: &AtomicU64) {
    let mut channel = control.open_channel().unwrap();
    let mut numbers = Numbers::new(7);
    let (from, len) = RESERVED;
    while !stop.load(Ordering::Relaxed) {
        let pages = 1 + numbers.below(LONGEST);
        let first = from / PAGE + numbers.below(len / PAGE - pages);
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
        // Two processors are all there are, and the guest has its work to do on them.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Killed again and again, at any point between a request and its answer, and started again: the guest notices nothing.
pub fn killed(iommu: &str) {
    let mut back_end = passgate(iommu);
    let mut guest = Guest::boot(&back_end.socket(), QUEUES);
    guest.tell(&json!({ "do": "soak", "seconds": 3600, "threads": 4 }));
    let mut numbers = Numbers::new(u64::from(std::process::id()));
    let kills = setting("PASSGATE_BLK_KILLS", 10);
    for nth in 0..kills {
        // It must get somewhere between two kills, or this tests nothing.
        let before = progress(&mut guest, 0);
        progress(&mut guest, before);
        let begun = Instant::now();
        std::thread::sleep(Duration::from_micros(numbers.below(400_000))); // the point of the kill is the random thing
        back_end.kill();
        let killed = begun.elapsed();
        back_end.restart();
        eprintln!(
            "kill {nth}, after {before}: {killed:?} after progress, started again at {:?}",
            begun.elapsed()
        );
    }
    let before = progress(&mut guest, 0);
    progress(&mut guest, before);
    guest.tell(&json!({ "do": "stop" }));
    let mut listed = Vec::new();
    let soaked = result(&mut guest, &mut listed);
    guest.off();
    back_end.end();
    assert_eq!(u64::from(back_end.starts), kills + 1);
    judge(&soaked, &listed);
}

/// Killed, and asked to end, by a service manager that keeps what `--restart hold` has kept: the guest's memory stays mapped
/// for the drive, and the next daemon has it as the same region.
pub fn restarted(iommu: &str) {
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("disk");
    let (disk, drive, queues) = (socket.to_str().unwrap(), drive(), QUEUES.to_string());
    let arguments = ["--socket-path", disk, "--device", &drive, "--num-queues", &queues, "--iommu", iommu];
    let arguments = [&arguments[..], &["--restart", "hold"]].concat();
    let mut service = Keeper::of(Path::new(PASSGATE), ["vhost-user-blk", "--control-path"], &arguments);
    service.start();
    let mut guest = Guest::boot(&socket, QUEUES);
    guest.tell(&json!({ "do": "soak", "seconds": 3600, "threads": 4 }));
    let works = |guest: &mut Guest| {
        let before = progress(guest, 0);
        progress(guest, before);
    };
    works(&mut guest);
    for killed in [true, true, false, true] {
        let had = regions(&service);
        if killed {
            service.kill();
        } else {
            assert!(service.terminate().success());
        }
        eprintln!("killed: {killed}; ready after {:?}", service.start());
        works(&mut guest);
        if killed {
            assert_eq!(regions(&service), had, "what was mapped is mapped anew");
        }
    }
    guest.tell(&json!({ "do": "stop" }));
    let mut listed = Vec::new();
    let soaked = result(&mut guest, &mut listed);
    guest.off();
    assert!(service.terminate().success());
    service.forget("");
    drop(service);
    judge(&soaked, &listed);
}

/// The numbers of the regions, and how many bytes are mapped.
fn regions(service: &Keeper) -> (Vec<u32>, u64) {
    let status = service.client().status().unwrap();
    (status.regions.iter().map(|region| region.region).collect(), status.pinned)
}

/// The VMM is killed while its guest writes: its memory is taken from the drive, and the next guest is served as if there
/// had been none.
pub fn front_end_killed(iommu: &str) {
    let mut back_end = passgate(iommu);
    let mut files = None;
    for _ in 0..2 {
        let mut guest = Guest::boot(&back_end.socket(), QUEUES);
        guest.tell(&json!({ "do": "soak", "seconds": 3600, "threads": 4 }));
        let before = progress(&mut guest, 0);
        progress(&mut guest, before);
        drop(guest);
        let mut control = Client::connect(back_end.control()).unwrap();
        let left = until(LONG, || control.status().unwrap().disk.is_some_and(|disk| !disk.connected));
        assert!(left, "{}", back_end.said());
        // One unmap takes all of it, and on a slow machine longer than a close may: then it is quarantined until that returns.
        let mut remains = || {
            let status = control.status().unwrap();
            (status.regions.len(), status.quarantine.len())
        };
        assert!(until(LONG, || remains() == (0, 0)), "{:?}: {}", remains(), back_end.said());
        // What the first one has left is what the daemon itself has open.
        let files = files.get_or_insert_with(|| back_end.open_files());
        until(LONG, || back_end.open_files() == *files);
        assert_eq!(back_end.open_files(), *files);
    }
    let mut guest = Guest::boot(&back_end.socket(), QUEUES);
    guest.tell(&json!({ "do": "soak", "seconds": 5 }));
    let mut listed = Vec::new();
    let soaked = result(&mut guest, &mut listed);
    guest.off();
    back_end.end();
    judge(&soaked, &listed);
}

/// Waits until the guest has done more than this; how much it has done.
fn progress(guest: &mut Guest, than: u64) -> u64 {
    loop {
        let said = guest.hear("progress", STOPPED);
        let done = said["raw"].as_u64().unwrap() + said["files"].as_u64().unwrap();
        if done > than {
            return done;
        }
    }
}
