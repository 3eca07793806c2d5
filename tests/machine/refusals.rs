//! What is refused at the start, and that the reason helps.

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use passgate::client::Client;
use passgate_bindings::vfio::pci::{PciDevice, SYSFS};
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::rig::{PASSGATE, Rig};
use crate::daemon::{LONG, serve_fails, until};

/// A user without any right.
const NOBODY: u32 = 65534;

pub fn not_free(rig: &Rig) {
    let first = rig.serve();
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("other.sock");
    let holder = format!("process {} (`{PASSGATE} serve --socket-path", first.pid().as_raw_nonzero());
    for (device, says) in [
        (rig.edu.as_str(), holder.as_str()),
        (rig.edu.as_str(), "has it: stop that process"),
        ("0000:00:1f.3", "not to vfio-pci; bind it:"), // the SMBus controller
        ("0000:00:07.0", "is a bridge"),
        ("ffff:ff:1f.7", "there is no such PCI device"),
        ("4:0.0", "names no device: write a PCI address"),
    ] {
        let arguments = ["--wait", "0", "--allow-unstoppable", "--iommu", rig.iommu, "--device", device];
        let (code, said) = serve_fails(Path::new(PASSGATE), &path, &arguments);
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains(device) && said.contains(says), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!path.exists(), "a socket is left");
    }
}

/// Whether a daemon answers there.
fn serves(path: &Path) -> bool {
    Client::connect(path).is_ok_and(|mut client| client.status().is_ok())
}

/// A taken device is waited for: its holder is named once, and when it lets go the device is served.
pub fn waited_for(rig: &Rig) {
    let mut first = rig.serve();
    assert!(serves(&first.path), "it hears a signal from here on");
    let place = TempDir::new().unwrap();
    let arguments = rig.arguments(&["--wait", "60"]);
    let mut second = Command::new(PASSGATE)
        .args(["serve", "--socket-path"])
        .arg(place.path().join("second.sock"))
        .args(&arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(second.stderr.take().unwrap()));
    let mut waits = || lines.find(|line| line.as_ref().unwrap().contains("trying again")).unwrap().unwrap();
    let said = waits();
    assert!(said.contains(&format!("process {} (", first.pid().as_raw_nonzero())), "{said}");
    first.terminate();
    assert!(first.ended(LONG).success());
    let path = place.path().join("second.sock");
    assert!(until(LONG, || serves(&path)), "the device is free, and not taken");
    kill_process(Pid::from_child(&second), Signal::TERM).unwrap();
    assert!(second.wait().unwrap().success());
    let more: Vec<_> = lines.map(Result::unwrap).filter(|line| line.contains("trying again")).collect();
    assert!(more.is_empty(), "said once: {more:?}");
}

/// The kernel's log, from when it is made.
struct KernelLog(fs::File);

impl KernelLog {
    fn from_now() -> Self {
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        let mut log = fs::File::options().read(true).custom_flags(nonblocking).open("/dev/kmsg").unwrap();
        log.seek(SeekFrom::End(0)).unwrap();
        Self(log)
    }

    /// How often the kernel has said of `device` that it resets it, since it was asked last.
    fn resets(&mut self, device: &str) -> usize {
        let (mut count, mut record) = (0, [0; 8192]);
        // One record a call; a reader that is overtaken is told so once, and goes on.
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

/// A group whose only descriptor lies in a socket: no process is seen to have it, and yet it is somebody's.
pub fn unseen_holder(rig: &Rig) {
    let device = std::env::var("PASSGATE_IGB").unwrap();
    let pci = PciDevice::find(Path::new(SYSFS), device.parse().unwrap()).unwrap();
    let group = format!("/dev/vfio/{}", pci.group().unwrap().id);
    let group = fs::File::options().read(true).write(true).open(group).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    passgate::protocol::frame::send(&near, b"one\0", &[group.as_fd()]).unwrap();
    drop(group);
    let mut log = KernelLog::from_now();
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("passgate.sock");
    let arguments = ["--wait", "3", "--iommu", rig.iommu, "--device", &device];
    let (code, said) = serve_fails(Path::new(PASSGATE), &path, &arguments);
    let last = said.lines().last().unwrap();
    assert_eq!(code, Some(3), "{said}");
    assert!(last.contains("no process is seen to have it") && !last.contains("/remove"), "{said}");
    assert_eq!(log.resets(&device), 0, "what somebody has is reset");
    drop((near, far));
    fs::write(pci.dir().join("reset"), "1").unwrap();
    assert_ne!(log.resets(&device), 0, "the log shows no reset");
}

/// The engine on type1 has nothing that stops it.
pub fn unstoppable(rig: &Rig) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("passgate.sock");
    let (code, said) = serve_fails(Path::new(PASSGATE), &path, &["--iommu", rig.iommu, "--device", &rig.edu]);
    assert_eq!((code, said.lines().count()), (Some(3), 1), "{said}");
    assert!(said.contains(&format!("{} cannot be stopped for certain", rig.edu)), "{said}");
    assert!(said.contains("use --iommu iommufd") && said.contains("--allow-unstoppable"), "{said}");
    let daemon = rig.serve();
    daemon.says("cannot be stopped for certain, which --allow-unstoppable accepts");
    assert_eq!(daemon.client().status().unwrap().devices[0].stop, ["unmap"]);
}

/// A file whose mode is as it was when this goes.
struct Opened(PathBuf, Permissions);

impl Opened {
    /// Lets everybody open it.
    fn to_all(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let mode = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        Self(path, mode)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        fs::set_permissions(&self.0, self.1.clone()).unwrap();
    }
}

/// Without a right to a file the reason names what to give, file after file; with all of them it serves.
pub fn without_rights(rig: &Rig) {
    let device = PciDevice::find(Path::new(SYSFS), rig.edu.parse().unwrap()).unwrap();
    let place = TempDir::new().unwrap();
    fs::set_permissions(place.path(), Permissions::from_mode(0o777)).unwrap();
    let path = place.path().join("passgate.sock");
    let arguments = rig.arguments(&["--wait", "0"]);
    let serve = || {
        let mut command = Command::new(PASSGATE);
        command.args(["serve", "--socket-path"]).arg(&path).args(&arguments).uid(NOBODY).gid(NOBODY);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let refused = |says: &str| {
        let output = serve().wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said.lines().count()), (Some(3), 1), "{said}");
        assert!(said.contains("Permission denied") && said.contains(says), "{said}");
    };
    let files = if rig.iommu == "iommufd" {
        let cdev = format!("/dev/vfio/devices/{}", device.cdev().unwrap().name);
        [
            ("/dev/iommu".to_owned(), "give this user /dev/iommu"),
            (cdev, "give this user the character device that the device's vfio-dev directory names"),
        ]
    } else {
        let group = format!("/dev/vfio/{}", device.group().unwrap().id);
        // Everybody may open the container, which gives nothing.
        [("/dev/vfio/vfio".to_owned(), ""), (group, "give this user /dev/vfio/GROUP")]
    };
    let mut opened = Vec::new();
    for (file, says) in files {
        if !says.is_empty() {
            refused(says);
        }
        opened.push(Opened::to_all(file));
    }
    let mut child = serve();
    assert!(until(LONG, || serves(&path) || child.try_wait().unwrap().is_some()));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
