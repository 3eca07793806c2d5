//! The first process of the guest that a stock VMM runs on nested KVM: works the disk at /dev/vda as it is told.
//!
//! It is told, and answers, in lines of JSON on the second serial port: `soak` writes and verifies, `bench` measures,
//! `memory` says how much there is, `off` ends the guest. The first line that it says is `{"ready": …}`. An error of any kind
//! is said as `{"failed": …}` and is never passed over.
#![allow(unreachable_pub)] // its modules are one program

mod bench;
mod buffer;
mod channel;
mod files;
mod pattern;
mod raw;
mod soak;

use std::path::Path;
use std::process::ExitCode;

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};
use serde_json::{Value, json};

use channel::Channel;

/// What went wrong, as the trial prints it.
type Wrong = String;

/// The disk.
const DISK: &str = "/dev/vda";

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("blk-guest is the first process of a guest; `tests/vm/run vhost_blk` starts one");
        return ExitCode::from(2);
    }
    if let Err(wrong) = work() {
        eprintln!("blk-guest: {wrong}");
    }
    let _ = reboot(RebootCommand::PowerOff);
    ExitCode::FAILURE
}

fn work() -> Result<(), Wrong> {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        std::fs::create_dir_all(at).map_err(|e| format!("{at}: {e}"))?;
        mount(kind, at, kind, MountFlags::empty(), None).map_err(|e| format!("mount {at}: {e}"))?;
    }
    let channel = Channel::open(Path::new("/dev/ttyS1"))?;
    channel.say(&json!({ "ready": { "disk": disk(), "memory": memory()? } }));
    let (told, lines) = std::sync::mpsc::channel();
    let reader = channel.clone();
    std::thread::spawn(move || reader.lines(|line| told.send(line).is_ok()));
    while let Ok(line) = lines.recv() {
        let asked: Value = serde_json::from_str(&line).map_err(|e| format!("`{line}`: {e}"))?;
        let answer = match asked["do"].as_str() {
            Some("soak") => soak::run(&asked, &channel, &lines).map(|done| json!({ "soak": done })),
            Some("bench") => bench::run(&asked).map(|done| json!({ "bench": done })),
            Some("memory") => memory().map(|kib| json!({ "memory": kib })),
            Some("stop") => continue, // what it was to stop has ended by itself
            Some("off") => return Ok(()),
            _ => Err(format!("`{line}` is nothing that can be done")),
        };
        channel.say(&answer.unwrap_or_else(|wrong| json!({ "failed": wrong })));
    }
    Ok(())
}

/// What the kernel says about the disk.
fn disk() -> Value {
    let says = |name: &str| {
        let said = std::fs::read_to_string(format!("/sys/block/vda/{name}")).unwrap_or_default();
        said.trim().to_owned()
    };
    json!({
        "sectors": says("size"), "serial": says("serial"), "read_only": says("ro"), "cache": says("queue/write_cache"),
        "block": says("queue/logical_block_size"), "discard": says("queue/discard_max_bytes"),
        "zeroes": says("queue/write_zeroes_max_bytes"), "features": says("device/features"),
    })
}

/// KiB of memory that the kernel has.
fn memory() -> Result<u64, Wrong> {
    let said = std::fs::read_to_string("/proc/meminfo").map_err(|e| format!("/proc/meminfo: {e}"))?;
    let total = said.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    total.and_then(|kib| kib.trim().parse().ok()).ok_or_else(|| "/proc/meminfo names no MemTotal".to_owned())
}
