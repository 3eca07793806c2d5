//! Deaths and farewells: of the daemon, its guardian, its client.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use passgate::client::{AddMemory, Client};
use passgate_bindings::PAGE;
use passgate_bindings::vfio::DeviceFile;
use rustix::fs::SealFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open};

use super::rig::{Engine, GPA, PASSGATE, Rig, Vmm, bytes, copy, fresh, memfd};
use crate::daemon::{Daemon, LONG, Notices, until};

/// Set in the process that is the client which is killed.
pub const VICTIM: &str = "PASSGATE_RIG_VICTIM";

/// The engine's registers and buffer, by a copy of the daemon's own descriptor of the device: what a VMM with the
/// device in its hands has. With it DMA can be asked for when the daemon is dead.
pub(super) struct Registers {
    device: DeviceFile,
    bar: passgate_bindings::vfio::device::Region,
}

impl Registers {
    fn of(daemon: &Daemon) -> Self {
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
        Self::by(DeviceFile::from_fd(fd))
    }

    pub(super) fn by(device: DeviceFile) -> Self {
        let bar = device.region(0).unwrap();
        Self { device, bar }
    }

    /// Has the engine write what is in its buffer to a page: what it wrote last.
    pub(super) fn write(&self, page: u64) {
        let set = |register: u64, value: u32| {
            self.device.write(self.bar, register, &value.to_le_bytes()).unwrap();
        };
        let idle = || {
            let mut word = [0; 4];
            self.device.read(self.bar, 0x98, &mut word).unwrap();
            word[0] & 1 == 0
        };
        assert!(until(LONG, idle), "the engine hangs");
        set(0x80, 0x40000);
        set(0x88, u32::try_from(GPA + page * PAGE).unwrap());
        set(0x90, 64);
        set(0x98, 1 | 2);
        assert!(until(LONG, idle), "the engine hangs");
    }
}

/// Serves, lets DMA run in another connection, takes the engine into its own hands and kills the daemon.
fn kill_under_dma(rig: &Rig, more: &[&str]) -> (Daemon, Vmm, Registers) {
    let mut daemon = rig.serve_with(more);
    let mut vmm = rig.join(&daemon, memfd(4), PAGE);
    let mut engine = Engine::of(&daemon, &rig.edu);
    let writer = std::thread::spawn(move || {
        let mut went = 0;
        while engine.try_write(2).is_ok() {
            went += 1;
        }
        went
    });
    let registers = Registers::of(&daemon);
    assert!(vmm.reaches(1));
    daemon.kill();
    assert!(writer.join().unwrap() > 0, "DMA ran");
    (daemon, vmm, registers)
}

pub fn a_killed_daemon(rig: &Rig) {
    let (daemon, vmm, registers) = kill_under_dma(rig, &[]);
    let said = daemon.silence(); // the guardian has done what it does
    assert!(said.iter().any(|line| line.contains(&rig.edu) && line.contains("DMA is blocked")), "{said:?}");
    for page in 0..4 {
        let canary = vmm.fill(page);
        registers.write(page);
        assert_eq!(vmm.bytes(page), canary, "DMA goes on in page {page}");
    }
    drop((registers, vmm));

    let next = Daemon::start_at(Path::new(PASSGATE), &daemon.path, &rig.arguments(&[]));
    let mut vmm = rig.join(&next, memfd(2), PAGE);
    assert!(vmm.reaches(0) && vmm.reaches(1), "a new daemon has the device, and DMA goes again");
}

/// The control: the same, but nobody is left to stop the device.
pub fn without_the_guardian(rig: &Rig) {
    let (daemon, vmm, registers) = kill_under_dma(rig, &["--no-guardian"]);
    let said = daemon.silence();
    assert!(!said.iter().any(|line| line.contains("guardian")), "{said:?}");
    let canary = vmm.fill(0);
    registers.write(0);
    assert_ne!(vmm.bytes(0), canary, "without a guardian DMA goes on for as long as anybody has the device");
}

pub fn the_guardian_is_replaced(rig: &Rig) {
    let (mut daemon, mut vmm) = rig.vmm(2);
    let first = daemon.guardian().unwrap();
    kill_process(first, Signal::KILL).unwrap();
    daemon.says("the guardian died");
    let other = |pid: Pid| pid != first;
    assert!(until(LONG, || daemon.guardian().is_some_and(other)), "no new one came");
    assert!(vmm.reaches(0), "the device goes on meanwhile");
    // The new one may not have been given the device yet when it is there: it is once this has been answered.
    let registers = Registers::of(&daemon);
    let guardian = daemon.guardian().unwrap();
    assert!(until(LONG, || holds_a_device(guardian)), "it was not given the device");
    daemon.kill();
    daemon.silence();
    let canary = vmm.fill(0);
    registers.write(0);
    assert_eq!(vmm.bytes(0), canary, "DMA goes on");
}

