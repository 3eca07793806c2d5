//! What is refused at the start, and that the reason helps.

use std::path::Path;

use super::rig::{PASSGATE, Rig};
use crate::daemon::serve_fails;

pub fn not_free(rig: &Rig) {
    let _first = rig.serve();
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("other.sock");
    for (device, says) in [
        (rig.edu.as_str(), "another process has"),
        ("0000:00:07.0", "not to vfio-pci; bind it:"), // the root port in front of igb
        ("ffff:ff:1f.7", "there is no such PCI device"),
        ("4:0.0", "names no device: write a PCI address"),
    ] {
        let arguments = ["--iommu", rig.iommu, "--device", device];
        let (code, said) = serve_fails(Path::new(PASSGATE), &path, &arguments);
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains(device) && said.contains(says), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!path.exists(), "a socket is left");
    }
}
