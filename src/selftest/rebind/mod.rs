//! A device that is bound to vfio-pci for a test. Its earlier driver is bound again whatever becomes of this process.
//!
//! A helper process restores the binding. It receives the earlier binding before anything changes, has the read end of a
//! pipe, and acts when the write end closes: on purpose, or because the process that had it died. It leads a session of
//! its own and ignores the signals that end a whole terminal or process group. Only if the helper dies does this process
//! restore the binding itself.

mod binding;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use passgate_bindings::vfio::PciAddress;
use serde::{Deserialize, Serialize};

use self::binding::{Binding, Bus as _, Sysfs, bind_to_vfio, is_vfio, restore};
use crate::error::{Error, Result};

/// The hidden subcommand that runs [`run`].
pub const SUBCOMMAND: &str = "give-back";

/// The line that the helper prints once it is certain to restore the binding.
const READY: &str = "ready";

/// The signals that the helper ignores: HUP, INT, QUIT and TERM, whose numbers are the same on every architecture.
const IGNORED_SIGNALS: [i32; 4] = [1, 2, 3, 15];

/// The request to the helper: one line of JSON on its standard input.
#[derive(Debug, Serialize, Deserialize)]
struct RestoreRequest {
    sysfs: PathBuf,
    device: String,
    before: Binding,
}

/// A device that is bound to vfio-pci until this is dropped, and then as it was before.
#[derive(Debug)]
pub(super) struct Rebound {
    bus: Sysfs,
    before: Binding,
    device: String,
    /// None if the device was bound to VFIO before, and once its binding is restored.
    helper: Option<Helper>,
}

#[derive(Debug)]
struct Helper {
    child: Child,
    /// Open for as long as the device stays bound to vfio-pci.
    pipe: ChildStdin,
}

impl Rebound {
    /// Binds the device to vfio-pci. `program` is the path of this program, which the helper runs. `claims` excludes
    /// other users from the disks of the device, and is dropped once its driver is unbound.
    pub(super) fn bind(
        sysfs: &Path,
        address: PciAddress,
        program: &Path,
        claims: impl Sized,
    ) -> Result<Self> {
        let bus = Sysfs::new(sysfs, address);
        let device = address.to_string();
        let before = bus.read().map_err(|why| Error::Binding { device: device.clone(), why })?;
        let mut rebound = Self { bus, before, device, helper: None };
        if rebound.before.driver.as_deref().is_some_and(is_vfio) {
            return Ok(rebound);
        }
        let request = RestoreRequest {
            sysfs: sysfs.to_owned(),
            device: rebound.device.clone(),
            before: rebound.before.clone(),
        };
        let helper = Helper::start(program, &request).map_err(|why| rebound.failed(why))?;
        rebound.helper = Some(helper);
        // If this fails, dropping `rebound` restores the earlier binding.
        let bound = bind_to_vfio(&mut rebound.bus);
        // Before any restore: while the node of a disk is open, the driver cannot give the disk its number again.
        drop(claims);
        bound.map_err(|why| rebound.failed(why))?;
        Ok(rebound)
    }

    fn failed(&self, why: String) -> Error {
        Error::Binding { device: self.device.clone(), why }
    }

    /// Restores the earlier binding and returns it as text; none if this has changed nothing, or has restored it before.
    pub(super) fn restore(&mut self) -> Result<Option<String>, String> {
        let Some(Helper { mut child, pipe }) = self.helper.take() else { return Ok(None) };
        drop(pipe);
        if !matches!(child.wait(), Ok(status) if status.success()) {
            restore(&mut self.bus, &self.before).map_err(|why| format!("not given back: {why}"))?;
        }
        Ok(Some(format!("{} again", self.before.describe())))
    }
}

impl Drop for Rebound {
    fn drop(&mut self) {
        if let Err(why) = self.restore() {
            log::error!("{}: {why}", self.device);
        }
    }
}

impl Helper {
    /// Starts the helper, and waits until it is ready: nothing may be changed before.
    fn start(program: &Path, request: &RestoreRequest) -> Result<Self, String> {
        let text = serde_json::to_string(request).map_err(|error| error.to_string())?;
        let mut child = Command::new(program)
            .args([SUBCOMMAND, &request.device])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("the process that would give it back cannot be started: {error}"))?;
        let (pipe, stdout) = (child.stdin.take(), child.stdout.take());
        let (Some(mut pipe), Some(stdout)) = (pipe, stdout) else { return Err("it has no pipes".to_owned()) };
        let mut answer = String::new();
        let answered = writeln!(pipe, "{text}").and_then(|()| BufReader::new(stdout).read_line(&mut answer));
        match answered {
            Ok(_) if answer.trim_end() == READY => Ok(Self { child, pipe }),
            answered => {
                drop(pipe);
                let ended = child.wait();
                Err(format!("the process that would give it back is not ready: {answered:?}, {ended:?}"))
            }
        }
    }
}

/// Runs the helper: waits until standard input ends, and restores the binding of the device that its first line names
/// (`RestoreRequest`).
pub fn run() -> Result<()> {
    // It fails only if this process leads a process group already: then no signal to the group of its parent reaches it.
    let _ = rustix::process::setsid();
    for signal in IGNORED_SIGNALS {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false))).map_err(Error::Signal)?;
    }
    let mut input = std::io::stdin().lock();
    let mut line = String::new();
    input.read_line(&mut line).map_err(Error::Output)?;
    let wrong = |why: String| Error::Usage(format!("`{SUBCOMMAND}` is started by `selftest --bind`: {why}"));
    let request: RestoreRequest = serde_json::from_str(&line).map_err(|error| wrong(error.to_string()))?;
    let address = request.device.parse::<PciAddress>().map_err(|error| wrong(error.to_string()))?;
    println!("{READY}");
    // Any end of the input counts, an error too.
    let _ = input.read_to_end(&mut Vec::new());
    let device = request.device;
    restore(&mut Sysfs::new(&request.sysfs, address), &request.before)
        .map_err(|why| Error::Binding { device, why: format!("not given back: {why}") })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// The open node of a disk: a file that is removed when it is closed.
    struct OpenNode(PathBuf);

    impl Drop for OpenNode {
        fn drop(&mut self) {
            fs::remove_file(&self.0).unwrap();
        }
    }

    #[test]
    fn claims_are_dropped_before_a_failed_rebind_is_restored() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("bus/pci/devices/0000:04:00.0");
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("driver_override"), "(null)\n").unwrap();
        // There is no kernel behind these files, so the device never loses this driver.
        let driver = dir.path().join("bus/pci/drivers/nvme");
        fs::create_dir_all(&driver).unwrap();
        symlink(&driver, device.join("driver")).unwrap();
        // The helper records if the node is still open when it is to restore the binding.
        let (node, helper, seen) =
            (dir.path().join("node"), dir.path().join("helper"), dir.path().join("seen"));
        let script = format!(
            "#!/bin/sh\necho {READY}\ncat > /dev/null\nls {} > {} 2>&1\n",
            node.display(),
            seen.display()
        );
        fs::write(&helper, script).unwrap();
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(&node, "").unwrap();
        let error = Rebound::bind(dir.path(), "04:00.0".parse().unwrap(), &helper, OpenNode(node.clone()));
        let error = error.unwrap_err();
        assert!(error.to_string().contains("it went to nvme"), "{error}");
        let seen = fs::read_to_string(seen).unwrap();
        assert!(seen.contains("No such file"), "{seen}");
    }
}