fn holds_a_device(pid: Pid) -> bool {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())) else { return false };
    entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).any(|target| {
        let target = target.to_string_lossy().into_owned();
        target.starts_with("/dev/vfio/devices/") || target == "anon_inode:[vfio-device]"
    })
}

/// The client that is killed: its memory is its standard input.
pub fn victim(path: &Path) {
    let mut client = Client::connect(path).unwrap();
    client.add_memory(&AddMemory::shared(GPA, 4 * PAGE), &[&std::io::stdin()]).unwrap();
    println!("ready");
    std::thread::park();
}

pub fn a_killed_client(rig: &Rig) {
    let daemon = rig.serve();
    let (memory, notices) = (memfd(4), Notices::of(&daemon));
    let mut client = Command::new(std::env::current_exe().unwrap())
        .env(VICTIM, &daemon.path)
        .stdin(Stdio::from(copy(&memory)))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"));
    let mut engine = Engine::of(&daemon, &rig.edu);
    let sent = engine.write(1);
    assert_eq!(bytes(&memory, 1), sent, "DMA goes");

    // From here on the engine writes to every page in turn, and is not told of anything.
    let (over, tried) = (AtomicBool::new(false), AtomicU64::new(0));
    let before = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            while !over.load(Relaxed) {
                engine.write(tried.load(Relaxed) % 4);
                tried.fetch_add(1, Relaxed);
            }
        });
        client.kill().unwrap();
        client.wait().unwrap();
        let (before, _) = notices.until("session.closed");
        let canaries: Vec<_> = (0..4).map(|_| fresh()).collect();
        for (page, canary) in (0..).zip(&canaries) {
            memory.write(page * PAGE, canary).unwrap();
        }
        let (begun, first) = (Instant::now(), tried.load(Relaxed));
        // Each page is met after the one that was under way, for a second at least.
        let enough = || begun.elapsed() > Duration::from_secs(1) && tried.load(Relaxed) > first + 4;
        assert!(until(LONG, || writer.is_finished() || enough()));
        over.store(true, Relaxed);
        writer.join().unwrap();
        for (page, canary) in (0..).zip(&canaries) {
            assert_eq!(bytes(&memory, page), *canary, "page {page} changed after session.closed");
        }
        before
    });
    assert!(before.contains(&"region.closed".to_owned()), "session.closed came too early: {before:?}");
    if rig.iommu == "iommufd" {
        assert!(before.contains(&"device.fenced".to_owned()), "devices are stopped first: {before:?}");
    }
    let mut next = rig.join(&daemon, memfd(2), PAGE);
    assert!(next.reaches(1), "the device is there for the next client");
}

pub fn sigterm(rig: &Rig) {
    let (mut daemon, vmm) = rig.vmm(4);
    let mut engine = Engine::of(&daemon, &rig.edu);
    let writer = std::thread::spawn(move || while engine.try_write(1).is_ok() {});
    daemon.terminate();
    let status = daemon.ended(Duration::from_secs(5));
    assert!(status.success(), "{status}");
    assert!(!daemon.path.exists(), "its socket is left");
    writer.join().unwrap();
    daemon.silence();
    drop(vmm);
    let (_daemon, mut next) = rig.vmm(1);
    assert!(next.reaches(0), "the device is free at once");
}

/// The kernel's own word that nothing pins or maps the memory for writing any more: F_SEAL_WRITE.
pub fn the_memory_can_be_sealed(rig: &Rig) {
    let daemon = rig.serve();
    let notices = Notices::of(&daemon);
    let memory = copy(&memfd(4)); // nobody here maps it
    let seal = || rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE);
    let mut client = daemon.client();
    client.add_memory(&AddMemory::shared(GPA, 4 * PAGE), &[&memory.as_fd()]).unwrap();
    assert_eq!(seal(), Err(Errno::BUSY), "the device has it");
    let mut engine = Engine::of(&daemon, &rig.edu);
    let sent = engine.write(1);
    let mut seen = vec![0; sent.len()];
    rustix::io::pread(&memory, &mut seen, PAGE).unwrap();
    assert_eq!(seen, sent);
    drop(client);
    notices.until("session.closed");
    assert_eq!(seal(), Ok(()), "after session.closed");
}
