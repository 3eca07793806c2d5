//! The ways in which one page leaves a large mapping, and what each costs its neighbours.
//!
//! | way | needs | the neighbours' DMA |
//! |---|---|---|
//! | *cut* | a domain that cuts (small IOMMU pages) | goes on |
//! | *page* | nothing: pages are mapped one by one | goes on, at the price of a kernel mapping per page |
//! | *replace* | a domain with a second page table | has a gap: the devices are paused for it, or tolerate it |
//! | *split* | nothing: the mapping is unmapped, the rest mapped again | has a gap for each mapping: as with *replace* |
//!
//! A *gap* is the time in which a neighbour that should be mapped is not. [`Hitless`] says which gaps are allowed.

use serde::{Deserialize, Serialize};

use super::Gate;
use super::ids::DomainId;
use super::policy::Hitless;

/// The capabilities of a domain, as they were probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Able {
    /// The maximum number of kernel mappings.
    pub max_mappings: u64,
    /// The maximum length of a kernel mapping, in bytes.
    pub max_piece: u64,
    /// True if an unmap may begin and end inside mappings, whose rest stays mapped without a gap.
    pub cut: bool,
    /// True if it can do [`super::Effect::Replace`].
    pub replace: bool,
}

impl Gate {
    /// True if gaps are allowed in a domain: by policy, and by what its devices tolerate or can do.
    pub(super) fn gaps_allowed(&self, domain: DomainId) -> bool {
        match self.policy.hitless {
            Hitless::Require => false,
            Hitless::Prefer => self.devices.of(domain).all(|(_, device)| device.tolerates_gap()),
            Hitless::Off => true,
        }
    }
}
