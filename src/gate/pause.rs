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
    /// Before mappings are split: has the devices paused that would miss them. Whether it asked one just now.
    pub(super) fn pauses(&mut self, id: InvalidationId, effects: &mut Effects) -> bool {
        let Some(inv) = self.invalidations.get(&id) else { return false };
        if self.policy.hitless != Hitless::Prefer || inv.pausing || inv.hurried {
            return false;
        }
        let splitting = |domain: &DomainEntry| splits(domain, inv);
        let runs = |d: &DeviceEntry| {
            let here = self.domain(d.domain).is_some_and(splitting);
            here && !d.nature.tolerant && !d.is_paused()
        };
        let devices: Vec<_> =
            self.devices.iter().filter(|(_, d)| runs(d)).map(|(id, d)| (*id, pause(d))).collect();
        let before = effects.len();
        for (device, step) in devices {
            if let Some(step) = step {
                self.fence_one(device, step, id, effects);
            }
        }
        let Some(inv) = self.invalidations.get(&id) else { return false };
        // What is under way already may be an attach, or a fence of somebody else: it is waited for just as well.
        let waits = effects.len() > before || self.awaits_pause(inv);
        if let Some(inv) = self.invalidations.get_mut(&id) {
            inv.pausing |= waits;
        }
        waits
    }

    /// Whether devices that were asked to pause run yet. A pause that fails is not waited for: no loss is preferred, not
    /// required.
    pub(super) fn waits_for_pause(&self, inv: &Invalidation) -> bool {
        inv.pausing && !inv.hurried && self.awaits_pause(inv)
    }

    fn awaits_pause(&self, inv: &Invalidation) -> bool {
        let pausing =
            |d: &DeviceEntry| d.is_stopping() && self.domain(d.domain).is_some_and(|e| splits(e, inv));
        self.devices.values().any(pausing)
    }
}

/// Whether the invalidation takes away more than its own pages in a domain, or maps what it takes away again.
fn splits(domain: &DomainEntry, inv: &Invalidation) -> bool {
    let is_merge = matches!(inv.after, After::Merged(_));
    if !inv.sweeps(domain.id) || (domain.able.cut && !is_merge) {
        return false;
    }
    inv.targets
        .iter()
        .filter_map(|target| domain.mapped.extent(*target))
        .any(|extent| is_merge || domain.mapped.whole(extent) != extent)
}
