//! The session's part, with all its freedom: it executes the gate's effects on simulated domains and devices,
//! in whatever order, as late as it likes or never, and brings back what really happened.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use passgate::gate::{
    DeviceId, DomainId, Effect, Event, FileId, FilePages, InvalidationId, JobId, MapResult, Outcome, Step,
    UnmapResult,
};
use passgate_backends::iommu::sim::{Call, Fault, FileKey, Memory, Sim, SimDevice};
use passgate_backends::{Device, Domain, Error, FenceStep, Nature, StopClass, Ticket, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};
use rustix::io::Errno;

use crate::action::FILE_PAGES;
use crate::truth::{Kept, Truth, broken};

/// One effect under way; none where a ticket came back by itself.
#[derive(Debug)]
pub struct Task {
    pub effect: Option<Effect>,
    /// What came of it, once it is done.
    pub result: Option<Event>,
    /// Never returns, until the end of the run.
    pub hangs: bool,
}

/// One domain and its devices.
#[derive(Debug)]
pub struct Bus {
    pub id: DomainId,
    pub sim: Sim,
    pub devices: Vec<(DeviceId, SimDevice)>,
    tickets: HashMap<Ticket, JobId>,
}

#[derive(Debug)]
pub struct Hands {
    pub memory: Memory,
    pub files: BTreeMap<FileId, (FileKey, Arc<GuestFile>)>,
    pub buses: Vec<Bus>,
    pub tasks: Vec<Task>,
    /// Unmaps whose `Released` must wait for the `Unmapped`.
    unsaid: HashSet<JobId>,
    /// A planted fault: unmaps are reported and not made.
    pub pretends: bool,
}

impl Hands {
    pub fn new(memory: Memory) -> Self {
        let (files, buses, tasks, unsaid) = Default::default();
        Self { memory, files, buses, tasks, unsaid, pretends: false }
    }

    pub fn add_bus(&mut self, id: DomainId, sim: Sim) {
        self.buses.push(Bus { id, sim, devices: Vec::new(), tickets: HashMap::new() });
    }

    pub fn add_device(&mut self, bus: usize, id: DeviceId, stop_class: StopClass, nature: Nature) {
        let device = self.buses[bus].sim.device(&format!("sim:{}", id.0), stop_class, nature);
        self.buses[bus].devices.push((id, device));
    }

    /// Takes an effect to be executed; says no to what is none.
    pub fn take(&mut self, effect: Effect) {
        match effect {
            Effect::Unmap { job, .. } | Effect::Replace { job, .. } => {
                self.unsaid.insert(job);
            }
            Effect::Map { .. } | Effect::Fence { .. } | Effect::Attach { .. } | Effect::Convert { .. } => {}
            _ => return,
        }
        self.tasks.push(Task { effect: Some(effect), result: None, hangs: false });
    }

    /// Whether the result may be told now.
    pub fn ripe(&self, index: usize) -> bool {
        match &self.tasks[index].result {
            Some(Event::Released { job }) => !self.unsaid.contains(job),
            Some(_) => true,
            None => false,
        }
    }

    /// The result of a task, which is over by that.
    pub fn finish(&mut self, index: usize) -> Option<Event> {
        if !self.ripe(index) {
            return None;
        }
        let event = self.tasks.swap_remove(index).result?;
        if let Event::Unmapped { job, .. } = event {
            self.unsaid.remove(&job);
        }
        Some(event)
    }

