//! `serve --strict` with a device whose ATS is on.

use std::path::Path;
use std::time::Duration;

use passgate::client::{AddMemory, Answer, Outcome, PageState};
use passgate_bindings::PAGE;

use super::rig::{Engine, GPA, PASSGATE, Rig, UNHURRIED, Vmm, bytes, fresh, memfd, range};
use crate::daemon::{Daemon, LONG, serve_fails, until};
use crate::keeper::Keeper;

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

/// Kills; the moment goes through all there are of a conversion.
const KILLS: u64 = 8;

/// Killed while the device is detached, or about to be, or on its way back: the next daemon knows that it caches
/// translations, although a detached device reads as one with ATS off, and detaches it before it unmaps.
pub fn a_restart(rig: &Rig) {
    let device = std::env::var("PASSGATE_VIRTIO_NET").unwrap();
    let arguments =
        ["--iommu", rig.iommu, "--device", &device, "--allow-dma", "--strict", "--restart", "hold"];
    let mut service = Keeper::new(Path::new(PASSGATE), &arguments);
    service.start();
    let memory = memfd(KILLS + 1);
    let mut client = service.client();
    client.add_memory(&AddMemory::shared(GPA, memory.size()), &[&*memory]).unwrap();
    let mut channel = client.open_channel().unwrap();
    for n in 0..KILLS {
        let converting = std::thread::spawn(move || {
            while let Ok(Answer::Granted { invalidation }) = channel.begin(range(n), PageState::Hole, None) {
                if channel.end(invalidation, Outcome::NotCommitted).is_err() {
                    return;
                }
            }
        });
        std::thread::sleep(Duration::from_millis(50 + n * 37 % 100)); // any moment of a conversion will do
        service.kill();
        converting.join().unwrap();
        service.start();
        client = service.client();
        client.adopt().unwrap();
        assert!(client.status().unwrap().devices[0].ats, "kill {n}: its ATS is forgotten");
        let mut engine = Engine::by(service.client(), &device);
        let arrives =
            |engine: &mut Engine| engine.try_write(KILLS).is_ok_and(|sent| bytes(&memory, KILLS) == sent);
        assert!(until(LONG, || arrives(&mut engine)), "kill {n}: the device does not come back");
        channel = client.open_channel().unwrap();
        let Answer::Granted { invalidation } =
            channel.begin(range(KILLS), PageState::Hole, UNHURRIED).unwrap()
        else {
            panic!("kill {n}: not granted")
        };
        channel.end(invalidation, Outcome::NotCommitted).unwrap();
        let receipt = client.explain(invalidation).unwrap();
        let steps: Vec<_> = receipt["steps"].as_array().unwrap().iter().map(|step| &step["step"]).collect();
        assert_eq!(steps, ["detach", "unmap"], "kill {n}: {receipt}");
    }
}
