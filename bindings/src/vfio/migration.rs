//! Migration states of a VFIO device (`enum vfio_device_mig_state` of include/uapi/linux/vfio.h): STOP ends its DMA, and
//! RUNNING resumes it.

use std::os::fd::{FromRawFd, OwnedFd};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio as uapi;

use super::device::{DeviceFile, Feature};
use crate::Failed;

/// A migration state, with the kernel's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MigrationState {
    /// The device has failed; only a reset recovers it.
    Error = uapi::vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR,
    /// The device does no DMA and raises no interrupt.
    Stop = uapi::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP,
    /// The device runs.
    Running = uapi::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING,
    /// The device is stopped, and its state can be read.
    StopCopy = uapi::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY,
    /// The device is stopped, and its state can be written.
    Resuming = uapi::vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING,
    /// The device runs, but issues no peer-to-peer DMA.
    RunningP2p = uapi::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P,
    /// The device runs, and its state can be read.
    PreCopy = uapi::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY,
    /// As [`MigrationState::PreCopy`], without peer-to-peer DMA.
    PreCopyP2p = uapi::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P,
}

impl MigrationState {
    const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];
}

impl DeviceFile {
    /// Returns true where the device supports the state STOP (`VFIO_MIGRATION_STOP_COPY` in
    /// `VFIO_DEVICE_FEATURE_MIGRATION`).
    pub fn can_stop(&self) -> Result<bool, Failed> {
        let mut flags = [0; 8];
        match self.feature_get(Feature::MIGRATION, &mut flags) {
            Ok(()) => Ok(has_stop(flags)),
            Err(failed) if failed.errno == Errno::NOTTY => Ok(false),
            Err(failed) => Err(failed),
        }
    }

    /// Returns the state of the device. `ENOTTY` where it does not support migration, `EPROTO` for an unknown state.
    pub fn migration_state(&self) -> Result<MigrationState, Failed> {
        let mut value = encode(MigrationState::Error);
        self.feature_get(Feature::MIG_DEVICE_STATE, &mut value)?;
        decode(value).0.ok_or(Failed::new("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE", Errno::PROTO))
    }

    /// Changes the state of the device to `state`, and returns when that is complete. After an error the device may be in
    /// any state between the two, or in [`MigrationState::Error`]; [`DeviceFile::migration_state`] returns it.
    pub fn set_migration_state(&self, state: MigrationState) -> Result<(), Failed> {
        let mut value = encode(state);
        self.feature_set(Feature::MIG_DEVICE_STATE, &mut value)?;
        // Some states return a descriptor for the migration data, which is not used.
        if let (_, Some(fd)) = decode(value) {
            // SAFETY: the kernel has just created this descriptor for this call; nothing else owns it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        Ok(())
    }
}

/// Returns true where the flags of `struct vfio_device_feature_migration` (one u64) include STOP_COPY, which implies STOP.
fn has_stop(flags: [u8; 8]) -> bool {
    u64::from_ne_bytes(flags) & u64::from(uapi::VFIO_MIGRATION_STOP_COPY) != 0
}

/// Returns `struct vfio_device_feature_mig_state`: u32 device_state, s32 data_fd (output only, here -1).
fn encode(state: MigrationState) -> [u8; 8] {
    let mut value = [0xff; 8];
    value[..4].copy_from_slice(&(state as u32).to_ne_bytes());
    value
}

/// Returns the state, or none for an unknown one, and the descriptor that the kernel returned with it.
fn decode(value: [u8; 8]) -> (Option<MigrationState>, Option<i32>) {
    let [a, b, c, d, e, f, g, h] = value;
    let state = u32::from_ne_bytes([a, b, c, d]);
    let fd = i32::from_ne_bytes([e, f, g, h]);
    (MigrationState::ALL.into_iter().find(|known| *known as u32 == state), (fd >= 0).then_some(fd))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::memory::GuestFile;

    #[test]
    fn migration_structures_match_the_header() {
        assert_eq!(size_of::<uapi::vfio_device_feature_migration>(), 8);
        assert_eq!(size_of::<uapi::vfio_device_feature_mig_state>(), 8);
        assert_eq!(std::mem::offset_of!(uapi::vfio_device_feature_mig_state, data_fd), 4);
        assert_eq!(encode(MigrationState::Stop), words(1, -1));
        assert_eq!(encode(MigrationState::Running), words(2, -1));
    }

    fn words(state: u32, fd: i32) -> [u8; 8] {
        let mut value = [0; 8];
        value[..4].copy_from_slice(&state.to_ne_bytes());
        value[4..].copy_from_slice(&fd.to_ne_bytes());
        value
    }

    #[test]
    fn migration_state_is_decoded() {
        assert_eq!(decode(words(0, -1)), (Some(MigrationState::Error), None));
        assert_eq!(decode(words(2, 0)), (Some(MigrationState::Running), Some(0)));
        assert_eq!(decode(words(5, -1)).0, Some(MigrationState::RunningP2p));
        assert_eq!(decode(words(8, 7)), (None, Some(7)), "a state of a newer kernel");
        for state in MigrationState::ALL {
            assert_eq!(decode(encode(state)), (Some(state), None));
        }
    }

    #[test]
    fn stop_is_supported_with_stop_copy() {
        for (flags, expected) in [(0_u64, false), (1, true), (2, false), (7, true), (6, false)] {
            assert_eq!(has_stop(flags.to_ne_bytes()), expected, "{flags}");
        }
    }

    #[test]
    fn device_without_migration_cannot_stop() {
        let memfd = GuestFile::memfd("not-a-device", 4096).unwrap();
        let device = DeviceFile::from_fd(memfd.as_fd().try_clone_to_owned().unwrap());
        assert_eq!(device.can_stop(), Ok(false));
        assert_eq!(device.migration_state().unwrap_err().errno, Errno::NOTTY);
        assert_eq!(device.set_migration_state(MigrationState::Stop).unwrap_err().errno, Errno::NOTTY);
    }
}
