//! `passgate list` on the host that the tests run on: it never fails, and reports what it cannot see.

#![allow(clippy::unwrap_used)] // a panic fails the test

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn list_succeeds_on_every_host() {
    let list = |arguments: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_passgate")).arg("list").args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (json, notes) = list(&["--json"]);
    let devices: Vec<Value> = serde_json::from_str(&json).unwrap();
    let device_count = std::fs::read_dir("/sys/bus/pci/devices").map_or(0, Iterator::count);
    assert_eq!(devices.len(), device_count);
    if devices.is_empty() {
        assert!(notes.contains("this host shows no PCI devices"), "{notes}");
    } else if !devices.iter().any(|device| device["group"].is_object()) {
        assert!(notes.contains("no IOMMU groups: switch the IOMMU on"), "{notes}");
    }
    let (text, _) = list(&[]);
    for device in &devices {
        let address = device["address"].as_str().unwrap();
        assert!(Path::new("/sys/bus/pci/devices").join(address).exists());
        assert!(text.lines().any(|line| line.starts_with(address)), "{address} has no row");
        // Without an IOMMU group there is always a reason with a remedy.
        if device["group"].is_null() {
            let refused = device["refused"].as_str().unwrap();
            assert!(refused.starts_with(address) && refused.contains(": "), "{refused}");
        }
    }
}
