//! Time and the ladder: what pushes an invalidation on when proof does not come.
//!
//! Every rung has its part of the deadline; after the last one comes an answer, whatever is the case. A
//! failure climbs at once, without waiting for time.

use super::Gate;
use super::effect::{Effect, Effects};
use super::event::{DomainId, InvalidationId, JobId};
use super::fence::Step;
use super::invalidation::Phase;
use super::ledger::Run;

/// A deadline has one part for each rung, and one of slack in which the answer travels.
const PARTS: u64 = Step::LADDER.len() as u64 + 1;

impl Gate {
    pub(super) fn arm(&self, invalidation: InvalidationId, rung: Step, effects: &mut Effects) {
        if let Some(inv) = self.invalidations.get(&invalidation) {
            let after_ns = (inv.deadline_ns / PARTS).max(1);
            effects.push(Effect::Arm { invalidation, rung, after_ns });
        }
    }

    /// Goes up to the next rung that the policy allows and a device in question has; false at the top.
    pub(super) fn climb(&mut self, id: InvalidationId, effects: &mut Effects) -> bool {
        let Some(inv) = self.invalidations.get(&id) else { return false };
        let allowed = self.allowed(inv);
        // A map that takes its time is no reason to stop a device.
        let stands = |run: Run| run.state.unsettled();
        let stuck: Vec<DomainId> = self
            .domains
            .iter()
            .filter(|domain| inv.targets.iter().any(|t| domain.mapped.runs(*t).any(stands)))
            .map(|domain| domain.id)
            .collect();
        let mut rung = inv.rung;
        while let Some(next) = rung.above() {
            rung = next;
            if !stuck.iter().any(|domain| self.can(*domain, next, allowed)) {
                continue;
            }
            for domain in stuck {
                self.fence(domain, next, allowed, id, effects);
            }
            if let Some(inv) = self.invalidations.get_mut(&id) {
                inv.rung = next;
                inv.retry = true;
            }
            return true;
        }
        false
    }

    /// A part of the deadline is over, and with it a rung.
    pub(super) fn expired(&mut self, id: InvalidationId, over: Step, effects: &mut Effects) {
        let last_job = JobId(self.last_job);
        let Some(inv) = self.invalidations.get_mut(&id).filter(|inv| inv.phase != Phase::Granted) else {
            return;
        };
        // Nothing of a conversion is unmapped before its devices are out; there is nothing to climb for.
        let waits = inv.stopping && inv.is_conversion();
        inv.stopping = waits;
        inv.hurried = true;
        inv.give_up(last_job);
        if inv.phase == Phase::Converting {
            match over.above() {
                None => self.convert_hangs(id, effects),
                Some(next) => self.arm(id, next, effects),
            }
            return;
        }
        match over.above() {
            None => {
                self.fail(id, effects);
                return;
            }
            Some(next) => {
                let behind = inv.rung <= over;
                self.arm(id, next, effects);
                if behind && !waits {
                    self.climb(id, effects);
                }
            }
        }
        self.advance(id, effects);
    }
}
