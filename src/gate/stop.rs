//! Devices: stopping them, and bringing them back.
//!
//! A fence is asked of every device of a domain that has it, at once; it counts for an invalidation only when
//! all of them have answered. A stopped device comes back when nothing in its domain is in doubt any more.

use super::effect::{Effect, Effects, Notice};
use super::event::{DeviceId, DomainId, InvalidationId, JobId};
use super::fence::{Nature, Step, Steps};
use super::receipt::Evidence;
use super::{Gate, Job};

/// A device, as the gate knows it.
#[derive(Debug)]
pub(super) struct DeviceEntry {
    pub(super) domain: DomainId,
    pub(super) steps: Steps,
    pub(super) nature: Nature,
    /// The fence that it is under.
    pub(super) fenced: Option<Step>,
    /// The fence or attach under way.
    busy: Option<JobId>,
    /// Whether it could not be brought back: tried again when memory is added.
    lost: bool,
}

impl Gate {
    pub(super) fn add_device(&mut self, device: DeviceId, domain: DomainId, steps: Steps, nature: Nature) {
        let entry = DeviceEntry { domain, steps, nature, fenced: None, busy: None, lost: false };
        self.devices.entry(device).or_insert(entry);
    }

    /// Asks `step` of every device in `domain` that has it and is not under it or a stronger one.
    pub(super) fn fence(
        &mut self,
        domain: DomainId,
        step: Step,
        invalidation: InvalidationId,
        effects: &mut Effects,
    ) {
        let able: Vec<DeviceId> = self
            .devices
            .iter()
            .filter(|(_, d)| d.domain == domain && d.steps.has(step))
            .map(|(id, _)| *id)
            .collect();
        for device in able {
            self.fence_one(device, step, invalidation, effects);
        }
    }

    /// Stops every device as surely as it can be, whatever the policy: their client is gone.
    pub(super) fn stop_all(&mut self, invalidation: InvalidationId, effects: &mut Effects) {
        let reset = self.policy.on_stuck_dma.allows().has(Step::Reset);
        let order = [Some(Step::Detach), reset.then_some(Step::Reset), Some(Step::Drain)];
        let steps: Vec<(DeviceId, Step)> = self
            .devices
            .iter()
            .filter_map(|(id, d)| Some((*id, order.into_iter().flatten().find(|step| d.steps.has(*step))?)))
            .collect();
        for (device, step) in steps {
            self.fence_one(device, step, invalidation, effects);
        }
    }

    fn fence_one(
        &mut self,
        device: DeviceId,
        step: Step,
        invalidation: InvalidationId,
        effects: &mut Effects,
    ) {
        let Some(entry) = self.devices.get(&device) else { return };
        if entry.busy.is_some() || entry.fenced.is_some_and(|under| under >= step) {
            return;
        }
        let job = self.next_job(Job::Fence { device, domain: entry.domain, step, invalidation });
        if let Some(entry) = self.devices.get_mut(&device) {
            entry.busy = Some(job);
        }
        effects.push(Effect::Fence { job, device, step });
    }

    /// Whether any device of the domain can do `step`.
    pub(super) fn can(&self, domain: DomainId, step: Step) -> bool {
        self.devices.values().any(|d| d.domain == domain && d.steps.has(step))
    }

    /// Whether a device of the domain is being fenced or brought back.
    pub(super) fn busy(&self, domain: DomainId) -> bool {
        self.devices.values().any(|d| d.domain == domain && d.busy.is_some())
    }

    /// The first device of the domain, to name in a reason.
    pub(super) fn suspect_device(&self, domain: DomainId) -> Option<DeviceId> {
        self.devices.iter().find(|(_, d)| d.domain == domain).map(|(id, _)| *id)
    }

    pub(super) fn fenced(&mut self, job: JobId, errno: i32, took_ns: u64, effects: &mut Effects) {
        let Some(Job::Fence { device, domain, step, invalidation }) = self.jobs.get(&job).copied() else {
            return;
        };
        self.jobs.remove(&job);
        if let Some(entry) = self.devices.get_mut(&device) {
            entry.busy = None;
            if errno == 0 && step > Step::Drain {
                entry.fenced = entry.fenced.max(Some(step));
            }
        }
        effects.push(Effect::Notice(Notice::DeviceFenced { device, step, errno }));
        if let Some(inv) = self.invalidations.get_mut(&invalidation) {
            inv.receipt.record(Evidence {
                step,
                domain,
                device: Some(device),
                iova: None,
                asked: 0,
                gone: 0,
                in_flight: false,
                errno,
                took_ns,
            });
        }
        self.advance_all(effects);
    }

    pub(super) fn attached(&mut self, job: JobId, errno: i32, effects: &mut Effects) {
        let Some(Job::Attach { device }) = self.jobs.get(&job).copied() else { return };
        self.jobs.remove(&job);
        if let Some(entry) = self.devices.get_mut(&device) {
            entry.busy = None;
            entry.lost = errno != 0;
            if errno == 0 {
                entry.fenced = None;
            }
        }
        effects.push(Effect::Notice(Notice::DeviceAttached { device, errno }));
        self.advance_all(effects);
    }

    /// Lost devices are worth another try.
    pub(super) fn hope(&mut self) {
        for device in self.devices.values_mut() {
            device.lost = false;
        }
    }

    /// Brings stopped devices back where nothing is in doubt any more.
    pub(super) fn bring_back(&mut self, effects: &mut Effects) {
        if self.devices.values().all(|d| d.fenced.is_none() || d.lost) {
            return;
        }
        if !self.clearing.is_empty() || !self.leaving.is_empty() {
            return;
        }
        let settled = |domain: DomainId| {
            self.domain(domain).is_some_and(|entry| entry.runs.unsettled() == 0) && !self.busy(domain)
        };
        let ready: Vec<DeviceId> = self
            .devices
            .iter()
            .filter(|(_, d)| d.fenced.is_some() && !d.lost && d.busy.is_none() && settled(d.domain))
            .map(|(id, _)| *id)
            .collect();
        for device in ready {
            let job = self.next_job(Job::Attach { device });
            if let Some(entry) = self.devices.get_mut(&device) {
                entry.busy = Some(job);
            }
            effects.push(Effect::Attach { job, device });
        }
    }
}
