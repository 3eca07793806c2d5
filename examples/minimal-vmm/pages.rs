//! The VMM's state of each page: its generation, and whether it is in quarantine.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::guest::{FIRST_GENERATION, PAGES};

/// The state of the pages, shared by the VMM and the device's thread.
pub(crate) struct Pages(Vec<Page>);

struct Page {
    /// Even while the page is shared and stamped; odd once passgate has granted its conversion to private.
    generation: AtomicU32,
    quarantined: AtomicBool,
}

impl Pages {
    /// Returns the initial state: all pages are shared, none is in quarantine.
    pub(crate) fn new() -> Self {
        let page =
            || Page { generation: AtomicU32::new(FIRST_GENERATION), quarantined: AtomicBool::new(false) };
        Self((0..PAGES).map(|_| page()).collect())
    }

    /// Returns the generation of a page.
    pub(crate) fn generation(&self, page: u64) -> u32 {
        self.0[page as usize].generation.load(Ordering::Acquire)
    }

    /// Sets the generation of a page.
    pub(crate) fn set_generation(&self, page: u64, generation: u32) {
        self.0[page as usize].generation.store(generation, Ordering::Release);
    }

    /// Marks a page as quarantined.
    pub(crate) fn quarantine(&self, page: u64) {
        self.0[page as usize].quarantined.store(true, Ordering::Release);
    }

    /// Returns true where devices must be able to access the page.
    pub(crate) fn is_shared(&self, page: u64) -> bool {
        self.generation(page).is_multiple_of(2) && !self.0[page as usize].quarantined.load(Ordering::Acquire)
    }
}
