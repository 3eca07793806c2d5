//! `serve --restart hold`, natively: a daemon is killed at any time; the next one has the same state, and reports pages as
//! unknown whose conversion was open. An io_uring cannot be handed over, so the software device's memory is mapped anew here;
//! tests/machine tests mappings that stay.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod hostile;
#[path = "../common/service_manager.rs"]
mod service_manager;
mod storm;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use passgate_bindings::{Gpa, PAGE, PageRange};
use passgate_client::{AddMemory, Adopted, Answer, Channel, Client, Outcome, PageState};
use rustix::fs::{MemfdFlags, SealFlags};
use service_manager::ServiceManager;

const SOFT_DEVICE_ARGS: [&str; 7] =
    ["--iommu", "soft", "--device", "soft:0", "--allow-dma", "--restart", "hold"];
const GPA: u64 = 0x10_0000;
const PAGES: u64 = 64;
/// The longest time that a test waits, chosen so that a busy machine does not reach it.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The deadline, in milliseconds, of a conversion that must be granted also on a busy machine.
const GRANT_DEADLINE_MS: u32 = 20_000;

/// Returns a service manager of a daemon with a software device, not started yet.
fn service(options: &[&str]) -> ServiceManager {
    ServiceManager::new(Path::new(env!("CARGO_BIN_EXE_passgate")), &[&SOFT_DEVICE_ARGS, options].concat())
}

/// Returns a memfd that this process does not map, sealed against shrinking.
fn memory(pages: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("restart", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, pages * PAGE).unwrap();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    fd
}

fn page(page: u64) -> PageRange<Gpa> {
    PageRange::new(GPA + page * PAGE, PAGE).unwrap()
}

/// Returns a client with `PAGES` pages of memory, all shared, and its channel.
fn client_with_memory(service: &ServiceManager, memory: &OwnedFd) -> (Client, Channel) {
    let mut client = service.client();
    client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[memory]).unwrap();
    let channel = client.open_channel().unwrap();
    (client, channel)
}

fn begin(channel: &mut Channel, at: u64, to: PageState) -> u64 {
    match channel.begin(page(at), to, Some(GRANT_DEADLINE_MS)).unwrap() {
        Answer::Granted { invalidation } => invalidation,
        other => panic!("page {at} is not granted: {other:?}"),
    }
}

fn convert(channel: &mut Channel, at: u64, to: PageState) {
    let invalidation = begin(channel, at, to);
    channel.end(invalidation, Outcome::Committed).unwrap();
}

/// Returns true if DMA reaches a page.
fn reaches(client: &mut Client, at: u64) -> bool {
    client.dma_read("soft:0", GPA + at * PAGE, 4).is_ok()
}

/// Returns true if DMA reaches a page, at the latest when the maps in progress are done.
fn becomes_reachable(client: &mut Client, at: u64) -> bool {
    let deadline = Instant::now() + TIMEOUT;
    while !reaches(client, at) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

/// Connects to a daemon that has just been started, and adopts its memory.
fn adopt(service: &ServiceManager) -> (Client, Channel, Adopted) {
    let mut client = service.client();
    let adopted = client.adopt().unwrap();
    let channel = client.open_channel().unwrap();
    (client, channel, adopted)
}

/// Waits until `shared` pages of a resumed region are mapped, or their maps are in progress.
fn wait_for_mapped_pages(client: &mut Client, shared: u64) {
    let deadline = Instant::now() + TIMEOUT;
    while client.status().unwrap().pinned != shared * PAGE {
        assert!(Instant::now() < deadline, "{:?}", client.status());
        std::thread::yield_now();
    }
}

#[test]
fn next_daemon_restores_state_of_killed_one() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (client, mut channel) = client_with_memory(&service, &memory);
    convert(&mut channel, 1, PageState::Private);
    convert(&mut channel, 2, PageState::Hole);
    let unended_id = begin(&mut channel, 3, PageState::Private);
    let unknown_id = begin(&mut channel, 4, PageState::Private);
    channel.end(unknown_id, Outcome::Unknown { errno: 5, offset: 0 }).unwrap();
    service.kill();
    drop((client, channel));
    service.start();

    let mut other = service.client();
    let status = other.status().unwrap();
    assert_eq!(status.regions.len(), 1, "the region must exist before it is adopted");
    let (mut client, mut channel, adopted) = adopt(&service);
    let [region] = &adopted.regions[..] else { panic!("{adopted:?}") };
    assert_eq!((region.gpa, region.length, region.offset, region.writable), (GPA, PAGES * PAGE, 0, true));
    let bytes = [region.shared, region.private, region.hole, region.unknown].map(|bytes| bytes / PAGE);
    assert_eq!(bytes, [PAGES - 4, 1, 1, 2]);
    let [unended] = adopted.unended[..] else { panic!("{adopted:?}") };
    assert_eq!((unended.invalidation, unended.gpa, unended.length), (unended_id, GPA + 3 * PAGE, PAGE));
    assert!(other.adopt().is_err(), "the memory is adopted already");

    wait_for_mapped_pages(&mut client, PAGES - 4);
    for at in 0..PAGES {
        match (1..=4).contains(&at) {
            true => assert!(!reaches(&mut client, at), "page {at}"),
            false => assert!(becomes_reachable(&mut client, at), "page {at}"),
        }
    }
    // The owner may settle the conversion that was open; it may not release the one that it had ended as unknown.
    let message = client.release(unknown_id, PageState::Shared).unwrap_err().to_string();
    assert!(message.contains("may not release its own quarantine"), "{message}");
    assert_eq!(client.release(unended_id, PageState::Shared).unwrap(), PAGE);
    wait_for_mapped_pages(&mut client, PAGES - 3);
    assert!(becomes_reachable(&mut client, 3));
    convert(&mut channel, 1, PageState::Shared);
    let next_id = begin(&mut channel, 5, PageState::Private);
    assert!(next_id > unknown_id, "an invalidation id was used again");
    assert!(!reaches(&mut client, 5));
    let region = region.region;
    channel.end(next_id, Outcome::NotCommitted).unwrap();
    client.remove_memory(region).unwrap();
    let names = service.stored_names();
    assert!(
        names.iter().any(|name| name.starts_with("passgate.memory.")),
        "the memory must stay stored, because a page is in quarantine: {names:?}"
    );
}

