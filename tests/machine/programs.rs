//! The programs that need no device of the machine's, on its kernel.

use std::path::Path;
use std::process::Command;

use super::rig::PASSGATE;

const MINIMAL_VMM: &str = "/bin/minimal-vmm";

/// Why a trial cannot run here.
pub fn missing(trial: &str) -> Option<&'static str> {
    (trial == "minimal_vmm_converts" && !Path::new(MINIMAL_VMM).exists())
        .then_some("there is no examples/minimal-vmm.rs yet")
}

pub fn demo() {
    let run = Command::new(PASSGATE).args(["demo", "--seconds", "3", "--json"]).output().unwrap();
    let (said, complained) = (String::from_utf8(run.stdout).unwrap(), String::from_utf8(run.stderr).unwrap());
    assert!(run.status.success(), "{said}{complained}");
    let summary: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    eprintln!("    {summary}");
    assert_eq!(summary["guest_memfd"], true, "{complained}");
    assert_eq!(summary["stale_dma"], 0);
    for counted in ["conversions", "dma_ops", "dma_hits_converted", "dma_faulted"] {
        assert!(summary[counted].as_u64().unwrap() > 0, "{counted}");
    }
}

pub fn minimal_vmm() {
    let run = Command::new(MINIMAL_VMM).output().unwrap();
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{said}");
}
