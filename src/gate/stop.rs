//! Devices: stopping them, and bringing them back.
//!
//! A fence is asked of every device of a domain that may take it, at once, and it is shared: whoever needs the same
//! or a weaker one meanwhile waits for this one, whoever needs a stronger one has it next. A stopped device comes
//! back when nothing in its domain is in doubt any more.

use super::effect::{Effect, Effects, Notice};
use super::event::{DeviceId, DomainId, InvalidationId, JobId};
use super::fence::{Nature, Platform, Step, Steps};
use super::hitless::pause;
use super::invalidation::Invalidation;
use super::pause::splits;
use super::receipt::Evidence;
use super::{Gate, Job};

/// A device, as the gate knows it.
#[derive(Debug)]
pub(super) struct DeviceEntry {
    pub(super) domain: DomainId,
    pub(super) steps: Steps,
    pub(super) nature: Nature,
    /// The strongest fence that it is under.
    pub(super) fenced: Option<Step>,
    /// Whether it is out of its domain. A reset is stronger and leaves it in.
    detached: bool,
    /// Whether its driver was told to issue nothing more, and has done so.
    drained: Option<bool>,
    /// A fence that failed may have stopped it all the same: it must be brought back too.
    shaken: bool,
    /// What is under way.
    busy: Option<Busy>,
    /// The fences that somebody needs after that, weakest first: the strongest, and a detach, which a reset does not include.
    next: Vec<(Step, InvalidationId)>,
    /// Whether it could not be brought back: tried again when memory is added, and at the end of every conversion.
    pub(super) lost: bool,
}

/// A call under way on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Busy {
    Fence(Step),
    Attach,
}

impl DeviceEntry {
    /// Whether it is under `step` or under what includes it.
    fn is_under(&self, step: Step) -> bool {
        match step {
            Step::Detach => self.detached,
            _ => self.fenced >= Some(step),
        }
    }

    /// Whether it is out of its domain, and not on its way back.
    pub(super) fn is_out(&self) -> bool {
        self.detached && self.busy != Some(Busy::Attach)
    }

    /// Whether it issues nothing, and is not on its way back.
    pub(super) fn is_paused(&self) -> bool {
        (self.drained == Some(true) || self.fenced.is_some()) && self.busy != Some(Busy::Attach)
    }

    /// Whether a fence is under way or asked for: any of them pauses it.
    pub(super) fn is_stopping(&self) -> bool {
        matches!(self.busy, Some(Busy::Fence(_))) || !self.next.is_empty()
    }

    /// Whether it plainly runs, and nothing is asked of it.
    pub(super) fn runs(&self) -> bool {
        let stopped =
            self.fenced.is_some() || self.detached || self.drained.is_some() || self.shaken || self.lost;
        !stopped && self.busy.is_none()
    }

    /// Whether it has to be brought back.
    fn is_stopped(&self) -> bool {
        (self.fenced.is_some() || self.shaken || self.drained.is_some()) && !self.lost
    }

    /// Whether it was told to issue nothing for a while, and nothing stronger.
    fn is_only_drained(&self) -> bool {
        self.fenced.is_none() && !self.shaken
    }
}

impl Gate {
    pub(super) fn add_device(&mut self, device: DeviceId, domain: DomainId, steps: Steps, nature: Nature) {
        self.devices.entry(device).or_insert(DeviceEntry {
            domain,
            steps,
            nature,
            fenced: None,
            detached: false,
            drained: None,
            shaken: false,
            busy: None,
            next: Vec::new(),
            lost: false,
        });
    }

    /// Whether the device has `step`, and may be asked for it where a policy allows `allowed`.
    fn may(&self, device: &DeviceEntry, step: Step, allowed: Steps) -> bool {
        // Strict means that what caches translations is detached, however far policy goes otherwise.
        let strict = self.policy.platform == Platform::Strict && device.nature.ats && step == Step::Detach;
        let spared = device.nature.tdi && step.ends_tdi() && !self.policy.end_tdi;
        device.steps.has(step) && (allowed.has(step) || strict) && !spared
    }

    /// Asks `step` of every device in `domain` that may be asked and is not under it or a stronger one.
    pub(super) fn fence(
        &mut self,
        domain: DomainId,
        step: Step,
        allowed: Steps,
        invalidation: InvalidationId,
        effects: &mut Effects,
    ) {
        let able: Vec<DeviceId> = self
            .devices
            .iter()
            .filter(|(_, d)| d.domain == domain && self.may(d, step, allowed))
            .map(|(id, _)| *id)
            .collect();
        for device in able {
            self.fence_one(device, step, invalidation, effects);
        }
    }

