//! New regions that wait for the regions in their way to be closed: the memory of a VMM that restarts at once is still being
//! closed when the new one adds the same range.

use std::time::{Duration, Instant};

use crate::gate::{Caller, ClientId, RegionSpec};

/// The time that a new region waits for the regions in its way to be closed: longer than the gate's deadline for a close
/// ([`crate::gate::Policy::close_deadline_ns`]).
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// A new region that waits.
#[derive(Debug)]
struct DeferredRegion {
    caller: Caller,
    spec: RegionSpec,
    /// The time at which it is added in any case; the gate refuses it if a region is still in its way.
    deadline: Instant,
}

/// The new regions that wait, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct DeferredRegions(Vec<DeferredRegion>);

impl DeferredRegions {
    /// Adds a region, which waits from `now` on.
    pub(super) fn defer(&mut self, caller: Caller, spec: RegionSpec, now: Instant) {
        self.0.push(DeferredRegion { caller, spec, deadline: now + CLOSE_TIMEOUT });
    }

    /// Forgets the regions of a client that is gone.
    pub(super) fn client_gone(&mut self, client: ClientId) {
        self.0.retain(|deferred| deferred.caller.client != client);
    }

    /// Takes out the first region that need not wait any more, as `waits` says, or whose deadline has passed.
    pub(super) fn take(
        &mut self,
        now: Instant,
        waits: impl Fn(ClientId, &RegionSpec) -> bool,
    ) -> Option<(Caller, RegionSpec)> {
        let at = self.0.iter().position(|deferred| {
            deferred.deadline <= now || !waits(deferred.caller.client, &deferred.spec)
        })?;
        let DeferredRegion { caller, spec, .. } = self.0.remove(at);
        Some((caller, spec))
    }

    /// Returns the earliest deadline.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.0.iter().map(|deferred| deferred.deadline).min()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
