//! Stands in for the session: executes the gate's effects on simulated domains and devices, in any order, late or never, and
//! reports what really happened.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use passgate::gate::{
    DeviceId, DomainId, Effect, Event, FileId, FilePages, InvalidationId, JobId, MapResult, Outcome,
    UnmapResult,
};
use passgate_backends::{Device, DeviceTraits, Domain, Error, Steps, Ticket, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};
use passgate_sim::iommu::{Call, Fault, FileKey, Memory, Sim, SimDevice};
use rustix::io::Errno;

use crate::action::FILE_PAGES;
use crate::oracle::{CheckResult, Oracle, broken};

/// One effect to execute, or the end of a ticket to report: then `effect` is none.
#[derive(Debug)]
pub struct Task {
    pub effect: Option<Effect>,
    /// The result, once the effect has been executed.
    pub result: Option<Event>,
    /// True if it does not return before the end of the run.
    pub hangs: bool,
}

/// One simulated IOVA domain and its devices.
#[derive(Debug)]
pub struct Bus {
    pub id: DomainId,
    pub sim: Sim,
    pub devices: Vec<(DeviceId, SimDevice)>,
    tickets: HashMap<Ticket, JobId>,
}

#[derive(Debug)]
pub struct Executor {
    pub memory: Memory,
    pub files: BTreeMap<FileId, (FileKey, Arc<GuestFile>)>,
    pub buses: Vec<Bus>,
    pub tasks: Vec<Task>,
    /// Unmaps whose result is not reported yet: their [`Event::FlightEnded`] must come after it.
    unreported_unmaps: HashSet<JobId>,
    /// True for the planted fault [`crate::mutant::Plant::UnmapsSkipped`]: unmaps are reported as done and not made.
    pub skips_unmaps: bool,
}

impl Executor {
    pub fn new(memory: Memory) -> Self {
        let (files, buses, tasks, unreported_unmaps) = Default::default();
        Self { memory, files, buses, tasks, unreported_unmaps, skips_unmaps: false }
    }

    pub fn add_bus(&mut self, id: DomainId, sim: Sim) {
        self.buses.push(Bus { id, sim, devices: Vec::new(), tickets: HashMap::new() });
    }

    pub fn add_device(&mut self, bus: usize, id: DeviceId, stop_class: Steps, traits: DeviceTraits) {
        let device = self.buses[bus].sim.device(&format!("sim:{}", id.0), stop_class, traits);
        self.buses[bus].devices.push((id, device));
    }

    /// Queues an effect that is a call; ignores all others.
    pub fn accept(&mut self, effect: Effect) {
        match effect {
            Effect::Unmap { job, .. } | Effect::Replace { job, .. } => {
                self.unreported_unmaps.insert(job);
            }
            Effect::Map { .. } | Effect::Fence { .. } | Effect::Attach { .. } | Effect::Convert { .. } => {}
            _ => return,
        }
        self.tasks.push(Task { effect: Some(effect), result: None, hangs: false });
    }

    /// True if the result may be reported to the gate now.
    pub fn is_deliverable(&self, index: usize) -> bool {
        match &self.tasks[index].result {
            Some(Event::FlightEnded { job }) => !self.unreported_unmaps.contains(job),
            Some(_) => true,
            None => false,
        }
    }

    /// Removes a task and returns its result; none if that may not be reported yet.
    pub fn take_result(&mut self, index: usize) -> Option<Event> {
        if !self.is_deliverable(index) {
            return None;
        }
        let event = self.tasks.swap_remove(index).result?;
        if let Event::Unmapped { job, .. } = event {
            self.unreported_unmaps.remove(&job);
        }
        Some(event)
    }