    /// Stops every device as surely as it can be, whatever the policy: their client is gone.
    pub(super) fn stop_all(&mut self, invalidation: InvalidationId, effects: &mut Effects) {
        const ORDER: [Step; 5] = [Step::Detach, Step::Reset, Step::Stop, Step::Master, Step::Drain];
        let Some(inv) = self.invalidations.get(&invalidation) else { return };
        let allowed = self.allowed(inv);
        let steps: Vec<(DeviceId, Step)> = self
            .devices
            .iter()
            .filter_map(|(id, d)| Some((*id, ORDER.into_iter().find(|step| self.may(d, *step, allowed))?)))
            .collect();
        for (device, step) in steps {
            self.fence_one(device, step, invalidation, effects);
        }
    }

    pub(super) fn fence_one(
        &mut self,
        device: DeviceId,
        step: Step,
        invalidation: InvalidationId,
        effects: &mut Effects,
    ) {
        let Some(entry) = self.devices.get_mut(&device) else { return };
        match entry.busy {
            // A reset under way does not detach.
            Some(Busy::Fence(other)) if other == step || (other > step && step != Step::Detach) => return,
            Some(_) => {
                let includes =
                    |this: Step, other: Step| this == other || (this > other && other != Step::Detach);
                if !entry.next.iter().any(|(other, _)| includes(*other, step)) {
                    entry.next.retain(|(other, _)| !includes(step, *other));
                    entry.next.push((step, invalidation));
                    entry.next.sort_unstable();
                }
                return;
            }
            None if entry.is_under(step) => return,
            None => entry.busy = Some(Busy::Fence(step)),
        }
        let (domain, ends_tdi) = (entry.domain, entry.nature.tdi && step.ends_tdi());
        let job = self.next_job(Job::Fence { device, domain, step, invalidation });
        if ends_tdi {
            effects.push(Effect::Notice(Notice::TdiEnded { device, step }));
        }
        effects.push(Effect::Fence { job, device, step });
    }

