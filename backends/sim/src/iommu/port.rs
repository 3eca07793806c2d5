//! The state of one device in a simulated domain: whether it does DMA, and its stale translations.

use passgate_backends::Ticket;

use super::table::Mapping;

/// The event that ends the use of a stale translation, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum StaleUntil {
    /// An operation in flight that ends with the next flush.
    Flush,
    /// An operation in flight that only a detach or a reset ends.
    Unstuck,
    /// An entry in the device's own translation cache (ATS), which a detach or a reset clears. It is used while the
    /// device issues requests.
    CacheCleared,
}

/// A translation that was unmapped and that one device still uses.
#[derive(Debug, Clone)]
pub(super) struct Stale {
    pub(super) mapping: Mapping,
    /// The ticket of the unmap; none for an entry in the device's cache, which is not reported.
    pub(super) ticket: Option<Ticket>,
    pub(super) until: StaleUntil,
}

/// One device.
#[derive(Debug, Default)]
pub(super) struct Port {
    pub(super) attached: bool,
    /// True while it issues no requests: stopped, or bus mastering off.
    pub(super) quiesced: bool,
    /// True if it caches translations (ATS).
    pub(super) ats: bool,
    pub(super) stale: Vec<Stale>,
}

impl Port {
    /// Returns true if it does DMA to mapped memory.
    pub(super) fn is_active(&self) -> bool {
        self.attached && !self.quiesced
    }

    /// Adds stale translations for the unmapped ranges `gone`.
    pub(super) fn add_stale(&mut self, gone: &[Mapping], ticket: Option<Ticket>, until: StaleUntil) {
        self.stale.extend(gone.iter().map(|mapping| Stale { mapping: mapping.clone(), ticket, until }));
    }

    /// Returns the stale translations that it can use now.
    pub(super) fn usable_stale(&self) -> impl Iterator<Item = &Stale> {
        self.stale.iter().filter(|stale| stale.until != StaleUntil::CacheCleared || self.is_active())
    }
}
