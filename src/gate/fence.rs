//! The ladder: which step comes next when a weaker one did not prove that DMA stopped.
//!
//! Policy only. A step is tried on every device of a domain at once, because a fence proves something only for
//! the whole group; what no device of the domain can do, or the policy does not allow, is skipped.

/// A rung of the ladder, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Step {
    /// Remove the mappings and wait for what is in flight.
    Unmap = 0,
    /// End what is in flight.
    Cancel = 1,
    /// Move the devices to the blocking domain.
    Detach = 2,
    /// Reset the devices.
    Reset = 3,
}

impl Step {
    /// All of them, weakest first.
    pub const LADDER: [Step; 4] = [Step::Unmap, Step::Cancel, Step::Detach, Step::Reset];

    /// In words, for messages and for JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unmap => "unmap",
            Self::Cancel => "cancel",
            Self::Detach => "detach",
            Self::Reset => "reset",
        }
    }

    /// The rung above.
    pub fn above(self) -> Option<Step> {
        Self::LADDER.get(self as usize + 1).copied()
    }
}

/// A set of rungs: a device's stop class, or what a policy allows. [`Step::Unmap`] is in every set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Steps(u8);

impl Steps {
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

/// How far passgate goes by itself when DMA does not stop (`--on-stuck-dma`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnStuckDma {
    /// Ask the device to end what it does; then refuse.
    #[default]
    Refuse,
    /// Also take the devices out of the domain.
    Fence,
    /// Also reset the devices.
    Reset,
}

impl OnStuckDma {
    /// The rungs that this policy allows.
    pub fn allows(self) -> Steps {
        match self {
            Self::Refuse => Steps::of(&[Step::Cancel]),
            Self::Fence => Steps::of(&[Step::Cancel, Step::Detach]),
            Self::Reset => Steps::of(&[Step::Cancel, Step::Detach, Step::Reset]),
        }
    }
}
