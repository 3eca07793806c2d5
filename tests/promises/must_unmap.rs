//! Promise 5: a client that cannot be refused is refused only when every fence was tried, and policy is exceeded for no other
//! client.

use passgate::gate::{DeviceId, DomainId, OnStuckDma, Receipt, Step, Steps, Verdict};
use passgate_bindings::{Gpa, Iova};

use crate::model::{Model, Request, RequestKind};
use crate::oracle::{CheckResult, broken};
use crate::shadow_ledger::span;

impl Model {
    /// Returns the fences that may be requested now, by policy and for the regions being closed.
    pub fn allowed(&self) -> Steps {
        let policy = self.policy.on_stuck_dma.allows();
        let leaving = if self.deaths.is_empty() { Steps::empty() } else { Steps::ALL_BUT_RESET };
        let forced =
            if self.is_must_unmap_in_progress() { OnStuckDma::Reset.allows() } else { Steps::empty() };
        policy | leaving | forced
    }

    /// True while a region is being closed whose owner cannot be refused.
    fn is_must_unmap_in_progress(&self) -> bool {
        let closes = |request: &Request| match request.kind {
            RequestKind::Remove { .. } => true,
            RequestKind::Add { region, .. } => {
                self.oracle.regions.iter().any(|known| Some(known.id) == region && known.map_failed)
            }
            _ => false,
        };
        let forces = |request: &Request| self.must_unmap.contains(&request.caller.client) && closes(request);
        self.requests.values().any(forces)
            || self.deaths.iter().any(|death| self.must_unmap.contains(&death.client))
    }

    /// Checks that the closing of a region whose owner cannot be refused was given up only if, in some domain that still maps
    /// it, every fence of every device was tried. If its deadline was running out, there may have been no time for the last ones.
    pub fn check_refusal_is_last_resort(&mut self, receipt: &Receipt) -> CheckResult {
        let id = receipt.invalidation;
        let Some(since) = self.closing.remove(&id) else { return Ok(()) };
        let given_up = matches!(receipt.verdict, Some(Verdict::Refused { .. } | Verdict::Unknown { .. }));
        if !given_up || self.rung_expired.contains(&id) || !self.must_unmap.contains(&receipt.caller.client) {
            return Ok(());
        }
        let iova = span(receipt.ranges.first().rebase(Gpa(0), Iova(0)));
        let stuck = self.shadow_ledger.domains.iter().filter(|(_, domain)| domain.stuck(&iova));
        let untried: Vec<_> = stuck.map(|(domain, _)| self.untried(*domain, since)).collect();
        if !untried.iter().any(Option::is_none) {
            broken!(5, "{receipt:?} is given up, but fences were not tried: {untried:?}");
        }
        Ok(())
    }

    /// Returns a device of the domain with a fence that has not been tried since `since`; none if all were tried.
    fn untried(&self, domain: DomainId, since: u64) -> Option<(DeviceId, Step)> {
        let mut devices = self.shadow_ledger.devices.iter().filter(|(_, device)| device.domain == domain);
        devices.find_map(|(id, device)| {
            let spared = |step: Step| device.traits.tdi && !self.policy.end_tdi && step.ends_tdi();
            let can = |step: &Step| device.steps.has(*step) && !spared(*step);
            let step = Step::ALL.into_iter().filter(can).find(|step| !device.was_tried(*step, since))?;
            Some((*id, step))
        })
    }
}
