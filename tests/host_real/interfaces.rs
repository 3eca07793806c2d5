//! A network namespace of this program's own, in which an interface is down and has an address.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, ExitCode};

use passgate::selftest::in_use::{Host, claim};

const ADDRESS: &str = "0000:04:00.0";

/// Set for a copy of this program that only says who uses a device whose interface is `lo`.
const INSIDE: &str = "PASSGATE_TEST_SAYS_WHO_USES_LO";

/// Says who uses the device, where that is all that this process is for.
pub(crate) fn inside() -> Option<ExitCode> {
    std::env::var_os(INSIDE)?;
    let host = tempfile::tempdir().unwrap();
    let [sysfs, proc] = ["sys", "proc"].map(|name| host.path().join(name));
    let device = sysfs.join("devices/pci0000:00").join(ADDRESS);
    let own = proc.join(std::process::id().to_string());
    for dir in [&device.join("net/lo"), &sysfs.join("class/net"), &sysfs.join("bus/pci/devices"), &own] {
        fs::create_dir_all(dir).unwrap();
    }
    symlink(&device, sysfs.join("bus/pci/devices").join(ADDRESS)).unwrap();
    symlink(sysfs.join("class/net"), device.join("net/lo/subsystem")).unwrap();
    fs::write(device.join("net/lo/ifindex"), "1\n").unwrap(); // `lo` in every namespace
    fs::write(device.join("net/lo/flags"), "0x8\n").unwrap();
    symlink(&own, proc.join("self")).unwrap();
    // Without `ipv6_route`: there `lo` has the route of what has none.
    fs::create_dir(own.join("net")).unwrap();
    for list in ["dev", "route"] {
        symlink(Path::new("/proc/self/net").join(list), own.join("net").join(list)).unwrap();
    }
    let host = Host { sysfs: &sysfs, proc: &proc, dev: Path::new("/dev") };
    println!("{}", claim(host, ADDRESS.parse().unwrap()).err().unwrap_or_else(|| "nobody".to_owned()));
    Some(ExitCode::SUCCESS)
}

/// What this program says in a namespace in which these commands were run.
fn says(commands: &str) -> Result<String, String> {
    let script = format!("{commands} exec \"$0\"");
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output =
        Command::new("unshare").args(["--net", "sh", "-ec", &script]).arg(program).env(INSIDE, "1").output();
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

pub(crate) fn missing() -> Option<String> {
    says("ip address show >&2;").err()
}

pub(crate) fn an_address_on_an_interface_that_is_down_is_use() {
    assert_eq!(says("").unwrap(), "nobody");
    let said = says("ip address add 192.0.2.1/32 dev lo;").unwrap();
    assert!(said.starts_with("network interface lo has an address"), "{said}");
}
