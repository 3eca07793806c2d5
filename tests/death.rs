//! Whoever dies, nothing of the guest's memory stays behind in his hands: natively, with the software device.
//! `machine.rs` shows the same of real devices.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod daemon;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use daemon::{Daemon, LONG, Notices, children, serve_fails, until};
use passgate::client::{AddMemory, Client};
use passgate::session::guardian::Watch;
use passgate_backends::device::Guard;
use passgate_backends::{Device, FenceStep, StopClass};
use passgate_bindings::PAGE;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, Signal, getpid, kill_process};

const SOFT: [&str; 5] = ["--iommu", "soft", "--device", "soft:0", "--allow-dma"];
const GPA: u64 = 0x10_0000;
const PAGES: u64 = 16;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_passgate"))
}

/// Memory that nobody here maps, so that only pins and mappings of others keep it from being sealed.
fn memory() -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("death", flags).unwrap();
    rustix::fs::ftruncate(&fd, PAGES * PAGE).unwrap();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    rustix::io::pwrite(&fd, &[b'A'; (PAGES * PAGE) as usize], 0).unwrap();
    fd
}

fn added(daemon: &Daemon, memory: &OwnedFd) -> Client {
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[memory]).unwrap();
    client
}

/// Whether nothing pins or maps the memory: the kernel's own word. It cannot be unsaid, so ask last.
fn is_free(memory: &OwnedFd) -> bool {
    rustix::fs::fcntl_add_seals(memory, SealFlags::WRITE).is_ok()
}

/// DMA all the time, until the daemon is gone or says no.
fn dma(daemon: &Daemon) -> std::thread::JoinHandle<u64> {
    let mut client = daemon.client();
    std::thread::spawn(move || {
        let mut went = 0;
        while client.dma_write("soft:0", GPA + went % PAGES * PAGE, &went.to_le_bytes()).is_ok() {
            went += 1;
        }
        went
    })
}

#[test]
fn a_killed_daemon_leaves_no_pin_and_another_takes_its_place() {
    let memory = memory();
    let mut daemon = Daemon::start(program(), &SOFT);
    let client = added(&daemon, &memory);
    assert!(!is_free(&memory), "the device has it");
    let writer = dma(&daemon);
    // DMA goes when a reading sees what the writer wrote.
    let mut reader = daemon.client();
    assert!(until(LONG, || reader.dma_read("soft:0", GPA + PAGE, 1).unwrap() != b"A"));
    daemon.kill();
    assert!(writer.join().unwrap() > 0);
    drop(client);
    let begun = Instant::now();
    assert!(until(LONG, || is_free(&memory)), "still pinned");
    eprintln!("the pins were gone after {:?}", begun.elapsed());

    assert!(daemon.path.exists(), "a killed daemon cannot remove its socket");
    let next = Daemon::start_at(program(), &daemon.path, &SOFT);
    let fresh = self::memory();
    let mut client = added(&next, &fresh);
    assert_eq!(client.dma_read("soft:0", GPA, 4).unwrap(), b"AAAA");
}

#[test]
fn a_second_daemon_at_one_socket_is_refused_and_the_first_goes_on() {
    let daemon = Daemon::start(program(), &SOFT);
    let (code, said) = serve_fails(program(), &daemon.path, &SOFT);
    assert_eq!(code, Some(1));
    assert!(said.contains("another daemon serves there; choose another --socket-path"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(daemon.client().status().unwrap().iommu, "soft");
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "precious").unwrap();
    let (code, said) = serve_fails(program(), file.path(), &SOFT);
    assert_eq!(code, Some(1));
    assert!(said.contains("that is no socket; choose another --socket-path"), "{said}");
    assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "precious");
}

#[test]
fn sigterm_ends_a_daemon_in_time_with_its_memory_free_and_its_socket_gone() {
    let memory = memory();
    let mut daemon = Daemon::start(program(), &SOFT);
    let client = added(&daemon, &memory);
    let writer = dma(&daemon);
    daemon.terminate();
    let status = daemon.ended(LONG);
    assert!(status.success(), "{status}");
    assert!(is_free(&memory), "still pinned");
    assert!(!daemon.path.exists());
    writer.join().unwrap();
    drop(client);
}

#[test]
fn sigint_ends_a_daemon_as_well() {
    let mut daemon = Daemon::start(program(), &SOFT);
    kill_process(daemon.pid(), Signal::INT).unwrap();
    assert!(daemon.ended(LONG).success());
}