    /// Makes the call that a task stands for, if it was not made.
    pub fn execute(&mut self, index: usize, fault: Option<Fault>, truth: &mut Truth) -> Kept {
        let task = &self.tasks[index];
        let Some(effect) = task.effect.clone().filter(|_| task.result.is_none()) else { return Ok(()) };
        // Where nobody knows how much is mapped, a domain that says less than it did cannot be found out.
        let uncounted = matches!(effect, Effect::Unmap { bytes: None, .. });
        let fault = fault.filter(|fault| !uncounted || !matches!(fault, Fault::Short | Fault::ShortLate));
        let injected = fault.is_some();
        let result = match effect {
            Effect::Map { job, domain, iova, piece, file, offset, writable } => {
                truth.dirty = true;
                let Some((_, file)) = self.files.get(&file) else {
                    broken!(8, "{effect:?} of an unknown file")
                };
                let sim = &self.buses[domain.0 as usize].sim;
                arm(sim, Call::Map, fault);
                let result = match sim.map(iova, piece, file, offset, writable) {
                    Ok(()) => MapResult::Mapped,
                    Err(Error::HalfMapped { source, .. }) => {
                        MapResult::Unknown { errno: source.errno.raw_os_error() }
                    }
                    Err(error) => {
                        let errno = error.errno().unwrap_or(Errno::IO);
                        match errno {
                            Errno::EXIST => broken!(2, "{effect:?} meets a mapping that was forgotten"),
                            Errno::NOSPC => broken!(7, "{effect:?} is more than the domain can hold"),
                            _ => MapResult::Refused { errno: errno.raw_os_error() },
                        }
                    }
                };
                Event::Mapped { job, result }
            }
            Effect::Unmap { job, iova, bytes, .. } if self.pretends => {
                let bytes = bytes.unwrap_or(iova.len());
                Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns: 1000 }
            }
            Effect::Replace { job, bytes, .. } if self.pretends => {
                Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns: 1000 }
            }
            Effect::Replace { job, domain, gone, .. } => {
                let bus = &mut self.buses[domain.0 as usize];
                arm(&bus.sim, Call::Replace, fault);
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
                arm(&bus.sim, Call::Unmap, fault);
                let result = match bus.sim.unmap(iova) {
                    Unmap::Gone { bytes } => UnmapResult::Gone { bytes },
                    Unmap::InFlight { bytes, ticket } => {
                        bus.tickets.insert(ticket, job);
                        UnmapResult::InFlight { bytes }
                    }
                    Unmap::Failed { errno: Errno::NOENT, .. } if !injected => {
                        broken!(2, "{effect:?} would cut a mapping in two")
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
                arm(sim, Call::Fence, fault);
                let step = match step {
                    Step::Drain => FenceStep::Drain,
                    Step::Stop => FenceStep::Stop,
                    Step::Master => FenceStep::Master,
                    Step::Detach => FenceStep::Detach,
                    Step::Reset => FenceStep::Reset,
                    Step::Unmap => broken!(4, "{effect:?} is no fence"),
                };
                Event::Fenced { job, errno: errno(device.fence(step)), took_ns: 1000 }
            }
            Effect::Attach { job, device } => {
                truth.dirty = true;
                let Some((sim, device)) = self.device(device) else {
                    broken!(4, "{effect:?} of an unknown device")
                };
                arm(sim, Call::Attach, fault);
                Event::Attached { job, errno: errno(device.attach()) }
            }
            Effect::Convert { invalidation, pages, .. } => self.convert(invalidation, &pages, fault),
            _ => return Ok(()),
        };
        self.tasks[index].result = Some(result);
        self.collect();
        Ok(())
    }

    /// A domain that reports more gone than there was.
    pub fn boast(&mut self, index: usize) {
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

    /// passgate converts: the pages get other frames.
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
                self.replace(part.file, part.range, id.0);
            }
        }
        Event::Converted { invalidation: id, outcome }
    }

    /// The owner gives pages of a file away; beyond the file there are none.
    pub fn replace(&self, file: FileId, range: PageRange<Offset>, bytes: u64) {
        let end = Offset(range.end().0.min(FILE_PAGES * PAGE));
        if let (Some((key, _)), Some(range)) = (self.files.get(&file), PageRange::between(range.start(), end))
        {
            self.memory.replace(*key, range, bytes);
        }
    }

    /// Whether a device is in its domain and issues requests; one that is only spoken of does what it should.
    pub fn runs(&self, id: DeviceId) -> bool {
        self.device(id).is_none_or(|(_, device)| device.runs())
    }

    fn device(&self, id: DeviceId) -> Option<(&Sim, &SimDevice)> {
        self.buses.iter().find_map(|bus| {
            bus.devices.iter().find(|(other, _)| *other == id).map(|(_, device)| (&bus.sim, device))
        })
    }

    /// Tickets that came back become results.
    pub fn collect(&mut self) {
        let mut ended = Vec::new();
        for bus in &mut self.buses {
            bus.sim.poll(&mut ended);
            for job in ended.drain(..).filter_map(|ticket| bus.tickets.remove(&ticket)) {
                let result = Some(Event::Released { job });
                self.tasks.push(Task { effect: None, result, hangs: false });
            }
        }
    }

    /// Whether nothing is under way, in flight or waiting to be told.
    pub fn idle(&self) -> bool {
        self.tasks.is_empty() && self.buses.iter().all(|bus| bus.tickets.is_empty())
    }

    /// Looks through every translation that a device can use: none may show what is forbidden, or an old frame.
    pub fn look(&self, truth: &Truth) -> Kept {
        let mut found = Ok(());
        for bus in &self.buses {
            bus.sim.reachable(|mapping, live| {
                if found.is_err() {
                    return;
                }
                let Some(file) = truth.files.iter().find(|file| file.key == mapping.file) else { return };
                let how = if live { "mapped" } else { "in flight" };
                let at = |what: String| crate::truth::Broken {
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

fn arm(sim: &Sim, call: Call, fault: Option<Fault>) {
    if let Some(fault) = fault {
        sim.fail_next(call, fault);
    }
}

fn errno(result: Result<(), Error>) -> i32 {
    result.err().map_or(0, |error| error.errno().unwrap_or(Errno::IO).raw_os_error())
}
