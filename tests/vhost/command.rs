//! The command line of `passgate vhost-user-blk`, as a management program uses it.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

fn passgate(name: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_passgate")).arg0(name).args(args).output().unwrap()
}

#[test]
fn print_capabilities_describes_block_device() {
    // By the subcommand, and by the program name of the description file.
    for (name, args) in [
        ("passgate", &["vhost-user-blk", "--print-capabilities"][..]),
        ("/usr/libexec/passgate-vhost-user-blk", &["--print-capabilities"]),
    ] {
        let output = passgate(name, args);
        assert!(output.status.success(), "{output:?}");
        let output: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (output["type"].as_str(), output["features"][0].as_str()),
            (Some("block"), Some("read-only"))
        );
    }
    let description = include_str!("../../examples/qemu/50-passgate-blk.json");
    let description: serde_json::Value = serde_json::from_str(description).unwrap();
    assert_eq!(description["type"], "block");
    assert!(description["binary"].as_str().unwrap().ends_with("/passgate-vhost-user-blk"));
}

#[test]
fn invalid_arguments_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("disk");
    let socket = socket.to_str().unwrap();
    for (args, expected, code) in [
        (&["--device", "0000:00:00.0"][..], "--socket-path", 2),
        (&["--socket-path", socket], "--device", 2),
        (&["--socket-path", socket, "--fd", "9", "--device", "x"], "cannot be used with", 2),
        (&["--fd", "99", "--device", "0000:00:00.0"], "start this with a socket open at that number", 2),
        (
            &["--socket-path", socket, "--device", "0000:00:00.0", "--num-queues", "0"],
            "0 is not in 1..=64",
            2,
        ),
        (
            &["--socket-path", socket, "--device", "ffff:ff:1f.7", "--wait", "0"],
            "there is no such PCI device",
            3,
        ),
    ] {
        let output = passgate("passgate", &[&["vhost-user-blk"], args].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(expected), "{args:?}: {error}");
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(!std::path::Path::new(socket).exists());
    }
}

#[test]
fn non_nvme_device_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("disk");
    let socket = socket.to_str().unwrap();
    let output = passgate("passgate", &["vhost-user-blk", "--socket-path", socket, "--device", "soft:0"]);
    let error = String::from_utf8(output.stderr).unwrap();
    if error.contains("io_uring") {
        return; // no software device on this host: the soft domain's own tests report that
    }
    assert!(error.contains("soft:0 is no NVMe drive"), "{error}");
    assert_eq!(output.status.code(), Some(2), "{error}");
}
