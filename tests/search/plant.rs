//! Faults that are planted at the border of the session, to show that the search finds them.

use passgate::gate::HeldBy;
use passgate::session::lasting::Left;

/// One planted fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    Nothing,
    /// ATS is read once, when the daemon comes, from the enable bit, which is off while a device is detached.
    LiveAts,
    /// An unmap says that it succeeded and does nothing.
    UnmapLies,
    /// A detach says that it succeeded and does nothing.
    DetachLies,
    /// A restart forgets what was held.
    HoldsLost,
    /// A restart forgets which devices were stopped.
    StopsLost,
    /// A restart takes every quarantine for a conversion that was open when the daemon ended.
    AllUnended,
}

impl Plant {
    /// What the next daemon reads, with the fault.
    pub fn spoil(self, left: &mut Left) {
        match self {
            Self::HoldsLost => left.past.holds.clear(),
            Self::StopsLost => left.past.stopped.clear(),
            Self::AllUnended => {
                left.past.unended.extend(left.past.holds.iter().filter_map(|(.., by)| match by {
                    HeldBy::Quarantine(since, _) => Some(*since),
                    HeldBy::Open(_) => None,
                }))
            }
            Self::Nothing | Self::LiveAts | Self::UnmapLies | Self::DetachLies => {}
        }
    }
}
