//! What passgate sees of a real host, and leaves as it was: processes, block devices, drivers. Runs as root; a test that
//! cannot run here says why and counts as skipped.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod host_real;

use std::process::ExitCode;

use host_real::{disks, giving_back, interfaces, namespaces};
use libtest_mimic::{Arguments, Trial};

/// A name, a test, and why it cannot run here.
type Test = (&'static str, fn(), fn() -> Option<String>);

const TESTS: [Test; 10] = [
    (
        "an_interface_that_is_down_and_has_an_address_is_in_use",
        interfaces::an_address_on_an_interface_that_is_down_is_use,
        interfaces::missing,
    ),
    ("a_borrower_that_dies_gives_its_device_back", giving_back::a_borrower_that_dies_gives_back, || None),
    ("a_device_that_is_not_given_back_is_told", giving_back::a_device_that_is_not_given_back_is_told, || {
        None
    }),
    (
        "a_process_outside_the_initial_pid_namespace_knows_that_it_sees_no_holders",
        namespaces::holders_are_unseen,
        namespaces::missing,
    ),
    ("a_claim_of_a_disk_keeps_others_out", disks::a_claim_keeps_others_out, disks::missing),
    (
        "every_device_of_a_mounted_btrfs_is_in_use",
        disks::every_device_of_a_btrfs_is_in_use,
        disks::btrfs_missing,
    ),
    (
        "a_part_of_a_device_mapper_table_is_in_use",
        disks::a_part_of_a_device_mapper_table_is_in_use,
        disks::mapper_missing,
    ),
    ("a_disk_that_is_swapped_to_is_in_use", disks::what_is_swapped_to_is_in_use, disks::swap_missing),
    (
        "a_disk_mounted_in_another_mount_namespace_is_in_use",
        disks::what_another_mount_namespace_has_mounted_is_in_use,
        disks::mount_missing,
    ),
    (
        "a_disk_that_a_process_has_open_is_in_use_under_any_name",
        disks::what_a_process_has_open_is_in_use_under_any_name,
        disks::missing,
    ),
];

fn main() -> ExitCode {
    if let Some(code) = namespaces::inside().or_else(interfaces::inside) {
        return code;
    }
    let trials = TESTS.into_iter().map(|(name, test, missing)| {
        let missing = missing();
        if let Some(why) = &missing {
            eprintln!("{name}: skipped, {why}");
        }
        let run = move || {
            test();
            Ok(())
        };
        Trial::test(name, run).with_ignored_flag(missing.is_some())
    });
    let mut arguments = Arguments::from_args();
    // A test that makes a mount namespace of its own copies the mounts of the others, which are then in use for as long as it
    // lives.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
