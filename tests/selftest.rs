//! `passgate selftest` with the software device; tests/machine.rs has real ones.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

use std::process::{Command, Output};

use serde_json::Value;

fn selftest(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_passgate")).arg("selftest").args(arguments).output().unwrap()
}

#[test]
fn the_software_device_passes_what_it_has_and_says_what_it_has_not() {
    let Output { status, stdout, stderr } = selftest(&["--device", "soft:0", "--json"]);
    assert!(status.success(), "{} {}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    let report: Value = serde_json::from_slice(&stdout).unwrap();
    let outcome = |name: &str| {
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|row| row["check"] == name).unwrap()["outcome"].as_str().unwrap().to_owned()
    };
    for done in ["map and unmap", "DMA", "unmap under DMA", "drain", "reset", "crash and recover"] {
        assert_eq!(outcome(done), "pass", "{done}");
    }
    for missing in ["migration STOP", "bus master off", "detach"] {
        assert_eq!(outcome(missing), "skip", "{missing}");
    }
    assert_eq!((report["passed"].as_u64(), report["failed"].as_u64()), (Some(7), Some(0)));
}

#[test]
fn a_device_that_is_not_there_is_one_line_and_the_exit_code_of_a_host_that_is_not_able() {
    let Output { status, stderr, .. } = selftest(&["--device", "ffff:ff:1f.7"]);
    assert_eq!(status.code(), Some(3));
    let said = String::from_utf8(stderr).unwrap();
    assert!(
        said.contains("ffff:ff:1f.7: there is no such PCI device") && said.lines().count() == 1,
        "{said}"
    );
}
