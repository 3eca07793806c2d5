//! Detection of device users on a real host (processes, block devices, network interfaces), and the return of borrowed
//! devices. Runs as root; a test that cannot run here reports the reason and counts as skipped.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod host_real;

use std::process::ExitCode;

use host_real::{disks, give_back, interfaces, namespaces};
use libtest_mimic::{Arguments, Trial};

/// A test: its name, its function, and a function that returns the reason why it cannot run here, if there is one.
type Test = (&'static str, fn(), fn() -> Option<String>);

const TESTS: [Test; 10] = [
    (
        "down_interface_with_address_is_in_use",
        interfaces::down_interface_with_address_is_in_use,
        interfaces::missing,
    ),
    (
        "borrowed_device_is_returned_when_borrower_dies",
        give_back::borrowed_device_is_returned_when_borrower_dies,
        || None,
    ),
    ("failed_return_of_device_is_reported", give_back::failed_return_of_device_is_reported, || None),
    (
        "hidden_processes_are_detected_in_pid_namespace",
        namespaces::hidden_processes_are_detected_in_pid_namespace,
        namespaces::missing,
    ),
    ("disk_claim_is_exclusive", disks::disk_claim_is_exclusive, disks::missing),
    (
        "every_device_of_mounted_btrfs_is_in_use",
        disks::every_device_of_mounted_btrfs_is_in_use,
        disks::btrfs_missing,
    ),
    ("device_mapper_member_is_in_use", disks::device_mapper_member_is_in_use, disks::mapper_missing),
    ("swap_disk_is_in_use", disks::swap_disk_is_in_use, disks::swap_missing),
    (
        "disk_mounted_in_other_namespace_is_in_use",
        disks::disk_mounted_in_other_namespace_is_in_use,
        disks::mount_missing,
    ),
    (
        "disk_open_in_process_is_in_use_under_any_name",
        disks::disk_open_in_process_is_in_use_under_any_name,
        disks::missing,
    ),
];

fn main() -> ExitCode {
    if let Some(code) = namespaces::child_mode().or_else(interfaces::child_mode) {
        return code;
    }
    let trials = TESTS.into_iter().map(|(name, test, missing)| {
        let missing = missing();
        if let Some(reason) = &missing {
            eprintln!("{name}: skipped, {reason}");
        }
        let run = move || {
            test();
            Ok(())
        };
        Trial::test(name, run).with_ignored_flag(missing.is_some())
    });
    let mut arguments = Arguments::from_args();
    // One at a time: a test that creates a mount namespace copies the mounts of the other tests into it, and so keeps their
    // disks in use.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
