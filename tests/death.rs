//! The death of daemon, client and guardian: no process keeps guest memory pinned or mapped. Natively, with the software
//! device; `machine.rs` tests the same with real devices.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod daemon;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use daemon::{Daemon, Notices, TIMEOUT, children, serve_fails, wait_until};
use passgate::session::guardian::Watch;
use passgate_backends::device::Guard;
use passgate_backends::{Device, Step, Steps};
use passgate_bindings::PAGE;
use passgate_client::{AddMemory, Client};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, Signal, getpid, kill_process};

const SOFT_DEVICE_ARGS: [&str; 5] = ["--iommu", "soft", "--device", "soft:0", "--allow-dma"];
const GPA: u64 = 0x10_0000;
const PAGES: u64 = 16;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_passgate"))
}

/// Returns memory that this process does not map, so that only pins and mappings of other processes prevent F_SEAL_WRITE.
fn memory() -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("death", flags).unwrap();
    rustix::fs::ftruncate(&fd, PAGES * PAGE).unwrap();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    rustix::io::pwrite(&fd, &[b'A'; (PAGES * PAGE) as usize], 0).unwrap();
    fd
}

/// Returns a client that has added the memory.
fn client_with_memory(daemon: &Daemon, memory: &OwnedFd) -> Client {
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[memory]).unwrap();
    client
}

/// Returns true if F_SEAL_WRITE succeeds: then nothing pins the memory or maps it writable. A seal cannot be removed, so this
/// must be the last check.
fn seal_succeeds(memory: &OwnedFd) -> bool {
    rustix::fs::fcntl_add_seals(memory, SealFlags::WRITE).is_ok()
}

/// Writes to the memory by DMA, on a thread of its own, until the daemon has ended or refuses. The thread returns the number
/// of writes.
fn write_continuously(daemon: &Daemon) -> std::thread::JoinHandle<u64> {
    let mut client = daemon.client();
    std::thread::spawn(move || {
        let mut writes = 0;
        while client.dma_write("soft:0", GPA + writes % PAGES * PAGE, &writes.to_le_bytes()).is_ok() {
            writes += 1;
        }
        writes
    })
}

#[test]
fn killed_daemon_leaves_no_pins_and_its_socket_is_replaced() {
    let memory = memory();
    let mut daemon = Daemon::start(program(), &SOFT_DEVICE_ARGS);
    let client = client_with_memory(&daemon, &memory);
    assert!(!seal_succeeds(&memory), "the memory must be pinned for the device");
    let writer = write_continuously(&daemon);
    // DMA runs once a read sees what the writer wrote.
    let mut reader = daemon.client();
    assert!(wait_until(TIMEOUT, || reader.dma_read("soft:0", GPA + PAGE, 1).unwrap() != b"A"));
    daemon.kill();
    assert!(writer.join().unwrap() > 0);
    drop(client);
    let started = Instant::now();
    assert!(wait_until(TIMEOUT, || seal_succeeds(&memory)), "still pinned");
    eprintln!("the pins were gone after {:?}", started.elapsed());

    assert!(daemon.path.exists(), "a killed daemon cannot remove its socket");
    let next = Daemon::start_at(program(), &daemon.path, &SOFT_DEVICE_ARGS);
    let new_memory = self::memory();
    let mut client = client_with_memory(&next, &new_memory);
    assert_eq!(client.dma_read("soft:0", GPA, 4).unwrap(), b"AAAA");
}

#[test]
fn second_daemon_at_same_socket_is_refused() {
    let daemon = Daemon::start(program(), &SOFT_DEVICE_ARGS);
    let (code, stderr) = serve_fails(program(), &daemon.path, &SOFT_DEVICE_ARGS);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("another daemon serves there; choose another --socket-path"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert_eq!(daemon.client().status().unwrap().iommu, "soft");
}

#[test]
fn existing_non_socket_file_is_not_replaced() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "precious").unwrap();
    let (code, stderr) = serve_fails(program(), file.path(), &SOFT_DEVICE_ARGS);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("that is no socket; choose another --socket-path"), "{stderr}");
    assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "precious");
}

#[test]
fn sigterm_frees_memory_and_removes_socket() {
    let memory = memory();
    let mut daemon = Daemon::start(program(), &SOFT_DEVICE_ARGS);
    let client = client_with_memory(&daemon, &memory);
    let writer = write_continuously(&daemon);
    daemon.terminate();
    let status = daemon.wait_exit(TIMEOUT);
    assert!(status.success(), "{status}");
    assert!(seal_succeeds(&memory), "still pinned");
    assert!(!daemon.path.exists());
    writer.join().unwrap();
    drop(client);
}

#[test]
fn sigint_ends_daemon() {
    let mut daemon = Daemon::start(program(), &SOFT_DEVICE_ARGS);
    kill_process(daemon.pid(), Signal::INT).unwrap();
    assert!(daemon.wait_exit(TIMEOUT).success());
}

