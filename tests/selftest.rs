//! `passgate selftest` with the software device; tests/machine.rs runs it with real ones.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The longest time that a test waits: a hang fails after it. Nothing here takes a second.
const TIMEOUT: Duration = Duration::from_secs(60);

fn selftest(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_passgate")).arg("selftest").args(arguments).output().unwrap()
}

#[test]
fn software_device_passes_supported_checks_and_skips_others() {
    let Output { status, stdout, stderr } = selftest(&["--device", "soft:0", "--json"]);
    assert!(status.success(), "{} {}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    let report: Value = serde_json::from_slice(&stdout).unwrap();
    let outcome = |name: &str| {
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|row| row["check"] == name).unwrap()["outcome"].as_str().unwrap().to_owned()
    };
    for passed_check in ["map and unmap", "DMA", "unmap under DMA", "drain", "reset", "crash and recover"] {
        assert_eq!(outcome(passed_check), "pass", "{passed_check}");
    }
    for skipped_check in ["migration STOP", "bus master off", "detach"] {
        assert_eq!(outcome(skipped_check), "skip", "{skipped_check}");
    }
    assert_eq!((report["passed"].as_u64(), report["failed"].as_u64()), (Some(7), Some(0)));
}

/// Returns the child processes of `parent`.
fn children(parent: u32) -> Vec<u32> {
    let is_child = |pid: &u32| {
        // proc_pid_stat(5): the command name in parentheses may contain anything; state and parent follow it.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap_or_default();
        fields.split_whitespace().nth(1) == Some(&parent.to_string())
    };
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

/// Returns the command line of a process; empty once it has ended.
fn command(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ")
}

/// A daemon that survives its test would prevent the return of the device to its driver.
#[test]
fn killed_selftest_leaves_no_daemon() {
    let mut test = Command::new(env!("CARGO_BIN_EXE_passgate"))
        .args(["selftest", "--device", "soft:0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut rows = BufReader::new(test.stdout.take().unwrap()).lines();
    // After this row the crash test starts daemons one after the other: at any time there is one or none.
    rows.find(|row| row.as_ref().unwrap().contains("  reset  ")).unwrap().unwrap();
    let started = Instant::now();
    let daemon = loop {
        let serves = |pid: &u32| command(*pid).contains(" serve --allow-dma");
        if let Some(daemon) = children(test.id()).into_iter().find(serves) {
            break daemon;
        }
        assert!(started.elapsed() < TIMEOUT && test.try_wait().unwrap().is_none(), "no daemon is started");
    };
    test.kill().unwrap();
    test.wait().unwrap();
    let started = Instant::now();
    while command(daemon).contains("serve") {
        assert!(started.elapsed() < TIMEOUT, "the daemon {daemon} survives its test");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn missing_device_prints_one_line_and_exits_3() {
    let Output { status, stderr, .. } = selftest(&["--device", "ffff:ff:1f.7"]);
    assert_eq!(status.code(), Some(3));
    let stderr_text = String::from_utf8(stderr).unwrap();
    assert!(
        stderr_text.contains("ffff:ff:1f.7: there is no such PCI device") && stderr_text.lines().count() == 1,
        "{stderr_text}"
    );
}
