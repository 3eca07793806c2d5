//! Promise 9: no DMA beside a page that is unmapped is lost where policy does not allow it.

use passgate::gate::{DeviceId, DomainId, Hitless};
use passgate_bindings::{Iova, PAGE, PageRange};

use crate::model::Model;
use crate::oracle::{CheckResult, Stage, broken, page_range};

impl Model {
    /// Checks that an unmap removes nothing that devices should reach, unless policy allows a gap now.
    pub fn check_unmap_spares_neighbours(&self, domain: DomainId, iova: PageRange<Iova>) -> CheckResult {
        if self.policy.hitless == Hitless::Off {
            return Ok(());
        }
        let mut pages = (iova.start().0..iova.end().0).step_by(PAGE as usize);
        match pages.find(|at| self.is_neighbour(domain, Iova(*at))) {
            Some(at) => {
                self.check_gap_allowed(domain, &format!("unmap of {iova:?} with its neighbour {at:#x}"))
            }
            None => Ok(()),
        }
    }

    /// True if devices should reach the page and certainly do, and no open invalidation covers it.
    fn is_neighbour(&self, domain: DomainId, at: Iova) -> bool {
        let reach = |mappings: &crate::shadow_ledger::Domain| {
            mappings.may_be_mapped.contains(&at.0) && !mappings.in_doubt.contains(&at.0)
        };
        if !self.shadow_ledger.domains.get(&domain).is_some_and(reach) {
            return false;
        }
        let here =
            |region: &&crate::oracle::Region| region.stage == Stage::Live && region.iova().contains(at);
        let Some(region) = self.oracle.regions.iter().find(here) else { return false };
        let offset = at.0 - region.iova().start().0 + region.spec.backing.offset.0;
        let id = region.spec.backing.file;
        let file = self.oracle.files.iter().find(|file| file.id == id);
        let wanted = file.is_some_and(|file| file.is_wanted(offset / PAGE));
        wanted && self.oracle.open_over(id, page_range(offset / PAGE)).next().is_none()
    }

    /// Checks that a gap in the DMA of a domain's devices is allowed now.
    pub fn check_gap_allowed(&self, domain: DomainId, what: &dyn std::fmt::Debug) -> CheckResult {
        let runs = |device: &crate::shadow_ledger::Device| {
            device.domain == domain && !device.traits.tolerant && !device.drained && device.fenced.is_none()
        };
        match self.policy.hitless {
            Hitless::Off => Ok(()),
            Hitless::Require => broken!(9, "{what:?}, though no gap is allowed"),
            // A pause that failed or took too long is no reason to refuse: `prefer` accepts a gap then.
            Hitless::Prefer
                if !self.clean || self.rung_expired.iter().any(|id| !self.receipts.contains(id)) =>
            {
                Ok(())
            }
            Hitless::Prefer => match self.shadow_ledger.devices.iter().find(|(_, device)| runs(device)) {
                Some((id, _)) => broken!(9, "{what:?}, while {id:?} runs"),
                None => Ok(()),
            },
        }
    }

    /// Checks that a paused device is attached again only after its neighbours' mappings were made.
    pub fn check_neighbours_are_mapped(&self, device: DeviceId) -> CheckResult {
        let Some(domain) = self.shadow_ledger.devices.get(&device).map(|device| device.domain) else {
            return Ok(());
        };
        match self.shadow_ledger.domains.get(&domain) {
            Some(mappings) if self.policy.hitless == Hitless::Prefer && !mappings.filling.is_empty() => {
                broken!(9, "{device:?} is attached while {:?} is being mapped", mappings.filling)
            }
            _ => Ok(()),
        }
    }
}
