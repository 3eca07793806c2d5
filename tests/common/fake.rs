//! A domain that does what a test tells it to, around one that does the real thing.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex};

use passgate_backends::{Capabilities, Domain, Result, Ticket, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

/// Calls that touch these addresses hang until [`Hanging::release`].
#[derive(Debug)]
pub struct Hanging {
    inner: Arc<dyn Domain>,
    at: PageRange<Iova>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    hang_maps: bool,
    hang_unmaps: bool,
    inside: usize,
}

impl Hanging {
    pub fn new(inner: Arc<dyn Domain>, at: Iova) -> Arc<Self> {
        Self::over(inner, PageRange::new(at.0 / PAGE * PAGE, PAGE).unwrap())
    }

    pub fn over(inner: Arc<dyn Domain>, at: PageRange<Iova>) -> Arc<Self> {
        Arc::new(Self { inner, at, state: Mutex::default(), changed: Condvar::new() })
    }

    pub fn hang_unmaps(&self) {
        self.state.lock().unwrap().hang_unmaps = true;
    }

    pub fn hang_maps(&self) {
        self.state.lock().unwrap().hang_maps = true;
    }

    /// Lets every call come back.
    pub fn release(&self) {
        let mut state = self.state.lock().unwrap();
        (state.hang_maps, state.hang_unmaps) = (false, false);
        self.changed.notify_all();
    }

    /// Waits until `count` calls hang.
    pub fn wait_inside(&self, count: usize) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| state.inside < count).unwrap());
    }

    fn pass(&self, iova: PageRange<Iova>, hangs: impl Fn(&State) -> bool) {
        let mut state = self.state.lock().unwrap();
        if !iova.overlaps(self.at) || !hangs(&state) {
            return;
        }
        state.inside += 1;
        self.changed.notify_all();
        let mut state = self.changed.wait_while(state, |state| hangs(state)).unwrap();
        state.inside -= 1;
        self.changed.notify_all();
    }
}

impl Domain for Hanging {
    fn name(&self) -> &'static str {
        "hanging"
    }

    fn capabilities(&self) -> Capabilities {
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
        self.pass(iova, |state| state.hang_maps);
        self.inner.map(iova, piece, file, offset, writable)
    }

    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        self.pass(iova, |state| state.hang_unmaps);
        self.inner.unmap(iova)
    }

    fn replace(&self, gone: &[PageRange<Iova>]) -> Unmap {
        gone.iter().for_each(|iova| self.pass(*iova, |state| state.hang_unmaps));
        self.inner.replace(gone)
    }

    fn poll(&self, ended: &mut Vec<Ticket>) {
        self.inner.poll(ended);
    }

    fn wake(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wake()
    }
}
