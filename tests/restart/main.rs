//! `serve --restart hold`, natively: a daemon is killed at any moment, the next knows what is so, and says unknown where
//! nobody can know. An io_uring cannot be passed on, so memory is mapped anew here; tests/machine shows the rest.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod hostile;
#[path = "../common/keeper.rs"]
mod keeper;
mod storm;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use keeper::Keeper;
use passgate::client::{AddMemory, Adopted, Answer, Channel, Client, Outcome, PageState, State};
use passgate_bindings::{Gpa, PAGE, PageRange};
use rustix::fs::{MemfdFlags, SealFlags};

const SOFT: [&str; 7] = ["--iommu", "soft", "--device", "soft:0", "--allow-dma", "--restart", "hold"];
const GPA: u64 = 0x10_0000;
const PAGES: u64 = 64;
/// Longer than anything takes here, also where much else runs: whoever waits in vain fails after that.
const LONG: Duration = Duration::from_secs(60);
/// The deadline of a conversion that is to be granted, in milliseconds: no machine is that slow.
const PATIENT_MS: u32 = 20_000;

fn service(more: &[&str]) -> Keeper {
    Keeper::new(Path::new(env!("CARGO_BIN_EXE_passgate")), &[&SOFT, more].concat())
}

fn memory(pages: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("restart", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, pages * PAGE).unwrap();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    fd
}

fn page(page: u64) -> PageRange<Gpa> {
    PageRange::new(GPA + page * PAGE, PAGE).unwrap()
}

/// A client with `PAGES` pages of memory, all shared.
fn join(service: &Keeper, memory: &OwnedFd) -> (Client, Channel) {
    let mut client = service.client();
    client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[memory]).unwrap();
    let channel = client.open_channel().unwrap();
    (client, channel)
}

fn begin(channel: &mut Channel, at: u64, to: PageState) -> u64 {
    match channel.begin(page(at), to, Some(PATIENT_MS)).unwrap() {
        Answer::Granted { invalidation } => invalidation,
        other => panic!("page {at} is not granted: {other:?}"),
    }
}

fn convert(channel: &mut Channel, at: u64, to: PageState) {
    let invalidation = begin(channel, at, to);
    channel.end(invalidation, Outcome::Committed).unwrap();
}

/// Whether DMA reaches a page.
fn reaches(client: &mut Client, at: u64) -> bool {
    client.dma_read("soft:0", GPA + at * PAGE, 4).is_ok()
}

