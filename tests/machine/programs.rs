//! Whole programs on the machine's kernel: the demo, and a VM of our own.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use super::rig::{PASSGATE, Rig};

const MINIMAL_VMM: &str = "/bin/minimal-vmm";

/// Why no VM of our own can run here.
pub fn no_vmm() -> Option<&'static str> {
    if !Path::new(MINIMAL_VMM).exists() {
        Some("examples/minimal-vmm was not carried along")
    } else if !Path::new("/dev/kvm").exists() {
        Some("this kernel has no /dev/kvm")
    } else {
        None
    }
}

/// Why KVM cannot be made to refuse a conversion here.
pub fn no_private_memory() -> Option<&'static str> {
    // The built kernel has CONFIG_KVM_SW_PROTECTED_VM, the stock one has not, and neither says so in a file.
    let stock = std::env::var("PASSGATE_RIG").is_ok_and(|has| has == "type1");
    no_vmm().or_else(|| stock.then_some("this kernel's KVM has no VM type with private memory"))
}

/// Runs a program that must end well, and reads the last line of what it prints.
fn summary(command: &mut Command) -> Value {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{status}: {said}{complained}");
    eprintln!("{}", said.trim_end());
    serde_json::from_str(said.lines().last().unwrap()).unwrap()
}

fn at_least_one(summary: &Value, counted: &[&str]) {
    for name in counted {
        assert!(summary[name].as_u64().unwrap() > 0, "{name}");
    }
}

pub fn demo() {
    let summary = summary(Command::new(PASSGATE).args(["demo", "--seconds", "3", "--json"]));
    assert_eq!(summary["guest_memfd"], true);
    assert_eq!(summary["stale_dma"], 0);
    at_least_one(&summary, &["conversions", "dma_ops", "dma_hits_converted", "dma_faulted"]);
}

/// A guest of our own under nested KVM, with a software device.
pub fn minimal_vmm() {
    let summary = summary(Command::new(MINIMAL_VMM).args(["--conversions", "200", "--json"]));
    assert_eq!(summary["stale"], 0);
    at_least_one(&summary, &["conversions", "dma_ops"]);
}

/// The same, with KVM refusing two conversions that passgate has granted.
pub fn kvm_refuses() {
    let arguments = ["--conversions", "50", "--fail-attributes", "--vm-type", "sw-protected", "--json"];
    let summary = summary(Command::new(MINIMAL_VMM).args(arguments));
    assert_eq!(summary["stale"], 0);
    assert_eq!(summary["failed_attributes"], true);
}

/// A guest of our own, the real daemon, and a real device behind a real IOMMU.
pub fn minimal_vmm_with_the_engine(rig: &Rig) {
    let daemon = rig.serve();
    let summary = summary(
        Command::new(MINIMAL_VMM)
            .args(["--conversions", "100", "--json", "--device", &rig.edu, "--socket-path"])
            .arg(&daemon.path),
    );
    assert_eq!(summary["stale"], 0);
    at_least_one(&summary, &["conversions", "dma_ops"]);
    let status = daemon.client().status().unwrap();
    assert_eq!((status.quarantine.len(), status.totals.refused), (0, 0));
}
