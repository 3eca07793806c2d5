//! A stock QEMU inside the machine, with a Linux guest on nested KVM: the front-end of a vhost-user back-end.
//!
//! Used by the trials and by a benchmark. QEMU and its storage daemon are at /tools, the guest's kernel at /rig/kernel and its
//! only program at /bin/blk-guest, where `tests/vm/boot --tools` puts them.

#![allow(dead_code, unreachable_pub)] // each program uses a part of it

pub mod back_end;
pub mod console;
pub mod cpio;
pub mod disk;
pub mod guest;
#[path = "../machine/guest/pattern.rs"]
pub mod pattern;
pub mod qmp;

use std::path::Path;
use std::time::{Duration, Instant};

/// The path of QEMU.
pub const QEMU: &str = "/tools/bin/qemu-system-x86_64";
/// The path of QEMU's own vhost-user back-end.
pub const STORAGE_DAEMON: &str = "/tools/bin/qemu-storage-daemon";

/// Returns why no guest can run here, if none can.
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

/// Returns the PCI address of the drive that is the guest's disk.
pub fn drive() -> String {
    let drives = std::env::var("PASSGATE_NVME").unwrap_or_default();
    drives.split_whitespace().next().expect("PASSGATE_NVME names no drive").to_owned()
}

/// Polls until `poll` returns a value; panics with `awaited` after `within`.
pub fn wait<T>(awaited: &str, within: Duration, mut poll: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = poll() {
            return answer;
        }
        assert!(started.elapsed() < within, "{awaited}: not within {within:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