/// Whether it does once the maps that are under way are made.
fn comes_to_reach(client: &mut Client, at: u64) -> bool {
    let until = Instant::now() + LONG;
    while !reaches(client, at) {
        if Instant::now() > until {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

/// Connects to a daemon that has just been started, and adopts.
fn adopt(service: &Keeper) -> (Client, Channel, Adopted) {
    let mut client = service.client();
    let adopted = client.adopt().unwrap();
    let channel = client.open_channel().unwrap();
    (client, channel, adopted)
}

/// Until what is to be mapped of a resumed region is, or is about to be.
fn settled(client: &mut Client, shared: u64) {
    let until = Instant::now() + LONG;
    while client.status().unwrap().pinned != shared * PAGE {
        assert!(Instant::now() < until, "{:?}", client.status());
        std::thread::yield_now();
    }
}

#[test]
fn a_killed_daemon_is_followed_by_one_that_knows_what_it_knew() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (client, mut channel) = join(&service, &memory);
    convert(&mut channel, 1, PageState::Private);
    convert(&mut channel, 2, PageState::Hole);
    let lost = begin(&mut channel, 3, PageState::Private);
    let unknown = begin(&mut channel, 4, PageState::Private);
    channel.end(unknown, Outcome::Unknown { errno: 5, offset: 0 }).unwrap();
    service.kill();
    drop((client, channel));
    service.start();

    let mut other = service.client();
    let status = other.status().unwrap();
    assert_eq!(status.regions.len(), 1, "it is there before anybody adopts it");
    let (mut client, mut channel, adopted) = adopt(&service);
    let [region] = &adopted.regions[..] else { panic!("{adopted:?}") };
    assert_eq!((region.gpa, region.length, region.offset, region.writable), (GPA, PAGES * PAGE, 0, true));
    let bytes = [region.shared, region.private, region.hole, region.unknown].map(|bytes| bytes / PAGE);
    assert_eq!(bytes, [PAGES - 4, 1, 1, 2]);
    let [unended] = adopted.unended[..] else { panic!("{adopted:?}") };
    assert_eq!((unended.invalidation, unended.gpa, unended.length), (lost, GPA + 3 * PAGE, PAGE));
    assert!(other.adopt().is_err(), "it is taken");

    settled(&mut client, PAGES - 4);
    for at in 0..PAGES {
        match (1..=4).contains(&at) {
            true => assert!(!reaches(&mut client, at), "page {at}"),
            false => assert!(comes_to_reach(&mut client, at), "page {at}"),
        }
    }
    // The owner says what it could not be asked for; what it could not say before, it cannot now.
    let message = client.release(unknown, State::Shared).unwrap_err().to_string();
    assert!(message.contains("may not release its own quarantine"), "{message}");
    assert_eq!(client.release(lost, State::Shared).unwrap(), PAGE);
    settled(&mut client, PAGES - 3);
    assert!(comes_to_reach(&mut client, 3));
    convert(&mut channel, 1, PageState::Shared);
    let next = begin(&mut channel, 5, PageState::Private);
    assert!(next > unknown, "no invalidation has the number of an earlier one");
    assert!(!reaches(&mut client, 5));
    let region = region.region;
    channel.end(next, Outcome::NotCommitted).unwrap();
    client.remove_memory(region).unwrap();
    let kept = service.names();
    assert!(
        kept.iter().any(|name| name.starts_with("passgate.memory.")),
        "it has a page in quarantine: {kept:?}"
    );
}

#[test]
fn an_open_conversion_is_settled_after_a_second_restart_and_one_of_a_dead_client_never() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (client, mut channel) = join(&service, &memory);
    // Another client shows the same memory, and dies between begin and end.
    let mut stranger = service.client();
    let alias = GPA + 2 * PAGES * PAGE;
    stranger.add_memory(&AddMemory::shared(alias, PAGES * PAGE), &[&memory]).unwrap();
    let mut theirs = stranger.open_channel().unwrap();
    let at = PageRange::new(alias + 5 * PAGE, PAGE).unwrap();
    let Answer::Granted { invalidation: theirs_id } =
        theirs.begin(at, PageState::Private, Some(PATIENT_MS)).unwrap()
    else {
        panic!("nothing holds the page");
    };
    drop((stranger, theirs));
    let mut person = service.client();
    let until = Instant::now() + LONG;
    while person.status().unwrap().regions.len() > 1 {
        assert!(Instant::now() < until, "{:?}", person.status());
        std::thread::yield_now();
    }
    let lost = begin(&mut channel, 3, PageState::Private);
    for _ in 0..2 {
        service.kill();
        service.start();
    }
    drop((client, channel, person));
    let (mut client, _channel, adopted) = adopt(&service);
    let unended: Vec<u64> = adopted.unended.iter().map(|one| one.invalidation).collect();
    assert_eq!(unended, [lost]);
    let message = client.release(theirs_id, State::Shared).unwrap_err().to_string();
    assert!(message.contains("may not release its own quarantine"), "{message}");
    assert_eq!(client.release(lost, State::Private).unwrap(), PAGE);
    // An operator may: it is somebody else's word.
    assert_eq!(service.client().release(theirs_id, State::Shared).unwrap(), PAGE);
}

#[test]
fn asked_to_end_it_leaves_everything_to_the_next() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (_client, mut channel) = join(&service, &memory);
    convert(&mut channel, 7, PageState::Private);
    assert!(service.terminate().success());
    assert!(service.path.exists(), "who connects meanwhile waits");
    let waiting = service.client();
    service.start();
    let adopted = { waiting }.adopt().unwrap();
    assert_eq!((adopted.regions[0].private, adopted.regions[0].unknown), (PAGE, 0));
}

#[test]
fn memory_that_nobody_comes_back_for_is_closed() {
    let (mut service, memory) = (service(&["--adopt-within", "0"]), memory(PAGES));
    service.start();
    let (client, channel) = join(&service, &memory);
    service.kill();
    drop((client, channel));
    service.start();
    let mut client = service.client();
    let until = Instant::now() + LONG;
    while !client.status().unwrap().regions.is_empty() {
        assert!(Instant::now() < until, "{:?}", client.status());
        std::thread::yield_now();
    }
    let message = client.adopt().unwrap_err().to_string();
    assert!(message.contains("there is no memory to adopt"), "{message}");
    service.says("nobody has adopted the memory");
    // The manager hears it after the client does.
    let until = Instant::now() + LONG;
    while service.names() != ["passgate.ledger", "passgate.socket"] {
        assert!(Instant::now() < until, "{:?}", service.names());
        std::thread::yield_now();
    }
    // Sealing says that nothing pins or maps it.
    let until = Instant::now() + LONG;
    while rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE).is_err() {
        assert!(Instant::now() < until, "something has it yet");
        std::thread::yield_now();
    }
}