#[test]
fn open_conversion_is_settled_after_second_restart_unless_client_died() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (client, mut channel) = client_with_memory(&service, &memory);
    // Another client adds the same memory, and dies between begin and end.
    let mut other_client = service.client();
    let alias = GPA + 2 * PAGES * PAGE;
    other_client.add_memory(&AddMemory::shared(alias, PAGES * PAGE), &[&memory]).unwrap();
    let mut other_channel = other_client.open_channel().unwrap();
    let at = PageRange::new(alias + 5 * PAGE, PAGE).unwrap();
    let Answer::Granted { invalidation: other_invalidation } =
        other_channel.begin(at, PageState::Private, Some(GRANT_DEADLINE_MS)).unwrap()
    else {
        panic!("not granted");
    };
    drop((other_client, other_channel));
    let mut operator = service.client();
    let deadline = Instant::now() + TIMEOUT;
    while operator.status().unwrap().regions.len() > 1 {
        assert!(Instant::now() < deadline, "{:?}", operator.status());
        std::thread::yield_now();
    }
    let unended_id = begin(&mut channel, 3, PageState::Private);
    for _ in 0..2 {
        service.kill();
        service.start();
    }
    drop((client, channel, operator));
    let (mut client, _channel, adopted) = adopt(&service);
    let unended: Vec<u64> = adopted.unended.iter().map(|one| one.invalidation).collect();
    assert_eq!(unended, [unended_id]);
    let message = client.release(other_invalidation, PageState::Shared).unwrap_err().to_string();
    assert!(message.contains("may not release its own quarantine"), "{message}");
    assert_eq!(client.release(unended_id, PageState::Private).unwrap(), PAGE);
    // An operator may release it.
    assert_eq!(service.client().release(other_invalidation, PageState::Shared).unwrap(), PAGE);
}

#[test]
fn terminated_daemon_hands_over_everything() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (_client, mut channel) = client_with_memory(&service, &memory);
    convert(&mut channel, 7, PageState::Private);
    assert!(service.terminate().success());
    assert!(service.path.exists(), "clients that connect before the next start must be able to wait");
    let waiting = service.client();
    service.start();
    let adopted = { waiting }.adopt().unwrap();
    assert_eq!((adopted.regions[0].private, adopted.regions[0].unknown), (PAGE, 0));
}

#[test]
fn unadopted_memory_is_closed() {
    let (mut service, memory) = (service(&["--adopt-within", "0"]), memory(PAGES));
    service.start();
    let (client, channel) = client_with_memory(&service, &memory);
    service.kill();
    drop((client, channel));
    service.start();
    let mut client = service.client();
    let deadline = Instant::now() + TIMEOUT;
    while !client.status().unwrap().regions.is_empty() {
        assert!(Instant::now() < deadline, "{:?}", client.status());
        std::thread::yield_now();
    }
    let message = client.adopt().unwrap_err().to_string();
    assert!(message.contains("there is no memory to adopt"), "{message}");
    service.wait_for_log("nobody has adopted the memory");
    // The manager is notified after the client is answered.
    let deadline = Instant::now() + TIMEOUT;
    while service.stored_names() != ["passgate.ledger", "passgate.socket"] {
        assert!(Instant::now() < deadline, "{:?}", service.stored_names());
        std::thread::yield_now();
    }
    // F_SEAL_WRITE succeeds once nothing pins or maps it.
    let deadline = Instant::now() + TIMEOUT;
    while rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE).is_err() {
        assert!(Instant::now() < deadline, "the memory is still pinned or mapped");
        std::thread::yield_now();
    }
}

