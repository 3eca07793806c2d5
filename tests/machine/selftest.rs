//! `passgate selftest` with every device of the machine.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::rig::{PASSGATE, Rig};
use crate::daemon::{TIMEOUT, wait_until};
use crate::nested::disk::Disk;

/// No check fails, and no capability that a device reports is skipped.
pub fn every_device(rig: &Rig) {
    let variables = ["EDU", "NVME", "IGB", "VIRTIO_NET", "VIRTIO_GPU"];
    let addresses = variables.map(|name| std::env::var(format!("PASSGATE_{name}")).unwrap());
    for device in addresses.iter().flat_map(|names| names.split_whitespace().take(1)) {
        let output = Command::new(PASSGATE)
            .args(["selftest", "--json", "--scratch", "--iommu", rig.iommu, "--device", device])
            .output()
            .unwrap();
        let report_text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "{device}: {report_text} {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let report: Value = serde_json::from_str(&report_text).unwrap();
        assert_eq!(report["failed"], 0, "{report_text}");
        println!("{device}: {} passed, {} skipped", report["passed"], report["skipped"]);
    }
}

/// Returns the driver of a device (empty if it has none), its `driver_override` and its `power/control`.
fn binding(device: &str) -> [String; 3] {
    let dir = Path::new("/sys/bus/pci/devices").join(device);
    let driver = fs::read_link(dir.join("driver")).unwrap_or_default();
    let driver = driver.file_name().unwrap_or_default().to_str().unwrap();
    // A kernel without power management has no `power/control`.
    let text = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    [driver.to_owned(), text("driver_override"), text("power/control")]
}

/// The drive is bound to the kernel's driver, and `driver_override` excludes every driver: after a selftest, and after one that
/// is killed, both are as before.
pub fn borrowed(rig: &Rig) {
    let drive = std::env::var("PASSGATE_NVME").unwrap();
    let _disk = Disk::bind(&drive);
    fs::write(Path::new("/sys/bus/pci/devices").join(&drive).join("driver_override"), "none\n").unwrap();
    let before = binding(&drive);
    assert_eq!([&before[0][..], &before[1]], ["nvme", "none\n"]);
    let test = || {
        let mut test = Command::new(PASSGATE);
        test.args(["selftest", "--bind", "--no-crash", "--iommu", rig.iommu, "--device", &drive]);
        test
    };
    let output = test().output().unwrap();
    let report_text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{report_text} {}", String::from_utf8_lossy(&output.stderr));
    assert!(report_text.contains("bound to nvme, driver_override none"), "{report_text}");
    assert_eq!(binding(&drive), before);

    let mut killed_test = test().stdout(Stdio::piped()).spawn().unwrap();
    let mut row = String::new();
    BufReader::new(killed_test.stdout.take().unwrap()).read_line(&mut row).unwrap();
    assert!(row.starts_with("pass  stop class"), "{row}");
    assert_eq!(binding(&drive)[0], "vfio-pci");
    killed_test.kill().unwrap();
    killed_test.wait().unwrap();
    assert!(
        wait_until(TIMEOUT, || binding(&drive) == before),
        "the binding is {:?}, expected {before:?}",
        binding(&drive)
    );
}

/// Returns why no drive can be borrowed here, if none can.
pub fn no_driver() -> Option<&'static str> {
    (!Path::new("/sys/bus/pci/drivers/nvme").exists()).then_some("this kernel has no driver for the drive")
}
