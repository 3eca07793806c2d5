//! `passgate selftest` on every device of the machine.

use std::process::Command;

use serde_json::Value;

use super::rig::{PASSGATE, Rig};

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
