//! A network interface that is down and has an address, in a network namespace of its own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, ExitCode};

use passgate::selftest::in_use::{Host, claim};

const ADDRESS: &str = "0000:04:00.0";

/// Set for a child process of this program that only prints who uses a device whose network interface is `lo`.
const CHILD_MODE_ENV: &str = "PASSGATE_TEST_USER_OF_LO";

/// Prints who uses the device, if this is the child process.
pub(crate) fn child_mode() -> Option<ExitCode> {
    std::env::var_os(CHILD_MODE_ENV)?;
    let host = tempfile::tempdir().unwrap();
    let [sysfs, proc] = ["sys", "proc"].map(|name| host.path().join(name));
    let device = sysfs.join("devices/pci0000:00").join(ADDRESS);
    let own = proc.join(std::process::id().to_string());
    for dir in [&device.join("net/lo"), &sysfs.join("class/net"), &sysfs.join("bus/pci/devices"), &own] {
        fs::create_dir_all(dir).unwrap();
    }
    symlink(&device, sysfs.join("bus/pci/devices").join(ADDRESS)).unwrap();
    symlink(sysfs.join("class/net"), device.join("net/lo/subsystem")).unwrap();
    fs::write(device.join("net/lo/ifindex"), "1\n").unwrap(); // the index of `lo` in every namespace
    fs::write(device.join("net/lo/flags"), "0x8\n").unwrap();
    symlink(&own, proc.join("self")).unwrap();
    // `ipv6_route` is left out: there the kernel lists rejecting default routes on `lo`.
    fs::create_dir(own.join("net")).unwrap();
    for list in ["dev", "route"] {
        symlink(Path::new("/proc/self/net").join(list), own.join("net").join(list)).unwrap();
    }
    let host = Host { sysfs: &sysfs, proc: &proc, dev: Path::new("/dev") };
    println!("{}", claim(host, ADDRESS.parse().unwrap()).err().unwrap_or_else(|| "nobody".to_owned()));
    Some(ExitCode::SUCCESS)
}

/// Runs the child in a new network namespace, after these commands; returns its output, or the reason of the failure.
fn user_in_namespace(commands: &str) -> Result<String, String> {
    let script = format!("{commands} exec \"$0\"");
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("unshare")
        .args(["--net", "sh", "-ec", &script])
        .arg(program)
        .env(CHILD_MODE_ENV, "1")
        .output();
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// Returns why the test cannot run here, if it cannot.
pub(crate) fn missing() -> Option<String> {
    user_in_namespace("ip address show >&2;").err()
}

pub(crate) fn down_interface_with_address_is_in_use() {
    assert_eq!(user_in_namespace("").unwrap(), "nobody");
    let user = user_in_namespace("ip address add 192.0.2.1/32 dev lo;").unwrap();
    assert!(user.starts_with("network interface lo has an address"), "{user}");
}