#[test]
fn memory_is_closed_when_its_time_is_up_though_nobody_asks() {
    let (mut service, memory) = (service(&["--adopt-within", "1"]), memory(PAGES));
    service.start();
    let (client, channel) = join(&service, &memory);
    service.kill();
    drop((client, channel));
    assert!(service.names().iter().any(|name| name.starts_with("passgate.memory.")), "{:?}", service.names());
    service.start();
    // Nobody connects from here on: time alone wakes the daemon.
    let until = Instant::now() + LONG;
    while service.names() != ["passgate.ledger", "passgate.socket"] {
        assert!(Instant::now() < until, "{:?}", service.names());
        std::thread::sleep(Duration::from_millis(10));
    }
    // Sealing says that nothing pins or maps the memory.
    while rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE).is_err() {
        assert!(Instant::now() < until, "something has it yet");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn to_stop_is_to_let_go_of_what_was_held() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (_client, _channel) = join(&service, &memory);
    service.kill();
    *service.arguments.last_mut().unwrap() = "stop".to_owned();
    // The socket is dropped with the rest, and made anew.
    service.start();
    assert!(service.names().is_empty(), "{:?}", service.names());
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
    let (mut first, names) = (None, service.names());
    for restart in 0..20 {
        service.kill();
        service.start();
        last = service.client();
        assert_eq!(last.adopt().unwrap().regions.len(), 1);
        settled(&mut last, PAGES);
        let first = first.get_or_insert_with(|| open_files(&service));
        // The word to the manager may be on its way yet.
        let until = Instant::now() + LONG;
        while open_files(&service).len() > first.len() {
            assert!(Instant::now() < until, "restart {restart}: {first:?}, now {:?}", open_files(&service));
            std::thread::yield_now();
        }
        assert_eq!(service.names(), names);
    }
    drop(last);
}

/// What the daemon has open, by what the kernel calls it.
fn open_files(service: &Keeper) -> Vec<String> {
    let directory = format!("/proc/{}/fd", service.pid().as_raw_nonzero());
    let link = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_link(entry.ok()?.path()).ok();
    let kind =
        |link: std::path::PathBuf| link.to_string_lossy().split(':').next().unwrap_or_default().to_owned();
    let mut open: Vec<_> = std::fs::read_dir(directory).unwrap().filter_map(link).map(kind).collect();
    open.sort();
    open
}

/// A tebibyte of private pages with some thousand shared ones: the next daemon answers at once.
#[test]
fn a_tebibyte_is_taken_over_at_once() {
    const LENGTH: u64 = 1 << 40;
    const SHARED: u64 = 4000;
    let (mut service, memory) = (service(&[]), memory(LENGTH / PAGE));
    service.start();
    let mut client = service.client();
    let region = AddMemory { initial: State::Private, ..AddMemory::shared(GPA, LENGTH) };
    client.add_memory(&region, &[&memory]).unwrap();
    let mut channel = client.open_channel().unwrap();
    for nth in 0..SHARED {
        // Scattered: no two in one leaf of the ledger.
        convert(&mut channel, nth * (LENGTH / PAGE / SHARED), PageState::Shared);
    }
    settled(&mut client, SHARED);
    service.kill();
    drop((client, channel));
    let begun = Instant::now();
    service.spawn();
    let mut client = service.client();
    let status = client.status().unwrap();
    // Its own time: it is not to blame for what else the machine does.
    let (took, worked) = (begun.elapsed(), processor_time(&service));
    service.is_told("READY=1");
    assert_eq!(
        (status.regions[0].shared, status.regions[0].private),
        (SHARED * PAGE, LENGTH - SHARED * PAGE)
    );
    settled(&mut client, SHARED);
    eprintln!(
        "1 TiB with {SHARED} shared pages: Status answered {took:?} after the process was started, {worked:?} of its own"
    );
    assert!(worked < Duration::from_millis(if cfg!(debug_assertions) { 1000 } else { 100 }), "{worked:?}");
    assert!(took < Duration::from_secs(10), "{took:?}: what does it wait for?");
}

/// How long the daemon has been on a processor.
fn processor_time(service: &Keeper) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", service.pid().as_raw_nonzero())).unwrap();
    // The name in parentheses may hold anything; from its end on, user and system time are the 12th and 13th.
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_secs(ticks) / u32::try_from(rustix::param::clock_ticks_per_second()).unwrap()
}

/// A small generator, so that a failure can be played again.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}
