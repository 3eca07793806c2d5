//! Detection that this process cannot see every process: this program as a child in new PID namespaces.

use std::path::Path;
use std::process::{Command, ExitCode};

use passgate::host::visibility::{Blind, blindness};

/// Set for a child process of this program that only prints which processes it cannot see.
const CHILD_MODE_ENV: &str = "PASSGATE_TEST_HIDDEN_PROCESSES";

/// Prints which processes this process cannot see, if this is the child process.
pub(crate) fn child_mode() -> Option<ExitCode> {
    std::env::var_os(CHILD_MODE_ENV)?;
    println!("{:?}", blindness(Path::new("/proc")));
    Some(ExitCode::SUCCESS)
}

/// Runs the child by `unshare` with these arguments; returns its output, or the reason of the failure.
fn hidden_processes_in_namespace(unshare: &[&str]) -> Result<String, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output =
        Command::new("unshare").args(unshare).arg("--").arg(program).env(CHILD_MODE_ENV, "1").output();
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

/// Returns why the test cannot run here, if it cannot.
pub(crate) fn missing() -> Option<String> {
    hidden_processes_in_namespace(&["--pid", "--fork", "--mount-proc"]).err()
}

pub(crate) fn hidden_processes_are_detected_in_pid_namespace() {
    let expected = |blind| format!("{:?}", Some::<Blind>(blind));
    assert_eq!(
        hidden_processes_in_namespace(&["--pid", "--fork", "--mount-proc"]).unwrap(),
        expected(Blind::Namespace)
    );
    assert_eq!(
        hidden_processes_in_namespace(&["--pid", "--fork"]).unwrap(),
        expected(Blind::OtherProcfs),
        "the procfs of the parent"
    );
    if blindness(Path::new("/proc")).is_none() {
        assert_eq!(
            hidden_processes_in_namespace(&["--mount"]).unwrap(),
            "None",
            "a mount namespace hides no process"
        );
    }
}
