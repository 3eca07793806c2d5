//! `serve --strict` with a device whose ATS is on.

use std::path::Path;
use std::time::Duration;

use passgate_bindings::PAGE;
use passgate_client::{AddMemory, Answer, Outcome, PageState};

use super::rig::{Engine, GPA, PASSGATE, Rig, UNHURRIED, Vmm, bytes, memfd, range, unique_bytes};
use crate::daemon::{Daemon, TIMEOUT, serve_fails, wait_until};
use crate::service_manager::ServiceManager;

/// A device that caches translations (ATS) is detached before an unmap, because the unmap alone proves nothing, and is attached
/// again. With type1, which cannot detach it, it is refused.
pub fn ats_device(rig: &Rig) {
    let device = std::env::var("PASSGATE_VIRTIO_NET").unwrap();
    let arguments = ["--iommu", rig.iommu, "--device", &device, "--allow-dma", "--strict"];
    if rig.iommu == "type1" {
        let dir = tempfile::tempdir().unwrap();
        let (code, stderr) = serve_fails(Path::new(PASSGATE), &dir.path().join("socket"), &arguments);
        assert!(code == Some(3) && stderr.contains("nothing here detaches it"), "{code:?} {stderr}");
        return;
    }
    let daemon = Daemon::start(Path::new(PASSGATE), &arguments);
    let mut vmm = rig.join(&daemon, memfd(4), PAGE);
    let status = vmm.client.status().unwrap();
    assert!(status.devices[0].ats, "the device has no ATS: {status:?}");
    let write = |vmm: &mut Vmm, page: u64| {
        let bytes = unique_bytes();
        vmm.client.dma_write(&device, GPA + page * PAGE, &bytes).is_ok() && vmm.bytes(page) == bytes
    };
    assert!(write(&mut vmm, 1), "no DMA before the conversion");
    let invalidation = vmm.begin(1, PageState::Private);
    let canary = vmm.fill(1);
    let _ = vmm.client.dma_write(&device, GPA + PAGE, &[1; 64]);
    assert_eq!(vmm.bytes(1), canary, "the device writes to a converted page");
    vmm.end(invalidation);
    let receipt = vmm.client.explain(invalidation).unwrap();
    let steps: Vec<_> = receipt["steps"].as_array().unwrap().iter().map(|step| &step["step"]).collect();
    assert_eq!(steps, ["detach", "unmap"], "{receipt}");
    assert!(wait_until(TIMEOUT, || write(&mut vmm, 0)), "the device is not attached again");
}

/// The number of kills, each after another time into the conversions.
const KILLS: u64 = 8;

/// The daemon is killed before, during or after a detach. The next daemon knows that the device caches translations, although a
/// detached device shows ATS disabled, and detaches it before it unmaps.
pub fn restart(rig: &Rig) {
    let device = std::env::var("PASSGATE_VIRTIO_NET").unwrap();
    let arguments =
        ["--iommu", rig.iommu, "--device", &device, "--allow-dma", "--strict", "--restart", "hold"];
    let mut service = ServiceManager::new(Path::new(PASSGATE), &arguments);
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
        std::thread::sleep(Duration::from_millis(50 + n * 37 % 100)); // any point of a conversion will do
        service.kill();
        converting.join().unwrap();
        service.start();
        client = service.client();
        client.adopt().unwrap();
        assert!(
            client.status().unwrap().devices[0].ats,
            "kill {n}: the daemon does not know the ATS of the device"
        );
        let mut engine = Engine::over_client(service.client(), &device);
        let write_arrives =
            |engine: &mut Engine| engine.try_write(KILLS).is_ok_and(|sent| bytes(&memory, KILLS) == sent);
        assert!(
            wait_until(TIMEOUT, || write_arrives(&mut engine)),
            "kill {n}: the device is not attached again"
        );
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