    /// Whether any device of the domain may take `step`.
    pub(super) fn can(&self, domain: DomainId, step: Step, allowed: Steps) -> bool {
        self.devices.values().any(|d| d.domain == domain && self.may(d, step, allowed))
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
            match errno {
                // What a drain stopped begins again only when it is told to; what it did not stop is drained again.
                _ if step == Step::Drain => entry.drained = Some(errno == 0),
                0 => {
                    entry.fenced = entry.fenced.max(Some(step));
                    entry.detached |= step == Step::Detach;
                }
                _ => entry.shaken = true,
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
        self.idle(device, (errno != 0).then_some(step), effects);
        self.copies_gone(domain, invalidation, effects);
        self.advance_all(effects);
    }

    pub(super) fn attached(&mut self, job: JobId, errno: i32, effects: &mut Effects) {
        let Some(Job::Attach { device }) = self.jobs.get(&job).copied() else { return };
        self.jobs.remove(&job);
        if let Some(entry) = self.devices.get_mut(&device) {
            entry.lost = errno != 0;
            // An attach that failed may have left the device anywhere between its fence and its domain, at work or not:
            // no fence from before it proves anything any more.
            entry.fenced = None;
            entry.detached = false;
            entry.drained = None;
            entry.shaken = errno != 0;
        }
        effects.push(Effect::Notice(Notice::DeviceAttached { device, errno }));
        self.idle(device, None, effects);
        self.advance_all(effects);
    }

    /// What was under way on a device is over: whoever needs a stronger fence has it now. `failed` is the fence that it was,
    /// where it has failed.
    fn idle(&mut self, device: DeviceId, failed: Option<Step>, effects: &mut Effects) {
        let Some(entry) = self.devices.get_mut(&device) else { return };
        entry.busy = None;
        let mut next = std::mem::take(&mut entry.next).into_iter();
        for (step, asker) in next.by_ref() {
            let Some(entry) = self.devices.get(&device) else { return };
            // Whoever asked may have given up meanwhile, and another need it as much.
            let needs = |id: &InvalidationId| {
                let Some(inv) = self.invalidations.get(id) else { return false };
                let may = self.may(entry, step, self.allowed(inv));
                *id == asker || (may && (inv.stopping || inv.rung >= step))
            };
            if let Some(invalidation) = self.clearing.find(needs) {
                self.fence_one(device, step, invalidation, effects);
                break;
            }
        }
        let Some(entry) = self.devices.get_mut(&device) else { return };
        entry.next.extend(next);
        let domain = entry.domain;
        let Some(entry) = self.devices.get(&device) else { return };
        // A pause that was asked for behind something stronger, which nobody needs any more, is still one. One that has
        // failed is not asked for again: nobody waits for it, and it might fail for ever.
        let waits = |id: &InvalidationId| {
            let asked = |inv: &&Invalidation| inv.pausing.contains(&device) && !inv.hurried;
            let inv = self.invalidations.get(id).filter(asked);
            inv.is_some_and(|inv| self.domain(domain).is_some_and(|domain| splits(domain, inv)))
        };
        if entry.busy.is_none()
            && !entry.is_paused()
            && let Some(step) = pause(entry).filter(|step| failed != Some(*step))
            && let Some(invalidation) = self.clearing.find(waits)
        {
            self.fence_one(device, step, invalidation, effects);
        }
    }

    /// Takes down what bears on the fences of a device, as it was read off the device.
    pub(super) fn device_nature(&mut self, device: DeviceId, ats: bool, tdi: bool, effects: &mut Effects) {
        let Some(entry) = self.devices.get_mut(&device) else { return };
        entry.nature = Nature { ats, tdi, ..entry.nature };
        let domain = entry.domain;
        if !ats && self.domain(domain).is_some_and(|domain| domain.mapped.unsettled() > 0) {
            // A number of its own for what it leaves in doubt.
            self.last_invalidation += 1;
            self.copies_gone(domain, InvalidationId(self.last_invalidation), effects);
        }
        self.advance_all(effects);
    }

    /// A replace that failed may have left devices of its domain detached: each is brought back as one that was told to
    /// pause, and has perhaps not done so.
    pub(super) fn perhaps_stranded(&mut self, domain: DomainId) {
        for device in self.devices.values_mut().filter(|device| device.domain == domain) {
            device.drained.get_or_insert(false);
        }
    }

    /// What an earlier gate did to a device is not known for certain: it is brought back as one that was stopped.
    pub(super) fn shake(&mut self, device: DeviceId) {
        if let Some(entry) = self.devices.get_mut(&device) {
            entry.shaken = true;
        }
    }

    /// Lost devices are worth another try.
    pub(super) fn hope(&mut self) {
        for device in self.devices.values_mut() {
            device.lost = false;
        }
    }

    /// Brings stopped devices back where nothing is in doubt any more.
    pub(super) fn bring_back(&mut self, effects: &mut Effects) {
        if !self.devices.values().any(DeviceEntry::is_stopped) {
            return;
        }
        let ready: Vec<DeviceId> = self
            .devices
            .iter()
            .filter(|(_, d)| {
                d.is_stopped() && !self.busy(d.domain) && self.is_calm(d.domain, d.is_only_drained())
            })
            .map(|(id, _)| *id)
            .collect();
        for device in ready {
            let job = self.next_job(Job::Attach { device });
            if let Some(entry) = self.devices.get_mut(&device) {
                entry.busy = Some(Busy::Attach);
            }
            effects.push(Effect::Attach { job, device });
        }
    }

    /// Whether nothing of a domain is in doubt, awaited, being mapped, or left of a client that is gone. A drain proves
    /// nothing, so what is in doubt and no longer waited for is no reason to keep it up (`drained`).
    fn is_calm(&self, domain: DomainId, drained: bool) -> bool {
        let Some(entry) = self.domain(domain) else { return false };
        // What is cheap to know first: this is asked after every event, and an invalidation may have thousands of targets.
        if entry.mapped.filling() > 0 || !(drained || entry.mapped.unsettled() == 0) {
            return false;
        }
        let only = self.domains.len() == 1;
        let awaited = self.clearing.iter().filter_map(|id| self.invalidations.get(&id)).any(|inv| {
            (only && inv.not_back() > 0) || inv.targets.iter().any(|target| !entry.mapped.is_clear(*target))
        });
        let left = self
            .regions
            .values()
            .any(|region| self.leaving.contains(&region.owner) && !entry.mapped.is_clear(region.iova()));
        !awaited && !left
    }
}
