//! The death and the orderly end of the daemon, its guardian and its client.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use passgate_bindings::PAGE;
use passgate_bindings::vfio::DeviceFile;
use passgate_client::{AddMemory, Client};
use rustix::fs::SealFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open};

use super::rig::{Engine, GPA, PASSGATE, Rig, Vmm, bytes, copy, memfd, unique_bytes};
use crate::daemon::{Daemon, Notices, TIMEOUT, wait_until};

/// Set to the socket's path in the child process that is the client to be killed.
pub const CLIENT_SOCKET_ENV: &str = "PASSGATE_RIG_CLIENT_SOCKET";

/// The registers of the edu device (QEMU, docs/specs/edu.rst), by a duplicate of the daemon's descriptor of the device. Any
/// process with such a descriptor, like a VMM, can start DMA when the daemon is dead.
pub(super) struct Registers {
    device: DeviceFile,
    bar: passgate_bindings::vfio::device::Region,
}

impl Registers {
    fn from_daemon(daemon: &Daemon) -> Self {
        let pidfd = pidfd_open(daemon.pid(), PidfdFlags::empty()).unwrap();
        let directory = format!("/proc/{}/fd", daemon.pid().as_raw_nonzero());
        let number = std::fs::read_dir(directory).unwrap().find_map(|entry| {
            let entry = entry.unwrap();
            let target = std::fs::read_link(entry.path()).ok()?;
            let target = target.to_str()?;
            let is_device = target.starts_with("/dev/vfio/devices/") || target == "anon_inode:[vfio-device]";
            is_device.then(|| entry.file_name().to_str()?.parse().ok()).flatten()
        });
        let fd: OwnedFd = pidfd_getfd(&pidfd, number.unwrap(), PidfdGetfdFlags::empty()).unwrap();
        Self::from_device(DeviceFile::from_fd(fd))
    }

    pub(super) fn from_device(device: DeviceFile) -> Self {
        let bar = device.region(0).unwrap();
        Self { device, bar }
    }

    /// Starts DMA of the engine's internal buffer, which contains what it wrote last, to a page, and waits for its end.
    pub(super) fn write(&self, page: u64) {
        let set = |register: u64, value: u32| {
            self.device.write(self.bar, register, &value.to_le_bytes()).unwrap();
        };
        let idle = || {
            let mut word = [0; 4];
            self.device.read(self.bar, 0x98, &mut word).unwrap();
            word[0] & 1 == 0
        };
        assert!(wait_until(TIMEOUT, idle), "the engine hangs");
        // DMA source (the buffer), destination, count, and command: start, from the device to memory.
        set(0x80, 0x40000);
        set(0x88, u32::try_from(GPA + page * PAGE).unwrap());
        set(0x90, 64);
        set(0x98, 1 | 2);
        assert!(wait_until(TIMEOUT, idle), "the engine hangs");
    }
}

/// Starts a daemon with DMA over another connection, duplicates its descriptor of the device, and kills it.
fn kill_under_dma(rig: &Rig, options: &[&str]) -> (Daemon, Vmm, Registers) {
    let mut daemon = rig.serve_with(options);
    let mut vmm = rig.join(&daemon, memfd(4), PAGE);
    let mut engine = Engine::connect(&daemon, &rig.edu);
    let writer = std::thread::spawn(move || {
        let mut writes = 0;
        while engine.try_write(2).is_ok() {
            writes += 1;
        }
        writes
    });
    let registers = Registers::from_daemon(&daemon);
    assert!(vmm.reaches(1));
    daemon.kill();
    assert!(writer.join().unwrap() > 0, "DMA ran");
    (daemon, vmm, registers)
}

pub fn killed_daemon(rig: &Rig) {
    let (daemon, vmm, registers) = kill_under_dma(rig, &[]);
    let log_lines = daemon.wait_stderr_closed(); // the guardian has stopped the device and ended
    assert!(
        log_lines.iter().any(|line| line.contains(&rig.edu) && line.contains("DMA is blocked")),
        "{log_lines:?}"
    );
    for page in 0..4 {
        let canary = vmm.fill(page);
        registers.write(page);
        assert_eq!(vmm.bytes(page), canary, "DMA still reaches page {page}");
    }
    drop((registers, vmm));

    let next = Daemon::start_at(Path::new(PASSGATE), &daemon.path, &rig.arguments(&[]));
    let mut vmm = rig.join(&next, memfd(2), PAGE);
    assert!(vmm.reaches(0) && vmm.reaches(1), "a new daemon must get the device, with DMA");
}

/// The control of the trial above: without a guardian nothing stops the device.
pub fn kill_without_guardian(rig: &Rig) {
    let (daemon, vmm, registers) = kill_under_dma(rig, &["--no-guardian"]);
    let log_lines = daemon.wait_stderr_closed();
    assert!(!log_lines.iter().any(|line| line.contains("guardian")), "{log_lines:?}");
    let canary = vmm.fill(0);
    registers.write(0);
    assert_ne!(vmm.bytes(0), canary, "without a guardian DMA must go on while a process has the device open");
}

