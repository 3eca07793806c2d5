//! The ladder: which step comes next when a weaker one did not prove that DMA stopped.
//!
//! Policy only. A step is tried on every device of a domain at once, because a fence proves something only for
//! the whole group; what no device of the domain can do, or the policy does not allow, is skipped.

use serde::{Deserialize, Serialize};

/// A rung of the ladder, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Step {
    /// Remove the mappings and wait for what is in flight.
    Unmap = 0,
    /// End what is in flight: the devices' drivers issue nothing more, and wait or cancel.
    Drain = 1,
    /// Stop the devices by their migration state (`VFIO_DEVICE_STATE_STOP`).
    Stop = 2,
    /// Bus mastering off, and no transaction pending: no new requests.
    Master = 3,
    /// Move the devices to the blocking domain.
    Detach = 4,
    /// Reset the devices.
    Reset = 5,
}

impl Step {
    /// All steps, weakest first.
    pub const LADDER: [Step; 6] =
        [Step::Unmap, Step::Drain, Step::Stop, Step::Master, Step::Detach, Step::Reset];

    /// Returns its name in messages and in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unmap => "unmap",
            Self::Drain => "drain",
            Self::Stop => "stop",
            Self::Master => "bus-master-off",
            Self::Detach => "detach",
            Self::Reset => "reset",
        }
    }

    /// True if it ends a TDI in CONFIG_LOCKED or RUN (PCIe 6.1, 11.2.8: the interface goes to ERROR).
    pub fn ends_tdi(self) -> bool {
        matches!(self, Self::Master | Self::Reset)
    }

    /// Returns the rung above; none at the top.
    pub fn above(self) -> Option<Step> {
        Self::LADDER.get(self as usize + 1).copied()
    }
}

/// A set of rungs: a device's stop class, or what a policy allows. [`Step::Unmap`] is in every set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Steps(u8);

impl Steps {
    /// Every step that keeps the devices' state.
    pub const ALL_BUT_RESET: Steps = Steps::of(&[Step::Drain, Step::Stop, Step::Master, Step::Detach]);

    /// Returns the set of these steps.
    pub const fn of(steps: &[Step]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < steps.len() {
            bits |= 1 << steps[i] as u8;
            i += 1;
        }
        Self(bits)
    }

    /// True if the set has it.
    pub fn has(self, step: Step) -> bool {
        step == Step::Unmap || self.0 & (1 << step as u8) != 0
    }

    /// Returns the steps of either set.
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The traits of a device that decide which fences prove anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Nature {
    /// It caches translations of its own (PCI ATS is on, or it has ATS and nobody knows that it is off): an unmap alone
    /// proves nothing where a stale write does harm ([`Platform::Strict`](super::Platform::Strict)).
    pub ats: bool,
    /// It is a TDISP interface in CONFIG_LOCKED or RUN, which bus mastering off or a reset would end.
    pub tdi: bool,
    /// A DMA of it that meets a gap does no harm: it is tried again, or reported.
    pub tolerant: bool,
}