/// Two clients die: `passgate events`, which has a connection only, and a connection of this process, which has memory.
#[test]
fn killed_client_loses_only_its_own_memory() {
    let (client_memory, other_memory) = (memory(), memory());
    let daemon = Daemon::start(program(), &SOFT_DEVICE_ARGS);
    let notices = Notices::subscribe(&daemon);
    let mut other = daemon.client();
    other.add_memory(&AddMemory::shared(GPA + PAGES * PAGE, PAGES * PAGE), &[&other_memory]).unwrap();
    let mut events_command = std::process::Command::new(program())
        .args(["events", "--socket-path"])
        .arg(&daemon.path)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let client = client_with_memory(&daemon, &client_memory);
    let mut status = daemon.client();
    assert!(wait_until(TIMEOUT, || status.status().unwrap().clients >= 5), "a connection is missing");
    events_command.kill().unwrap();
    events_command.wait().unwrap();
    drop(client);
    notices.wait_for("session.closed");
    assert!(seal_succeeds(&client_memory), "session.closed was sent too early");
    assert!(!seal_succeeds(&other_memory), "the other's memory is in use");
    let after = status.status().unwrap();
    assert_eq!(after.regions.len(), 1);
    assert_eq!(after.regions[0].gpa, GPA + PAGES * PAGE);
    assert_eq!(other.dma_read("soft:0", GPA + PAGES * PAGE, 4).unwrap(), b"AAAA");
    assert!(status.dma_read("soft:0", GPA, 4).is_err(), "the memory must be unmapped");
}

/// Every thread of the daemon has no capability but CAP_IPC_LOCK (bit 14), and no_new_privs is set (proc_pid_status(5)).
#[test]
fn serving_daemon_has_dropped_privileges() {
    let memory = memory();
    let daemon = Daemon::start(program(), &SOFT_DEVICE_ARGS);
    let mut client = client_with_memory(&daemon, &memory);
    assert_eq!(client.dma_read("soft:0", GPA, 4).unwrap(), b"AAAA");
    let mut threads = 0;
    for thread in std::fs::read_dir(format!("/proc/{}/task", daemon.pid().as_raw_nonzero())).unwrap() {
        // A worker thread may have ended in the meantime.
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
    let daemon = Daemon::start(program(), &SOFT_DEVICE_ARGS);
    daemon.client().status().unwrap();
    assert_eq!(daemon.guardian(), None);
}

/// A device whose descriptor is the write end of a pipe: its reader sees when every duplicate is closed, the guardian's too.
#[derive(Debug)]
struct GuardedPipe(std::io::PipeWriter);

impl Device for GuardedPipe {
    fn name(&self) -> &str {
        "held"
    }
    fn stop_class(&self) -> Steps {
        Steps::empty()
    }
    fn fence(&self, _: Step) -> passgate_backends::Result<()> {
        Err(self.no_dma())
    }
    fn attach(&self) -> passgate_backends::Result<()> {
        Ok(())
    }
    fn guard(&self) -> Guard<'_> {
        Guard::Cdev(self.0.as_fd())
    }
}

/// Returns the guardian processes of this one.
fn guardians() -> Vec<Pid> {
    let is_one = |pid: &Pid| {
        let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
        std::fs::read(path).is_ok_and(|line| line == b"passgate\0guardian\0")
    };
    children(getpid()).into_iter().filter(is_one).collect()
}

/// Waits until every write end of the pipe is closed.
fn wait_closed(reader: BorrowedFd<'_>) {
    let limit = rustix::time::Timespec::try_from(TIMEOUT).unwrap();
    let mut fds = [rustix::event::PollFd::new(&reader, rustix::event::PollFlags::IN)];
    assert_eq!(
        rustix::event::poll(&mut fds, Some(&limit)).unwrap(),
        1,
        "a process still has the device open"
    );
}

#[test]
fn guardian_ignores_signals_and_is_replaced_when_killed() {
    let (reader, writer) = std::io::pipe().unwrap();
    let devices: Vec<Arc<dyn Device>> = vec![Arc::new(GuardedPipe(writer))];
    let guardian_watch = Watch::start(PathBuf::from(program()), devices).unwrap().unwrap();
    let first = guardians()[0];
    assert_eq!(
        rustix::process::getsid(Some(first)).unwrap(),
        first,
        "the guardian must lead its own session"
    );
    for ignored in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        kill_process(first, ignored).unwrap();
    }
    kill_process(first, Signal::KILL).unwrap();
    assert!(
        wait_until(TIMEOUT, || guardians().first().is_some_and(|current| *current != first)),
        "no new guardian was started"
    );
    guardian_watch.bye();
    assert_eq!(guardians(), []);
    wait_closed(reader.as_fd());
}