    /// Makes the call of a task, unless it was made already.
    pub fn execute(&mut self, index: usize, fault: Option<Fault>, oracle: &mut Oracle) -> CheckResult {
        let task = &self.tasks[index];
        let Some(effect) = task.effect.clone().filter(|_| task.result.is_none()) else { return Ok(()) };
        // Where the gate does not know how much is mapped, it cannot detect an unmap that reports too little.
        let uncounted = matches!(effect, Effect::Unmap { bytes: None, .. });
        let fault = fault.filter(|fault| !uncounted || !matches!(fault, Fault::Short | Fault::ShortLate));
        let injected = fault.is_some();
        let result = match effect {
            Effect::Map { job, domain, iova, piece, file, offset, writable } => {
                oracle.dirty = true;
                let Some((_, file)) = self.files.get(&file) else {
                    broken!(8, "{effect:?} of an unknown file")
                };
                let sim = &self.buses[domain.0 as usize].sim;
                inject(sim, Call::Map, fault);
                let result = match sim.map(iova, piece, file, offset, writable) {
                    Ok(()) => MapResult::Mapped,
                    Err(Error::HalfMapped { source, .. }) => {
                        MapResult::Unknown { errno: source.errno.raw_os_error() }
                    }
                    Err(error) => {
                        let errno = error.errno().unwrap_or(Errno::IO);
                        match errno {
                            Errno::EXIST => {
                                broken!(2, "{effect:?} overlaps a mapping that the gate has forgotten")
                            }
                            Errno::NOSPC => broken!(7, "{effect:?} exceeds the mapping limit of the domain"),
                            _ => MapResult::Refused { errno: errno.raw_os_error() },
                        }
                    }
                };
                Event::Mapped { job, result }
            }
            Effect::Unmap { job, iova, bytes, .. } if self.skips_unmaps => {
                let bytes = bytes.unwrap_or(iova.len());
                Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns: 1000 }
            }
            Effect::Replace { job, bytes, .. } if self.skips_unmaps => {
                Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns: 1000 }
            }
            Effect::Replace { job, domain, gone, .. } => {
                let bus = &mut self.buses[domain.0 as usize];
                inject(&bus.sim, Call::Replace, fault);
                let result = match bus.sim.replace(&gone) {
                    Unmap::Gone { bytes } => UnmapResult::Gone { bytes },
                    Unmap::InFlight { bytes, .. } => UnmapResult::InFlight { bytes },
                    Unmap::Failed { errno, bytes } => {
                        UnmapResult::Failed { errno: errno.raw_os_error(), bytes }
                    }
                };
                Event::Unmapped { job, result, took_ns: 1000 }
            }
            Effect::Unmap { job, domain, iova, .. } => {
                let bus = &mut self.buses[domain.0 as usize];
                inject(&bus.sim, Call::Unmap, fault);
                let result = match bus.sim.unmap(iova) {
                    Unmap::Gone { bytes } => UnmapResult::Gone { bytes },
                    Unmap::InFlight { bytes, ticket } => {
                        bus.tickets.insert(ticket, job);
                        UnmapResult::InFlight { bytes }
                    }
                    Unmap::Failed { errno: Errno::NOENT, .. } if !injected => {
                        broken!(2, "{effect:?} would cut a mapping of a domain that cannot")
                    }
                    Unmap::Failed { errno, bytes } => {
                        UnmapResult::Failed { errno: errno.raw_os_error(), bytes }
                    }
                };
                Event::Unmapped { job, result, took_ns: 1000 }
            }
            Effect::Fence { job, device, step } => {
                let Some((sim, device)) = self.device(device) else {
                    broken!(4, "{effect:?} of an unknown device")
                };
                inject(sim, Call::Fence, fault);
                Event::Fenced { job, errno: errno(device.fence(step)), took_ns: 1000 }
            }
            Effect::Attach { job, device } => {
                oracle.dirty = true;
                let Some((sim, device)) = self.device(device) else {
                    broken!(4, "{effect:?} of an unknown device")
                };
                inject(sim, Call::Attach, fault);
                Event::Attached { job, errno: errno(device.attach()) }
            }
            Effect::Convert { invalidation, pages, .. } => self.convert(invalidation, &pages, fault),
            _ => return Ok(()),
        };
        self.tasks[index].result = Some(result);
        self.collect_tickets();
        Ok(())
    }

    /// Changes the result of a complete unmap to one page more than was mapped.
    pub fn overreport_unmap(&mut self, index: usize) {
        let task = &mut self.tasks[index];
        if let (Some(Effect::Unmap { iova, bytes, .. }), Some(Event::Unmapped { result, .. })) =
            (&task.effect, &mut task.result)
        {
            let bytes = bytes.unwrap_or(iova.len());
            if *result == (UnmapResult::Gone { bytes }) {
                *result = UnmapResult::Gone { bytes: bytes + PAGE };
            }
        }
    }

    /// Executes passgate's own conversion: the pages get other frames.
    fn convert(&self, id: InvalidationId, pages: &[FilePages], fault: Option<Fault>) -> Event {
        let outcome = match fault {
            None => Outcome::Committed,
            Some(Fault::HalfMapped(_) | Fault::Short | Fault::ShortLate) => {
                Outcome::Unknown { errno: 5, offset: 4096 }
            }
            Some(_) => Outcome::NotCommitted,
        };
        if outcome != Outcome::NotCommitted {
            for part in pages {
                self.replace_pages(part.file, part.range, id.0);
            }
        }
        Event::Converted { invalidation: id, outcome }
    }

    /// Gives pages of a file other frames, filled with `bytes`; ignores what lies beyond the file.
    pub fn replace_pages(&self, file: FileId, range: PageRange<Offset>, bytes: u64) {
        let end = Offset(range.end().0.min(FILE_PAGES * PAGE));
        if let (Some((key, _)), Some(range)) = (self.files.get(&file), PageRange::between(range.start(), end))
        {
            self.memory.replace(*key, range, bytes);
        }
    }

    /// True if a device is in its domain and issues requests, or is not simulated.
    pub fn runs(&self, id: DeviceId) -> bool {
        self.device(id).is_none_or(|(_, device)| device.runs())
    }

    fn device(&self, id: DeviceId) -> Option<(&Sim, &SimDevice)> {
        self.buses.iter().find_map(|bus| {
            bus.devices.iter().find(|(other, _)| *other == id).map(|(_, device)| (&bus.sim, device))
        })
    }

    /// Queues a result for each ticket whose operations have ended.
    pub fn collect_tickets(&mut self) {
        let mut ended = Vec::new();
        for bus in &mut self.buses {
            bus.sim.poll(&mut ended);
            for job in ended.drain(..).filter_map(|ticket| bus.tickets.remove(&ticket)) {
                let result = Some(Event::FlightEnded { job });
                self.tasks.push(Task { effect: None, result, hangs: false });
            }
        }
    }

    /// True if nothing is in progress, in flight or waiting to be reported.
    pub fn is_idle(&self) -> bool {
        self.tasks.is_empty() && self.buses.iter().all(|bus| bus.tickets.is_empty())
    }

    /// Checks every translation that a device can use: none may show a forbidden page or an old frame.
    pub fn check_reachable(&self, oracle: &Oracle) -> CheckResult {
        let mut found = Ok(());
        for bus in &self.buses {
            bus.sim.reachable(|mapping, live| {
                if found.is_err() {
                    return;
                }
                let Some(file) = oracle.files.iter().find(|file| file.key == mapping.file) else { return };
                let how = if live { "mapped" } else { "in flight" };
                let at = |what: String| crate::oracle::BrokenPromise {
                    promise: 1,
                    how: format!("{:?}: {how} at {:?}: {what}", bus.id, mapping.iova),
                };
                if let Some(page) = file.first_forbidden(mapping.pages()) {
                    found = Err(at(format!("page {page} of {:?} is {}", file.id, file.describe(page))));
                } else if self.memory.replaced_since(mapping.file, mapping.pages(), mapping.since) {
                    found = Err(at(format!("a page of {:?} was replaced since", mapping.pages())));
                }
            });
        }
        found
    }
}

fn inject(sim: &Sim, call: Call, fault: Option<Fault>) {
    if let Some(fault) = fault {
        sim.fail_next(call, fault);
    }
}

fn errno(result: Result<(), Error>) -> i32 {
    result.err().map_or(0, |error| error.errno().unwrap_or(Errno::IO).raw_os_error())
}
