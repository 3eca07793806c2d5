//! Reports a test that this machine cannot run, so that it counts as skipped and not as passed.
//!
//! The standard test harness knows only tests that pass, fail or are ignored when they are compiled. A test that
//! finds out at run time that it cannot run calls [`skip`] and returns. `tests/run` names a file in
//! `PASSGATE_SKIPPED`, subtracts its lines from the tests that passed, and prints the reasons at the end.

#![allow(unreachable_pub, clippy::expect_used)] // a module of several test programs: a panic fails the test

use std::fmt::Display;
use std::fs::File;
use std::io::Write;

/// Records that the calling test is skipped, and why. The caller returns at once.
pub fn skip(reason: impl Display) {
    let thread = std::thread::current();
    let line = format!("{}: skipped, {reason}\n", thread.name().unwrap_or("a test").replace('\n', " "));
    print!("{line}");
    let Some(path) = std::env::var_os("PASSGATE_SKIPPED") else { return };
    // One write of a line to a file opened for appending does not mix with another test's.
    let mut file =
        File::options().create(true).append(true).open(&path).expect("PASSGATE_SKIPPED names a file");
    file.write_all(line.as_bytes()).expect("PASSGATE_SKIPPED can be written");
}
