//! An exact model of the kernel: what is mapped, which device is attached, what is in flight.
//!
//! It does what the [`Outcome`] of a call says and answers accordingly, and it takes the device's side: what a device
//! could have in its translation cache is there, and what is in flight stays so until the search ends it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use passgate_backends::device::Guard;
use passgate_backends::{
    Capabilities, Device, Domain, Error, FenceStep, Nature, Result, StopClass, Ticket, Unmap,
};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Failed, Iova, PAGE, PageRange};
use rustix::io::Errno;

use crate::plant::Plant;

/// What the kernel does with one call, and what it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// It does all of it and says so.
    Done,
    /// It does nothing and says that it failed.
    Fails,
    /// It does all of it and says that it failed.
    FailsDone,
    /// An attach only: it fails, and the device is out of its domain.
    FailsOut,
    /// It does the first half and says that it failed.
    FailsHalf,
    /// An unmap only: it removes the first half and says that it succeeded, with the bytes of that half.
    Short,
    /// An unmap only: it removes all of it, with operations in flight.
    InFlight,
}

/// One kernel mapping, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mapping {
    pub start: u64,
    pub pages: u64,
    pub file_page: u64,
}

impl Mapping {
    fn end(self) -> u64 {
        self.start + self.pages
    }

    fn file_pages(self) -> u64 {
        ((1 << self.pages) - 1) << self.file_page
    }
}

/// One device, as the kernel has it. Sets of pages of the file are bit masks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    pub attached: bool,
    /// Stopped by its migration state or without bus mastering.
    pub silent: bool,
    pub drained: bool,
    /// Pages that its translation cache may still have although they were unmapped.
    pub cached: u64,
}

#[derive(Debug, Default)]
pub struct State {
    pub mappings: Vec<Mapping>,
    pub ports: Vec<Port>,
    /// Unmaps whose operations have not ended, and the pages that these are over.
    pub flights: Vec<(Ticket, u64)>,
    ended: Vec<Ticket>,
    tickets: u64,
    outcome: Option<Outcome>,
    /// The first page that was to be mapped where something was mapped already: the ledger had lost it.
    pub mapped_twice: Option<u64>,
}

/// What a machine is like.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    pub capabilities: Capabilities,
    pub devices: usize,
    pub stop_class: StopClass,
    /// Whether the devices cache translations.
    pub ats: bool,
    /// What is wrong with the drivers, where a fault is planted.
    pub plant: Plant,
}

/// The kernel; it outlives every daemon.
#[derive(Debug)]
pub struct Kernel {
    pub machine: Machine,
    state: Mutex<State>,
}

impl Kernel {
    pub fn new(machine: Machine) -> Arc<Self> {
        let port = Port { attached: true, silent: false, drained: false, cached: 0 };
        let state = State { ports: vec![port; machine.devices], ..State::default() };
        Arc::new(Self { machine, state: Mutex::new(state) })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next call goes so.
    pub fn next(&self, outcome: Outcome) {
        self.state().outcome = Some(outcome);
    }

    pub fn domain(self: &Arc<Self>) -> Arc<dyn Domain> {
        Arc::new(ModelDomain(Arc::clone(self)))
    }

    pub fn devices(self: &Arc<Self>) -> Vec<Arc<dyn Device>> {
        let device = |port: usize| {
            let name = format!("0000:00:{port:02x}.0");
            let was_attached = self.state().ports[port].attached;
            Arc::new(ModelDevice { kernel: Arc::clone(self), name, port, was_attached }) as Arc<dyn Device>
        };
        (0..self.machine.devices).map(device).collect()
    }
}

impl State {
    /// The pages that some device may reach.
    pub fn reachable(&self) -> u64 {
        let mapped = self.mappings.iter().fold(0, |pages, mapping| pages | mapping.file_pages());
        let in_flight = self.flights.iter().fold(0, |pages, (_, over)| pages | over);
        let cached =
            self.ports.iter().filter(|port| port.attached).fold(0, |pages, port| pages | port.cached);
        mapped | in_flight | cached
    }

    /// Whether the IOVA page is mapped.
    pub fn maps(&self, iova_page: u64) -> bool {
        self.mappings.iter().any(|mapping| (mapping.start..mapping.end()).contains(&iova_page))
    }

