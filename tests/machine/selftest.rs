//! `passgate selftest` on every device of the machine.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::rig::{PASSGATE, Rig};
use crate::daemon::{LONG, until};
use crate::nested::disk::Disk;

/// Nothing fails, and what a device says it has was done.
pub fn every_device(rig: &Rig) {
    let variables = ["EDU", "NVME", "IGB", "VIRTIO_NET", "VIRTIO_GPU"];
    let named = variables.map(|name| std::env::var(format!("PASSGATE_{name}")).unwrap());
    for device in named.iter().flat_map(|names| names.split_whitespace().take(1)) {
        let output = Command::new(PASSGATE)
            .args(["selftest", "--json", "--scratch", "--iommu", rig.iommu, "--device", device])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{device}: {said} {}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(report["failed"], 0, "{said}");
        println!("{device}: {} passed, {} skipped", report["passed"], report["skipped"]);
    }
}

/// The driver of a device and what decides it; an empty name where it has none.
fn binding(device: &str) -> [String; 3] {
    let dir = Path::new("/sys/bus/pci/devices").join(device);
    let driver = fs::read_link(dir.join("driver")).unwrap_or_default();
    let driver = driver.file_name().unwrap_or_default().to_str().unwrap();
    // A kernel without power management has no policy of it.
    let text = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    [driver.to_owned(), text("driver_override"), text("power/control")]
}

/// The kernel's own driver has the drive, and a restriction keeps it from every other: after a test, and after a test
/// that is killed, all of that is as it was.
pub fn borrowed(rig: &Rig) {
    let drive = std::env::var("PASSGATE_NVME").unwrap();
    let _disk = Disk::take(&drive);
    fs::write(Path::new("/sys/bus/pci/devices").join(&drive).join("driver_override"), "none\n").unwrap();
    let before = binding(&drive);
    assert_eq!([&before[0][..], &before[1]], ["nvme", "none\n"]);
    let test = || {
        let mut test = Command::new(PASSGATE);
        test.args(["selftest", "--bind", "--no-crash", "--iommu", rig.iommu, "--device", &drive]);
        test
    };
    let output = test().output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said} {}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("bound to nvme, driver_override none"), "{said}");
    assert_eq!(binding(&drive), before);

    let mut killed = test().stdout(Stdio::piped()).spawn().unwrap();
    let mut row = String::new();
    BufReader::new(killed.stdout.take().unwrap()).read_line(&mut row).unwrap();
    assert!(row.starts_with("pass  stop class"), "{row}");
    assert_eq!(binding(&drive)[0], "vfio-pci");
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(until(LONG, || binding(&drive) == before), "it is {:?} and not {before:?}", binding(&drive));
}

/// Why no drive can be borrowed here.
pub fn no_driver() -> Option<&'static str> {
    (!Path::new("/sys/bus/pci/drivers/nvme").exists()).then_some("this kernel has no driver for the drive")
}