#[test]
fn adoption_timeout_closes_memory_without_requests() {
    let (mut service, memory) = (service(&["--adopt-within", "1"]), memory(PAGES));
    service.start();
    let (client, channel) = client_with_memory(&service, &memory);
    service.kill();
    drop((client, channel));
    assert!(
        service.stored_names().iter().any(|name| name.starts_with("passgate.memory.")),
        "{:?}",
        service.stored_names()
    );
    service.start();
    // No client connects from here on: only its timer wakes the daemon.
    let deadline = Instant::now() + TIMEOUT;
    while service.stored_names() != ["passgate.ledger", "passgate.socket"] {
        assert!(Instant::now() < deadline, "{:?}", service.stored_names());
        std::thread::sleep(Duration::from_millis(10));
    }
    // F_SEAL_WRITE succeeds once nothing pins or maps the memory.
    while rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE).is_err() {
        assert!(Instant::now() < deadline, "the memory is still pinned or mapped");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn restart_stop_drops_stored_descriptors() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (_client, _channel) = client_with_memory(&service, &memory);
    service.kill();
    *service.arguments.last_mut().unwrap() = "stop".to_owned();
    // The stored socket is closed with the rest, and created anew.
    service.start();
    assert!(service.stored_names().is_empty(), "{:?}", service.stored_names());
    assert!(service.client().status().unwrap().regions.is_empty());
    assert!(service.terminate().success());
    assert!(!service.path.exists());
}

#[test]
fn twenty_restarts_leak_no_descriptor() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let mut last = service.client();
    last.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory]).unwrap();
    let (mut first, names) = (None, service.stored_names());
    for restart in 0..20 {
        service.kill();
        service.start();
        last = service.client();
        assert_eq!(last.adopt().unwrap().regions.len(), 1);
        wait_for_mapped_pages(&mut last, PAGES);
        let first = first.get_or_insert_with(|| open_files(&service));
        // A descriptor may still be on its way to the manager.
        let deadline = Instant::now() + TIMEOUT;
        while open_files(&service).len() > first.len() {
            assert!(
                Instant::now() < deadline,
                "restart {restart}: {first:?}, now {:?}",
                open_files(&service)
            );
            std::thread::yield_now();
        }
        assert_eq!(service.stored_names(), names);
    }
    drop(last);
}

/// Returns the kinds of the daemon's open files, from their /proc/PID/fd links, sorted.
fn open_files(service: &ServiceManager) -> Vec<String> {
    let directory = format!("/proc/{}/fd", service.pid().as_raw_nonzero());
    let link = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_link(entry.ok()?.path()).ok();
    let kind =
        |link: std::path::PathBuf| link.to_string_lossy().split(':').next().unwrap_or_default().to_owned();
    let mut kinds: Vec<_> = std::fs::read_dir(directory).unwrap().filter_map(link).map(kind).collect();
    kinds.sort();
    kinds
}

/// A tebibyte of private pages with four thousand shared ones: the next daemon must answer quickly.
#[test]
fn tebibyte_region_is_taken_over_quickly() {
    const LENGTH: u64 = 1 << 40;
    const SHARED: u64 = 4000;
    let (mut service, memory) = (service(&[]), memory(LENGTH / PAGE));
    service.start();
    let mut client = service.client();
    let region = AddMemory { initial: PageState::Private, ..AddMemory::shared(GPA, LENGTH) };
    client.add_memory(&region, &[&memory]).unwrap();
    let mut channel = client.open_channel().unwrap();
    for nth in 0..SHARED {
        // Scattered, so that no two are in one leaf of the ledger.
        convert(&mut channel, nth * (LENGTH / PAGE / SHARED), PageState::Shared);
    }
    wait_for_mapped_pages(&mut client, SHARED);
    service.kill();
    drop((client, channel));
    let started = Instant::now();
    service.spawn();
    let mut client = service.client();
    let status = client.status().unwrap();
    // The limit is on the daemon's processor time, which other load on the machine does not change.
    let (elapsed, cpu_time) = (started.elapsed(), processor_time(&service));
    service.wait_notified("READY=1");
    assert_eq!(
        (status.regions[0].shared, status.regions[0].private),
        (SHARED * PAGE, LENGTH - SHARED * PAGE)
    );
    wait_for_mapped_pages(&mut client, SHARED);
    eprintln!(
        "1 TiB with {SHARED} shared pages: Status answered {elapsed:?} after the process was started, {cpu_time:?} of its own"
    );
    assert!(
        cpu_time < Duration::from_millis(if cfg!(debug_assertions) { 1000 } else { 100 }),
        "{cpu_time:?}"
    );
    assert!(elapsed < Duration::from_secs(10), "{elapsed:?}: the daemon has waited");
}

/// Returns the processor time of the daemon.
fn processor_time(service: &ServiceManager) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", service.pid().as_raw_nonzero())).unwrap();
    // proc_pid_stat(5): the command name in parentheses may contain anything; utime and stime are the 12th and 13th field
    // after it.
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_secs(ticks) / u32::try_from(rustix::param::clock_ticks_per_second()).unwrap()
}

/// A pseudo-random number generator (xorshift64) with a fixed seed, so that a failure can be reproduced.
struct Random(u64);

impl Random {
    fn next_below(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}
