//! A simulated IOVA domain: exact, deterministic, and exactly as faulty as its [`FaultPlan`] says.
//!
//! It keeps a page table of mappings, and for every attached device the old translations that an unmap
//! has not flushed yet. Nothing in it knows time, chance or the gate: tests step it ([`Sim::flush`],
//! [`Sim::release`]) and then ask what a device can still reach ([`Sim::reachable`], [`Sim::dma`]). It takes the
//! devices' side: a drained or reset device that is still attached is expected to do DMA again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::event::EventfdFlags;

use super::{Capabilities, Domain, Ticket, Unmap};
use crate::device::{Nature, StopClass};
use crate::{Error, Result};

mod calls;
mod fault;
mod memory;
mod port;
mod table;

pub use crate::device::sim::SimDevice;
pub use fault::{Call, Fault, FaultPlan};
pub use memory::{Memory, Stamp};
pub(crate) use port::Ends;
use port::{Port, Stale};
pub use table::Mapping;
use table::Table;

/// The identity of a file (`st_dev`, `st_ino`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileKey {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

impl FileKey {
    /// Asks the kernel.
    pub fn of(file: &GuestFile) -> Result<Self, Failed> {
        let stat = rustix::fs::fstat(file).map_err(|errno| Failed::new("fstat", errno))?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// What one DMA meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// A page of this file
    pub file: FileKey,
    /// at this offset,
    pub offset: Offset,
    /// in the frame that backed it then.
    pub since: Stamp,
    /// Whether a write would land.
    pub writable: bool,
}

#[derive(Debug, Default)]
struct State {
    table: Table,
    ports: Vec<Port>,
    faults: fault::Dealer,
    tickets: u64,
    /// Tickets given out whose operations still run.
    running: Vec<Ticket>,
    ended: Vec<Ticket>,
    hanging: usize,
    releases: u64,
}

#[derive(Debug)]
pub(crate) struct Shared {
    capabilities: Capabilities,
    memory: Memory,
    state: Mutex<State>,
    released: Condvar,
    wake: OwnedFd,
}

/// A simulated IOVA domain. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Sim {
    shared: Arc<Shared>,
}

impl Sim {
    /// What a domain can do unless a test says otherwise.
    pub const CAPABILITIES: Capabilities = Capabilities {
        max_mappings: 65_535,
        max_mapping_len: 1 << 30,
        by_file: true,
        tickets: true,
        cut: false,
        replace: false,
        counts_partial: false,
    };

