//! The controller's admin queue.

use passgate_backends::device::OwnMemory;
use passgate_backends::nvme::low_level::{Command, Controller};
use passgate_sim::nvme::{CommandFilter, FaultAction, opcode};

use super::*;

/// The late completion would be taken for that of the next command.
#[test]
fn late_completion_of_an_abandoned_admin_command_completes_no_later_command() {
    const INVALID_NAMESPACE: u16 = 0x0b;
    let _driver_memory = DRIVER_MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let domain = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
    let sim = Simulated::new(&domain, Options::default()).unwrap();
    let domain = Arc::new(domain) as Arc<dyn Domain>;
    let mut controller = Controller::open(sim.registers(), &domain).unwrap();
    let memory = OwnMemory::map(&domain, 1).unwrap();
    controller.reset().unwrap();
    controller.initialize().unwrap();
    let to = memory.iova(0);
    sim.fault(CommandFilter::admin(opcode::IDENTIFY), FaultAction::StallData);
    assert_eq!(controller.run(Command::identify(1, to)).unwrap(), None);
    assert_eq!(sim.release(), 1);
    for (namespace, status) in [(2, INVALID_NAMESPACE), (1, 0), (2, INVALID_NAMESPACE)] {
        let completion = controller.run(Command::identify(namespace, to)).unwrap().unwrap();
        assert_eq!(completion.status, status, "namespace {namespace}");
    }
    controller.reset().unwrap();
}
