//! `serve --restart hold`: mappings stay and DMA continues across a restart; without a restart the devices are stopped.

use std::path::Path;

use passgate_bindings::PAGE;
use passgate_bindings::vfio::DeviceFile;
use passgate_client::PageState;

use super::death::Registers;
use super::rig::{Engine, GPA, PASSGATE, Rig, Vmm, memfd};
use crate::daemon::{TIMEOUT, wait_until};
use crate::service_manager::ServiceManager;

const PAGES: u64 = 4;
/// The page that is a hole: devices must never reach it.
const HOLE_PAGE: u64 = 2;

fn service(rig: &Rig) -> ServiceManager {
    ServiceManager::new(Path::new(PASSGATE), &rig.arguments(&["--restart", "hold"]))
}

fn connect_vmm(service: &ServiceManager, rig: &Rig) -> Vmm {
    let memory = memfd(PAGES);
    let mut client = service.client();
    let region = passgate_client::AddMemory::shared(GPA, memory.size());
    client.add_memory(&region, &[&*memory]).unwrap();
    let channel = client.open_channel().unwrap();
    Vmm { client, channel, memory, engine: engine(service, rig) }
}

fn engine(service: &ServiceManager, rig: &Rig) -> Engine {
    Engine::over_client(service.client(), &rig.edu)
}

/// Returns the registers of the edu device, by the descriptor in the manager's store: they start DMA while no daemon runs.
fn registers(service: &ServiceManager, rig: &Rig) -> Registers {
    let name = format!("passgate.device.{}", rig.edu.replace(':', "-"));
    Registers::from_device(DeviceFile::from_fd(service.stored_fd(&name)))
}

/// Returns true if a DMA write, started by the registers, arrives in a page.
fn write_arrives(registers: &Registers, vmm: &Vmm, page: u64) -> bool {
    let before = vmm.fill(page);
    registers.write(page);
    vmm.bytes(page) != before
}

/// Before and after a new daemon starts, the device reaches exactly the pages that are mapped: after `kill -9` and after
/// SIGTERM.
pub fn dma_continues(rig: &Rig) {
    let mut service = service(rig);
    service.start();
    let mut vmm = connect_vmm(&service, rig);
    vmm.convert_to_hole(HOLE_PAGE);
    let unended = vmm.begin(3, PageState::Hole);
    assert!(vmm.reaches(0) && vmm.reaches(1));
    let registers = registers(&service, rig);
    for killed in [true, false] {
        if killed {
            service.kill();
        } else {
            assert!(service.terminate().success());
        }
        assert!(
            write_arrives(&registers, &vmm, 0) && write_arrives(&registers, &vmm, 1),
            "DMA must continue without a daemon"
        );
        assert!(!write_arrives(&registers, &vmm, HOLE_PAGE), "DMA must not reach the hole");
        let start_time = service.start();
        eprintln!("ready {start_time:?} after the process was started");
        assert!(
            write_arrives(&registers, &vmm, 1),
            "DMA must continue with the new daemon before the memory is adopted"
        );

        vmm.client = service.client();
        let adopted = vmm.client.adopt().unwrap();
        vmm.channel = vmm.client.open_channel().unwrap();
        vmm.engine = engine(&service, rig);
        let [region] = &adopted.regions[..] else { panic!("{adopted:?}") };
        let states = [region.shared, region.private, region.hole, region.unknown].map(|bytes| bytes / PAGE);
        if killed {
            assert_eq!(states, [2, 0, 1, 1]);
            assert_eq!((adopted.unended[0].invalidation, adopted.unended[0].gpa), (unended, GPA + 3 * PAGE));
            vmm.assert_unreachable(3);
            vmm.client.release(unended, passgate_client::PageState::Shared).unwrap();
        } else {
            assert_eq!((states, adopted.unended.len()), ([3, 0, 1, 0], 0));
        }
        assert!(wait_until(TIMEOUT, || vmm.client.status().unwrap().pinned == 3 * PAGE));
        for page in [0, 1, 3] {
            assert!(vmm.reaches(page), "page {page}");
        }
        vmm.assert_unreachable(HOLE_PAGE);
    }
    // The third daemon can unmap what the first one mapped, and map it again.
    vmm.convert_to_hole(0);
    vmm.assert_unreachable(0);
    vmm.convert_to_shared(0);
    vmm.convert_to_shared(HOLE_PAGE);
    assert!(vmm.reaches(0) && vmm.reaches(HOLE_PAGE));
    let region = vmm.client.status().unwrap().regions[0].region;
    vmm.client.remove_memory(region).unwrap();
    assert!(!write_arrives(&registers, &vmm, 1), "DMA must not reach a removed region");
}

/// No new daemon starts: the manager closes its descriptor store, and the guardian stops the device, although another process
/// has it open.
pub fn abandoned(rig: &Rig) {
    let mut service = service(rig);
    service.start();
    let vmm = connect_vmm(&service, rig);
    let registers = registers(&service, rig);
    service.kill();
    assert!(write_arrives(&registers, &vmm, 1), "DMA must continue while the manager stores the device");
    assert!(!service.log_lines().iter().any(|line| line.contains("guardian")), "{:?}", service.log_lines());
    service.remove("");
    service.wait_for_log("DMA is blocked");
    for page in 0..PAGES {
        assert!(!write_arrives(&registers, &vmm, page), "DMA still reaches page {page}");
    }
}
