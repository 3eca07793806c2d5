//! The command, as a management program meets it.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

fn passgate(name: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_passgate")).arg0(name).args(args).output().unwrap()
}

#[test]
fn a_management_program_learns_what_it_is() {
    // By the subcommand, and under the name that a description file gives.
    for (name, args) in [
        ("passgate", &["vhost-user-blk", "--print-capabilities"][..]),
        ("/usr/libexec/passgate-vhost-user-blk", &["--print-capabilities"]),
    ] {
        let said = passgate(name, args);
        assert!(said.status.success(), "{said:?}");
        let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!((said["type"].as_str(), said["features"][0].as_str()), (Some("block"), Some("read-only")));
    }
    let description = include_str!("../../examples/qemu/50-passgate-blk.json");
    let description: serde_json::Value = serde_json::from_str(description).unwrap();
    assert_eq!(description["type"], "block");
    assert!(description["binary"].as_str().unwrap().ends_with("/passgate-vhost-user-blk"));
}

#[test]
fn what_makes_no_sense_is_said_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("disk");
    let socket = socket.to_str().unwrap();
    for (args, says, code) in [
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
        let said = passgate("passgate", &[&["vhost-user-blk"], args].concat());
        let error = String::from_utf8(said.stderr).unwrap();
        assert!(error.contains(says), "{args:?}: {error}");
        assert_eq!(said.status.code(), Some(code), "{error}");
        assert!(!std::path::Path::new(socket).exists());
    }
}

#[test]
fn what_is_no_drive_is_no_disk() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("disk");
    let socket = socket.to_str().unwrap();
    let said = passgate("passgate", &["vhost-user-blk", "--socket-path", socket, "--device", "soft:0"]);
    let error = String::from_utf8(said.stderr).unwrap();
    if error.contains("io_uring") {
        return; // no software device here: the soft domain's own tests say so
    }
    assert!(error.contains("soft:0 is no NVMe drive"), "{error}");
    assert_eq!(said.status.code(), Some(2), "{error}");
}
