//! `serve --strict` with a device whose ATS is on.

use std::path::Path;

use passgate::client::PageState;
use passgate_bindings::PAGE;

use super::rig::{GPA, PASSGATE, Rig, Vmm, fresh, memfd};
use crate::daemon::{Daemon, LONG, serve_fails, until};

/// An unmap alone proves nothing of a device that caches translations: it is detached first, and comes back. Where
/// nothing detaches it, it is not taken.
pub fn a_device_with_ats(rig: &Rig) {
    let device = std::env::var("PASSGATE_VIRTIO_NET").unwrap();
    let arguments = ["--iommu", rig.iommu, "--device", &device, "--allow-dma", "--strict"];
    if rig.iommu == "type1" {
        let place = tempfile::tempdir().unwrap();
        let (code, said) = serve_fails(Path::new(PASSGATE), &place.path().join("socket"), &arguments);
        assert!(code == Some(3) && said.contains("nothing here detaches it"), "{code:?} {said}");
        return;
    }
    let daemon = Daemon::start(Path::new(PASSGATE), &arguments);
    let mut vmm = rig.join(&daemon, memfd(4), PAGE);
    let status = vmm.client.status().unwrap();
    assert!(status.devices[0].ats, "the device has no ATS: {status:?}");
    let write = |vmm: &mut Vmm, page: u64| {
        let bytes = fresh();
        vmm.client.dma_write(&device, GPA + page * PAGE, &bytes).is_ok() && vmm.bytes(page) == bytes
    };
    assert!(write(&mut vmm, 1), "DMA goes before");
    let invalidation = vmm.begin(1, PageState::Private);
    let canary = vmm.fill(1);
    let _ = vmm.client.dma_write(&device, GPA + PAGE, &[1; 64]);
    assert_eq!(vmm.bytes(1), canary, "the device writes to a page that is away");
    vmm.end(invalidation);
    let receipt = vmm.client.explain(invalidation).unwrap();
    let steps: Vec<_> = receipt["steps"].as_array().unwrap().iter().map(|step| &step["step"]).collect();
    assert_eq!(steps, ["detach", "unmap"], "{receipt}");
    assert!(until(LONG, || write(&mut vmm, 0)), "the device does not come back");
}
