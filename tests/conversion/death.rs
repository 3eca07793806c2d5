//! The death of a client, at every point of a conversion, and of the daemon.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use passgate_bindings::PAGE;
use passgate_client::{AddMemory, Client, Outcome, PageState};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Pid, Signal, kill_process};

use crate::common::event_watch::EventWatch;
use crate::common::{
    Setup, TIMEOUT, assert_faults, assert_quarantined, dma_write, exclusive, granted, memory, open_files,
    pages, wait_for_status,
};

/// The length of the memory that the device writes to, in pages.
const PAGES: u64 = 16;
const CANARY: u64 = 0xca_0a_71;

/// Stops the DMA, also where an assertion fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn no_dma_changes_client_memory_after_session_closed() {
    let setup = Setup::new();
    let mut other = setup.connect();
    let watch = EventWatch::new(setup.connect());
    // The test has its own descriptor of the memory.
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
        let _stop_on_drop = StopOnDrop(&stop);
        for round in 0..2 {
            let mut client = setup.connect();
            client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&*file]).unwrap();
            let mut channel = client.open_channel().unwrap();
            // In the first round the client dies with nothing begun, in the second between begin and end.
            if round == 1 {
                granted(channel.begin(pages(PAGES - 1, 1), PageState::Shared, None));
            }
            let hits_before = hits.load(Ordering::Acquire);
            while hits.load(Ordering::Acquire) < hits_before + 100 {
                std::thread::yield_now();
            }
            drop((client, channel));
            watch.wait("session.closed");
            for page in 0..PAGES {
                file.store(page * PAGE, CANARY).unwrap();
            }
            let (hits_at_close, end) =
                (hits.load(Ordering::Acquire), Instant::now() + Duration::from_secs(1));
            // One operation that ended before session.closed may be counted after it.
            while Instant::now() < end {
                std::thread::yield_now();
            }
            assert!(hits.load(Ordering::Acquire) <= hits_at_close + 1);
            for page in 0..PAGES {
                assert_eq!(file.load(page * PAGE).unwrap(), CANARY, "round {round}, page {page}");
            }
        }
    });
    assert!(faults.load(Ordering::Acquire) > 100, "too few faults: the device stopped trying");
    assert_eq!(setup.domain.mappings(), 0);
    // The conversion that was not ended is in quarantine, and its file stays open with it.
    let status = other.status().unwrap();
    assert_eq!(status.quarantine.iter().map(|q| q.cause.as_str()).collect::<Vec<_>>(), ["client-gone"]);
    assert_eq!(open_files(), before + 1);
    drop(file);
}

#[test]
fn quarantine_of_dead_client_persists_for_next_client() {
    let setup = Setup::new();
    let mut other = setup.connect();
    let file = memory(2);
    let mut client = setup.connect();
    client.add_memory(&AddMemory::shared(0, 2 * PAGE), &[&*file]).unwrap();
    let mut channel = client.open_channel().unwrap();
    granted(channel.begin(pages(0, 1), PageState::Private, None));
    drop((client, channel));
    wait_for_status(&mut other, |status| status.regions.is_empty());
    other.add_memory(&AddMemory::shared(0, 2 * PAGE), &[&*file]).unwrap();
    assert_faults(&setup.device, 0);
    dma_write(&setup.device, 1, 1).unwrap();
    let mut channel = other.open_channel().unwrap();
    assert_quarantined(channel.begin(pages(0, 1), PageState::Shared, None), 0);
}

#[test]
fn client_reopens_closed_channel_and_ends_conversion() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(1);
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, None));
    drop(channel);
    let mut channel = loop {
        match client.open_channel() {
            Ok(channel) => break channel,
            // The server has not noticed yet that the channel is closed.
            Err(error) => assert!(error.to_string().contains("has a channel already"), "{error}"),
        }
    };
    channel.end(invalidation, Outcome::Committed).unwrap();
}

/// A daemon process.
struct Daemon(Child);

impl Daemon {
    fn start(socket: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_passgate"));
        command.args(["serve", "--device", "soft:0", "--allow-dma", "--socket-path"]).arg(socket);
        let daemon = Self(command.stdin(Stdio::null()).spawn().unwrap());
        let end = Instant::now() + TIMEOUT;
        // The socket of a killed daemon refuses connections until the new daemon has replaced it.
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
fn killed_daemon_leaves_no_pins_and_next_daemon_starts() {
    let _exclusive = exclusive();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    // This test does not map it, so F_SEAL_WRITE fails only while another process maps or pins it.
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

    assert!(channel.begin(pages(0, 1), PageState::Private, None).is_err(), "no conversion without a daemon");
    assert!(client.status().is_err());
    // The kernel unpins the pages when it has destroyed the io_uring, some 30 ms after the death.
    let end = Instant::now() + TIMEOUT;
    let mut daemon = Daemon::start(&socket);
    let mut client = Client::connect(&socket).unwrap();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&fd]).unwrap();
    assert_eq!(client.dma_read("soft:0", 0, 13).unwrap(), b"by the device");
    client.remove_memory(1).unwrap();
    while fcntl_add_seals(&fd, SealFlags::WRITE).is_err() {
        assert!(Instant::now() < end, "the memory of the killed daemon is still pinned");
        std::thread::yield_now();
    }

    assert!(daemon.signal(Signal::TERM).success(), "SIGTERM must end the daemon with success");
    assert!(!socket.exists());
}

#[test]
fn terminated_daemon_closes_client_memory_first() {
    let _exclusive = exclusive();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut daemon = Daemon::start(&socket);
    let mut client = Client::connect(&socket).unwrap();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap();
    assert!(daemon.signal(Signal::INT).success());
    assert!(client.status().is_err());
}
