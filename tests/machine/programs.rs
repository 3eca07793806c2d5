//! Whole programs on the machine's kernel: the demo, and the minimal VMM of examples/minimal-vmm.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use super::rig::{PASSGATE, Rig};

const MINIMAL_VMM: &str = "/bin/minimal-vmm";

/// Returns why the minimal VMM cannot run here, if it cannot.
pub fn no_vmm() -> Option<&'static str> {
    if !Path::new(MINIMAL_VMM).exists() {
        Some("examples/minimal-vmm was not carried along")
    } else if !Path::new("/dev/kvm").exists() {
        Some("this kernel has no /dev/kvm")
    } else {
        None
    }
}

/// Returns why there is no VM type with private memory here, if there is none.
pub fn no_private_memory() -> Option<&'static str> {
    // Only the built kernel has CONFIG_KVM_SW_PROTECTED_VM. No file shows that, but only the stock kernel's rig is type1.
    let stock = std::env::var("PASSGATE_RIG").is_ok_and(|api| api == "type1");
    no_vmm().or_else(|| stock.then_some("this kernel's KVM has no VM type with private memory"))
}

/// Runs a program that must succeed, and parses the last line of its output.
fn summary(command: &mut Command) -> Value {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (output, errors) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{status}: {output}{errors}");
    eprintln!("{}", output.trim_end());
    serde_json::from_str(output.lines().last().unwrap()).unwrap()
}

/// Asserts that none of these counters of the summary is 0.
fn assert_nonzero(summary: &Value, counters: &[&str]) {
    for name in counters {
        assert!(summary[name].as_u64().unwrap() > 0, "{name}");
    }
}

pub fn demo() {
    let summary = summary(Command::new(PASSGATE).args(["demo", "--seconds", "3", "--json"]));
    assert_eq!(summary["guest_memfd"], true);
    assert_eq!(summary["stale_dma"], 0);
    assert_nonzero(&summary, &["conversions", "dma_ops", "dma_hits_converted", "dma_faulted"]);
}

/// The minimal VMM's guest under nested KVM, with a software device.
pub fn minimal_vmm() {
    let summary = summary(Command::new(MINIMAL_VMM).args(["--conversions", "200", "--json"]));
    assert_eq!(summary["stale"], 0);
    assert_nonzero(&summary, &["conversions", "dma_ops"]);
}

/// Like [`minimal_vmm`], but KVM refuses two conversions that passgate has granted.
pub fn kvm_refuses() {
    let arguments = ["--conversions", "50", "--fail-attributes", "--vm-type", "sw-protected", "--json"];
    let summary = summary(Command::new(MINIMAL_VMM).args(arguments));
    assert_eq!(summary["stale"], 0);
    assert_eq!(summary["failed_attributes"], true);
}

/// The minimal VMM's guest with the real daemon, and a real device behind a real IOMMU.
pub fn minimal_vmm_with_edu(rig: &Rig) {
    let daemon = rig.serve();
    let summary = summary(
        Command::new(MINIMAL_VMM)
            .args(["--conversions", "100", "--json", "--device", &rig.edu, "--socket-path"])
            .arg(&daemon.path),
    );
    assert_eq!(summary["stale"], 0);
    assert_nonzero(&summary, &["conversions", "dma_ops"]);
    let status = daemon.client().status().unwrap();
    assert_eq!((status.quarantine.len(), status.totals.refused), (0, 0));
}
