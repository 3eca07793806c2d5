//! The demo's guest memory: real guest_memfd where there is one, and what each page ought to hold.
//!
//! A page begins with a *stamp*: its number and its generation. The generation goes up by two with each
//! conversion; it is odd while the page is away. The device writes its *mark* into a cache line of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::{PAGE, guest_memfd};

use crate::error::{Error, Result};

/// Where in a page the stamp is: number, then generation, eight bytes each.
pub(super) const STAMP: u64 = 0;
/// Bytes of a stamp.
pub(super) const STAMP_LEN: usize = 16;
/// Where in a page the device leaves its mark, eight bytes.
pub(super) const MARK: u64 = 64;
/// Set in the number of every stamped page, so that a fresh page is no stamp.
const STAMPED: u64 = 0x7061_7373_0000_0000;

/// The demo's guest memory.
pub(super) struct Memory {
    /// Its file.
    pub(super) file: Arc<GuestFile>,
    /// Whether it is guest_memfd.
    pub(super) guest_memfd: bool,
    /// Why it is not, where it is not.
    pub(super) instead: Option<String>,
    /// Keeps the VM that a guest_memfd belongs to.
    _vm: Option<Box<dyn Send + Sync>>,
    generations: Vec<AtomicU64>,
    /// The device's newest mark.
    issued: AtomicU64,
    /// What that was when a page came to be, per page: no older mark may ever turn up in it.
    born: Vec<AtomicU64>,
}

impl Memory {
    /// `pages` pages, stamped.
    pub(super) fn new(pages: u64) -> Result<Self> {
        let len = pages * PAGE;
        let (file, vm, instead): (GuestFile, Option<Box<dyn Send + Sync>>, _) = match guest_memfd::shared(len)
        {
            Ok((vm, file)) => (file, Some(Box::new(vm)), None),
            Err(why) => {
                (GuestFile::memfd("passgate-demo", len).map_err(Error::Memory)?, None, Some(why.to_string()))
            }
        };
        let fresh = || (0..pages).map(|_| AtomicU64::new(0)).collect();
        let memory = Self {
            file: Arc::new(file),
            guest_memfd: instead.is_none(),
            instead,
            _vm: vm,
            generations: fresh(),
            issued: AtomicU64::new(0),
            born: fresh(),
        };
        for page in 0..pages {
            memory.stamp(page, 0)?;
        }
        Ok(memory)
    }

    /// Pages of it.
    pub(super) fn pages(&self) -> u64 {
        self.generations.len() as u64
    }

    /// The generation of a page; odd while it is away.
    pub(super) fn generation(&self, page: u64) -> u64 {
        self.generations[page as usize].load(Ordering::Acquire)
    }

    /// The page goes away, or is there again with its next stamp.
    pub(super) fn turn(&self, page: u64) {
        self.generations[page as usize].fetch_add(1, Ordering::AcqRel);
    }

    fn stamp(&self, page: u64, generation: u64) -> Result<()> {
        let at = page * PAGE + STAMP;
        self.file.store(at + 8, generation).map_err(Error::Memory)?;
        self.file.store(at, STAMPED | page).map_err(Error::Memory)
    }

    /// Takes the page away: what is found there next is fresh.
    pub(super) fn punch(&self, page: u64) -> Result<()> {
        self.file.punch(page * PAGE, PAGE).map_err(Error::Memory)
    }

    /// Brings a page that was taken away, with its next stamp.
    pub(super) fn bring(&self, page: u64) -> Result<()> {
        self.stamp(page, self.generation(page) + 1)?;
        self.born[page as usize].store(self.issued.load(Ordering::Acquire), Ordering::Release);
        Ok(())
    }

    /// The generation in a stamp, if it is one of this page.
    pub(super) fn read_stamp(page: u64, bytes: &[u8; STAMP_LEN]) -> Option<u64> {
        let word = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or(0);
        (word(0) == STAMPED | page).then(|| word(8))
    }

    /// The device's mark, as the owner sees it.
    pub(super) fn mark(&self, page: u64) -> Result<u64> {
        self.file.load(page * PAGE + MARK).map_err(Error::Memory)
    }

    fn owners_stamp(&self, page: u64) -> Result<Option<u64>> {
        let mut bytes = [0; STAMP_LEN];
        self.file.read(page * PAGE + STAMP, &mut bytes).map_err(Error::Memory)?;
        Ok(Self::read_stamp(page, &bytes))
    }

    /// The device's next mark.
    pub(super) fn next_mark(&self) -> u64 {
        self.issued.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Whether the owner finds in a page what must be there, before it takes it away: its own stamp, and no mark
    /// from before the page came to be.
    pub(super) fn is_sound(&self, page: u64) -> Result<bool> {
        let mark = self.mark(page)?;
        let old = mark != 0 && mark < self.born[page as usize].load(Ordering::Acquire);
        Ok(!old && self.owners_stamp(page)? == Some(self.generation(page)))
    }
}
