//! A stock QEMU inside the machine, with a Linux guest on nested KVM: what stands at the other end of a vhost-user back-end.
//!
//! The trials and a benchmark share this. QEMU and its storage daemon are at /tools, the guest's kernel at /rig/kernel and its
//! only program at /bin/blk-guest: `tests/vm/boot --tools` puts them there.

#![allow(dead_code, unreachable_pub)] // each program uses a part of it

pub mod back_end;
pub mod cpio;
pub mod disk;
pub mod guest;
#[path = "../machine/guest/pattern.rs"]
pub mod pattern;
pub mod qmp;

use std::path::Path;
use std::time::{Duration, Instant};

/// Where the tools are.
pub const QEMU: &str = "/tools/bin/qemu-system-x86_64";
/// QEMU's own back-end.
pub const STORAGE_DAEMON: &str = "/tools/bin/qemu-storage-daemon";

/// Why no guest can run here.
pub fn missing() -> Option<&'static str> {
    if !Path::new(QEMU).exists() {
        Some("no disk of tools is attached")
    } else if !Path::new("/dev/kvm").exists() {
        Some("this kernel has no /dev/kvm")
    } else if std::env::var("PASSGATE_NVME").is_ok_and(|drives| drives.trim().is_empty()) {
        Some("there is no NVMe drive")
    } else {
        None
    }
}

/// The drive that the guest's disk lies on.
pub fn drive() -> String {
    let drives = std::env::var("PASSGATE_NVME").unwrap_or_default();
    drives.split_whitespace().next().expect("PASSGATE_NVME names no drive").to_owned()
}

/// Asks again and again until there is an answer.
pub fn wait<T>(what: &str, within: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begun.elapsed() < within, "{what}: not within {within:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
