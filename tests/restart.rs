//! `serve --restart hold`, natively: a daemon is killed at any moment, the next knows what is so, and says unknown where
//! nobody can know. An io_uring cannot be passed on, so memory is mapped anew here; tests/machine shows the rest.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

#[path = "common/keeper.rs"]
mod keeper;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keeper::Keeper;
use passgate::client::{AddMemory, Adopted, Answer, Channel, Client, Outcome, PageState, State};
use passgate_bindings::{Gpa, PAGE, PageRange};
use rustix::fs::{MemfdFlags, SealFlags};

const SOFT: [&str; 7] = ["--iommu", "soft", "--device", "soft:0", "--allow-dma", "--restart", "hold"];
const GPA: u64 = 0x10_0000;
const PAGES: u64 = 64;

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
    match channel.begin(page(at), to, None).unwrap() {
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

/// Connects to a daemon that has just been started, and adopts.
fn adopt(service: &Keeper) -> (Client, Channel, Adopted) {
    let mut client = service.client();
    let adopted = client.adopt().unwrap();
    let channel = client.open_channel().unwrap();
    (client, channel, adopted)
}

/// Until no map of a resumed region is under way.
fn settled(client: &mut Client, shared: u64) {
    let until = Instant::now() + Duration::from_secs(10);
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
        assert_eq!(reaches(&mut client, at), !(1..=4).contains(&at), "page {at}");
    }
    // The owner says what it could not be asked for; what it could not say before, it cannot now.
    let message = client.release(unknown, State::Shared).unwrap_err().to_string();
    assert!(message.contains("may not release its own quarantine"), "{message}");
    assert_eq!(client.release(lost, State::Shared).unwrap(), PAGE);
    settled(&mut client, PAGES - 3);
    assert!(reaches(&mut client, 3));
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
    let until = Instant::now() + Duration::from_secs(10);
    while !client.status().unwrap().regions.is_empty() {
        assert!(Instant::now() < until, "{:?}", client.status());
        std::thread::yield_now();
    }
    let message = client.adopt().unwrap_err().to_string();
    assert!(message.contains("there is no memory to adopt"), "{message}");
    service.says("nobody has adopted the memory");
    // The manager hears it after the client does.
    let until = Instant::now() + Duration::from_secs(10);
    while service.names() != ["passgate.ledger", "passgate.socket"] {
        assert!(Instant::now() < until, "{:?}", service.names());
        std::thread::yield_now();
    }
    // Sealing says that nothing pins or maps it.
    let until = Instant::now() + Duration::from_secs(10);
    while rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE).is_err() {
        assert!(Instant::now() < until, "something has it yet");
        std::thread::yield_now();
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

/// What the client of the storm knows of a page.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Knows {
    Is(PageState),
    /// Asked, and not answered.
    Asked(PageState),
    Granted,
    /// Said that it has become so, and not answered.
    Said(PageState),
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

/// Converts pages at random until the daemon is gone.
fn storm(mut channel: Channel, known: &Mutex<BTreeMap<u64, Knows>>, seed: u64) {
    let mut dice = Dice(seed);
    loop {
        let at = dice.roll(PAGES);
        let Knows::Is(was) = known.lock().unwrap()[&at] else {
            panic!("page {at} is settled before each storm")
        };
        let to = if was == PageState::Shared { PageState::Private } else { PageState::Shared };
        known.lock().unwrap().insert(at, Knows::Asked(to));
        let invalidation = match channel.begin(page(at), to, None) {
            Ok(Answer::Granted { invalidation }) => invalidation,
            Ok(other) => panic!("page {at}: {other:?}"),
            Err(_) => return,
        };
        known.lock().unwrap().insert(at, Knows::Granted);
        if dice.roll(4) == 0 {
            // Others convert between begin and end too.
            std::thread::yield_now();
        }
        known.lock().unwrap().insert(at, Knows::Said(to));
        if channel.end(invalidation, Outcome::Committed).is_err() {
            return;
        }
        known.lock().unwrap().insert(at, Knows::Is(to));
    }
}

#[test]
fn killed_at_any_moment_it_knows_or_says_that_it_does_not() {
    const KILLS: u64 = 60;
    let (mut service, memory) = (service(&[]), memory(PAGES));
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    service.start();
    let (mut client, mut channel) = join(&service, &memory);
    let known: BTreeMap<u64, Knows> = (0..PAGES).map(|at| (at, Knows::Is(PageState::Shared))).collect();
    let known = Arc::new(Mutex::new(known));
    let mut unknown = 0;
    for kill in 0..KILLS {
        let (mine, seed, (begun, has_begun)) = (Arc::clone(&known), dice.roll(u64::MAX) | 1, channel_of());
        let converting = std::thread::spawn(move || {
            begun.send(()).unwrap();
            storm(channel, &mine, seed);
        });
        has_begun.recv().unwrap();
        std::thread::sleep(Duration::from_micros(dice.roll(8000)));
        service.kill();
        converting.join().unwrap();
        drop(client);
        service.start();
        let adopted;
        (client, channel, adopted) = adopt(&service);
        let unended: BTreeMap<u64, u64> =
            adopted.unended.iter().map(|one| ((one.gpa - GPA) / PAGE, one.invalidation)).collect();
        let mut known = known.lock().unwrap();
        let shared =
            known.iter().filter(|(at, knows)| !unended.contains_key(at) && now(**knows) == PageState::Shared);
        settled_if(&mut client, shared.count() as u64, &known);
        for (at, knows) in known.iter_mut() {
            let lost = unended.contains_key(at);
            let reached = reaches(&mut client, *at);
            match *knows {
                Knows::Is(state) => {
                    assert!(!lost, "kill {kill}: page {at} was {state:?}, now nobody knows");
                    assert_eq!(reached, state == PageState::Shared, "kill {kill}: page {at} is {state:?}");
                }
                Knows::Granted => assert!(lost && !reached, "kill {kill}: page {at} was given away"),
                Knows::Asked(_) | Knows::Said(_) => assert!(!(lost && reached), "kill {kill}: page {at}"),
            }
            let state = match (*knows, lost) {
                (Knows::Is(state), _) => state,
                (_, true) => {
                    unknown += 1;
                    let to = if dice.roll(2) == 0 { State::Shared } else { State::Private };
                    assert_eq!(client.release(unended[at], to).unwrap(), PAGE);
                    to.into()
                }
                // It has not come to the begin, or the end has: DMA tells which.
                (_, false) if reached => PageState::Shared,
                _ => PageState::Private,
            };
            *knows = Knows::Is(state);
        }
        let shared = known.values().filter(|knows| **knows == Knows::Is(PageState::Shared)).count() as u64;
        drop(known);
        settled(&mut client, shared);
    }
    eprintln!("{KILLS} kills, {unknown} pages of which nobody could know");
    assert!(unknown > 0, "some kill must have met an open conversion");
}

fn channel_of() -> (std::sync::mpsc::Sender<()>, std::sync::mpsc::Receiver<()>) {
    channel()
}

/// What a page is if nothing was lost on the way.
fn now(knows: Knows) -> PageState {
    match knows {
        Knows::Is(state) => state,
        _ => PageState::Unknown,
    }
}

/// Waits for the maps that must come: at least so many, at most those whose state is open besides.
fn settled_if(client: &mut Client, least: u64, known: &BTreeMap<u64, Knows>) {
    let open = known.values().filter(|knows| !matches!(knows, Knows::Is(_))).count() as u64;
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let region = client.status().unwrap();
        let (pinned, shared) = (region.pinned / PAGE, region.regions[0].shared / PAGE);
        if pinned == shared && (least..=least + open).contains(&shared) {
            return;
        }
        assert!(Instant::now() < until, "{least} {open} {region:?}");
        std::thread::yield_now();
    }
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
        let until = Instant::now() + Duration::from_secs(10);
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

/// Whatever comes in place of what was kept: a clean start that says why, or a clear error; never another state.
#[test]
fn what_was_kept_is_not_believed_for_its_shape() {
    let memfd = |bytes: &[u8]| {
        let fd =
            rustix::fs::memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::io::pwrite(&fd, bytes, 0).unwrap();
        fd
    };
    type Spoil = fn(&Keeper, OwnedFd);
    let cases: &[(&str, Spoil, &str, bool)] = &[
        (
            "another file as the ledger",
            |service, other| service.replace("passgate.ledger", other),
            "ledger",
            false,
        ),
        (
            "no ledger",
            |service, _| service.forget("passgate.ledger"),
            "passgate.ledger` was not handed over",
            false,
        ),
        (
            "a pipe as the ledger",
            |service, _| {
                let (read, _write) = std::io::pipe().unwrap();
                service.replace("passgate.ledger", read);
            },
            "ledger that was kept cannot be opened",
            false,
        ),
        (
            "the memory is missing",
            |service, _| service.forget("passgate.memory."),
            "its file did not come back",
            false,
        ),
        (
            "other memory",
            |service, other| {
                let name =
                    service.names().into_iter().find(|name| name.starts_with("passgate.memory.")).unwrap();
                service.replace(&name, other);
            },
            "is another file",
            false,
        ),
        (
            "another socket",
            |service, other| service.replace("passgate.socket", other),
            "does not listen",
            true,
        ),
        (
            "unknown names",
            |service, other| service.replace("something.else", other),
            "none of passgate's",
            true,
        ),
        ("an iommufd too many", |service, other| service.replace("passgate.iommufd", other), "", true),
    ];
    for (what, spoil, says, whole) in cases {
        let (mut service, memory) = (service(&[]), memory(PAGES));
        service.start();
        let (client, channel) = join(&service, &memory);
        service.kill();
        drop((client, channel));
        spoil(&service, memfd(&[7; 8192]));
        if *what == "another socket" {
            std::fs::remove_file(&service.path).unwrap();
        }
        service.start();
        if !says.is_empty() {
            service.says(says);
        }
        let mut client = service.client();
        match client.adopt() {
            Ok(adopted) => assert!(*whole && adopted.regions.len() == 1, "{what}: {adopted:?}"),
            Err(error) => assert!(!whole, "{what}: {error}"),
        }
        if !whole {
            let until = Instant::now() + Duration::from_secs(10);
            while !client.status().unwrap().regions.is_empty() {
                assert!(Instant::now() < until, "{what}: {:?}", client.status());
                std::thread::yield_now();
            }
            // It serves as one that has just begun.
            client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory]).unwrap();
        }
        assert!(reaches(&mut client, 1), "{what}");
    }
}

