//! `serve --restart hold`: mappings stay, DMA goes on, whoever holds the devices lets go of them in the end.

use std::path::Path;

use passgate::client::PageState;
use passgate_bindings::PAGE;
use passgate_bindings::vfio::DeviceFile;

use super::death::Registers;
use super::rig::{Engine, GPA, PASSGATE, Rig, Vmm, memfd};
use crate::daemon::{LONG, until};
use crate::keeper::Keeper;

const PAGES: u64 = 4;
/// The page that devices must never see.
const PRIVATE: u64 = 2;

fn service(rig: &Rig) -> Keeper {
    Keeper::new(Path::new(PASSGATE), &rig.arguments(&["--restart", "hold"]))
}

fn join(service: &Keeper, rig: &Rig) -> Vmm {
    let memory = memfd(PAGES);
    let mut client = service.client();
    let region = passgate::client::AddMemory::shared(GPA, memory.size());
    client.add_memory(&region, &[&*memory]).unwrap();
    let channel = client.open_channel().unwrap();
    Vmm { client, channel, memory, engine: engine(service, rig) }
}

fn engine(service: &Keeper, rig: &Rig) -> Engine {
    Engine::by(service.client(), &rig.edu)
}

/// The engine by the descriptor that the manager keeps: it can be asked for DMA while there is no daemon.
fn registers(service: &Keeper, rig: &Rig) -> Registers {
    let name = format!("passgate.device.{}", rig.edu.replace(':', "-"));
    Registers::by(DeviceFile::from_fd(service.copy(&name)))
}

/// Whether a write of the engine arrives in a page, asked for by its registers.
fn arrives(registers: &Registers, vmm: &Vmm, page: u64) -> bool {
    let before = vmm.fill(page);
    registers.write(page);
    vmm.bytes(page) != before
}

/// Killed, and asked to end: either way the device reaches what it may, and nothing else, before there is a new daemon,
/// and after.
pub fn goes_on(rig: &Rig) {
    let mut service = service(rig);
    service.start();
    let mut vmm = join(&service, rig);
    vmm.take_away(PRIVATE);
    let unended = vmm.begin(3, PageState::Hole);
    assert!(vmm.reaches(0) && vmm.reaches(1));
    let registers = registers(&service, rig);
    for killed in [true, false] {
        if killed {
            service.kill();
        } else {
            assert!(service.terminate().success());
        }
        assert!(arrives(&registers, &vmm, 0) && arrives(&registers, &vmm, 1), "DMA goes on without a daemon");
        assert!(!arrives(&registers, &vmm, PRIVATE), "and only where it may");
        let took = service.start();
        eprintln!("ready {took:?} after the process was started");
        assert!(arrives(&registers, &vmm, 1), "and with the new one, before anybody adopts");

        vmm.client = service.client();
        let adopted = vmm.client.adopt().unwrap();
        vmm.channel = vmm.client.open_channel().unwrap();
        vmm.engine = engine(&service, rig);
        let [region] = &adopted.regions[..] else { panic!("{adopted:?}") };
        let states = [region.shared, region.private, region.hole, region.unknown].map(|bytes| bytes / PAGE);
        if killed {
            assert_eq!(states, [2, 0, 1, 1]);
            assert_eq!((adopted.unended[0].invalidation, adopted.unended[0].gpa), (unended, GPA + 3 * PAGE));
            vmm.is_out_of_reach(3);
            vmm.client.release(unended, passgate::client::State::Shared).unwrap();
        } else {
            assert_eq!((states, adopted.unended.len()), ([3, 0, 1, 0], 0));
        }
        assert!(until(LONG, || vmm.client.status().unwrap().pinned == 3 * PAGE));
        for page in [0, 1, 3] {
            assert!(vmm.reaches(page), "page {page}");
        }
        vmm.is_out_of_reach(PRIVATE);
    }
    // What was mapped by the first daemon can be unmapped by the third, and mapped again.
    vmm.take_away(0);
    vmm.is_out_of_reach(0);
    vmm.give_back(0);
    vmm.give_back(PRIVATE);
    assert!(vmm.reaches(0) && vmm.reaches(PRIVATE));
    let region = vmm.client.status().unwrap().regions[0].region;
    vmm.client.remove_memory(region).unwrap();
    assert!(!arrives(&registers, &vmm, 1), "a region that goes is gone for the device as well");
}

/// No daemon comes: the service is stopped for good, the manager drops what it kept, and the guardian stops the device,
/// although somebody else has its file.
pub fn let_go(rig: &Rig) {
    let mut service = service(rig);
    service.start();
    let vmm = join(&service, rig);
    let registers = registers(&service, rig);
    service.kill();
    assert!(arrives(&registers, &vmm, 1), "it is held");
    assert!(!service.said().iter().any(|line| line.contains("guardian")), "{:?}", service.said());
    service.forget("");
    service.says("DMA is blocked");
    for page in 0..PAGES {
        assert!(!arrives(&registers, &vmm, page), "DMA goes on in page {page}");
    }
}
