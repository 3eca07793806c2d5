//! A simulated IOVA domain: deterministic, with exactly the faults of its [`FaultPlan`].
//!
//! It consists of a page table, and for every device the stale translations that no unmap has flushed yet. It has no
//! clock and no randomness and does not know the gate: tests advance it ([`Sim::flush`], [`Sim::release`]) and then
//! check what a device can still reach ([`Sim::reachable`], [`Sim::dma`]). It assumes the worst of devices: a drained
//! or reset device that is still attached does DMA again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use passgate_backends::{DeviceTraits, Domain, DomainCaps, Error, Result, Steps, Ticket, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::event::EventfdFlags;

mod calls;
mod device;
mod fault;
mod memory;
mod port;
mod table;

pub use device::SimDevice;
pub use fault::{Call, Fault, FaultPlan};
pub use memory::{Generation, Memory};
pub(crate) use port::StaleUntil;
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
    /// Returns the identity of an open file, by `fstat`.
    pub fn of(file: &GuestFile) -> Result<Self, Failed> {
        let stat = rustix::fs::fstat(file).map_err(|errno| Failed::new("fstat", errno))?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// The memory that a DMA to one address accesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaTarget {
    /// The file.
    pub file: FileKey,
    /// The offset in the file.
    pub offset: Offset,
    /// The generation in which the page was pinned: the DMA accesses the frame that backed the page then.
    pub since: Generation,
    /// True if a write is permitted.
    pub writable: bool,
}

#[derive(Debug, Default)]
struct State {
    table: Table,
    ports: Vec<Port>,
    faults: fault::Injector,
    /// The number of tickets issued.
    tickets: u64,
    /// The tickets whose operations are in flight.
    running: Vec<Ticket>,
    /// The tickets whose operations have ended and that were not polled yet.
    ended: Vec<Ticket>,
    /// The number of calls that hang.
    hanging: usize,
    /// The number of calls of [`Sim::release`].
    releases: u64,
}

#[derive(Debug)]
pub(crate) struct Shared {
    capabilities: DomainCaps,
    memory: Memory,
    state: Mutex<State>,
    released: Condvar,
    wake: OwnedFd,
}

/// A simulated IOVA domain. A clone refers to the same domain.
#[derive(Debug, Clone)]
pub struct Sim {
    shared: Arc<Shared>,
}

impl Sim {
    /// The capabilities of a domain, for tests that need no others.
    pub const CAPABILITIES: DomainCaps = DomainCaps {
        max_mappings: 65_535,
        max_mapping_len: 1 << 30,
        tickets: true,
        cut: false,
        replace: false,
        counts_partial: false,
    };

