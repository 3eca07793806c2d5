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
    /// All of them, weakest first.
    pub const LADDER: [Step; 6] =
        [Step::Unmap, Step::Drain, Step::Stop, Step::Master, Step::Detach, Step::Reset];

    /// In words, for messages and for JSON.
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

    /// Whether it would end a TDI in CONFIG_LOCKED or RUN (PCIe 6.1, 11.2.8: the interface goes to ERROR).
    pub fn ends_tdi(self) -> bool {
        matches!(self, Self::Master | Self::Reset)
    }

    /// The rung above.
    pub fn above(self) -> Option<Step> {
        Self::LADDER.get(self as usize + 1).copied()
    }
}

/// A set of rungs: a device's stop class, or what a policy allows. [`Step::Unmap`] is in every set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Steps(u8);

impl Steps {
    /// What leaves the devices' state alone.
    pub const ALL_BUT_RESET: Steps = Steps::of(&[Step::Drain, Step::Stop, Step::Master, Step::Detach]);

    /// A set of these.
    pub const fn of(steps: &[Step]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < steps.len() {
            bits |= 1 << steps[i] as u8;
            i += 1;
        }
        Self(bits)
    }

    /// Whether the set has it.
    pub fn has(self, step: Step) -> bool {
        step == Step::Unmap || self.0 & (1 << step as u8) != 0
    }

    /// What either set has.
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What of a device bears on which fences prove anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Nature {
    /// It caches translations of its own (PCI ATS is on, or it has ATS and nobody knows that it is off): an unmap alone
    /// proves nothing where a stale write does harm ([`Platform::Strict`]).
    pub ats: bool,
    /// It is a TDISP interface in CONFIG_LOCKED or RUN, which bus mastering off or a reset would end.
    pub tdi: bool,
    /// A DMA of it that meets a page which is gone for a moment does no harm: it is tried again, or told.
    pub tolerant: bool,
}

/// What a stale write does here, and so what counts as proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Platform {
    /// It faults, noisy but harmless (AMD SEV-SNP, Arm): an unmap at its full length is proof.
    #[default]
    Contained,
    /// It may take the host down (Intel TDX: a machine check): a device that caches translations must have been
    /// detached, and may be, whatever [`OnStuckDma`] says.
    Strict,
}

/// How far passgate goes by itself when DMA does not stop (`--on-stuck-dma`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnStuckDma {
    /// Ask the device to end what it does; then refuse.
    #[default]
    Refuse,
    /// Also stop the devices: migration STOP, bus mastering off, out of their domain.
    Fence,
    /// Also reset the devices.
    Reset,
}

impl OnStuckDma {
    /// The rungs that this policy allows.
    pub fn allows(self) -> Steps {
        match self {
            Self::Refuse => Steps::of(&[Step::Drain]),
            Self::Fence => Steps::ALL_BUT_RESET,
            Self::Reset => Steps::ALL_BUT_RESET.or(Steps::of(&[Step::Reset])),
        }
    }
}
