//! Recovery without a reboot: however a daemon died, the next one has the devices.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use passgate_bindings::PAGE;
use rustix::process::{Signal, kill_process};
use tempfile::TempDir;

use super::rig::{Engine, PASSGATE, Rig, memfd};
use crate::daemon::{Daemon, LONG, Notices, until};

/// How often a daemon is killed, where `PASSGATE_KILLS` does not say.
const KILLS: u64 = 10;

/// Devices of three kinds: the engine, and two that are reset when their daemon dies.
fn devices() -> [String; 2] {
    ["PASSGATE_NVME", "PASSGATE_IGB"].map(|variable| std::env::var(variable).unwrap())
}

/// `kill -9` at moments that go through all there are: while it takes the devices, and under DMA; with its guardian,
/// without it, and without ever having had one. The next start takes the devices by itself each time.
pub fn a_crash_loop(rig: &Rig) {
    let kills = std::env::var("PASSGATE_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let place = TempDir::new().unwrap();
    let path = place.path().join("passgate.sock");
    let [nvme, igb] = devices();
    let mut arguments = rig.arguments(&["--device", &nvme, "--device", &igb]);
    for n in 0..kills {
        killed_while_it_starts(&path, &arguments, Duration::from_millis(n * 61 % 500));
        if n % 3 == 2 {
            arguments.push("--no-guardian");
        }
        let mut daemon = Daemon::start_at(Path::new(PASSGATE), &path, &arguments);
        let mut vmm = rig.join(&daemon, memfd(4), PAGE);
        assert!(vmm.reaches(n % 4), "kill {n}: it has the engine, and DMA goes");
        let mut engine = Engine::of(&daemon, &rig.edu);
        let writer = std::thread::spawn(move || while engine.try_write(2).is_ok() {});
        std::thread::sleep(Duration::from_millis(n * 37 % 200)); // any moment of a transfer will do
        let guardian = daemon.guardian();
        assert_eq!(guardian.is_none(), n % 3 == 2);
        daemon.kill();
        if let Some(guardian) = guardian.filter(|_| n % 3 == 1) {
            let _ = kill_process(guardian, Signal::KILL); // it may have ended
        }
        writer.join().unwrap();
        arguments.retain(|argument| *argument != "--no-guardian");
    }
    let last = Daemon::start_at(Path::new(PASSGATE), &path, &arguments);
    let mut vmm = rig.join(&last, memfd(4), PAGE);
    assert!(vmm.reaches(0));
    let status = last.client().status().unwrap();
    let has: Vec<_> = status.devices.iter().map(|device| device.device.as_str()).collect();
    assert_eq!(has, [&rig.edu, &nvme, &igb]);
}

fn killed_while_it_starts(path: &Path, arguments: &[&str], after: Duration) {
    let mut child = Command::new(PASSGATE)
        .args(["serve", "--socket-path"])
        .arg(path)
        .args(arguments)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(after); // any moment of its start will do
    assert!(child.try_wait().unwrap().is_none(), "it does not give up");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// An unbind from vfio-pci waits until nobody has the device open: the daemon stops the device, says so, and ends, and
/// the unbind returns. Bound again, the device goes to the next daemon. A drive, whose driver may look for the request too,
/// and the engine.
pub fn the_host_wants_a_device_back(rig: &Rig) {
    let [nvme, _] = devices();
    for device in [&nvme, &rig.edu] {
        let arguments = rig.arguments(&["--device", &nvme]);
        wants_back(rig, &arguments, device);
    }
}

fn wants_back(rig: &Rig, arguments: &[&str], device: &str) {
    let driver = Path::new("/sys/bus/pci/drivers/vfio-pci");
    let mut daemon = Daemon::start(Path::new(PASSGATE), arguments);
    let mut vmm = rig.join(&daemon, memfd(2), PAGE);
    assert!(vmm.reaches(0));
    let notices = Notices::of(&daemon);
    let (unbind, name) = (driver.join("unbind"), device.to_owned());
    let unbinding = std::thread::spawn(move || std::fs::write(unbind, name));
    let (_, wanted) = notices.until("device.wanted");
    assert_eq!(wanted.details["device"], device);
    assert!(daemon.ended(LONG).success(), "{:?}", daemon.silence());
    assert!(until(LONG, || unbinding.is_finished()), "the unbind hangs");
    unbinding.join().unwrap().unwrap();
    assert!(!driver.join(device).exists());
    std::fs::write(driver.join("bind"), device).unwrap();
    drop(vmm);
    let next = Daemon::start_at(Path::new(PASSGATE), &daemon.path, arguments);
    let mut vmm = rig.join(&next, memfd(2), PAGE);
    assert!(vmm.reaches(0), "a new daemon has the device");
}
