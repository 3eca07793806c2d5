//! The helper that gives a device back, as a real process beside a sysfs made of files.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const ADDRESS: &str = "0000:04:00.0";

/// A device that nvme has, whose restriction was `none` when its taking began and stopped half-way.
fn half_taken() -> TempDir {
    let sysfs = tempfile::tempdir().unwrap();
    let device = sysfs.path().join("bus/pci/devices").join(ADDRESS);
    fs::create_dir_all(&device).unwrap();
    symlink("../../drivers/nvme", device.join("driver")).unwrap();
    fs::write(device.join("driver_override"), "vfio-pci\n").unwrap();
    sysfs
}

fn restriction(sysfs: &TempDir) -> String {
    fs::read_to_string(sysfs.path().join("bus/pci/devices").join(ADDRESS).join("driver_override")).unwrap()
}

/// Starts a helper whose pipe `sh` has, as its own standard output. Both are returned once the helper is ready.
fn start(sysfs: &TempDir) -> (Child, Child) {
    let order = format!(
        r#"{{"sysfs":"{}","device":"{ADDRESS}","before":{{"driver":"nvme","only":"none","power":null}}}}"#,
        sysfs.path().display()
    );
    // Whoever starts the tests may ignore signals, as nohup does, and a program inherits that.
    let mut borrower = Command::new("env")
        .args(["--default-signal", "sh", "-c", "echo \"$0\"; exec sleep 1000", &order])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut helper = Command::new(env!("CARGO_BIN_EXE_passgate"))
        .args(["give-back", ADDRESS])
        .stdin(borrower.stdout.take().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(helper.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    assert_eq!(restriction(sysfs), "vfio-pci\n", "nothing is given back while somebody has the pipe");
    (borrower, helper)
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Every signal that ends a terminal's or a unit's processes reaches both; only the borrower ends by it.
pub(crate) fn a_borrower_that_dies_gives_back() {
    for signal in [Signal::KILL, Signal::INT, Signal::TERM, Signal::HUP] {
        let sysfs = half_taken();
        let (mut borrower, mut helper) = start(&sysfs);
        if signal != Signal::KILL {
            kill_process(pid(&helper), signal).unwrap();
        }
        kill_process(pid(&borrower), signal).unwrap();
        borrower.wait().unwrap();
        let status = helper.wait().unwrap();
        let mut said = String::new();
        helper.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(status.success(), "{signal:?}: {status}: {said}");
        assert_eq!(restriction(&sysfs), "none\n", "{signal:?}");
    }
}

/// A device that cannot be given back is told of, with its state and what it should be.
pub(crate) fn a_device_that_is_not_given_back_is_told() {
    let sysfs = half_taken();
    let device = sysfs.path().join("bus/pci/devices").join(ADDRESS);
    fs::remove_file(device.join("driver")).unwrap();
    let (mut borrower, mut helper) = start(&sysfs);
    borrower.kill().unwrap();
    borrower.wait().unwrap();
    assert_eq!(helper.wait().unwrap().code(), Some(3));
    let mut said = String::new();
    helper.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(
        said.contains("0000:04:00.0: not given back: it is bound to no driver, driver_override none and not"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
}
