//! This very program, started in PID namespaces of its own.

use std::path::Path;
use std::process::{Command, ExitCode};

use passgate::host::sight::{Blind, blindness};

/// Set for a copy of this program that only says how far it sees.
const INSIDE: &str = "PASSGATE_TEST_SAYS_ITS_BLINDNESS";

/// Says how far this process sees, where that is all that it is for.
pub(crate) fn inside() -> Option<ExitCode> {
    std::env::var_os(INSIDE)?;
    println!("{:?}", blindness(Path::new("/proc")));
    Some(ExitCode::SUCCESS)
}

/// What this program says when it is started by `unshare` with these arguments.
fn says(unshare: &[&str]) -> Result<String, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("unshare").args(unshare).arg("--").arg(program).env(INSIDE, "1").output();
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

pub(crate) fn missing() -> Option<String> {
    says(&["--pid", "--fork", "--mount-proc"]).err()
}

pub(crate) fn holders_are_unseen() {
    let said = |blind| format!("{:?}", Some::<Blind>(blind));
    assert_eq!(says(&["--pid", "--fork", "--mount-proc"]).unwrap(), said(Blind::Namespace));
    assert_eq!(says(&["--pid", "--fork"]).unwrap(), said(Blind::OtherProcfs), "the procfs of the parent");
    if blindness(Path::new("/proc")).is_none() {
        assert_eq!(says(&["--mount"]).unwrap(), "None", "another namespace hides no process");
    }
}
