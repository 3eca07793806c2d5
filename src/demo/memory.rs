//! The guest memory of the demo: guest_memfd where the kernel has it, and the contents that each page must have.
//!
//! A page begins with a *stamp*: its number and its generation. The generation increases by two with each conversion, and is
//! odd while the page is punched. The device writes its *mark*, a number that increases, to another cache line of the page.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::{PAGE, guest_memfd};

use crate::error::{Error, Result};

/// The offset of the stamp in a page: the number, then the generation, eight bytes each.
pub(super) const STAMP_OFFSET: u64 = 0;
/// The size of a stamp in bytes.
pub(super) const STAMP_LEN: usize = 16;
/// The offset of the mark in a page, eight bytes.
pub(super) const MARK_OFFSET: u64 = 64;
/// The upper half of the number in every stamp, so that a fresh page (all zero) has none.
const STAMP_MAGIC: u64 = 0x7061_7373_0000_0000;

/// The guest memory of the demo.
pub(super) struct Memory {
    /// The file.
    pub(super) file: Arc<GuestFile>,
    /// True if the file is a guest_memfd.
    pub(super) guest_memfd: bool,
    /// The reason why it is a memfd instead; none if it is a guest_memfd.
    pub(super) fallback_reason: Option<String>,
    /// The VM that a guest_memfd belongs to: open for as long as the file.
    _vm: Option<Box<dyn Send + Sync>>,
    /// The generation of each page.
    generations: Vec<AtomicU64>,
    /// The newest mark that the device has used.
    last_mark: AtomicU64,
    /// The value of `last_mark` when each page was restored: an older mark in the page is stale.
    mark_at_restore: Vec<AtomicU64>,
}

impl Memory {
    /// Allocates `pages` pages and stamps them.
    pub(super) fn new(pages: u64) -> Result<Self> {
        let len = pages * PAGE;
        let (file, vm, fallback_reason): (GuestFile, Option<Box<dyn Send + Sync>>, _) =
            match guest_memfd::shared(len) {
                Ok((vm, file)) => (file, Some(Box::new(vm)), None),
                Err(why) => (
                    GuestFile::memfd("passgate-demo", len).map_err(Error::Memory)?,
                    None,
                    Some(why.to_string()),
                ),
            };
        let fresh = || (0..pages).map(|_| AtomicU64::new(0)).collect();
        let memory = Self {
            file: Arc::new(file),
            guest_memfd: fallback_reason.is_none(),
            fallback_reason,
            _vm: vm,
            generations: fresh(),
            last_mark: AtomicU64::new(0),
            mark_at_restore: fresh(),
        };
        for page in 0..pages {
            memory.stamp(page, 0)?;
        }
        Ok(memory)
    }

    /// Returns the number of pages.
    pub(super) fn pages(&self) -> u64 {
        self.generations.len() as u64
    }

    /// Returns the generation of a page; odd while the page is punched.
    pub(super) fn generation(&self, page: u64) -> u64 {
        self.generations[page as usize].load(Ordering::Acquire)
    }

    /// Marks a page as punched, or as restored.
    pub(super) fn advance_generation(&self, page: u64) {
        self.generations[page as usize].fetch_add(1, Ordering::AcqRel);
    }

    /// Writes the stamp. The number is written last: without it a page has no stamp yet.
    fn stamp(&self, page: u64, generation: u64) -> Result<()> {
        let offset = page * PAGE + STAMP_OFFSET;
        self.file.store(offset + 8, generation).map_err(Error::Memory)?;
        self.file.store(offset, STAMP_MAGIC | page).map_err(Error::Memory)
    }

    /// Punches the page out of the file: the next access finds a fresh one.
    pub(super) fn punch(&self, page: u64) -> Result<()> {
        self.file.punch(page * PAGE, PAGE).map_err(Error::Memory)
    }

    /// Stamps a page that was punched with its next generation.
    pub(super) fn restore(&self, page: u64) -> Result<()> {
        self.stamp(page, self.generation(page) + 1)?;
        self.mark_at_restore[page as usize].store(self.last_mark.load(Ordering::Acquire), Ordering::Release);
        Ok(())
    }

    /// Returns the generation in a stamp; none if it is not a stamp of this page.
    pub(super) fn read_stamp(page: u64, bytes: &[u8; STAMP_LEN]) -> Option<u64> {
        let word = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or(0);
        (word(0) == STAMP_MAGIC | page).then(|| word(8))
    }

    /// Returns the mark in a page, as the owner sees it.
    pub(super) fn mark(&self, page: u64) -> Result<u64> {
        self.file.load(page * PAGE + MARK_OFFSET).map_err(Error::Memory)
    }

    fn stamp_of(&self, page: u64) -> Result<Option<u64>> {
        let mut bytes = [0; STAMP_LEN];
        self.file.read(page * PAGE + STAMP_OFFSET, &mut bytes).map_err(Error::Memory)?;
        Ok(Self::read_stamp(page, &bytes))
    }

    /// Returns a new mark.
    pub(super) fn next_mark(&self) -> u64 {
        self.last_mark.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Returns true if the owner finds the current stamp in a page, and no mark that is older than the page.
    pub(super) fn is_intact(&self, page: u64) -> Result<bool> {
        let mark = self.mark(page)?;
        let is_stale = mark != 0 && mark < self.mark_at_restore[page as usize].load(Ordering::Acquire);
        Ok(!is_stale && self.stamp_of(page)? == Some(self.generation(page)))
    }
}
