//! What stops the device itself, whatever its address space: bus mastering off, and the migration state STOP.

use std::time::{Duration, Instant};

use passgate_bindings::Failed;
use passgate_bindings::vfio::MigrationState;
use passgate_bindings::vfio::config::{COMMAND, COMMAND_MASTER, COMMAND_MEMORY, Capabilities, is_gone};
use rustix::io::Errno;

use super::VfioDevice;
use crate::{Error, Result};

/// How long requests may be pending after bus mastering went off: ten times the completion time-out that a
/// function should keep to (PCIe 6.0, 7.5.3.16: 50 ms by default).
const PENDING: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(1);

impl VfioDevice {
    /// The 4 bytes at `at` of configuration space.
    fn config_word(&self, at: u16) -> Result<u32> {
        self.read_u32(self.config, at.into())
    }

    /// The capabilities in configuration space.
    pub(super) fn find_capabilities(&self) -> Result<Capabilities> {
        Capabilities::find(self.config.size, |at| self.config_word(at))
    }

    /// Whether the device may use its cache of translations now: its enable bit, which a detached device reads as off.
    pub(super) fn ats_on(&self) -> Result<bool> {
        self.capabilities.ats_on(|at| self.config_word(at))
    }

    /// Lets the device issue requests, or stops it from doing so, and reads back that it is so.
    ///
    /// Switched off it issues nothing new, without any fault. The read back also brings in what it has written:
    /// a completion does not pass the posted writes before it (PCIe 6.0, 2.4.1).
    pub(super) fn set_master(&self, on: bool) -> Result<()> {
        const CALL: &str = "Bus Master Enable";
        let before = self.command()?;
        let after = if on { before | COMMAND_MEMORY | COMMAND_MASTER } else { before & !COMMAND_MASTER };
        let written = self.seat.file().write(self.config, COMMAND.into(), &after.to_le_bytes());
        written.map_err(|failed| self.failed(failed.without_partial()))?;
        if (self.command()? & COMMAND_MASTER != 0) == on {
            return Ok(());
        }
        Err(self.failed(Failed::new(CALL, Errno::IO)))
    }

    /// The command register of a device that answers. Of a virtual function VFIO makes up a bit of it, so that it is not
    /// all ones where the function is gone.
    fn command(&self) -> Result<u16> {
        let word = self.config_word(COMMAND)?;
        if is_gone(word) { Err(Error::Gone { device: self.name.clone() }) } else { Ok(word as u16) }
    }

    /// Bus mastering off, and no request of the device without its completion any more (Transactions Pending).
    pub(super) fn master_off(&self) -> Result<()> {
        self.set_master(false)?;
        let pending = || self.capabilities.transactions_pending(|at| self.config_word(at));
        if settles(PENDING, || Ok(pending()?.unwrap_or(true)))? {
            return Ok(());
        }
        Err(self.failed(Failed::new("Transactions Pending", Errno::TIMEDOUT)))
    }

    /// Stops the device by its migration state.
    pub(super) fn migration_stop(&self) -> Result<()> {
        self.migrate(MigrationState::Stop)
    }

    /// Lets it run again where it was stopped by its migration state.
    pub(super) fn migration_run(&self) -> Result<()> {
        let state = self.seat.file().migration_state().map_err(|failed| self.failed(failed))?;
        if state == MigrationState::Running { Ok(()) } else { self.migrate(MigrationState::Running) }
    }

    fn migrate(&self, state: MigrationState) -> Result<()> {
        let file = self.seat.file();
        file.set_migration_state(state).map_err(|source| Error::Device {
            device: self.name.clone(),
            source,
            mend: match file.migration_state() {
                Ok(MigrationState::Error) => {
                    "; its migration state is ERROR now: only a reset brings it back"
                }
                Ok(MigrationState::Running) => "; it runs as before",
                _ => "",
            },
        })
    }
}

/// Whether `pending` says no within this time.
fn settles(within: Duration, mut pending: impl FnMut() -> Result<bool>) -> Result<bool> {
    let until = Instant::now() + within;
    loop {
        // Looked at once more after the last wait, however long that took.
        let last = Instant::now() >= until;
        if !pending()? {
            return Ok(true);
        }
        if last {
            return Ok(false);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pending_is_waited_for_and_what_never_ends_is_told() {
        let mut left = 3;
        let mut fewer = || {
            left -= 1;
            Ok(left > 0)
        };
        assert!(settles(Duration::from_secs(60), &mut fewer).unwrap());
        assert_eq!(left, 0);
        assert!(!settles(Duration::ZERO, || Ok(true)).unwrap());
        assert!(settles(Duration::ZERO, || Ok(false)).unwrap(), "it is looked at once at least");
        let gone = || Err(Error::Unsupported { device: "x".into(), what: "this" });
        assert!(settles(Duration::from_secs(60), gone).is_err());
    }
}
