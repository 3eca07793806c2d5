//! The ladder: which step comes next when a weaker one did not prove that DMA stopped.
//!
//! A fence is tried on every device of a domain at once, because it proves something only for the whole group; what no device
//! of the domain can do, or the policy does not allow, is skipped.

use std::fmt;

use passgate_backends::Step;
use serde::{Deserialize, Serialize};

/// A rung of the ladder, weakest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rung {
    /// Remove the mappings and wait for what is in flight.
    Unmap,
    /// Stop the devices by this fence. Serialised as the fence itself.
    #[serde(untagged)]
    Fence(Step),
}

impl Rung {
    /// All rungs, weakest first.
    pub const LADDER: [Rung; 6] = [
        Rung::Unmap,
        Rung::Fence(Step::Drain),
        Rung::Fence(Step::Stop),
        Rung::Fence(Step::Master),
        Rung::Fence(Step::Detach),
        Rung::Fence(Step::Reset),
    ];

    /// Returns its name in messages, events and replies.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unmap => "unmap",
            Self::Fence(step) => step.word(),
        }
    }

    /// Returns its place on the ladder, from 0 on.
    pub fn number(self) -> u8 {
        match self {
            Self::Unmap => 0,
            Self::Fence(step) => step as u8,
        }
    }

    /// Returns its fence; none for the unmap.
    pub fn fence(self) -> Option<Step> {
        match self {
            Self::Unmap => None,
            Self::Fence(step) => Some(step),
        }
    }

    /// Returns the fence of the rung above; none at the top.
    pub fn above(self) -> Option<Step> {
        Self::LADDER.get(usize::from(self.number()) + 1)?.fence()
    }
}

/// By the fence's own name, as in every other text.
impl fmt::Debug for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unmap => f.write_str("Unmap"),
            Self::Fence(step) => fmt::Debug::fmt(step, f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rungs_are_written_by_their_fences_names() {
        let written = ["unmap", "drain", "stop", "master", "detach", "reset"];
        for (number, (rung, name)) in (0..).zip(Rung::LADDER.into_iter().zip(written)) {
            let text = serde_json::to_string(&rung).unwrap();
            assert_eq!(text, format!("\"{name}\""));
            assert_eq!(serde_json::from_str::<Rung>(&text).unwrap(), rung);
            assert_eq!(rung.number(), number);
        }
        assert!(serde_json::from_str::<Rung>("\"climb\"").is_err());
        assert!(Rung::LADDER.is_sorted());
        assert_eq!(Rung::Fence(Step::Reset).above(), None);
    }
}
