//! Runs: ranges of pages that are being mapped, being unmapped, or in doubt.

use passgate_bindings::units::Address;
use passgate_bindings::{Iova, PageRange};

use crate::gate::ids::JobId;

/// The state of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// A map call is in progress.
    Filling {
        /// The call.
        job: JobId,
        /// Bytes per kernel mapping; their borders are multiples of it.
        piece: u64,
    },
    /// An unmap call is in progress.
    Removing(JobId),
    /// Unmapped, but operations issued before are in flight.
    Leaking(JobId),
    /// Unmapped, but a device with ATS may have a cached translation.
    Cached,
    /// A call failed half-way or came back short: may be mapped, in part or whole.
    Suspect {
        /// Bytes reported unmapped so far, of those that were mapped; none where nobody knows how many were. Then an unmap
        /// that succeeds is proof by itself.
        gone: Option<u64>,
        /// The kernel's last errno; 0 for none.
        errno: i32,
    },
}

impl RunState {
    /// True if it is being unmapped or in doubt, and not being mapped.
    pub fn unsettled(self) -> bool {
        !matches!(self, Self::Filling { .. })
    }
}

/// A range of pages that is not live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The range.
    pub range: PageRange<Iova>,
    /// Bytes of it that are mapped, or were before the call; the maximum, where nobody knows how many.
    pub bytes: u64,
    /// The number of kernel mappings in it.
    pub mapping_count: u64,
    /// Its state.
    pub state: RunState,
}

impl Run {
    /// Returns a run of mappings that are being made: with borders at the multiples of `piece`, a power of two.
    pub fn filling(range: PageRange<Iova>, piece: u64, job: JobId) -> Self {
        let mapping_count = mapping_count(range, piece);
        Self { range, bytes: range.len(), mapping_count, state: RunState::Filling { job, piece } }
    }
}

/// Returns the number of kernel mappings that cover `range` with borders at the multiples of `piece`.
pub fn mapping_count(range: PageRange<Iova>, piece: u64) -> u64 {
    (range.end().raw() - 1) / piece - range.start().raw() / piece + 1
}

impl Run {
    /// Returns the bytes of it that may be mapped.
    pub(super) fn bytes_mapped(&self) -> u64 {
        match self.state {
            RunState::Suspect { gone: Some(gone), .. } => self.bytes.saturating_sub(gone),
            _ => self.bytes,
        }
    }
}
