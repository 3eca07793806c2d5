//! What passgate sees of a real host, and leaves as it was: processes, block devices, drivers. Runs as root; a test that
//! cannot run here says why and counts as skipped.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod host_real;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// Returns why a test cannot run here, or none.
type Missing = fn() -> Option<String>;

const TESTS: [(&str, fn(), Missing); 1] = [(
    "a_process_outside_the_initial_pid_namespace_knows_that_it_sees_no_holders",
    host_real::namespaces::holders_are_unseen,
    host_real::namespaces::missing,
)];

fn main() -> ExitCode {
    if let Some(code) = host_real::namespaces::inside() {
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
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
