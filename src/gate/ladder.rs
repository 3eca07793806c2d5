//! Time, and the ladder of fences: what pushes an invalidation on when proof does not come.
//!
//! Every rung has its part of the deadline; after the last one comes an answer, whatever is the case. A failure climbs at
//! once, without waiting for time.

use super::Gate;
use super::effect::{Effect, Effects};
use super::ids::InvalidationId;
use super::invalidations::Phase;
use super::policy::DEADLINE_PARTS;
use super::rung::Rung;

impl Gate {
    /// Sets the timer for the end of a rung.
    pub(super) fn arm(&self, invalidation: InvalidationId, rung: Rung, effects: &mut Effects) {
        if let Some(inv) = self.invalidations.get(invalidation) {
            let after_ns = (inv.deadline_ns() / DEADLINE_PARTS).max(1);
            effects.push(Effect::Arm { invalidation, rung, after_ns });
        }
    }

    /// Climbs to the next rung that the policy allows and a device in question has. Returns false at the top.
    pub(super) fn climb(&mut self, id: InvalidationId, effects: &mut Effects) -> bool {
        let Some(inv) = self.invalidations.get(id) else { return false };
        let Some(progress) = inv.progress() else { return false };
        let allowed = self.allowed_fences(inv);
        // A map that takes its time is no reason to stop a device.
        let stuck = self.mappings.iter().filter(|domain| {
            let mut runs = inv.targets().iter().flat_map(|target| domain.mapped().runs(*target));
            runs.any(|run| run.state.unsettled())
        });
        let stuck: Vec<_> = stuck.map(|domain| domain.id()).collect();
        let mut rung = progress.rung;
        while let Some(step) = rung.above() {
            rung = Rung::Fence(step);
            if !stuck.iter().any(|domain| self.can_fence(*domain, step, allowed)) {
                continue;
            }
            for domain in stuck {
                self.fence_domain(domain, step, allowed, id, effects);
            }
            if let Some(progress) = self.invalidations.progress_mut(id) {
                progress.rung = rung;
                progress.retry = true;
            }
            return true;
        }
        false
    }

    /// A part of the deadline is over, and with it a rung.
    pub(super) fn expired(&mut self, id: InvalidationId, over: Rung, effects: &mut Effects) {
        let last_call = self.calls.last();
        let Some(inv) = self.invalidations.get_mut(id) else { return };
        let (is_conversion, is_close) = (inv.is_conversion(), inv.is_close());
        let progress = match &mut inv.phase {
            Phase::Clearing(progress) => progress,
            Phase::Converting => return self.conversion_takes_long(id, over, effects),
            Phase::Granted => return,
        };
        if progress.renew(last_call) && is_close {
            // Nothing is stuck: the kernel has much to unmap.
            self.arm(id, Rung::Unmap, effects);
            self.advance(id, effects);
            return;
        }
        // Nothing of a conversion is unmapped before its devices are detached; there is nothing to climb for.
        let waits = progress.stopping && is_conversion;
        progress.stopping = waits;
        progress.part_over(last_call);
        let behind = progress.rung <= over;
        let Some(next) = over.above() else {
            self.fail(id, effects);
            return;
        };
        self.arm(id, Rung::Fence(next), effects);
        if behind && !waits {
            self.climb(id, effects);
        }
        self.advance(id, effects);
    }

    fn conversion_takes_long(&mut self, id: InvalidationId, over: Rung, effects: &mut Effects) {
        match over.above() {
            None => self.give_up_conversion(id, effects),
            Some(next) => self.arm(id, Rung::Fence(next), effects),
        }
    }
}
