//! A device that is taken from its driver for a while, and given back whatever becomes of this process.
//!
//! A helper process gives it back: it is told what was before anything changes, holds one end of a pipe, and acts when
//! the other end closes, by intent or because whoever had it died. It has a session of its own and ignores the signals
//! that end a whole terminal or process group. Only where the helper dies does the borrower give back by itself.

mod binding;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use passgate_bindings::vfio::PciAddress;
use serde::{Deserialize, Serialize};

use self::binding::{Binding, Bus as _, Sysfs, give_back, is_vfio, take};
use crate::error::{Error, Result};

/// The hidden subcommand that runs [`run`].
pub const SUBCOMMAND: &str = "give-back";

/// The helper's answer once it will give the device back.
const READY: &str = "ready";

/// The signals that the helper ignores: HUP, INT, QUIT, TERM, the same on every architecture.
const IGNORED_SIGNALS: [i32; 4] = [1, 2, 3, 15];

/// What the helper is told, in one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    sysfs: PathBuf,
    device: String,
    before: Binding,
}

/// A device that is bound to vfio-pci until dropped, and then as it was before.
#[derive(Debug)]
pub(super) struct Borrowed {
    bus: Sysfs,
    before: Binding,
    device: String,
    /// None where it was vfio-pci's already, or once it is given back.
    helper: Option<Helper>,
}

#[derive(Debug)]
struct Helper {
    child: Child,
    /// Open for as long as the device is borrowed.
    pipe: ChildStdin,
}

impl Borrowed {
    /// Takes the device from its driver; `program` is this program, which the helper runs. `claims` keeps others from what
    /// is below the device until it has lost its driver.
    pub(super) fn take(
        sysfs: &Path,
        address: PciAddress,
        program: &Path,
        claims: impl Sized,
    ) -> Result<Self> {
        let bus = Sysfs::new(sysfs, address);
        let device = address.to_string();
        let before = bus.read().map_err(|why| Error::Binding { device: device.clone(), why })?;
        let mut borrowed = Self { bus, before, device, helper: None };
        if borrowed.before.driver.as_deref().is_some_and(is_vfio) {
            return Ok(borrowed);
        }
        let order = Order {
            sysfs: sysfs.to_owned(),
            device: borrowed.device.clone(),
            before: borrowed.before.clone(),
        };
        let helper = Helper::start(program, &order).map_err(|why| borrowed.refused(why))?;
        borrowed.helper = Some(helper);
        // Where this fails, dropping it gives back what was.
        let taken = take(&mut borrowed.bus);
        // A node that is open keeps its disk's number from the driver that the device is given back to.
        drop(claims);
        taken.map_err(|why| borrowed.refused(why))?;
        Ok(borrowed)
    }

    fn refused(&self, why: String) -> Error {
        Error::Binding { device: self.device.clone(), why }
    }

    /// Gives the device back. Returns how it is bound now; none where it was not taken.
    pub(super) fn give_back(&mut self) -> Result<Option<String>, String> {
        let Some(Helper { mut child, pipe }) = self.helper.take() else { return Ok(None) };
        drop(pipe);
        if !matches!(child.wait(), Ok(status) if status.success()) {
            give_back(&mut self.bus, &self.before).map_err(|why| format!("not given back: {why}"))?;
        }
        Ok(Some(format!("{} again", self.before.words())))
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if let Err(why) = self.give_back() {
            log::error!("{}: {why}", self.device);
        }
    }
}

impl Helper {
    /// Starts the helper, and waits until it is ready: nothing may change before.
    fn start(program: &Path, order: &Order) -> Result<Self, String> {
        let text = serde_json::to_string(order).map_err(|error| error.to_string())?;
        let mut child = Command::new(program)
            .args([SUBCOMMAND, &order.device])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("the process that would give it back cannot be started: {error}"))?;
        let (pipe, stdout) = (child.stdin.take(), child.stdout.take());
        let (Some(mut pipe), Some(stdout)) = (pipe, stdout) else { return Err("it has no pipes".to_owned()) };
        let mut answer = String::new();
        let told = writeln!(pipe, "{text}").and_then(|()| BufReader::new(stdout).read_line(&mut answer));
        match told {
            Ok(_) if answer.trim_end() == READY => Ok(Self { child, pipe }),
            told => {
                drop(pipe);
                let ended = child.wait();
                Err(format!("the process that would give it back is not ready: {told:?}, {ended:?}"))
            }
        }
    }
}

/// Waits until standard input ends, and gives the device back that its first line tells of. The process is the helper
/// from here on.
pub fn run() -> Result<()> {
    // It fails where this process leads a session already, which serves as well.
    let _ = rustix::process::setsid();
    for signal in IGNORED_SIGNALS {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false))).map_err(Error::Signal)?;
    }
    let mut input = std::io::stdin().lock();
    let mut line = String::new();
    input.read_line(&mut line).map_err(Error::Output)?;
    let wrong = |why: String| Error::Usage(format!("`{SUBCOMMAND}` is started by `selftest --bind`: {why}"));
    let order: Order = serde_json::from_str(&line).map_err(|error| wrong(error.to_string()))?;
    let address = order.device.parse::<PciAddress>().map_err(|error| wrong(error.to_string()))?;
    println!("{READY}");
    // An error is an end as well.
    let _ = input.read_to_end(&mut Vec::new());
    let device = order.device;
    give_back(&mut Sysfs::new(&order.sysfs, address), &order.before)
        .map_err(|why| Error::Binding { device, why: format!("not given back: {why}") })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// A node of a disk that is open.
    struct Open(PathBuf);

    impl Drop for Open {
        fn drop(&mut self) {
            fs::remove_file(&self.0).unwrap();
        }
    }

    #[test]
    fn claims_are_dropped_before_a_device_that_could_not_be_taken_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("bus/pci/devices/0000:04:00.0");
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("driver_override"), "(null)\n").unwrap();
        // It never loses this driver: the files here are no kernel's.
        let driver = dir.path().join("bus/pci/drivers/nvme");
        fs::create_dir_all(&driver).unwrap();
        symlink(&driver, device.join("driver")).unwrap();
        // The helper takes down what is open when it is to give the device back.
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
        let taken =
            Borrowed::take(dir.path(), "04:00.0".parse().unwrap(), &helper, Open(node.clone())).unwrap_err();
        assert!(taken.to_string().contains("it went to nvme"), "{taken}");
        let seen = fs::read_to_string(seen).unwrap();
        assert!(seen.contains("No such file"), "{seen}");
    }
}
