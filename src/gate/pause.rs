//! Devices that are paused while a mapping is split, so that their DMA beside it waits instead of failing
//! ([`Hitless::Prefer`]). What was paused comes back with everything else that was stopped, once the rest of the mapping is
//! there again.

use super::effect::Effects;
use super::event::InvalidationId;
use super::hitless::{Hitless, pause};
use super::invalidation::{After, Invalidation};
use super::stop::DeviceEntry;
use super::{DomainEntry, Gate};

impl Gate {
    /// Before mappings are split: has the devices paused that would miss them. Whether one of them runs yet. A pause that
    /// fails, or takes longer than its part of the deadline, is not waited for: no loss is preferred, not required.
    pub(super) fn pauses(&mut self, id: InvalidationId, effects: &mut Effects) -> bool {
        let Some(inv) = self.invalidations.get(&id) else { return false };
        if self.policy.hitless != Hitless::Prefer || inv.hurried {
            return false;
        }
        let concerned = |d: &DeviceEntry| self.domain(d.domain).is_some_and(|domain| splits(domain, inv));
        let running =
            self.devices.iter().filter(|(_, d)| !d.nature.tolerant && !d.is_paused() && concerned(d));
        // Each is asked once.
        let (asked, fresh): (Vec<_>, Vec<_>) = running.partition(|(device, _)| inv.pausing.contains(device));
        let mut waits = asked.iter().any(|(_, device)| device.is_stopping());
        let fresh: Vec<_> =
            fresh.into_iter().filter_map(|(id, device)| Some((*id, pause(device)?))).collect();
        for (device, step) in fresh {
            self.fence_one(device, step, id, effects);
            if let Some(inv) = self.invalidations.get_mut(&id) {
                inv.pausing.push(device);
            }
            waits = true;
        }
        waits
    }
}

/// Whether the invalidation takes away more than its own pages in a domain, or maps what it takes away again.
pub(super) fn splits(domain: &DomainEntry, inv: &Invalidation) -> bool {
    let is_merge = matches!(inv.after, After::Merged(_));
    if !inv.sweeps(domain.id) || (domain.able.cut && !is_merge) {
        return false;
    }
    inv.targets
        .iter()
        .filter_map(|target| domain.mapped.extent(*target))
        .any(|extent| is_merge || domain.mapped.whole(extent) != extent)
}
