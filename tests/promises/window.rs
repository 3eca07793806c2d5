//! Promise 9: no DMA beside a page that goes is lost without leave.

use passgate::gate::{DeviceId, DomainId, Hitless};
use passgate_bindings::{Iova, PAGE, PageRange};

use crate::model::Model;
use crate::truth::{Kept, Stage, broken, page_range};

impl Model {
    /// An unmap takes nothing away that devices ought to reach, unless that is allowed now.
    pub fn no_window(&self, domain: DomainId, iova: PageRange<Iova>) -> Kept {
        if self.policy.hitless == Hitless::Off {
            return Ok(());
        }
        let mut pages = (iova.start().0..iova.end().0).step_by(PAGE as usize);
        match pages.find(|at| self.is_neighbour(domain, Iova(*at))) {
            Some(at) => self.may_break(domain, &format!("unmap of {iova:?} with its neighbour {at:#x}")),
            None => Ok(()),
        }
    }

    /// Whether devices ought to reach the page, and do for certain, and nobody asked for it.
    fn is_neighbour(&self, domain: DomainId, at: Iova) -> bool {
        let reach = |told: &crate::told::Domain| told.maybe.contains(&at.0) && !told.doubt.contains(&at.0);
        if !self.told.domains.get(&domain).is_some_and(reach) {
            return false;
        }
        let here = |region: &&crate::truth::Region| region.stage == Stage::Live && region.iova().contains(at);
        let Some(region) = self.truth.regions.iter().find(here) else { return false };
        let offset = at.0 - region.iova().start().0 + region.spec.backing.offset.0;
        let id = region.spec.backing.file;
        let file = self.truth.files.iter().find(|file| file.id == id);
        let wanted = file.is_some_and(|file| file.is_wanted(offset / PAGE));
        wanted && self.truth.open_over(id, page_range(offset / PAGE)).next().is_none()
    }

    /// Whether the DMA of a domain's devices may miss a moment now.
    pub fn may_break(&self, domain: DomainId, what: &dyn std::fmt::Debug) -> Kept {
        let runs = |device: &crate::told::Device| {
            device.domain == domain && !device.nature.tolerant && !device.drained && device.fenced.is_none()
        };
        match self.policy.hitless {
            Hitless::Off => Ok(()),
            Hitless::Require => broken!(9, "{what:?}, though no window is allowed"),
            // A pause that failed, or took too long, is no reason to refuse: no loss is preferred, not required.
            Hitless::Prefer if !self.clean || self.hurried.iter().any(|id| !self.receipts.contains(id)) => {
                Ok(())
            }
            Hitless::Prefer => match self.told.devices.iter().find(|(_, device)| runs(device)) {
                Some((id, _)) => broken!(9, "{what:?}, while {id:?} runs"),
                None => Ok(()),
            },
        }
    }

    /// A device that was paused comes back to what it left.
    pub fn neighbours_are_back(&self, device: DeviceId) -> Kept {
        let Some(domain) = self.told.devices.get(&device).map(|device| device.domain) else { return Ok(()) };
        match self.told.domains.get(&domain) {
            Some(told) if self.policy.hitless == Hitless::Prefer && !told.filling.is_empty() => {
                broken!(9, "{device:?} comes back while {:?} is being mapped", told.filling)
            }
            _ => Ok(()),
        }
    }
}