    /// What is in flight under the `n`th ticket has ended.
    pub fn end_flight(&mut self, n: usize) {
        let (ticket, _) = self.flights.remove(n);
        self.ended.push(ticket);
    }

    fn end_flights(&mut self) {
        while !self.flights.is_empty() {
            self.end_flight(0);
        }
    }

    fn outcome(&mut self) -> Outcome {
        self.outcome.take().unwrap_or(Outcome::Done)
    }

    /// Removes the first `count` mappings in `iova`; their bytes, and the pages that they were over.
    fn remove(&mut self, iova: PageRange<Iova>, count: usize, caches: bool) -> (u64, u64) {
        let (start, end) = (iova.start().0 / PAGE, iova.end().0 / PAGE);
        let (mut bytes, mut over, mut left) = (0, 0, count);
        self.mappings.retain(|mapping| {
            let goes = start <= mapping.start && mapping.end() <= end && left > 0;
            if goes {
                left -= 1;
                bytes += mapping.pages * PAGE;
                over |= mapping.file_pages();
            }
            !goes
        });
        for port in self.ports.iter_mut().filter(|port| port.attached && caches) {
            port.cached |= over;
        }
        (bytes, over)
    }

    fn within(&self, iova: PageRange<Iova>) -> usize {
        let (start, end) = (iova.start().0 / PAGE, iova.end().0 / PAGE);
        self.mappings.iter().filter(|mapping| start <= mapping.start && mapping.end() <= end).count()
    }

    fn cuts(&self, iova: PageRange<Iova>) -> bool {
        let (start, end) = (iova.start().0 / PAGE, iova.end().0 / PAGE);
        let crosses = |mapping: &Mapping| {
            let overlaps = mapping.start < end && start < mapping.end();
            overlaps && !(start <= mapping.start && mapping.end() <= end)
        };
        self.mappings.iter().any(crosses)
    }

    /// Splits mappings at the borders of `iova`, as a domain that cuts does.
    fn split(&mut self, iova: PageRange<Iova>) {
        for border in [iova.start().0 / PAGE, iova.end().0 / PAGE] {
            let crosses = |mapping: &&mut Mapping| mapping.start < border && border < mapping.end();
            if let Some(mapping) = self.mappings.iter_mut().find(crosses) {
                let first = border - mapping.start;
                let rest = Mapping {
                    start: border,
                    pages: mapping.pages - first,
                    file_page: mapping.file_page + first,
                };
                mapping.pages = first;
                self.mappings.push(rest);
            }
        }
        self.mappings.sort_unstable();
    }
}

struct ModelDomain(Arc<Kernel>);

impl std::fmt::Debug for ModelDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("model")
    }
}

fn failed(errno: Errno, bytes: u64) -> Unmap {
    Unmap::Failed { errno, bytes }
}