    /// Makes an empty domain over `memory`.
    pub fn new(capabilities: DomainCaps, memory: Memory) -> Result<Self> {
        let wake =
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| {
                Error::Host {
                    what: format!("eventfd: {e}"),
                    remedy: "raise the limit of open files (ulimit -n)",
                }
            })?;
        let state = Mutex::default();
        Ok(Self { shared: Arc::new(Shared { capabilities, memory, state, released: Condvar::new(), wake }) })
    }

    /// Makes a device, attached to this domain.
    pub fn device(&self, name: &str, stop_class: Steps, traits: DeviceTraits) -> SimDevice {
        let mut state = self.shared.lock();
        state.ports.push(Port { attached: true, quiesced: false, ats: traits.ats, stale: Vec::new() });
        SimDevice::new(name, stop_class, traits, Arc::clone(&self.shared), state.ports.len() - 1)
    }

    /// Replaces the fault plan. Calls are counted from the making of the domain on, so calls made before count.
    pub fn plan(&self, plan: FaultPlan) {
        self.shared.lock().faults.plan = plan;
    }

    /// Injects `fault` into the next call of this kind.
    pub fn fail_next(&self, call: Call, fault: Fault) {
        self.shared.lock().faults.plan_next(call, fault);
    }

    /// Returns the number of calls of this kind made so far.
    pub fn calls(&self, call: Call) -> u64 {
        self.shared.lock().faults.count(call)
    }

    /// Returns the number of calls of all kinds made so far.
    pub fn all_calls(&self) -> u64 {
        self.shared.lock().faults.total()
    }

    /// Completes late flushes ([`Fault::Late`]); stuck operations stay in flight. Returns the number of stale
    /// translations that ended.
    pub fn flush(&self) -> usize {
        self.shared.drop_stale(|_, stale| stale.until == StaleUntil::Flush)
    }

    /// Ends everything in flight, including stuck operations ([`Fault::Stuck`]), as when a network peer reads at last
    /// or a link goes down. Returns the number of stale translations that ended.
    pub fn unstick(&self) -> usize {
        self.shared.drop_stale(|_, stale| stale.until <= StaleUntil::Unstuck)
    }

    /// Lets every call that hangs ([`Fault::Hang`]) continue.
    pub fn release(&self) {
        self.shared.lock().releases += 1;
        self.shared.released.notify_all();
    }

    /// Returns the number of calls that hang now.
    pub fn hanging(&self) -> usize {
        self.shared.lock().hanging
    }

    /// Returns the mappings in the page table, ascending.
    pub fn mappings(&self) -> Vec<Mapping> {
        self.shared.lock().table.iter().cloned().collect()
    }

    /// Returns the number of mappings in the page table.
    pub fn mapping_count(&self) -> u64 {
        self.shared.lock().table.len()
    }

    /// Returns the tickets whose operations are in flight.
    pub fn running(&self) -> Vec<Ticket> {
        self.shared.lock().running.clone()
    }

    /// Calls `visit` for every translation that some device can still use, with true for a live and false for a stale
    /// one. `visit` must not call this domain.
    pub fn reachable(&self, mut visit: impl FnMut(&Mapping, bool)) {
        let state = self.shared.lock();
        if state.ports.iter().any(Port::is_active) {
            state.table.iter().for_each(|mapping| visit(mapping, true));
        }
        for stale in state.ports.iter().flat_map(Port::usable_stale) {
            visit(&stale.mapping, false);
        }
    }

    /// Returns the memory that a DMA of any device of this domain accesses at `iova`; none if it faults for all of
    /// them.
    pub fn dma(&self, iova: Iova) -> Option<DmaTarget> {
        let ports = self.shared.lock().ports.len();
        (0..ports).find_map(|port| self.shared.translate(port, iova)).map(|(target, _)| target)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the call and returns the fault to inject into it. A call that hangs waits here for [`Sim::release`]
    /// first.
    pub(crate) fn enter(&self, call: Call) -> Option<Fault> {
        let mut state = self.lock();
        let fault = state.faults.count_call(call);
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

    /// Translates `iova` for one device. A stale translation is preferred to a live one, as a hit in the IOTLB is.
    pub(crate) fn translate(&self, port: usize, iova: Iova) -> Option<(DmaTarget, Arc<GuestFile>)> {
        self.with_page(port, iova, |target, file| (target, Arc::clone(file)))
    }

    /// Translates as [`Shared::translate`] and calls `with` while the domain is locked; `with` must not call the
    /// domain.
    pub(crate) fn with_page<R>(
        &self,
        port: usize,
        iova: Iova,
        with: impl FnOnce(DmaTarget, &Arc<GuestFile>) -> R,
    ) -> Option<R> {
        let state = self.lock();
        let port = state.ports.get(port)?;
        let live = state.table.find(iova).filter(|_| port.is_active());
        let stale = port.usable_stale().map(|stale| &stale.mapping).find(|m| m.iova.contains(iova));
        let mapping = stale.or(live)?;
        Some(with(mapping.at(iova)?, &mapping.memory))
    }

    pub(crate) fn runs(&self, port: usize) -> bool {
        self.lock().ports.get(port).is_some_and(Port::is_active)
    }

    pub(crate) fn is_attached(&self, port: usize) -> bool {
        self.lock().ports.get(port).is_some_and(|port| port.attached)
    }

    pub(crate) fn set_attached(&self, port: usize, attached: bool) {
        if let Some(port) = self.lock().ports.get_mut(port) {
            port.attached = attached;
        }
    }

    pub(crate) fn set_quiesced(&self, port: usize, quiesced: bool) {
        if let Some(port) = self.lock().ports.get_mut(port) {
            port.quiesced = quiesced;
        }
    }

    /// Ends the stale translations of one device that end at `event` or at a weaker one. Returns true if no operation
    /// of the device is in flight any more.
    pub(crate) fn end_stale(&self, port: usize, event: StaleUntil) -> bool {
        self.drop_stale(|p, stale| p == port && stale.until <= event);
        let state = self.lock();
        state
            .ports
            .get(port)
            .is_none_or(|port| port.stale.iter().all(|stale| stale.until == StaleUntil::CacheCleared))
    }

    /// Drops the stale translations that `which` selects by port. A ticket ends with the last of its translations.
    /// Returns the number of dropped translations.
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
            // A write to a full eventfd fails, but then it is readable already.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
        dropped
    }
}

impl Domain for Sim {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn capabilities(&self) -> DomainCaps {
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
        let key = FileKey::of(file).map_err(|source| Error::Map { iova, source, remedy: "" })?;
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
        // EAGAIN means that no ticket has ended; the list is empty then.
        let _ = rustix::io::read(&self.shared.wake, &mut count);
        ended.append(&mut self.shared.lock().ended);
    }

    fn wake(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.wake.as_fd())
    }
}

#[cfg(test)]
mod tests;