/// The client is `passgate events`, which holds a connection, and this process, which holds one with memory.
#[test]
fn a_killed_client_takes_only_its_own_memory_with_it() {
    let (lost, kept) = (memory(), memory());
    let daemon = Daemon::start(program(), &SOFT);
    let notices = Notices::of(&daemon);
    let mut other = daemon.client();
    other.add_memory(&AddMemory::shared(GPA + PAGES * PAGE, PAGES * PAGE), &[&kept]).unwrap();
    let mut watcher = std::process::Command::new(program())
        .args(["events", "--socket-path"])
        .arg(&daemon.path)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let client = added(&daemon, &lost);
    let mut status = daemon.client();
    assert!(until(LONG, || status.status().unwrap().clients >= 5), "all have come");
    watcher.kill().unwrap();
    watcher.wait().unwrap();
    drop(client);
    notices.until("session.closed");
    assert!(is_free(&lost), "session.closed was told too early");
    assert!(!is_free(&kept), "the other's memory is in use");
    let now = status.status().unwrap();
    assert_eq!(now.regions.len(), 1);
    assert_eq!(now.regions[0].gpa, GPA + PAGES * PAGE);
    assert_eq!(other.dma_read("soft:0", GPA + PAGES * PAGE, 4).unwrap(), b"AAAA");
    assert!(status.dma_read("soft:0", GPA, 4).is_err(), "nothing is there any more");
}

/// The kernel's word on every thread of the daemon: no capability but CAP_IPC_LOCK (bit 14), and no way to another.
#[test]
fn a_serving_daemon_has_no_privilege_left() {
    let memory = memory();
    let daemon = Daemon::start(program(), &SOFT);
    let mut client = added(&daemon, &memory);
    assert_eq!(client.dma_read("soft:0", GPA, 4).unwrap(), b"AAAA");
    let mut threads = 0;
    for thread in std::fs::read_dir(format!("/proc/{}/task", daemon.pid().as_raw_nonzero())).unwrap() {
        // A worker may have ended meanwhile.
        let Ok(status) = std::fs::read_to_string(thread.unwrap().path().join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap().trim().to_owned()
        };
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            let bits = u64::from_str_radix(&field(set), 16).unwrap();
            assert_eq!(bits & !(1 << 14), 0, "{set} of {}", field("Name"));
        }
        assert_eq!(field("NoNewPrivs"), "1", "{}", field("Name"));
        threads += 1;
    }
    assert!(threads >= 3, "{threads} threads");
}

#[test]
fn software_devices_need_no_guardian() {
    let daemon = Daemon::start(program(), &SOFT);
    daemon.client().status().unwrap();
    assert_eq!(daemon.guardian(), None);
}

/// A device that a guardian holds: the writing end of a pipe, which tells its reader when all copies are closed.
#[derive(Debug)]
struct Held(std::io::PipeWriter);

impl Device for Held {
    fn name(&self) -> &str {
        "held"
    }
    fn stop_class(&self) -> StopClass {
        StopClass::empty()
    }
    fn fence(&self, _: FenceStep) -> passgate_backends::Result<()> {
        Err(self.no_dma())
    }
    fn attach(&self) -> passgate_backends::Result<()> {
        Ok(())
    }
    fn guard(&self) -> Guard<'_> {
        Guard::Cdev(self.0.as_fd())
    }
}

fn guardians() -> Vec<Pid> {
    let is_one = |pid: &Pid| {
        let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
        std::fs::read(path).is_ok_and(|line| line == b"passgate\0guardian\0")
    };
    children(getpid()).into_iter().filter(is_one).collect()
}

fn closes(reader: BorrowedFd<'_>) {
    let limit = rustix::time::Timespec::try_from(LONG).unwrap();
    let mut fds = [rustix::event::PollFd::new(&reader, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut fds, Some(&limit)).unwrap(), 1, "somebody still holds the device");
}

#[test]
fn a_guardian_holds_what_it_is_given_hears_no_sigterm_and_is_replaced_when_it_dies() {
    let (reader, writer) = std::io::pipe().unwrap();
    let devices: Vec<Arc<dyn Device>> = vec![Arc::new(Held(writer))];
    let watch = Watch::start(PathBuf::from(program()), devices).unwrap().unwrap();
    let first = guardians()[0];
    assert_eq!(rustix::process::getsid(Some(first)).unwrap(), first, "it leads a session of its own");
    for deaf in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        kill_process(first, deaf).unwrap();
    }
    kill_process(first, Signal::KILL).unwrap();
    assert!(until(LONG, || guardians().first().is_some_and(|now| *now != first)), "no new one came");
    watch.bye();
    assert_eq!(guardians(), []);
    closes(reader.as_fd());
}
