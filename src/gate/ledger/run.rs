//! Pages that are not plainly mapped: what is under way with them, or how much is in doubt.

use passgate_bindings::units::Address;
use passgate_bindings::{Iova, PageRange};

use crate::gate::event::JobId;

/// How sure we are of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// A map call is under way.
    Filling {
        /// Which.
        job: JobId,
        /// Bytes per kernel mapping; their borders are multiples of it.
        piece: u64,
    },
    /// An unmap call is under way.
    Removing(JobId),
    /// Out of the translation, but operations issued before are in flight.
    Leaking(JobId),
    /// Out of the translation, but a device that caches translations may have kept a copy of it.
    Cached,
    /// A call failed half-way or came up short: may be mapped, in part or whole.
    Suspect {
        /// Bytes reported removed so far, of those that were mapped; none where nobody knows how many were. Then an
        /// unmap that succeeds is proof by itself.
        gone: Option<u64>,
        /// The kernel's last answer.
        errno: i32,
    },
}

impl RunState {
    /// Whether it is on its way out or in doubt, and not about to be mapped.
    pub fn unsettled(self) -> bool {
        !matches!(self, Self::Filling { .. })
    }
}

/// Pages that are not plainly mapped, in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where.
    pub range: PageRange<Iova>,
    /// Bytes of it that are mapped, or were before the call; at most, where nobody knows how many.
    pub bytes: u64,
    /// Kernel mappings in it.
    pub objects: u64,
    /// How sure we are.
    pub state: RunState,
}

impl Run {
    /// A run of mappings that are being made: with borders at the multiples of `piece`, a power of two.
    pub fn filling(range: PageRange<Iova>, piece: u64, job: JobId) -> Self {
        let objects = objects(range, piece);
        Self { range, bytes: range.len(), objects, state: RunState::Filling { job, piece } }
    }
}

/// Kernel mappings that cover `range` where their borders are at the multiples of `piece`.
pub fn objects(range: PageRange<Iova>, piece: u64) -> u64 {
    (range.end().raw() - 1) / piece - range.start().raw() / piece + 1
}

impl Run {
    /// Bytes of it that may be mapped.
    pub(super) fn left(&self) -> u64 {
        match self.state {
            RunState::Suspect { gone: Some(gone), .. } => self.bytes.saturating_sub(gone),
            _ => self.bytes,
        }
    }
}
