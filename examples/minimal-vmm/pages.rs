//! What the VMM knows of each page: its generation, and which ones nobody may have any more.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::guest::{FIRST, PAGES};

/// The pages, seen by the VMM and by whoever checks the device.
pub(crate) struct Pages(Vec<Page>);

struct Page {
    /// Even while the page is shared and stamped; odd from the moment that passgate has granted its leaving.
    generation: AtomicU32,
    quarantined: AtomicBool,
}

impl Pages {
    /// All shared, none in quarantine.
    pub(crate) fn new() -> Self {
        let page = || Page { generation: AtomicU32::new(FIRST), quarantined: AtomicBool::new(false) };
        Self((0..PAGES).map(|_| page()).collect())
    }

    /// The generation of a page.
    pub(crate) fn generation(&self, page: u64) -> u32 {
        self.0[page as usize].generation.load(Ordering::Acquire)
    }

    /// A page has another generation from now on.
    pub(crate) fn turn(&self, page: u64, generation: u32) {
        self.0[page as usize].generation.store(generation, Ordering::Release);
    }

    /// Nobody may have this page any more.
    pub(crate) fn quarantine(&self, page: u64) {
        self.0[page as usize].quarantined.store(true, Ordering::Release);
    }

    /// Whether devices must see the page now, as far as the VMM knows.
    pub(crate) fn is_shared(&self, page: u64) -> bool {
        self.generation(page).is_multiple_of(2) && !self.0[page as usize].quarantined.load(Ordering::Acquire)
    }
}
