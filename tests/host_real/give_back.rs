//! The helper that returns a borrowed device to its driver (`passgate give-back`), as a real process with a sysfs made of files.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const ADDRESS: &str = "0000:04:00.0";

/// Returns a sysfs in which a device is bound to nvme and its `driver_override`, `none` before, is `vfio-pci`: the state of a
/// device that was being taken when the borrower stopped half-way.
fn half_taken_device() -> TempDir {
    let sysfs = tempfile::tempdir().unwrap();
    let device = sysfs.path().join("bus/pci/devices").join(ADDRESS);
    fs::create_dir_all(&device).unwrap();
    symlink("../../drivers/nvme", device.join("driver")).unwrap();
    fs::write(device.join("driver_override"), "vfio-pci\n").unwrap();
    sysfs
}

fn driver_override(sysfs: &TempDir) -> String {
    fs::read_to_string(sysfs.path().join("bus/pci/devices").join(ADDRESS).join("driver_override")).unwrap()
}

/// Starts a borrower and a helper. The borrower's standard output is the helper's standard input, whose end of file starts the
/// return of the device. Returns both once the helper is ready.
fn start(sysfs: &TempDir) -> (Child, Child) {
    let request = format!(
        r#"{{"sysfs":"{}","device":"{ADDRESS}","before":{{"driver":"nvme","only":"none","power":null}}}}"#,
        sysfs.path().display()
    );
    // The tests may run with signals ignored, as under nohup, and a child inherits that.
    let mut borrower = Command::new("env")
        .args(["--default-signal", "sh", "-c", "echo \"$0\"; exec sleep 1000", &request])
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
    assert_eq!(
        driver_override(sysfs),
        "vfio-pci\n",
        "nothing may be returned while the borrower has the pipe open"
    );
    (borrower, helper)
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// A signal to a terminal's or a unit's processes reaches both: only the borrower may end by it.
pub(crate) fn borrowed_device_is_returned_when_borrower_dies() {
    for signal in [Signal::KILL, Signal::INT, Signal::TERM, Signal::HUP] {
        let sysfs = half_taken_device();
        let (mut borrower, mut helper) = start(&sysfs);
        if signal != Signal::KILL {
            kill_process(pid(&helper), signal).unwrap();
        }
        kill_process(pid(&borrower), signal).unwrap();
        borrower.wait().unwrap();
        let status = helper.wait().unwrap();
        let mut stderr_text = String::new();
        helper.stderr.take().unwrap().read_to_string(&mut stderr_text).unwrap();
        assert!(status.success(), "{signal:?}: {status}: {stderr_text}");
        assert_eq!(driver_override(&sysfs), "none\n", "{signal:?}");
    }
}

/// A device that cannot be returned is reported, with its state and the intended one.
pub(crate) fn failed_return_of_device_is_reported() {
    let sysfs = half_taken_device();
    let device = sysfs.path().join("bus/pci/devices").join(ADDRESS);
    fs::remove_file(device.join("driver")).unwrap();
    let (mut borrower, mut helper) = start(&sysfs);
    borrower.kill().unwrap();
    borrower.wait().unwrap();
    assert_eq!(helper.wait().unwrap().code(), Some(3));
    let mut stderr_text = String::new();
    helper.stderr.take().unwrap().read_to_string(&mut stderr_text).unwrap();
    assert!(
        stderr_text
            .contains("0000:04:00.0: not given back: it is bound to no driver, driver_override none and not"),
        "{stderr_text}"
    );
    assert_eq!(stderr_text.lines().count(), 1, "{stderr_text}");
}
