//! New regions that wait for the regions in their way to be closed: the memory of a VMM that restarts at once is still being
//! closed when the new one adds the same range.

use std::time::{Duration, Instant};

use crate::gate::{Caller, ClientId, CloseWait, RegionSpec};

/// The time that a new region waits for room that other regions leave when they are closed.
const ROOM_TIMEOUT: Duration = Duration::from_secs(3);

/// A new region that waits.
#[derive(Debug)]
struct DeferredRegion {
    caller: Caller,
    spec: RegionSpec,
    /// The time until which it waits for room; none once that has passed. Regions in its way are waited for until they are
    /// closed or given up.
    room_deadline: Option<Instant>,
}

/// The new regions that wait, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct DeferredRegions(Vec<DeferredRegion>);

impl DeferredRegions {
    /// Adds a region, which waits from `now` on.
    pub(super) fn defer(&mut self, caller: Caller, spec: RegionSpec, now: Instant) {
        self.0.push(DeferredRegion { caller, spec, room_deadline: Some(now + ROOM_TIMEOUT) });
    }

    /// Forgets the regions of a client that is gone.
    pub(super) fn client_gone(&mut self, client: ClientId) {
        self.0.retain(|deferred| deferred.caller.client != client);
    }

    /// Takes out the first region that need not wait any more: `wait` returns what a region waits for.
    pub(super) fn take(
        &mut self,
        wait: impl Fn(ClientId, &RegionSpec) -> Option<CloseWait>,
    ) -> Option<(Caller, RegionSpec)> {
        let is_due = |deferred: &DeferredRegion| match wait(deferred.caller.client, &deferred.spec) {
            None => true,
            Some(CloseWait::Room) => deferred.room_deadline.is_none(),
            Some(CloseWait::Region) => false,
        };
        let at = self.0.iter().position(is_due)?;
        let DeferredRegion { caller, spec, .. } = self.0.remove(at);
        Some((caller, spec))
    }

    /// Returns the earliest deadline.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.0.iter().filter_map(|deferred| deferred.room_deadline).min()
    }

    /// Ends the wait for room whose deadline is due at `now`.
    pub(super) fn expire(&mut self, now: Instant) {
        for deferred in &mut self.0 {
            deferred.room_deadline = deferred.room_deadline.filter(|deadline| *deadline > now);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