pub fn guardian_is_replaced(rig: &Rig) {
    let (mut daemon, mut vmm) = rig.vmm(2);
    let first = daemon.guardian().unwrap();
    kill_process(first, Signal::KILL).unwrap();
    daemon.wait_for_line("the guardian died");
    let is_new = |pid: Pid| pid != first;
    assert!(wait_until(TIMEOUT, || daemon.guardian().is_some_and(is_new)), "no new guardian was started");
    assert!(vmm.reaches(0), "DMA must go on meanwhile");
    // The new guardian process exists before it is given the device: wait until it has it open.
    let registers = Registers::from_daemon(&daemon);
    let guardian = daemon.guardian().unwrap();
    assert!(wait_until(TIMEOUT, || has_device_open(guardian)), "the new guardian was not given the device");
    daemon.kill();
    daemon.wait_stderr_closed();
    let canary = vmm.fill(0);
    registers.write(0);
    assert_eq!(vmm.bytes(0), canary, "DMA still reaches the page");
}

/// Returns true if the process has a VFIO device open.
fn has_device_open(pid: Pid) -> bool {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())) else { return false };
    entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).any(|target| {
        let target = target.to_string_lossy().into_owned();
        target.starts_with("/dev/vfio/devices/") || target == "anon_inode:[vfio-device]"
    })
}

/// Runs as the client to be killed: adds its standard input as memory and waits.
pub fn client_process(path: &Path) {
    let mut client = Client::connect(path).unwrap();
    client.add_memory(&AddMemory::shared(GPA, 4 * PAGE), &[&std::io::stdin()]).unwrap();
    println!("ready");
    std::thread::park();
}

pub fn killed_client(rig: &Rig) {
    let daemon = rig.serve();
    let (memory, notices) = (memfd(4), Notices::subscribe(&daemon));
    let mut client = Command::new(std::env::current_exe().unwrap())
        .env(CLIENT_SOCKET_ENV, &daemon.path)
        .stdin(Stdio::from(copy(&memory)))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"));
    let mut engine = Engine::connect(&daemon, &rig.edu);
    let sent = engine.write(1);
    assert_eq!(bytes(&memory, 1), sent, "DMA does not run");

    // From here on the engine writes to every page in turn, whatever happens to the client.
    let (stop, attempts) = (AtomicBool::new(false), AtomicU64::new(0));
    let earlier_notices = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            while !stop.load(Relaxed) {
                engine.write(attempts.load(Relaxed) % 4);
                attempts.fetch_add(1, Relaxed);
            }
        });
        client.kill().unwrap();
        client.wait().unwrap();
        let (earlier_notices, _) = notices.wait_for("session.closed");
        let canaries: Vec<_> = (0..4).map(|_| unique_bytes()).collect();
        for (page, canary) in (0..).zip(&canaries) {
            memory.write(page * PAGE, canary).unwrap();
        }
        let (started, first) = (Instant::now(), attempts.load(Relaxed));
        // Continue until each page was written to after session.closed, and for a second at least: the first of these writes may
        // have started before.
        let enough = || started.elapsed() > Duration::from_secs(1) && attempts.load(Relaxed) > first + 4;
        assert!(wait_until(TIMEOUT, || writer.is_finished() || enough()));
        stop.store(true, Relaxed);
        writer.join().unwrap();
        for (page, canary) in (0..).zip(&canaries) {
            assert_eq!(bytes(&memory, page), *canary, "page {page} changed after session.closed");
        }
        earlier_notices
    });
    assert!(
        earlier_notices.contains(&"region.closed".to_owned()),
        "session.closed came too early: {earlier_notices:?}"
    );
    if rig.iommu == "iommufd" {
        assert!(
            earlier_notices.contains(&"device.fenced".to_owned()),
            "devices are stopped first: {earlier_notices:?}"
        );
    }
    let mut next = rig.join(&daemon, memfd(2), PAGE);
    assert!(next.reaches(1), "the next client must have DMA");
}

pub fn sigterm(rig: &Rig) {
    let (mut daemon, vmm) = rig.vmm(4);
    let mut engine = Engine::connect(&daemon, &rig.edu);
    let writer = std::thread::spawn(move || while engine.try_write(1).is_ok() {});
    daemon.terminate();
    let status = daemon.wait_exit(Duration::from_secs(5));
    assert!(status.success(), "{status}");
    assert!(!daemon.path.exists(), "the socket was not removed");
    writer.join().unwrap();
    daemon.wait_stderr_closed();
    drop(vmm);
    let (_daemon, mut next) = rig.vmm(1);
    assert!(next.reaches(0), "the device must be free at once");
}

/// F_SEAL_WRITE succeeds only once nothing pins the memory or maps it writable.
pub fn memory_can_be_sealed(rig: &Rig) {
    let daemon = rig.serve();
    let notices = Notices::subscribe(&daemon);
    let memory = copy(&memfd(4)); // this process must not map it
    let seal = || rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE);
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(GPA, 4 * PAGE), &[&memory.as_fd()]).unwrap();
    assert_eq!(seal(), Err(Errno::BUSY), "the memory must be pinned for the device");
    let mut engine = Engine::connect(&daemon, &rig.edu);
    let sent = engine.write(1);
    let mut seen = vec![0; sent.len()];
    rustix::io::pread(&memory, &mut seen, PAGE).unwrap();
    assert_eq!(seen, sent);
    drop(client);
    notices.wait_for("session.closed");
    assert_eq!(seal(), Ok(()), "after session.closed");
}
