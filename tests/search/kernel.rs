//! An exact model of the kernel: its mappings, the state of its devices, and the operations in flight.
//!
//! It executes a call as its [`Outcome`] states, and assumes the worst of devices: every translation that a device could have
//! in its translation cache (ATS) is there, and operations stay in flight until the search ends them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use passgate_backends::device::Guard;
use passgate_backends::{
    Device, DeviceTraits, Domain, DomainCaps, Error, Result, Step, Steps, Ticket, Unmap,
};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Failed, Iova, PAGE, PageRange};
use rustix::io::Errno;

use crate::plant::Plant;

/// The effect of one call, and its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// It does all of it and succeeds.
    Done,
    /// It does nothing and fails.
    Fails,
    /// It does all of it and fails.
    FailsDone,
    /// An attach only: it fails and leaves the device detached.
    FailsOut,
    /// It does the first half and fails.
    FailsHalf,
    /// An unmap only: it removes the first half and succeeds with the bytes of that half.
    Short,
    /// An unmap only: it removes all of it, and operations remain in flight.
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

/// The state of one device. Sets of pages of the file are bit masks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    pub attached: bool,
    /// True while it is stopped by its migration state or has bus mastering off.
    pub stopped: bool,
    pub drained: bool,
    /// The pages that its translation cache may still have although they were unmapped.
    pub cached: u64,
}

#[derive(Debug, Default)]
pub struct State {
    pub mappings: Vec<Mapping>,
    pub device_states: Vec<DeviceState>,
    /// Unmaps whose operations have not ended, and the pages of these operations.
    pub flights: Vec<(Ticket, u64)>,
    ended: Vec<Ticket>,
    tickets: u64,
    outcome: Option<Outcome>,
    /// The first IOVA page whose map was requested while it was mapped: the ledger had lost the mapping.
    pub mapped_twice: Option<u64>,
}

/// The hardware of a machine.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    pub capabilities: DomainCaps,
    pub devices: usize,
    pub stop_class: Steps,
    /// True if the devices cache translations.
    pub ats: bool,
    /// The fault that is planted in the drivers.
    pub plant: Plant,
}

/// The kernel, which outlives every daemon.
#[derive(Debug)]
pub struct Kernel {
    pub machine: Machine,
    state: Mutex<State>,
}

impl Kernel {
    pub fn new(machine: Machine) -> Arc<Self> {
        let device = DeviceState { attached: true, stopped: false, drained: false, cached: 0 };
        let state = State { device_states: vec![device; machine.devices], ..State::default() };
        Arc::new(Self { machine, state: Mutex::new(state) })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the outcome of the next call.
    pub fn set_next_outcome(&self, outcome: Outcome) {
        self.state().outcome = Some(outcome);
    }

    pub fn domain(self: &Arc<Self>) -> Arc<dyn Domain> {
        Arc::new(ModelDomain(Arc::clone(self)))
    }

    pub fn devices(self: &Arc<Self>) -> Vec<Arc<dyn Device>> {
        let device = |index: usize| {
            let name = format!("0000:00:{index:02x}.0");
            let was_attached = self.state().device_states[index].attached;
            Arc::new(ModelDevice { kernel: Arc::clone(self), name, index, was_attached }) as Arc<dyn Device>
        };
        (0..self.machine.devices).map(device).collect()
    }
}

impl State {
    /// Returns the pages that some device may reach.
    pub fn reachable(&self) -> u64 {
        let mapped = self.mappings.iter().fold(0, |pages, mapping| pages | mapping.file_pages());
        let in_flight = self.flights.iter().fold(0, |pages, (_, over)| pages | over);
        let cached = self
            .device_states
            .iter()
            .filter(|device| device.attached)
            .fold(0, |pages, device| pages | device.cached);
        mapped | in_flight | cached
    }

    /// True if the IOVA page is mapped.
    pub fn maps(&self, iova_page: u64) -> bool {
        self.mappings.iter().any(|mapping| (mapping.start..mapping.end()).contains(&iova_page))
    }

    /// Ends the operations in flight under the `n`th ticket.
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

    /// Removes the first `count` mappings in `iova`. Returns their bytes and their pages of the file.
    fn remove(&mut self, iova: PageRange<Iova>, count: usize, caches: bool) -> (u64, u64) {
        let (start, end) = (iova.start().0 / PAGE, iova.end().0 / PAGE);
        let (mut bytes, mut over, mut remaining) = (0, 0, count);
        self.mappings.retain(|mapping| {
            let goes = start <= mapping.start && mapping.end() <= end && remaining > 0;
            if goes {
                remaining -= 1;
                bytes += mapping.pages * PAGE;
                over |= mapping.file_pages();
            }
            !goes
        });
        for device in self.device_states.iter_mut().filter(|device| device.attached && caches) {
            device.cached |= over;
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

    fn capabilities(&self) -> DomainCaps {
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
            return Err(Error::Map { iova, source, remedy: "" });
        }
        let (first, end, piece) = (iova.start().0 / PAGE, iova.end().0 / PAGE, piece / PAGE);
        if let Some(page) = (first..end).find(|page| state.maps(*page)) {
            state.mapped_twice = Some(page);
            return Err(Error::Map { iova, source, remedy: "" });
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
            _ => Err(Error::HalfMapped { iova, source, rollback: source.errno, remedy: "" }),
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
    index: usize,
    /// True if it was attached when its daemon opened it.
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
        Error::Device { device: self.name.clone(), source, remedy: "" }
    }
}

impl Device for ModelDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn stop_class(&self) -> Steps {
        self.kernel.machine.stop_class
    }

    fn traits(&self) -> DeviceTraits {
        let Machine { ats, plant, .. } = self.kernel.machine;
        DeviceTraits {
            ats: ats && (self.was_attached || plant != Plant::LiveAts),
            tdi: false,
            tolerant: false,
        }
    }

    fn fence(&self, step: Step) -> Result<()> {
        let mut state = self.kernel.state();
        let outcome = state.outcome();
        if self.kernel.machine.plant == Plant::DetachLies && step == Step::Detach {
            return Ok(());
        }
        if outcome != Outcome::Fails {
            if step != Step::Detach || outcome == Outcome::Done {
                state.end_flights();
            }
            let device = &mut state.device_states[self.index];
            match step {
                Step::Drain => device.drained = true,
                Step::Stop | Step::Master => device.stopped = true,
                Step::Detach => (device.attached, device.cached) = (false, 0),
                Step::Reset => (device.stopped, device.cached) = (false, 0),
            }
        }
        if outcome == Outcome::Done { Ok(()) } else { Err(self.failed()) }
    }

    fn attach(&self) -> Result<()> {
        let mut state = self.kernel.state();
        let outcome = state.outcome();
        let device = &mut state.device_states[self.index];
        match outcome {
            Outcome::Fails => {}
            Outcome::FailsOut => (device.attached, device.cached) = (false, 0),
            Outcome::Done => {
                *device =
                    DeviceState { attached: true, stopped: false, drained: false, cached: device.cached }
            }
            // It is attached, but a later step (its migration state, bus mastering) failed.
            _ => device.attached = true,
        }
        if outcome == Outcome::Done { Ok(()) } else { Err(self.failed()) }
    }

    fn guard(&self) -> Guard<'_> {
        Guard::None
    }
}
