//! Abstract physical memory: which page frame backs each page of each file, and eight bytes in every frame.
//!
//! A mapping pins the frames that back its pages when it is made. When the owner takes a page away (punches it,
//! converts it), the file gets another frame there; who still holds the old translation reads and writes the
//! old frame. That is the canonical bug of pinned guest_memfd, made visible without a byte of real memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};

use super::{FileKey, Seen};

/// Pages that share one summary of when they were last replaced.
const CHUNK: usize = 64;

/// A moment: how often any page had been replaced by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

#[derive(Debug, Clone, Copy)]
struct Frame {
    since: Stamp,
    bytes: u64,
}

#[derive(Debug, Default)]
struct FilePages {
    /// Every frame that ever backed the page, oldest first.
    frames: Vec<Vec<Frame>>,
    /// The newest `since` of each chunk of pages.
    newest: Vec<Stamp>,
}

#[derive(Debug, Default)]
struct Inner {
    now: u64,
    files: HashMap<FileKey, FilePages>,
}

/// The physical memory that several simulated domains share. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    inner: Arc<Mutex<Inner>>,
}

impl Memory {
    /// Memory in which no page was ever replaced.
    pub fn new() -> Self {
        Self::default()
    }

    /// The present moment.
    pub fn now(&self) -> Stamp {
        Stamp(self.lock().now)
    }

    /// The pages of `range` get other frames, filled with `bytes`; the old ones live on for who pinned them.
    pub fn replace(&self, file: FileKey, range: PageRange<Offset>, bytes: u64) {
        let mut inner = self.lock();
        inner.now += 1;
        let since = Stamp(inner.now);
        let pages = inner.files.entry(file).or_default();
        for page in indexes(range) {
            pages.history(page).push(Frame { since, bytes });
            pages.newest[page / CHUNK] = since;
        }
    }

    /// Whether a page of `range` has had another frame since `stamp`: a translation of then is stale.
    pub fn replaced_since(&self, file: FileKey, range: PageRange<Offset>, stamp: Stamp) -> bool {
        let inner = self.lock();
        let Some(pages) = inner.files.get(&file) else { return false };
        let (mut page, end) = (indexes(range).start, indexes(range).end.min(pages.frames.len()));
        while page < end {
            let stop = end.min((page / CHUNK + 1) * CHUNK);
            if pages.newest[page / CHUNK] > stamp
                && pages.frames[page..stop].iter().any(|h| h.last().is_some_and(|f| f.since > stamp))
            {
                return true;
            }
            page = stop;
        }
        false
    }

    /// What the device reads through `seen`.
    pub fn load(&self, seen: &Seen) -> u64 {
        let mut inner = self.lock();
        inner.frame(seen.file, seen.offset, seen.since).map_or(0, |frame| frame.bytes)
    }

    /// What the device writes through `seen`.
    pub fn store(&self, seen: &Seen, bytes: u64) {
        let mut inner = self.lock();
        if let Some(frame) = inner.frame(seen.file, seen.offset, seen.since) {
            frame.bytes = bytes;
        }
    }

    /// What the owner of the file reads: the frame that backs the page now.
    pub fn owner_load(&self, file: FileKey, offset: Offset) -> u64 {
        let mut inner = self.lock();
        inner.frame(file, offset, Stamp(u64::MAX)).map_or(0, |frame| frame.bytes)
    }

    /// What the owner of the file writes.
    pub fn owner_store(&self, file: FileKey, offset: Offset, bytes: u64) {
        let mut inner = self.lock();
        if let Some(frame) = inner.frame(file, offset, Stamp(u64::MAX)) {
            frame.bytes = bytes;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The frame that backed the page at `when`.
    fn frame(&mut self, file: FileKey, offset: Offset, when: Stamp) -> Option<&mut Frame> {
        let history = self.files.entry(file).or_default().history((offset.0 / PAGE) as usize);
        history.iter_mut().rev().find(|frame| frame.since <= when)
    }
}

impl FilePages {
    fn history(&mut self, page: usize) -> &mut Vec<Frame> {
        if self.frames.len() <= page {
            let first = vec![Frame { since: Stamp(0), bytes: 0 }];
            self.frames.resize((page / CHUNK + 1) * CHUNK, first);
            self.newest.resize(page / CHUNK + 1, Stamp(0));
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
    fn an_old_translation_sees_the_old_frame() {
        let (memory, file) = (Memory::new(), FileKey { device: 1, inode: 1 });
        memory.owner_store(file, Offset(PAGE), 7);
        let old = Seen { file, offset: Offset(PAGE), since: memory.now(), writable: true };
        let page = PageRange::new(PAGE, PAGE).unwrap();
        memory.replace(file, page, 8);
        let new = Seen { since: memory.now(), ..old };
        assert_eq!((memory.load(&old), memory.load(&new), memory.owner_load(file, Offset(PAGE))), (7, 8, 8));
        memory.store(&old, 9);
        assert_eq!(memory.owner_load(file, Offset(PAGE)), 8);
        assert!(memory.replaced_since(file, page, old.since));
        assert!(!memory.replaced_since(file, page, new.since));
        assert!(!memory.replaced_since(file, PageRange::new(0, PAGE).unwrap(), old.since));
    }
}
