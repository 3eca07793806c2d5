//! The fences that stop a device's DMA, the sets of them, and the traits of a device that decide which fences are proof.
//!
//! Plain data, in which the gate says what it asks for and knows what a device has.

use std::ops::{BitOr, Sub};

use serde::{Deserialize, Serialize};

/// A fence, weakest first. The numbers are on disk (ledger records, audit logs): never renumber; a new one goes to the end, and its
/// place on the ladder is `gate::Rung::LADDER`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Step {
    /// End the operations in flight and issue no more, where the device supports it (cancellation of io_uring
    /// operations, the drain of a driver in this crate). Operations have ended only once their tickets are returned.
    /// With a driver in this crate, a transfer that is requested after a drain waits, for 5 s at most, until the device
    /// is attached again; after any stronger fence it fails.
    Drain = 1,
    /// Set the migration state `VFIO_DEVICE_STATE_STOP`: DMA has stopped when the call returns.
    Stop = 2,
    /// Clear Bus Master Enable in the Command register, then wait until Transactions Pending in Device Status is clear
    /// (PCIe 6.0, 7.5.1.1.3 and 7.5.3.5): the device issues no new request, and none is outstanding.
    Master = 3,
    /// Move the device to the blocking domain (`VFIO_DEVICE_DETACH_IOMMUFD_PT`).
    Detach = 4,
    /// Reset the device (`VFIO_DEVICE_RESET`; a software device resets its sockets).
    Reset = 5,
}

impl Step {
    /// All fences, weakest first.
    pub const ALL: [Self; 5] = [Self::Drain, Self::Stop, Self::Master, Self::Detach, Self::Reset];

    /// Returns its name in messages, events and replies. Audit logs have the serialised name (`master`).
    pub fn word(self) -> &'static str {
        match self {
            Self::Drain => "drain",
            Self::Stop => "stop",
            Self::Master => "bus-master-off",
            Self::Detach => "detach",
            Self::Reset => "reset",
        }
    }

    /// Returns true if it ends a TDI in CONFIG_LOCKED or RUN (PCIe 6.1, 11.2.8: the interface goes to ERROR).
    pub fn ends_tdi(self) -> bool {
        matches!(self, Self::Master | Self::Reset)
    }
}

/// A set of fences: those that a device has (its stop class), or those that a policy allows. Serialised as a number, with
/// bit `n` for the fence of number `n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Steps(u8);

impl Steps {
    /// [`Step::Drain`].
    pub const DRAIN: Self = Self::of(&[Step::Drain]);
    /// [`Step::Stop`].
    pub const STOP: Self = Self::of(&[Step::Stop]);
    /// [`Step::Master`].
    pub const MASTER: Self = Self::of(&[Step::Master]);
    /// [`Step::Detach`].
    pub const DETACH: Self = Self::of(&[Step::Detach]);
    /// [`Step::Reset`].
    pub const RESET: Self = Self::of(&[Step::Reset]);
    /// Every fence that keeps the devices' state.
    pub const ALL_BUT_RESET: Self = Self::of(&[Step::Drain, Step::Stop, Step::Master, Step::Detach]);

    /// Returns the set of these fences.
    pub const fn of(steps: &[Step]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < steps.len() {
            bits |= 1 << steps[i] as u8;
            i += 1;
        }
        Self(bits)
    }

    /// Returns the set of all fences.
    pub const fn all() -> Self {
        Self::of(&Step::ALL)
    }

    /// Returns the empty set.
    pub const fn empty() -> Self {
        Self(0)
    }

    /// Returns the set with these bits, without those that are no fence.
    pub const fn from_bits_truncate(bits: u8) -> Self {
        Self(bits & Self::all().0)
    }

    /// Adds these fences if `has`, else removes them.
    pub fn set(&mut self, steps: Self, has: bool) {
        *self = if has { *self | steps } else { *self - steps };
    }

    /// Returns true if the set has no fence.
    pub const fn is_empty(self) -> bool {
        self.0 & Self::all().0 == 0
    }

    /// Returns true if the set has this fence.
    pub const fn has(self, step: Step) -> bool {
        self.0 & 1 << step as u8 != 0
    }
}

impl FromIterator<Step> for Steps {
    fn from_iter<T: IntoIterator<Item = Step>>(steps: T) -> Self {
        steps.into_iter().fold(Self::empty(), |set, step| set | Self::of(&[step]))
    }
}

impl BitOr for Steps {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Sub for Steps {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// The traits of a device that determine which fences are proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceTraits {
    /// It caches translations of its own (PCI ATS is on, or it has ATS and nobody knows that it is off): the invalidation of
    /// that cache after an unmap may time out, which the kernel does not report. Where a stale write does harm, an unmap
    /// alone proves nothing.
    pub ats: bool,
    /// It is a TDISP interface in CONFIG_LOCKED or RUN: bus mastering off or a reset ends the TDI (PCIe 6.1,
    /// 11.2.8: the interface goes to ERROR).
    pub tdi: bool,
    /// A DMA of it that meets a gap does no harm: it is tried again, or reported. Not known to a backend: the operator says it
    /// (`serve --tolerant`).
    pub tolerant: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_fences_have_what_was_put_into_them() {
        assert!(Steps::empty().is_empty() && Steps::default().is_empty());
        for step in Step::ALL {
            let one = Steps::of(&[step]);
            for other in Step::ALL {
                assert_eq!((one.has(other), (Steps::all() - one).has(other)), (step == other, step != other));
            }
        }
        assert_eq!(Step::ALL.into_iter().collect::<Steps>(), Steps::ALL_BUT_RESET | Steps::RESET);
        assert_eq!(Steps::from_bits_truncate(u8::MAX), Steps::all());
    }
}