impl Domain for ModelDomain {
    fn name(&self) -> &'static str {
        "model"
    }

    fn capabilities(&self) -> Capabilities {
        self.0.machine.capabilities
    }

    fn map(
        &self,
        iova: PageRange<Iova>,
        piece: u64,
        _: &Arc<GuestFile>,
        offset: Offset,
        _: bool,
    ) -> Result<()> {
        let mut state = self.0.state();
        let outcome = state.outcome();
        let source = Failed::new("model map", Errno::NOMEM);
        if outcome == Outcome::Fails {
            return Err(Error::Map { iova, source, mend: "" });
        }
        let (first, end, piece) = (iova.start().0 / PAGE, iova.end().0 / PAGE, piece / PAGE);
        if let Some(page) = (first..end).find(|page| state.maps(*page)) {
            state.mapped_twice = Some(page);
            return Err(Error::Map { iova, source, mend: "" });
        }
        let mut at = first;
        while at < end {
            let next = ((at / piece + 1) * piece).min(end);
            let file_page = offset.0 / PAGE + (at - first);
            state.mappings.push(Mapping { start: at, pages: next - at, file_page });
            at = next;
            if outcome == Outcome::FailsHalf {
                break;
            }
        }
        state.mappings.sort_unstable();
        match outcome {
            Outcome::Done => Ok(()),
            _ => Err(Error::HalfMapped { iova, source }),
        }
    }

    fn unmap(&self, iova: PageRange<Iova>) -> Unmap {
        let Machine { capabilities, ats, .. } = self.0.machine;
        let mut state = self.0.state();
        let outcome = state.outcome();
        if outcome == Outcome::Fails {
            return failed(Errno::BUSY, 0);
        }
        if self.0.machine.plant == Plant::UnmapLies {
            let bytes = state.mappings.iter().filter(|mapping| iova.contains(Iova(mapping.start * PAGE)));
            return Unmap::Gone { bytes: bytes.map(|mapping| mapping.pages * PAGE).sum() };
        }
        if capabilities.cut {
            state.split(iova);
        } else if state.cuts(iova) {
            return failed(Errno::INVAL, 0);
        }
        let all = state.within(iova);
        match outcome {
            Outcome::FailsDone => {
                state.remove(iova, all, ats);
                failed(Errno::IO, 0)
            }
            Outcome::FailsHalf => {
                let (bytes, _) = state.remove(iova, all / 2, ats);
                failed(Errno::IO, bytes)
            }
            Outcome::Short => {
                let (bytes, _) = state.remove(iova, all / 2, ats);
                Unmap::Gone { bytes }
            }
            Outcome::InFlight => {
                let (bytes, over) = state.remove(iova, all, ats);
                state.tickets += 1;
                let ticket = Ticket(state.tickets);
                state.flights.push((ticket, over));
                Unmap::InFlight { bytes, ticket }
            }
            _ => Unmap::Gone { bytes: state.remove(iova, all, ats).0 },
        }
    }

    fn replace(&self, gone: &[PageRange<Iova>]) -> Unmap {
        let mut state = self.0.state();
        if state.outcome() != Outcome::Done {
            return failed(Errno::NOMEM, 0);
        }
        let mut bytes = 0;
        for range in gone {
            state.split(*range);
            let all = state.within(*range);
            bytes += state.remove(*range, all, self.0.machine.ats).0;
        }
        Unmap::Gone { bytes }
    }

    fn poll(&self, ended: &mut Vec<Ticket>) {
        ended.append(&mut self.0.state().ended);
    }
}

struct ModelDevice {
    kernel: Arc<Kernel>,
    name: String,
    port: usize,
    /// Whether it was when its daemon came.
    was_attached: bool,
}

impl std::fmt::Debug for ModelDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl ModelDevice {
    fn failed(&self) -> Error {
        let source = Failed::new("model", Errno::IO);
        Error::Device { device: self.name.clone(), source, mend: "" }
    }
}

impl Device for ModelDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn stop_class(&self) -> StopClass {
        self.kernel.machine.stop_class
    }

    fn nature(&self) -> Nature {
        let Machine { ats, plant, .. } = self.kernel.machine;
        Nature { ats: ats && (self.was_attached || plant != Plant::LiveAts), tdi: false }
    }

    fn fence(&self, step: FenceStep) -> Result<()> {
        let mut state = self.kernel.state();
        let outcome = state.outcome();
        if self.kernel.machine.plant == Plant::DetachLies && step == FenceStep::Detach {
            return Ok(());
        }
        if outcome != Outcome::Fails {
            if step != FenceStep::Detach || outcome == Outcome::Done {
                state.end_flights();
            }
            let port = &mut state.ports[self.port];
            match step {
                FenceStep::Drain => port.drained = true,
                FenceStep::Stop | FenceStep::Master => port.silent = true,
                FenceStep::Detach => (port.attached, port.cached) = (false, 0),
                FenceStep::Reset => (port.silent, port.cached) = (false, 0),
            }
        }
        if outcome == Outcome::Done { Ok(()) } else { Err(self.failed()) }
    }

    fn attach(&self) -> Result<()> {
        let mut state = self.kernel.state();
        let outcome = state.outcome();
        let port = &mut state.ports[self.port];
        match outcome {
            Outcome::Fails => {}
            Outcome::FailsOut => (port.attached, port.cached) = (false, 0),
            Outcome::Done => {
                *port = Port { attached: true, silent: false, drained: false, cached: port.cached }
            }
            // It is attached, but what comes after that (its migration state, bus mastering) failed.
            _ => port.attached = true,
        }
        if outcome == Outcome::Done { Ok(()) } else { Err(self.failed()) }
    }

    fn guard(&self) -> Guard<'_> {
        Guard::None
    }
}
