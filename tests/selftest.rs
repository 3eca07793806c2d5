//! `passgate selftest` with the software device; tests/machine.rs has real ones.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A failure, not a measure: nothing here takes a second.
const LIMIT: Duration = Duration::from_secs(60);

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

/// The processes that this one has started.
fn children(parent: u32) -> Vec<u32> {
    let is_child = |pid: &u32| {
        // The fields behind the name, which may hold anything: state, parent.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap_or_default();
        fields.split_whitespace().nth(1) == Some(&parent.to_string())
    };
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

fn command(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ")
}

/// A daemon that outlives its test would keep the device from being given back.
#[test]
fn a_test_that_is_killed_leaves_no_daemon_behind() {
    let mut test = Command::new(env!("CARGO_BIN_EXE_passgate"))
        .args(["selftest", "--device", "soft:0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut rows = BufReader::new(test.stdout.take().unwrap()).lines();
    // The row before the crashes: from here on there is a daemon, or none yet, or none between two.
    rows.find(|row| row.as_ref().unwrap().contains("  reset  ")).unwrap().unwrap();
    let begun = Instant::now();
    let daemon = loop {
        let serves = |pid: &u32| command(*pid).contains(" serve --allow-dma");
        if let Some(daemon) = children(test.id()).into_iter().find(serves) {
            break daemon;
        }
        assert!(begun.elapsed() < LIMIT && test.try_wait().unwrap().is_none(), "no daemon is started");
    };
    test.kill().unwrap();
    test.wait().unwrap();
    let begun = Instant::now();
    while command(daemon).contains("serve") {
        assert!(begun.elapsed() < LIMIT, "the daemon {daemon} outlives its test");
        std::thread::sleep(Duration::from_millis(1));
    }
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