/// Words of the ledger are overwritten. What cannot be is refused, and what could be is served: no daemon falls over it.
#[test]
fn no_damage_to_the_ledger_keeps_a_daemon_from_serving() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (client, mut channel) = join(&service, &memory);
    convert(&mut channel, 3, PageState::Private);
    begin(&mut channel, 5, PageState::Private);
    service.kill();
    drop((client, channel));
    let whole = service.copy("passgate.ledger");
    let mut before = vec![0; 1 << 20];
    let len = rustix::io::pread(&whole, &mut before, 0).unwrap();
    let words: Vec<usize> = (0..len / 8).filter(|at| before[at * 8..at * 8 + 8] != [0; 8]).collect();
    assert!(words.len() > 20);
    let mut dice = Dice(42);
    for _ in 0..40 {
        let at = words[dice.roll(words.len() as u64) as usize] * 8;
        let bad = (dice.roll(u64::MAX) >> dice.roll(63)).to_le_bytes();
        rustix::io::pwrite(&whole, &bad, at as u64).unwrap();
        service.start();
        let mut client = service.client();
        if let Ok(adopted) = client.adopt() {
            assert!(adopted.regions.len() <= 1, "{adopted:?}");
        }
        assert!(client.status().is_ok());
        service.kill();
        // As it was: the file that the test holds is the one that was kept at first.
        for (nth, chunk) in before.chunks(1 << 16).enumerate() {
            rustix::io::pwrite(&whole, chunk, (nth << 16) as u64).unwrap();
        }
        service.replace("passgate.ledger", &whole);
        if !service.names().iter().any(|name| name.starts_with("passgate.memory.")) {
            let stat = rustix::fs::fstat(&memory).unwrap();
            service.replace(&format!("passgate.memory.{:x}.{:x}", stat.st_dev, stat.st_ino), &memory);
        }
    }
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
    let took = begun.elapsed();
    service.is_told("READY=1");
    assert_eq!(
        (status.regions[0].shared, status.regions[0].private),
        (SHARED * PAGE, LENGTH - SHARED * PAGE)
    );
    settled(&mut client, SHARED);
    eprintln!("1 TiB with {SHARED} shared pages: Status answered {took:?} after the process was started");
    assert!(took < Duration::from_millis(if cfg!(debug_assertions) { 1000 } else { 100 }), "{took:?}");
}
