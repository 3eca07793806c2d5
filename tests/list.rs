//! `passgate list` on whatever host the tests run on: it never fails, and says what it cannot see.

#![allow(clippy::unwrap_used)] // a panic fails the test

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn every_host_has_a_list() {
    let list = |arguments: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_passgate")).arg("list").args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (json, said) = list(&["--json"]);
    let devices: Vec<Value> = serde_json::from_str(&json).unwrap();
    let there = std::fs::read_dir("/sys/bus/pci/devices").map_or(0, Iterator::count);
    assert_eq!(devices.len(), there);
    if devices.is_empty() {
        assert!(said.contains("this host shows no PCI devices"), "{said}");
    } else if !devices.iter().any(|device| device["group"].is_object()) {
        assert!(said.contains("no IOMMU groups: switch the IOMMU on"), "{said}");
    }
    let (text, _) = list(&[]);
    for device in &devices {
        let address = device["address"].as_str().unwrap();
        assert!(Path::new("/sys/bus/pci/devices").join(address).exists());
        assert!(text.lines().any(|line| line.starts_with(address)), "{address} has no row");
        // Without an IOMMU there is always a reason, and a way out.
        if device["group"].is_null() {
            let refused = device["refused"].as_str().unwrap();
            assert!(refused.starts_with(address) && refused.contains(": "), "{refused}");
        }
    }
}