    /// An empty domain over `memory`.
    pub fn new(capabilities: Capabilities, memory: Memory) -> Result<Self> {
        let wake =
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| {
                Error::Host {
                    what: format!("eventfd: {e}"),
                    mend: "raise the limit of open files (ulimit -n)",
                }
            })?;
        let state = Mutex::default();
        Ok(Self { shared: Arc::new(Shared { capabilities, memory, state, released: Condvar::new(), wake }) })
    }

    /// A device, attached.
    pub fn device(&self, name: &str, stop_class: StopClass, nature: Nature) -> SimDevice {
        let mut state = self.shared.lock();
        state.ports.push(Port { attached: true, silent: false, ats: nature.ats, stale: Vec::new() });
        SimDevice::new(name, stop_class, nature, Arc::clone(&self.shared), state.ports.len() - 1)
    }

    /// What goes wrong from now on; calls made before count.
    pub fn plan(&self, plan: FaultPlan) {
        self.shared.lock().faults.plan = plan;
    }

    /// The next call of this kind goes wrong.
    pub fn fail_next(&self, call: Call, fault: Fault) {
        self.shared.lock().faults.next(call, fault);
    }

    /// Calls of this kind by now.
    pub fn calls(&self, call: Call) -> u64 {
        self.shared.lock().faults.count(call)
    }

    /// Calls of all kinds by now.
    pub fn all_calls(&self) -> u64 {
        self.shared.lock().faults.total()
    }

    /// Late flushes come through; what is stuck stays. Returns how many old translations ended.
    pub fn flush(&self) -> usize {
        self.shared.drop_stale(|_, stale| stale.ends == Ends::WithFlush)
    }

    /// Everything in flight ends, also what was stuck (the peer drained, somebody pulled the cable).
    pub fn unstick(&self) -> usize {
        self.shared.drop_stale(|_, stale| stale.ends <= Ends::WhenUnstuck)
    }

    /// Every call that hangs goes on.
    pub fn release(&self) {
        self.shared.lock().releases += 1;
        self.shared.released.notify_all();
    }

    /// Calls that hang now.
    pub fn hanging(&self) -> usize {
        self.shared.lock().hanging
    }

    /// The mappings in the page table, in order.
    pub fn mappings(&self) -> Vec<Mapping> {
        self.shared.lock().table.iter().cloned().collect()
    }

    /// How many there are.
    pub fn mapping_count(&self) -> u64 {
        self.shared.lock().table.len()
    }

    /// Tickets whose operations still run.
    pub fn running(&self) -> Vec<Ticket> {
        self.shared.lock().running.clone()
    }

    /// Shows `look` every translation that some device can still use, live or not flushed; `false` marks the
    /// latter. `look` must not call this domain.
    pub fn reachable(&self, mut look: impl FnMut(&Mapping, bool)) {
        let state = self.shared.lock();
        if state.ports.iter().any(Port::reaches) {
            state.table.iter().for_each(|mapping| look(mapping, true));
        }
        for stale in state.ports.iter().flat_map(Port::used) {
            look(&stale.mapping, false);
        }
    }

    /// What a DMA of any device of this domain meets at `iova`; none where every one faults.
    pub fn dma(&self, iova: Iova) -> Option<Seen> {
        let ports = self.shared.lock().ports.len();
        (0..ports).find_map(|port| self.shared.translate(port, iova)).map(|(seen, _)| seen)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the call, waits where it hangs; what goes wrong with it otherwise.
    pub(crate) fn enter(&self, call: Call) -> Option<Fault> {
        let mut state = self.lock();
        let fault = state.faults.deal(call);
        if fault != Some(Fault::Hang) {
            return fault;
        }
        let before = state.releases;
        state.hanging += 1;
        while state.releases == before {
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.hanging -= 1;
        None
    }

    /// An old translation wins over a live one, as a hit in the device's IOTLB does.
    pub(crate) fn translate(&self, port: usize, iova: Iova) -> Option<(Seen, Arc<GuestFile>)> {
        self.with_page(port, iova, |seen, file| (seen, Arc::clone(file)))
    }

    /// As [`Shared::translate`], with the domain as it is until `with` returns, which must not call it.
    pub(crate) fn with_page<R>(
        &self,
        port: usize,
        iova: Iova,
        with: impl FnOnce(Seen, &Arc<GuestFile>) -> R,
    ) -> Option<R> {
        let state = self.lock();
        let port = state.ports.get(port)?;
        let live = state.table.find(iova).filter(|_| port.reaches());
        let stale = port.used().map(|stale| &stale.mapping).find(|m| m.iova.contains(iova));
        let mapping = stale.or(live)?;
        Some(with(mapping.at(iova)?, &mapping.memory))
    }

    pub(crate) fn runs(&self, port: usize) -> bool {
        self.lock().ports.get(port).is_some_and(Port::reaches)
    }

    pub(crate) fn is_attached(&self, port: usize) -> bool {
        self.lock().ports.get(port).is_some_and(|port| port.attached)
    }

    pub(crate) fn set_attached(&self, port: usize, attached: bool) {
        if let Some(port) = self.lock().ports.get_mut(port) {
            port.attached = attached;
        }
    }

    pub(crate) fn silence(&self, port: usize, silent: bool) {
        if let Some(port) = self.lock().ports.get_mut(port) {
            port.silent = silent;
        }
    }

    /// What of one device ends so, or more easily, ends; whether nothing of it is in flight any more.
    pub(crate) fn end_flight(&self, port: usize, ends: Ends) -> bool {
        self.drop_stale(|p, stale| p == port && stale.ends <= ends);
        let state = self.lock();
        state.ports.get(port).is_none_or(|port| port.stale.iter().all(|stale| stale.ends == Ends::WithCache))
    }

    /// Drops the old translations that `which` picks by port; a ticket ends with the last of its own.
    fn drop_stale(&self, which: impl Fn(usize, &Stale) -> bool) -> usize {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut dropped = 0;
        for (index, port) in state.ports.iter_mut().enumerate() {
            let before = port.stale.len();
            port.stale.retain(|stale| !which(index, stale));
            dropped += before - port.stale.len();
        }
        let ports = &state.ports;
        let (running, ended): (Vec<_>, Vec<_>) = state.running.iter().partition(|ticket| {
            ports.iter().flat_map(|port| &port.stale).any(|s| s.ticket == Some(**ticket))
        });
        state.running = running;
        if !ended.is_empty() {
            state.ended.extend(ended);
            // An eventfd that is full is readable, which is all that is asked of it.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
        dropped
    }
}

impl Domain for Sim {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn capabilities(&self) -> Capabilities {
        self.shared.capabilities
    }

    fn map(
        &self,
        iova: PageRange<Iova>,
        piece: u64,
        file: &Arc<GuestFile>,
        offset: Offset,
        writable: bool,
    ) -> Result<()> {
        let fault = self.shared.enter(Call::Map);
        let key = FileKey::of(file).map_err(|source| Error::Map { iova, source, mend: "" })?;
        let since = self.shared.memory.now();
        let whole = Mapping { iova, file: key, offset, since, writable, memory: Arc::clone(file) };
        self.shared.map(whole, piece, fault)
    }

    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        let fault = self.shared.enter(Call::Unmap);
        self.shared.unmap(&[iova], self.shared.capabilities.cut, fault)
    }

    fn replace(&self, gone: &[PageRange<Iova>]) -> Unmap {
        let fault = self.shared.enter(Call::Replace);
        self.shared.replace(gone, fault)
    }

    fn poll(&self, ended: &mut Vec<Ticket>) {
        let mut count = [0; 8];
        // EAGAIN: nothing new; the list below is empty then.
        let _ = rustix::io::read(&self.shared.wake, &mut count);
        ended.append(&mut self.shared.lock().ended);
    }

    fn wake(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.wake.as_fd())
    }
}

#[cfg(test)]
mod tests;
