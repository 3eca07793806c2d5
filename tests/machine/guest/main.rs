//! The first process (PID 1) of the guest that a stock VMM runs on nested KVM: it does I/O to the disk at /dev/vda as the trial
//! commands.
//!
//! Commands and answers are JSON lines on the second serial port: `soak` writes and verifies, `bench` measures, `memory` reports
//! the amount of memory, `off` ends the guest. The first line that it sends is `{"ready": …}`. Every error is reported as
//! `{"failed": …}`.
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

/// The text of an error, as the trial prints it.
type Failure = String;

/// The device file of the disk.
const DISK: &str = "/dev/vda";

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("blk-guest is the first process of a guest; `tests/vm/run vhost_blk` starts one");
        return ExitCode::from(2);
    }
    if let Err(failure) = work() {
        eprintln!("blk-guest: {failure}");
    }
    let _ = reboot(RebootCommand::PowerOff);
    ExitCode::FAILURE
}

fn work() -> Result<(), Failure> {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        std::fs::create_dir_all(at).map_err(|e| format!("{at}: {e}"))?;
        mount(kind, at, kind, MountFlags::empty(), None).map_err(|e| format!("mount {at}: {e}"))?;
    }
    let channel = Channel::open(Path::new("/dev/ttyS1"))?;
    channel.send(&json!({ "ready": { "disk": disk(), "memory": memory()? } }));
    let (sender, lines) = std::sync::mpsc::channel();
    let reader = channel.clone();
    std::thread::spawn(move || reader.lines(|line| sender.send(line).is_ok()));
    while let Ok(line) = lines.recv() {
        let command: Value = serde_json::from_str(&line).map_err(|e| format!("`{line}`: {e}"))?;
        let answer = match command["do"].as_str() {
            Some("soak") => soak::run(&command, &channel, &lines).map(|result| json!({ "soak": result })),
            Some("bench") => bench::run(&command).map(|result| json!({ "bench": result })),
            Some("memory") => memory().map(|kib| json!({ "memory": kib })),
            Some("stop") => continue, // the soak that it was to stop has already ended
            Some("off") => return Ok(()),
            _ => Err(format!("`{line}` is no command")),
        };
        channel.send(&answer.unwrap_or_else(|failure| json!({ "failed": failure })));
    }
    Ok(())
}

/// Returns the kernel's attributes of the disk (sysfs).
fn disk() -> Value {
    let attribute = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/block/vda/{name}")).unwrap_or_default();
        text.trim().to_owned()
    };
    json!({
        "sectors": attribute("size"), "serial": attribute("serial"), "read_only": attribute("ro"), "cache": attribute("queue/write_cache"),
        "block": attribute("queue/logical_block_size"), "discard": attribute("queue/discard_max_bytes"),
        "zeroes": attribute("queue/write_zeroes_max_bytes"), "features": attribute("device/features"),
    })
}

/// Returns the kernel's total memory in KiB.
fn memory() -> Result<u64, Failure> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|e| format!("/proc/meminfo: {e}"))?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    total.and_then(|kib| kib.trim().parse().ok()).ok_or_else(|| "/proc/meminfo names no MemTotal".to_owned())
}
