//! Recovery without a reboot: however a daemon died, the next one gets the devices.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use passgate_bindings::PAGE;
use rustix::process::{Signal, kill_process};
use tempfile::TempDir;

use super::rig::{Engine, PASSGATE, Rig, memfd};
use crate::daemon::{Daemon, Notices, TIMEOUT, wait_until};

/// The number of kills, unless `PASSGATE_KILLS` sets another.
const KILLS: u64 = 10;

/// Returns two devices that are reset when their daemon dies; with the edu device they are three kinds.
fn devices() -> [String; 2] {
    ["PASSGATE_NVME", "PASSGATE_IGB"].map(|variable| std::env::var(variable).unwrap())
}

/// `kill -9` at increasing delays: while the daemon takes the devices, and under DMA; with its guardian alive, with its guardian
/// killed, and without a guardian. Each time the next daemon takes the devices without help.
pub fn crash_loop(rig: &Rig) {
    let kills = std::env::var("PASSGATE_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("passgate.sock");
    let [nvme, igb] = devices();
    let mut arguments = rig.arguments(&["--device", &nvme, "--device", &igb]);
    for n in 0..kills {
        kill_while_starting(&path, &arguments, Duration::from_millis(n * 61 % 500));
        if n % 3 == 2 {
            arguments.push("--no-guardian");
        }
        let mut daemon = Daemon::start_at(Path::new(PASSGATE), &path, &arguments);
        let mut vmm = rig.join(&daemon, memfd(4), PAGE);
        assert!(vmm.reaches(n % 4), "kill {n}: no DMA of the edu device");
        let mut engine = Engine::connect(&daemon, &rig.edu);
        let writer = std::thread::spawn(move || while engine.try_write(2).is_ok() {});
        std::thread::sleep(Duration::from_millis(n * 37 % 200)); // any point of a transfer will do
        let guardian = daemon.guardian();
        assert_eq!(guardian.is_none(), n % 3 == 2);
        daemon.kill();
        if let Some(guardian) = guardian.filter(|_| n % 3 == 1) {
            let _ = kill_process(guardian, Signal::KILL); // it may have ended already
        }
        writer.join().unwrap();
        arguments.retain(|argument| *argument != "--no-guardian");
    }
    let last_daemon = Daemon::start_at(Path::new(PASSGATE), &path, &arguments);
    let mut vmm = rig.join(&last_daemon, memfd(4), PAGE);
    assert!(vmm.reaches(0));
    let status = last_daemon.client().status().unwrap();
    let served_devices: Vec<_> = status.devices.iter().map(|device| device.device.as_str()).collect();
    assert_eq!(served_devices, [&rig.edu, &nvme, &igb]);
}

/// Starts a daemon and kills it after `delay`.
fn kill_while_starting(path: &Path, arguments: &[&str], delay: Duration) {
    let mut child = Command::new(PASSGATE)
        .args(["serve", "--socket-path"])
        .arg(path)
        .args(arguments)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(delay); // any point of its start will do
    assert!(child.try_wait().unwrap().is_none(), "the daemon must not give up");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// An unbind from vfio-pci blocks until the device is closed: the daemon reports the request, stops the device and ends, and the
/// unbind returns. After a new bind the next daemon gets the device. Tested with the drive, whose driver may receive the
/// request too, and with the edu device.
pub fn device_request(rig: &Rig) {
    let [nvme, _] = devices();
    for device in [&nvme, &rig.edu] {
        let arguments = rig.arguments(&["--device", &nvme]);
        request_device(rig, &arguments, device);
    }
}

fn request_device(rig: &Rig, arguments: &[&str], device: &str) {
    let driver = Path::new("/sys/bus/pci/drivers/vfio-pci");
    let mut daemon = Daemon::start(Path::new(PASSGATE), arguments);
    let mut vmm = rig.join(&daemon, memfd(2), PAGE);
    assert!(vmm.reaches(0));
    let notices = Notices::subscribe(&daemon);
    let (unbind, name) = (driver.join("unbind"), device.to_owned());
    let unbinding = std::thread::spawn(move || std::fs::write(unbind, name));
    let (_, notice) = notices.wait_for("device.wanted");
    assert_eq!(notice.details["device"], device);
    assert!(daemon.wait_exit(TIMEOUT).success(), "{:?}", daemon.wait_stderr_closed());
    assert!(wait_until(TIMEOUT, || unbinding.is_finished()), "the unbind hangs");
    unbinding.join().unwrap().unwrap();
    assert!(!driver.join(device).exists());
    std::fs::write(driver.join("bind"), device).unwrap();
    drop(vmm);
    let next = Daemon::start_at(Path::new(PASSGATE), &daemon.path, arguments);
    let mut vmm = rig.join(&next, memfd(2), PAGE);
    assert!(vmm.reaches(0), "the next daemon must get the device");
}
