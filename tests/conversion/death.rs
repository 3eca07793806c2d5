//! Death: of the client, at every point, and of the daemon.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use passgate::client::{AddMemory, Client, Outcome, PageState};
use passgate_bindings::PAGE;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Pid, Signal, kill_process};

use crate::common::watch::Watch;
use crate::common::{
    LONG, Setup, alone, assert_faults, assert_refused, dma_write, granted, memory, open_files, pages, until,
};

/// Pages of the memory under attack.
const PAGES: u64 = 16;
const CANARY: u64 = 0xca_0a_71;

/// Stops the attack also where an assertion fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn after_session_closed_no_dma_changes_what_was_the_clients() {
    let setup = Setup::new();
    let mut other = setup.connect();
    let watch = Watch::new(setup.connect());
    // The harness keeps a duplicate of the memory.
    let file = memory(PAGES);
    let before = open_files();
    let stop = AtomicBool::new(false);
    let (hits, faults) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut page = 0;
            while !stop.load(Ordering::Acquire) {
                page = (page + 1) % PAGES;
                let counter = if dma_write(&setup.device, page, 0xbad).is_ok() { &hits } else { &faults };
                counter.fetch_add(1, Ordering::AcqRel);
            }
        });
        let _stop = Stop(&stop);
        for round in 0..2 {
            let mut client = setup.connect();
            client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&*file]).unwrap();
            let mut channel = client.open_channel().unwrap();
            // It dies with nothing begun, then between begin and end.
            if round == 1 {
                granted(channel.begin(pages(PAGES - 1, 1), PageState::Shared, None));
            }
            let under_attack = hits.load(Ordering::Acquire);
            while hits.load(Ordering::Acquire) < under_attack + 100 {
                std::thread::yield_now();
            }
            drop((client, channel));
            watch.wait("session.closed");
            for page in 0..PAGES {
                file.store(page * PAGE, CANARY).unwrap();
            }
            let (hit, end) = (hits.load(Ordering::Acquire), Instant::now() + Duration::from_secs(1));
            // One operation that was counted before may be reported after.
            while Instant::now() < end {
                std::thread::yield_now();
            }
            assert!(hits.load(Ordering::Acquire) <= hit + 1);
            for page in 0..PAGES {
                assert_eq!(file.load(page * PAGE).unwrap(), CANARY, "round {round}, page {page}");
            }
        }
    });
    assert!(faults.load(Ordering::Acquire) > 100, "the device went on trying");
    assert_eq!(setup.domain.mappings(), 0);
    // What was begun and not ended is in quarantine, and its file is kept with it.
    let status = other.status().unwrap();
    assert_eq!(status.quarantine.iter().map(|q| q.cause.as_str()).collect::<Vec<_>>(), ["client-gone"]);
    assert_eq!(open_files(), before + 1);
    drop(file);
}

#[test]
fn what_a_dead_client_left_unknown_stays_so_for_the_next() {
    let setup = Setup::new();
    let mut other = setup.connect();
    let file = memory(2);
    let mut client = setup.connect();
    client.add_memory(&AddMemory::shared(0, 2 * PAGE), &[&*file]).unwrap();
    let mut channel = client.open_channel().unwrap();
    granted(channel.begin(pages(0, 1), PageState::Private, None));
    drop((client, channel));
    until(&mut other, |status| status.regions.is_empty());
    other.add_memory(&AddMemory::shared(0, 2 * PAGE), &[&*file]).unwrap();
    assert_faults(&setup.device, 0);
    dma_write(&setup.device, 1, 1).unwrap();
    let mut channel = other.open_channel().unwrap();
    assert_refused(channel.begin(pages(0, 1), PageState::Shared, None), 5, "0x0");
}

#[test]
fn a_client_whose_channel_closes_may_open_another_and_go_on() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(1);
    let begun = granted(channel.begin(pages(0, 1), PageState::Private, None));
    drop(channel);
    let mut channel = loop {
        match client.open_channel() {
            Ok(channel) => break channel,
            // The server has not read yet that it is closed.
            Err(error) => assert!(error.to_string().contains("has a channel already"), "{error}"),
        }
    };
    channel.end(begun, Outcome::Committed).unwrap();
}

/// A daemon of its own.
struct Daemon(Child);

impl Daemon {
    fn start(socket: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_passgate"));
        command.args(["serve", "--device", "soft:0", "--allow-dma", "--socket-path"]).arg(socket);
        let daemon = Self(command.stdin(Stdio::null()).spawn().unwrap());
        let end = Instant::now() + LONG;
        // A left-over socket answers "connection refused" until the new one is there.
        while Client::connect(socket).and_then(|mut client| client.status()).is_err() {
            assert!(Instant::now() < end, "it never listened");
            std::thread::yield_now();
        }
        daemon
    }

    fn signal(&mut self, signal: Signal) -> std::process::ExitStatus {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
        self.0.wait().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_killed_daemon_leaves_no_pin_no_conversion_and_room_for_the_next() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    // Not mapped by us: sealing it against writing shows whether anybody pins it.
    let fd = memfd_create("killed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, PAGE).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();

    let mut daemon = Daemon::start(&socket);
    let mut client = Client::connect(&socket).unwrap();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&fd]).unwrap();
    let mut channel = client.open_channel().unwrap();
    client.dma_write("soft:0", 0, b"by the device").unwrap();
    assert!(fcntl_add_seals(&fd, SealFlags::WRITE).is_err(), "pinned");
    daemon.signal(Signal::KILL);

    assert!(
        channel.begin(pages(0, 1), PageState::Private, None).is_err(),
        "without it no conversion happens"
    );
    assert!(client.status().is_err());
    // What is pinned is let go of once the kernel has taken the ring apart, some 30 ms after.
    let end = Instant::now() + LONG;
    let mut daemon = Daemon::start(&socket);
    let mut client = Client::connect(&socket).unwrap();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&fd]).unwrap();
    assert_eq!(client.dma_read("soft:0", 0, 13).unwrap(), b"by the device");
    client.remove_memory(1).unwrap();
    while fcntl_add_seals(&fd, SealFlags::WRITE).is_err() {
        assert!(Instant::now() < end, "somebody still pins what the killed daemon had");
        std::thread::yield_now();
    }

    assert!(daemon.signal(Signal::TERM).success(), "a daemon that is asked to go goes in order");
    assert!(!socket.exists());
}

#[test]
fn a_daemon_that_is_asked_to_go_closes_what_its_clients_have_first() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut daemon = Daemon::start(&socket);
    let mut client = Client::connect(&socket).unwrap();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap();
    assert!(daemon.signal(Signal::INT).success());
    assert!(client.status().is_err());
}
