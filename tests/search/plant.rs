//! Faults that are planted at the interfaces of the session, to show that the search finds them.

use passgate::gate::ExcludedBy;
use passgate::session::persist::EarlierState;

/// One planted fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    Nothing,
    /// ATS is read once, at the start of the daemon, from the enable bit, which is off while a device is detached.
    LiveAts,
    /// An unmap succeeds and does nothing.
    UnmapLies,
    /// A detach succeeds and does nothing.
    DetachLies,
    /// A restart loses the excluded ranges.
    HoldsLost,
    /// A restart loses the set of stopped devices.
    StopsLost,
    /// A restart takes every quarantine for a conversion that was open when the daemon ended.
    AllUnended,
}

impl Plant {
    /// Plants the fault in the state that the next daemon reads.
    pub fn corrupt(self, state: &mut EarlierState) {
        match self {
            Self::HoldsLost => state.past.exclusions.clear(),
            Self::StopsLost => state.past.stopped.clear(),
            Self::AllUnended => {
                state.past.unended.extend(state.past.exclusions.iter().filter_map(|(.., by)| match by {
                    ExcludedBy::Quarantine(since, _) => Some(*since),
                    ExcludedBy::Open(_) => None,
                }))
            }
            Self::Nothing | Self::LiveAts | Self::UnmapLies | Self::DetachLies => {}
        }
    }
}
