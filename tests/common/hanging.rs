//! A domain whose calls hang on request, around a real one: for tests of kernel calls that do not return.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex};

use passgate_backends::{Domain, DomainCaps, Result, Ticket, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

/// Forwards every call to `inner`. Calls that touch `range` hang, while a test wants it, until
/// [`HangingDomain::resume_calls`].
#[derive(Debug)]
pub struct HangingDomain {
    inner: Arc<dyn Domain>,
    range: PageRange<Iova>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    hang_maps: bool,
    hang_unmaps: bool,
    /// The number of calls that hang.
    hanging: usize,
}

impl HangingDomain {
    /// Calls that touch the page at `at` can hang.
    pub fn new(inner: Arc<dyn Domain>, at: Iova) -> Arc<Self> {
        Self::over_range(inner, PageRange::new(at.0 / PAGE * PAGE, PAGE).unwrap())
    }

    /// Calls that touch `range` can hang.
    pub fn over_range(inner: Arc<dyn Domain>, range: PageRange<Iova>) -> Arc<Self> {
        Arc::new(Self { inner, range, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Makes unmaps (and replaces) over the range hang from now on.
    pub fn hang_unmaps(&self) {
        self.state.lock().unwrap().hang_unmaps = true;
    }

    /// Makes maps over the range hang from now on.
    pub fn hang_maps(&self) {
        self.state.lock().unwrap().hang_maps = true;
    }

    /// Lets every hanging call, and every later one, run.
    pub fn resume_calls(&self) {
        let mut state = self.state.lock().unwrap();
        (state.hang_maps, state.hang_unmaps) = (false, false);
        self.changed.notify_all();
    }

    /// Waits until `count` calls hang.
    pub fn wait_hanging(&self, count: usize) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| state.hanging < count).unwrap());
    }

    /// Blocks the caller while `hangs` holds, if `iova` touches the range.
    fn block(&self, iova: PageRange<Iova>, hangs: impl Fn(&State) -> bool) {
        let mut state = self.state.lock().unwrap();
        if !iova.overlaps(self.range) || !hangs(&state) {
            return;
        }
        state.hanging += 1;
        self.changed.notify_all();
        let mut state = self.changed.wait_while(state, |state| hangs(state)).unwrap();
        state.hanging -= 1;
        self.changed.notify_all();
    }
}

impl Domain for HangingDomain {
    fn name(&self) -> &'static str {
        "hanging"
    }

    fn capabilities(&self) -> DomainCaps {
        self.inner.capabilities()
    }

    fn map(
        &self,
        iova: PageRange<Iova>,
        piece: u64,
        file: &Arc<GuestFile>,
        offset: Offset,
        writable: bool,
    ) -> Result<()> {
        self.block(iova, |state| state.hang_maps);
        self.inner.map(iova, piece, file, offset, writable)
    }

    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        self.block(iova, |state| state.hang_unmaps);
        self.inner.unmap(iova)
    }

    fn replace(&self, removed: &[PageRange<Iova>]) -> Unmap {
        removed.iter().for_each(|iova| self.block(*iova, |state| state.hang_unmaps));
        self.inner.replace(removed)
    }

    fn poll(&self, completed: &mut Vec<Ticket>) {
        self.inner.poll(completed);
    }

    fn wake(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wake()
    }
}
