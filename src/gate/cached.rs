//! Devices that cache translations (PCI ATS), where a stale write does harm ([`Platform::Strict`]).
//!
//! The kernel waits for such a device's cache to be invalidated, and when that times out it says nothing: the unmap
//! succeeds. So an unmap proves something in a domain only while every device in it that caches translations is
//! detached, which empties the cache (the kernel turns ATS off) and leaves the device nothing to fill it from.
//! A reset empties it too, but leaves the device attached, to fill it again.

use passgate_bindings::Iova;
use passgate_bindings::PageRange;

use super::Gate;
use super::effect::Effects;
use super::event::{DeviceId, DomainId, InvalidationId};
use super::fence::{Platform, Step, Steps};
use super::invalidation::Invalidation;
use super::ledger::RunState;
use super::stop::DeviceEntry;

impl Gate {
    /// A device of the domain that may still use a translation that was taken away.
    pub(super) fn keeps_copies(&self, domain: DomainId) -> Option<DeviceId> {
        if self.policy.platform == Platform::Contained {
            return None;
        }
        let keeps = |d: &DeviceEntry| d.domain == domain && d.nature.ats && !d.is_out();
        self.devices.iter().find(|(_, d)| keeps(d)).map(|(id, _)| *id)
    }

    /// The domains with something over `targets`.
    fn concerned(&self, targets: &[PageRange<Iova>]) -> Vec<DomainId> {
        let concerned = self.domains.iter().filter(|d| targets.iter().any(|t| !d.mapped.is_clear(*t)));
        concerned.map(|domain| domain.id).collect()
    }

    /// Whether a device may keep a copy of what is mapped over `targets`.
    pub(super) fn copies_over(&self, targets: &[PageRange<Iova>]) -> bool {
        self.policy.platform == Platform::Strict
            && self.concerned(targets).into_iter().any(|domain| self.keeps_copies(domain).is_some())
    }

    /// Before anything is unmapped: has the devices detached that would keep copies of it.
    pub(super) fn detach_caches(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.get(&id) else { return };
        if self.policy.platform == Platform::Contained {
            return;
        }
        let (concerned, is_conversion) = (self.concerned(&inv.targets), inv.is_conversion());
        // One that can never be detached: no reason to stop the others, the answer is no.
        let hopeless = |d: &DeviceEntry| d.nature.ats && !d.is_out() && !d.steps.has(Step::Detach);
        let mut here = self.devices.values().filter(|d| concerned.contains(&d.domain));
        if is_conversion && here.any(hopeless) {
            return;
        }
        let mut stopping = false;
        for domain in concerned {
            if self.keeps_copies(domain).is_some() {
                self.fence(domain, Step::Detach, Steps::default(), id, effects);
                stopping |= self.busy(domain);
            }
        }
        if let Some(inv) = self.invalidations.get_mut(&id) {
            inv.stopping |= stopping;
        }
    }

    /// Whether devices that must be stopped before anything is unmapped are not stopped yet.
    pub(super) fn waits_for_fences(&self, inv: &Invalidation) -> bool {
        let keeps = |domain: DomainId| self.busy(domain) && self.keeps_copies(domain).is_some();
        match inv.is_conversion() {
            _ if !inv.stopping => false,
            // For the detach of what keeps copies of its range, and for nothing else.
            true => self.concerned(&inv.targets).into_iter().any(keeps),
            false => self.domains.iter().any(|domain| self.busy(domain.id)),
        }
    }

    /// The last device of a domain that kept copies is detached: what was unmapped before is gone now.
    pub(super) fn copies_gone(&mut self, domain: DomainId, id: InvalidationId, effects: &mut Effects) {
        if self.policy.platform == Platform::Contained || self.keeps_copies(domain).is_some() {
            return;
        }
        let Some(mapped) = self.mapped_in(domain) else { return };
        let gone = mapped.in_state(RunState::Cached);
        // All of them before anybody looks, for the detach proves them together; and what they show is taken down
        // before any of it is forgotten.
        gone.iter().for_each(|run| _ = mapped.remove(run.range.start()));
        let gone: Vec<_> = gone.into_iter().map(|run| (run.range, self.files_at(run.range))).collect();
        for (iova, _) in &gone {
            self.advance_over(*iova, effects);
        }
        for (iova, pages) in gone {
            self.look_again(iova, pages, id, effects);
        }
    }
}
