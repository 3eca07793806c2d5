//! Refusals at the start of `serve`, and their remedies.

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use passgate_bindings::vfio::pci::{PciDevice, SYSFS};
use passgate_client::Client;
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::rig::{PASSGATE, Rig};
use crate::daemon::{TIMEOUT, serve_fails, wait_until};

/// The user and group id of an unprivileged user.
const UNPRIVILEGED_UID: u32 = 65534;

pub fn busy_device(rig: &Rig) {
    let first = rig.serve();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.sock");
    let holder = format!("process {} (`{PASSGATE} serve --socket-path", first.pid().as_raw_nonzero());
    for (device, expected) in [
        (rig.edu.as_str(), holder.as_str()),
        (rig.edu.as_str(), "has it: stop that process"),
        ("0000:00:1f.3", "not to vfio-pci; bind it:"), // the SMBus controller
        ("0000:00:07.0", "is a bridge"),
        ("ffff:ff:1f.7", "there is no such PCI device"),
        ("4:0.0", "names no device: write a PCI address"),
    ] {
        let arguments = ["--wait", "0", "--allow-unstoppable", "--iommu", rig.iommu, "--device", device];
        let (code, stderr) = serve_fails(Path::new(PASSGATE), &path, &arguments);
        assert_eq!(code, Some(3), "{stderr}");
        assert!(stderr.contains(device) && stderr.contains(expected), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(!path.exists(), "the socket was not removed");
    }
}

/// Returns true if a daemon answers at this socket.
fn serves(path: &Path) -> bool {
    Client::connect(path).is_ok_and(|mut client| client.status().is_ok())
}

/// `--wait` waits for a device in use: the process that has it is named once, and after its end the device is served.
pub fn wait_for_device(rig: &Rig) {
    let mut first = rig.serve();
    assert!(serves(&first.path), "the daemon does not answer");
    let dir = TempDir::new().unwrap();
    let arguments = rig.arguments(&["--wait", "60"]);
    let mut second = Command::new(PASSGATE)
        .args(["serve", "--socket-path"])
        .arg(dir.path().join("second.sock"))
        .args(&arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(second.stderr.take().unwrap()));
    let mut next_retry_line =
        || lines.find(|line| line.as_ref().unwrap().contains("trying again")).unwrap().unwrap();
    let retry_line = next_retry_line();
    assert!(retry_line.contains(&format!("process {} (", first.pid().as_raw_nonzero())), "{retry_line}");
    first.terminate();
    assert!(first.wait_exit(TIMEOUT).success());
    let path = dir.path().join("second.sock");
    assert!(wait_until(TIMEOUT, || serves(&path)), "the daemon has not taken the free device");
    kill_process(Pid::from_child(&second), Signal::TERM).unwrap();
    assert!(second.wait().unwrap().success());
    let further_lines: Vec<_> =
        lines.map(Result::unwrap).filter(|line| line.contains("trying again")).collect();
    assert!(further_lines.is_empty(), "reported more than once: {further_lines:?}");
}

/// The kernel log from the time on at which this is created.
struct KernelLog(fs::File);

impl KernelLog {
    fn from_now() -> Self {
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        let mut log = fs::File::options().read(true).custom_flags(nonblocking).open("/dev/kmsg").unwrap();
        log.seek(SeekFrom::End(0)).unwrap();
        Self(log)
    }

    /// Returns how often the kernel has logged a reset of `device` since the last call.
    fn resets(&mut self, device: &str) -> usize {
        let (mut count, mut record) = (0, [0; 8192]);
        // /dev/kmsg: a read returns one record, and EPIPE once if records were overwritten before they were read.
        loop {
            match self.0.read(&mut record) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    count += usize::from(text.contains(&format!("{device}: resetting")));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return count,
                Err(error) => assert_eq!(error.kind(), ErrorKind::BrokenPipe),
            }
        }
    }
}

