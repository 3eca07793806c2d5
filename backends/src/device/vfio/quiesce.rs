//! The fences that act on the device itself and not on its address space: bus mastering off, and the migration state
//! STOP.

use std::time::{Duration, Instant};

use passgate_bindings::Failed;
use passgate_bindings::vfio::MigrationState;
use passgate_bindings::vfio::config::{COMMAND, COMMAND_MASTER, COMMAND_MEMORY, Capabilities, is_gone};
use rustix::io::Errno;

use super::VfioDevice;
use crate::{Error, Result};

/// The time within which no request may be pending any more after bus mastering was switched off: far longer than the
/// default completion time-out of at most 50 ms (PCIe 6.0, 7.5.3.16).
const PENDING_TIMEOUT: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(1);

impl VfioDevice {
    /// Returns the 4 bytes at `at` of configuration space.
    fn config_word(&self, at: u16) -> Result<u32> {
        self.read_u32(self.config, at.into())
    }

    /// Finds the capabilities in configuration space.
    pub(super) fn find_capabilities(&self) -> Result<Capabilities> {
        Capabilities::find(self.config.size, |at| self.config_word(at))
    }

    /// Returns the ATS enable bit: true if the device may use its translation cache now. It is off while the device is
    /// detached.
    pub(super) fn ats_on(&self) -> Result<bool> {
        self.capabilities.ats_on(|at| self.config_word(at))
    }

    /// Sets or clears Bus Master Enable and checks it by reading it back.
    ///
    /// While it is clear, the device issues no new request, without any fault. The read-back also flushes the device's
    /// earlier writes: its completion does not pass the posted writes before it (PCIe 6.0, 2.4.1).
    pub(super) fn set_master(&self, on: bool) -> Result<()> {
        const CALL: &str = "Bus Master Enable";
        let before = self.command()?;
        let after = if on { before | COMMAND_MEMORY | COMMAND_MASTER } else { before & !COMMAND_MASTER };
        let written = self.handle.file().write(self.config, COMMAND.into(), &after.to_le_bytes());
        written.map_err(|failed| self.failed(failed.without_partial()))?;
        if (self.command()? & COMMAND_MASTER != 0) == on {
            return Ok(());
        }
        Err(self.failed(Failed::new(CALL, Errno::IO)))
    }

    /// Returns the Command register; [`Error::Gone`] if the device does not respond. `is_gone` is needed because VFIO
    /// emulates a bit of the register of a virtual function, so that it does not read as all ones if the function is
    /// gone.
    fn command(&self) -> Result<u16> {
        let word = self.config_word(COMMAND)?;
        if is_gone(word) { Err(Error::Gone { device: self.name.clone() }) } else { Ok(word as u16) }
    }

    /// Switches bus mastering off and waits until every request of the device has its completion (Transactions Pending
    /// in Device Status is clear; PCIe 6.0, 7.5.3.5).
    pub(super) fn master_off(&self) -> Result<()> {
        self.set_master(false)?;
        let pending = || self.capabilities.transactions_pending(|at| self.config_word(at));
        if ends_within(PENDING_TIMEOUT, || Ok(pending()?.unwrap_or(true)))? {
            return Ok(());
        }
        Err(self.failed(Failed::new("Transactions Pending", Errno::TIMEDOUT)))
    }

    /// Stops the device by its migration state.
    pub(super) fn migration_stop(&self) -> Result<()> {
        self.migrate(MigrationState::Stop)
    }

    /// Sets the migration state RUNNING, if it is another.
    pub(super) fn migration_run(&self) -> Result<()> {
        let state = self.handle.file().migration_state().map_err(|failed| self.failed(failed))?;
        if state == MigrationState::Running { Ok(()) } else { self.migrate(MigrationState::Running) }
    }

    fn migrate(&self, state: MigrationState) -> Result<()> {
        let file = self.handle.file();
        file.set_migration_state(state).map_err(|source| Error::Device {
            device: self.name.clone(),
            source,
            remedy: match file.migration_state() {
                Ok(MigrationState::Error) => {
                    "; its migration state is ERROR now: only a reset brings it back"
                }
                Ok(MigrationState::Running) => "; it runs as before",
                _ => "",
            },
        })
    }
}

/// Polls `pending` until it returns false. Returns false if it does not within this time.
fn ends_within(within: Duration, mut pending: impl FnMut() -> Result<bool>) -> Result<bool> {
    let until = Instant::now() + within;
    loop {
        // Read before `pending`, so that there is one more poll after the last sleep, however long that took.
        let last = Instant::now() >= until;
        if !pending()? {
            return Ok(true);
        }
        if last {
            return Ok(false);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_within_polls_until_the_end_or_the_timeout() {
        let mut remaining = 3;
        let mut fewer = || {
            remaining -= 1;
            Ok(remaining > 0)
        };
        assert!(ends_within(Duration::from_secs(60), &mut fewer).unwrap());
        assert_eq!(remaining, 0);
        assert!(!ends_within(Duration::ZERO, || Ok(true)).unwrap());
        assert!(ends_within(Duration::ZERO, || Ok(false)).unwrap(), "it polls at least once");
        let gone = || Err(Error::Unsupported { device: "x".into(), what: "this" });
        assert!(ends_within(Duration::from_secs(60), gone).is_err());
    }
}
