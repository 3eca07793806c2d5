//! Abstract physical memory: the page frame that backs each page of each file, and eight bytes in every frame.
//!
//! A mapping pins the frames that back its pages when it is made. When the owner replaces a page (by a punch or a
//! conversion), the file gets another frame there; a device with the old translation reads and writes the old frame.
//! That is the bug of pinned guest_memfd pages, made visible without real memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};

use super::{DmaTarget, FileKey};

/// The number of pages that share one entry in [`FilePages::newest`].
const CHUNK_PAGES: usize = 64;

/// A generation of the memory: the number of replacements ([`Memory::replace`]) made before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(u64);

#[derive(Debug, Clone, Copy)]
struct Frame {
    /// The first generation in which the frame backs its page.
    since: Generation,
    bytes: u64,
}

#[derive(Debug, Default)]
struct FilePages {
    /// Every frame that ever backed each page, oldest first.
    frames: Vec<Vec<Frame>>,
    /// The latest `since` in each chunk of pages.
    newest: Vec<Generation>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The current generation.
    now: u64,
    files: HashMap<FileKey, FilePages>,
}

/// The physical memory of several simulated domains. A clone refers to the same memory.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    inner: Arc<Mutex<Inner>>,
}

impl Memory {
    /// Makes memory in which no page was replaced yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the current generation.
    pub fn now(&self) -> Generation {
        Generation(self.lock().now)
    }

    /// Gives the pages of `range` new frames, filled with `bytes`. The old frames remain for mappings that have pinned
    /// them.
    pub fn replace(&self, file: FileKey, range: PageRange<Offset>, bytes: u64) {
        let mut inner = self.lock();
        inner.now += 1;
        let since = Generation(inner.now);
        let pages = inner.files.entry(file).or_default();
        for page in indexes(range) {
            pages.history(page).push(Frame { since, bytes });
            pages.newest[page / CHUNK_PAGES] = since;
        }
    }

    /// Returns true if any page of `range` was replaced after `generation`: a translation made then is stale.
    pub fn replaced_since(&self, file: FileKey, range: PageRange<Offset>, generation: Generation) -> bool {
        let inner = self.lock();
        let Some(pages) = inner.files.get(&file) else { return false };
        let (mut page, end) = (indexes(range).start, indexes(range).end.min(pages.frames.len()));
        while page < end {
            let stop = end.min((page / CHUNK_PAGES + 1) * CHUNK_PAGES);
            if pages.newest[page / CHUNK_PAGES] > generation
                && pages.frames[page..stop].iter().any(|h| h.last().is_some_and(|f| f.since > generation))
            {
                return true;
            }
            page = stop;
        }
        false
    }

    /// Returns the bytes that a device reads at `target`.
    pub fn load(&self, target: &DmaTarget) -> u64 {
        let mut inner = self.lock();
        inner.frame(target.file, target.offset, target.since).map_or(0, |frame| frame.bytes)
    }

    /// Writes `bytes` at `target`, as a device does.
    pub fn store(&self, target: &DmaTarget, bytes: u64) {
        let mut inner = self.lock();
        if let Some(frame) = inner.frame(target.file, target.offset, target.since) {
            frame.bytes = bytes;
        }
    }

    /// Returns the bytes that the owner of the file reads, from the frame that backs the page now.
    pub fn owner_load(&self, file: FileKey, offset: Offset) -> u64 {
        let mut inner = self.lock();
        inner.frame(file, offset, Generation(u64::MAX)).map_or(0, |frame| frame.bytes)
    }

    /// Writes `bytes` as the owner of the file does, to the frame that backs the page now.
    pub fn owner_store(&self, file: FileKey, offset: Offset, bytes: u64) {
        let mut inner = self.lock();
        if let Some(frame) = inner.frame(file, offset, Generation(u64::MAX)) {
            frame.bytes = bytes;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Returns the frame that backed the page in `generation`.
    fn frame(&mut self, file: FileKey, offset: Offset, generation: Generation) -> Option<&mut Frame> {
        let history = self.files.entry(file).or_default().history((offset.0 / PAGE) as usize);
        history.iter_mut().rev().find(|frame| frame.since <= generation)
    }
}

impl FilePages {
    fn history(&mut self, page: usize) -> &mut Vec<Frame> {
        if self.frames.len() <= page {
            let first = vec![Frame { since: Generation(0), bytes: 0 }];
            self.frames.resize((page / CHUNK_PAGES + 1) * CHUNK_PAGES, first);
            self.newest.resize(page / CHUNK_PAGES + 1, Generation(0));
        }
        &mut self.frames[page]
    }
}

fn indexes(range: PageRange<Offset>) -> std::ops::Range<usize> {
    (range.start().0 / PAGE) as usize..(range.end().0 / PAGE) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_translation_accesses_the_old_frame() {
        let (memory, file) = (Memory::new(), FileKey { device: 1, inode: 1 });
        memory.owner_store(file, Offset(PAGE), 7);
        let old = DmaTarget { file, offset: Offset(PAGE), since: memory.now(), writable: true };
        let page = PageRange::new(PAGE, PAGE).unwrap();
        memory.replace(file, page, 8);
        let new = DmaTarget { since: memory.now(), ..old };
        assert_eq!((memory.load(&old), memory.load(&new), memory.owner_load(file, Offset(PAGE))), (7, 8, 8));
        memory.store(&old, 9);
        assert_eq!(memory.owner_load(file, Offset(PAGE)), 8);
        assert!(memory.replaced_since(file, page, old.since));
        assert!(!memory.replaced_since(file, page, new.since));
        assert!(!memory.replaced_since(file, PageRange::new(0, PAGE).unwrap(), old.since));
    }
}