/// A group whose only descriptor is in flight in a socket: it is in use although no process is seen to have it open.
pub fn unseen_holder(rig: &Rig) {
    let device = std::env::var("PASSGATE_IGB").unwrap();
    let pci = PciDevice::find(Path::new(SYSFS), device.parse().unwrap()).unwrap();
    let group = format!("/dev/vfio/{}", pci.group().unwrap().id);
    let group = fs::File::options().read(true).write(true).open(group).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    passgate_client::protocol::frame::send(&near, b"one\0", &[group.as_fd()]).unwrap();
    drop(group);
    let mut log = KernelLog::from_now();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("passgate.sock");
    let arguments = ["--wait", "3", "--iommu", rig.iommu, "--device", &device];
    let (code, stderr) = serve_fails(Path::new(PASSGATE), &path, &arguments);
    let last = stderr.lines().last().unwrap();
    assert_eq!(code, Some(3), "{stderr}");
    assert!(last.contains("no process is seen to have it") && !last.contains("/remove"), "{stderr}");
    assert_eq!(log.resets(&device), 0, "a device in use was reset");
    drop((near, far));
    fs::write(pci.dir().join("reset"), "1").unwrap();
    assert_ne!(log.resets(&device), 0, "the kernel log shows no reset");
}

/// On type1 nothing stops the edu device for certain.
pub fn unstoppable(rig: &Rig) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("passgate.sock");
    let (code, stderr) =
        serve_fails(Path::new(PASSGATE), &path, &["--iommu", rig.iommu, "--device", &rig.edu]);
    assert_eq!((code, stderr.lines().count()), (Some(3), 1), "{stderr}");
    assert!(stderr.contains(&format!("{} cannot be stopped for certain", rig.edu)), "{stderr}");
    assert!(stderr.contains("use --iommu iommufd") && stderr.contains("--allow-unstoppable"), "{stderr}");
    let daemon = rig.serve();
    daemon.wait_for_line("cannot be stopped for certain, which --allow-unstoppable accepts");
    assert_eq!(daemon.client().status().unwrap().devices[0].stop, ["unmap"]);
}

/// A file that every user may read and write until this is dropped, which restores its mode.
struct WorldWritable(PathBuf, Permissions);

impl WorldWritable {
    /// Sets the mode 0666.
    fn set(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let mode = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        Self(path, mode)
    }
}

impl Drop for WorldWritable {
    fn drop(&mut self) {
        fs::set_permissions(&self.0, self.1.clone()).unwrap();
    }
}

/// Without permission for a device file the daemon names the file to grant, one after the other; with all of them it serves.
pub fn missing_permission(rig: &Rig) {
    let device = PciDevice::find(Path::new(SYSFS), rig.edu.parse().unwrap()).unwrap();
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
    let path = dir.path().join("passgate.sock");
    let arguments = rig.arguments(&["--wait", "0"]);
    let serve = || {
        let mut command = Command::new(PASSGATE);
        command
            .args(["serve", "--socket-path"])
            .arg(&path)
            .args(&arguments)
            .uid(UNPRIVILEGED_UID)
            .gid(UNPRIVILEGED_UID);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let refused = |expected: &str| {
        let output = serve().wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(3), 1), "{stderr}");
        assert!(stderr.contains("Permission denied") && stderr.contains(expected), "{stderr}");
    };
    let files = if rig.iommu == "iommufd" {
        let cdev = format!("/dev/vfio/devices/{}", device.cdev().unwrap().name);
        [
            ("/dev/iommu".to_owned(), "give this user /dev/iommu"),
            (cdev, "give this user the character device that the device's vfio-dev directory names"),
        ]
    } else {
        let group = format!("/dev/vfio/{}", device.group().unwrap().id);
        // Every user may open the container, which grants no access by itself.
        [("/dev/vfio/vfio".to_owned(), ""), (group, "give this user /dev/vfio/GROUP")]
    };
    let mut permissions = Vec::new();
    for (file, expected) in files {
        if !expected.is_empty() {
            refused(expected);
        }
        permissions.push(WorldWritable::set(file));
    }
    let mut child = serve();
    assert!(wait_until(TIMEOUT, || serves(&path) || child.try_wait().unwrap().is_some()));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
