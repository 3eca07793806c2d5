//! Stopping devices, and attaching them again.
//!
//! A fence is asked of every device of a domain that may take it, at once, and it is shared: whoever needs the same
//! or a weaker one meanwhile waits for this one, whoever needs a stronger one has it next. A stopped device is attached
//! again when nothing in its domain is in doubt any more.
//!
//! **ATS** on a strict platform ([`Platform::Strict`]). The kernel waits for the invalidation of a device's translation cache,
//! and when that times out it says nothing: the unmap succeeds. So an unmap proves something in a domain only while every
//! device in it with ATS is detached, which empties the cache (the kernel turns ATS off) and leaves the device nothing
//! to fill it from. A reset empties it too, but leaves the device attached, to fill it again.
//!
//! **Pauses** ([`Hitless::Prefer`]). Devices are paused while a mapping is split, so that their DMA beside it waits instead
//! of failing. What was paused is attached again with everything else that was stopped, once the rest of the mapping is
//! there again.

use passgate_backends::{Step, Steps};
use passgate_bindings::{Iova, PageRange};

use super::Gate;
use super::calls::Call;
use super::devices::Device;
use super::effect::{Effect, Effects, Notice};
use super::ids::{DeviceId, DomainId, InvalidationId, JobId};
use super::invalidations::{Invalidation, Purpose};
use super::mappings::Domain;
use super::policy::{Hitless, Platform};
use super::receipt::Evidence;
use super::rung::Rung;

/// The steps by which the devices of a client that is gone are stopped: the first that a device has.
const STOP_ORDER: [Step; 5] = [Step::Detach, Step::Reset, Step::Stop, Step::Master, Step::Drain];

impl Gate {
    /// True if gaps are allowed in a domain: by policy, and by what its devices tolerate or can do.
    pub(super) fn gaps_allowed(&self, domain: DomainId) -> bool {
        match self.policy.hitless {
            Hitless::Require => false,
            Hitless::Prefer => self.devices.of(domain).all(|(_, device)| device.tolerates_gap()),
            Hitless::Off => true,
        }
    }

    /// Returns the fences that an invalidation may ask for.
    pub(super) fn allowed_fences(&self, inv: &Invalidation) -> Steps {
        self.clients.allowed_fences(inv, self.policy.on_stuck_dma)
    }

    /// True if the device has `step`, and may be asked for it where a policy allows `allowed`.
    fn may_fence(&self, device: &Device, step: Step, allowed: Steps) -> bool {
        // Strict means that a device with ATS is detached, however far policy goes otherwise.
        let strict = self.policy.platform == Platform::Strict && device.traits().ats && step == Step::Detach;
        let spared = device.traits().tdi && step.ends_tdi() && !self.policy.end_tdi;
        device.has(step) && (allowed.has(step) || strict) && !spared
    }

    /// True if any device of the domain may take `step`.
    pub(super) fn can_fence(&self, domain: DomainId, step: Step, allowed: Steps) -> bool {
        self.devices.of(domain).any(|(_, device)| self.may_fence(device, step, allowed))
    }

    /// Asks `step` of every device in `domain` that may take it and is not under it or a stronger one.
    pub(super) fn fence_domain(
        &mut self,
        domain: DomainId,
        step: Step,
        allowed: Steps,
        invalidation: InvalidationId,
        effects: &mut Effects,
    ) {
        let able = self.devices.of(domain).filter(|(_, device)| self.may_fence(device, step, allowed));
        for device in able.map(|(id, _)| id).collect::<Vec<_>>() {
            self.fence(device, step, invalidation, effects);
        }
    }

    /// Stops every device as surely as it can be: their client is gone.
    pub(super) fn stop_all(&mut self, invalidation: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.get(invalidation) else { return };
        let allowed = self.allowed_fences(inv);
        let first =
            |device: &Device| STOP_ORDER.into_iter().find(|step| self.may_fence(device, *step, allowed));
        let steps: Vec<_> =
            self.devices.iter().filter_map(|(id, device)| Some((id, first(device)?))).collect();
        for (device, step) in steps {
            self.fence(device, step, invalidation, effects);
        }
    }

    /// Asks `step` of one device; later, where a call on it is in progress.
    fn fence(&mut self, device: DeviceId, step: Step, invalidation: InvalidationId, effects: &mut Effects) {
        let Some(entry) = self.devices.request(device, step, invalidation) else { return };
        let (domain, ends_tdi) = (entry.domain(), entry.traits().tdi && step.ends_tdi());
        let job = self.calls.start(Call::Fence { device, domain, step, invalidation });
        if ends_tdi {
            effects.push(Effect::Notice(Notice::TdiEnded { device, step }));
        }
        effects.push(Effect::Fence { job, device, step });
    }

    /// A fence has returned.
    pub(super) fn fenced(&mut self, job: JobId, errno: i32, took_ns: u64, effects: &mut Effects) {
        let Some(&Call::Fence { device, domain, step, invalidation }) = self.calls.get(job) else { return };
        self.calls.end(job);
        if !self.devices.fence_ended(device, step, errno == 0) {
            self.inconsistent_device("a fence returned that was not in progress", effects);
            return;
        }
        effects.push(Effect::Notice(Notice::DeviceFenced { device, step, errno }));
        let evidence = Evidence {
            step: Rung::Fence(step),
            domain,
            device: Some(device),
            iova: None,
            asked: 0,
            gone: 0,
            in_flight: false,
            errno,
            took_ns,
        };
        self.invalidations.record(invalidation, evidence);
        self.device_idle(device, (errno != 0).then_some(step), effects);
        self.cached_gone(domain, invalidation, effects);
        self.advance_all(effects);
    }

    /// An attach has returned.
    pub(super) fn attached(&mut self, job: JobId, errno: i32, effects: &mut Effects) {
        let Some(&Call::Attach { device }) = self.calls.get(job) else { return };
        self.calls.end(job);
        if !self.devices.attach_ended(device, errno == 0) {
            self.inconsistent_device("an attach returned that was not in progress", effects);
            return;
        }
        effects.push(Effect::Notice(Notice::DeviceAttached { device, errno }));
        self.device_idle(device, None, effects);
        self.advance_all(effects);
    }

    /// The call on a device is over: whoever needs a stronger fence has it now. `failed` is the fence that it was, where it
    /// has failed.
    fn device_idle(&mut self, device: DeviceId, failed: Option<Step>, effects: &mut Effects) {
        let mut requested = self.devices.take_requested(device).into_iter();
        for (step, asker) in requested.by_ref() {
            if let Some(invalidation) = self.first_in_need(device, step, asker) {
                self.fence(device, step, invalidation, effects);
                break;
            }
        }
        self.devices.put_back(device, requested);
        self.pause_again(device, failed, effects);
    }

    /// Returns the first invalidation that needs `step` of a device. Whoever asked may have given up meanwhile, and another need
    /// it as much.
    fn first_in_need(&self, device: DeviceId, step: Step, asker: InvalidationId) -> Option<InvalidationId> {
        let device = self.devices.get(device)?;
        let needs = |id: InvalidationId, inv: &Invalidation| {
            let climbed = |inv: &Invalidation| {
                inv.progress().is_some_and(|progress| progress.stopping || progress.rung >= Rung::Fence(step))
            };
            id == asker || (self.may_fence(device, step, self.allowed_fences(inv)) && climbed(inv))
        };
        self.invalidations.waiting_ones().find(|(id, inv)| needs(*id, inv)).map(|(id, _)| id)
    }

    /// A pause that was requested behind something stronger, which nobody needs any more, is still needed. One that has failed
    /// is not asked for again: nobody waits for it, and it might fail for ever.
    fn pause_again(&mut self, id: DeviceId, failed: Option<Step>, effects: &mut Effects) {
        let Some(device) = self.devices.get(id).filter(|device| !device.is_busy() && !device.is_paused())
        else {
            return;
        };
        let Some(step) = device.pause_step().filter(|step| failed != Some(*step)) else { return };
        let Some(domain) = self.mappings.get(device.domain()) else { return };
        let waits = |inv: &Invalidation| {
            let asked = |progress: &super::invalidations::Progress| {
                progress.pausing.contains(&id) && !progress.hurried
            };
            inv.progress().is_some_and(asked) && splits(domain, inv)
        };
        let waiting = self.invalidations.waiting_ones().find(|(_, inv)| waits(inv)).map(|(id, _)| id);
        if let Some(invalidation) = waiting {
            self.fence(id, step, invalidation, effects);
        }
    }

    /// The ATS and TDI state of a device was read again.
    pub(super) fn device_traits(&mut self, device: DeviceId, ats: bool, tdi: bool, effects: &mut Effects) {
        let Some(entry) = self.devices.set_traits(device, ats, tdi) else { return };
        let domain = entry.domain();
        if !ats && self.mappings.get(domain).is_some_and(|domain| domain.mapped().unsettled() > 0) {
            // A number of its own for what it leaves in doubt.
            let id = self.invalidations.number();
            self.cached_gone(domain, id, effects);
        }
        self.advance_all(effects);
    }

    /// Attaches stopped devices again where nothing is in doubt any more.
    pub(super) fn attach_stopped(&mut self, effects: &mut Effects) {
        if !self.devices.iter().any(|(_, device)| device.is_stopped()) {
            return;
        }
        let ready = self.devices.iter().filter(|(_, device)| {
            let domain = device.domain();
            device.is_stopped()
                && !self.devices.is_busy(domain)
                && self.is_settled(domain, device.is_only_drained())
        });
        for device in ready.map(|(id, _)| id).collect::<Vec<_>>() {
            let job = self.calls.start(Call::Attach { device });
            self.devices.attach_started(device);
            effects.push(Effect::Attach { job, device });
        }
    }

    /// True if nothing of a domain is in doubt, awaited, being mapped, or left of a client that is gone. A drain proves
    /// nothing, so what is in doubt and no longer waited for is no reason to keep it up (`drained`), nor is a close that needs no
    /// fence: it may take minutes.
    fn is_settled(&self, domain: DomainId, drained: bool) -> bool {
        let Some(mapped) = self.mappings.get(domain).map(Domain::mapped) else { return false };
        // The cheap questions first: this is asked after every event, and an invalidation may have thousands of targets.
        if mapped.filling() > 0 || !(drained || mapped.unsettled() == 0) {
            return false;
        }
        let only = self.mappings.iter().count() == 1;
        let awaited = self.invalidations.waiting_ones().any(|(_, inv)| {
            let calls = inv.progress().map_or(0, |progress| progress.calls());
            let needs_no_fence = drained && inv.is_close_without_fence();
            !needs_no_fence
                && ((only && calls > 0) || inv.targets().iter().any(|target| !mapped.is_clear(*target)))
        });
        let left = self
            .memory
            .regions()
            .any(|(_, region)| self.clients.is_leaving(region.owner()) && !mapped.is_clear(region.iova()));
        !awaited && !left
    }
}

/// ATS on a strict platform.
impl Gate {
    /// Returns a device of the domain that may still use a translation that was taken away.
    pub(super) fn ats_active(&self, domain: DomainId) -> Option<DeviceId> {
        if self.policy.platform == Platform::Contained {
            return None;
        }
        let active = |device: &Device| device.traits().ats && !device.is_out();
        self.devices.of(domain).find(|(_, device)| active(device)).map(|(id, _)| id)
    }

    /// True if a device may keep a translation of what is mapped over `targets`.
    pub(super) fn is_ats_active_over(&self, targets: &[PageRange<Iova>]) -> bool {
        let active = |domain: DomainId| self.ats_active(domain).is_some();
        self.policy.platform == Platform::Strict && self.mappings.concerned(targets).into_iter().any(active)
    }

    /// Before anything is unmapped: detaches the devices that would keep translations of it.
    pub(super) fn detach_ats(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.get(id) else { return };
        if self.policy.platform == Platform::Contained {
            return;
        }
        let (concerned, is_conversion) = (self.mappings.concerned(inv.targets()), inv.is_conversion());
        // One that can never be detached: no reason to stop the others, the answer is no.
        let hopeless = |device: &Device| {
            concerned.contains(&device.domain())
                && device.traits().ats
                && !device.is_out()
                && !device.has(Step::Detach)
        };
        if is_conversion && self.devices.iter().any(|(_, device)| hopeless(device)) {
            return;
        }
        let mut stopping = false;
        for domain in concerned {
            if self.ats_active(domain).is_some() {
                self.fence_domain(domain, Step::Detach, Steps::empty(), id, effects);
                stopping |= self.devices.is_busy(domain);
            }
        }
        if let Some(progress) = self.invalidations.progress_mut(id) {
            progress.stopping |= stopping;
        }
    }

    /// True while devices that must be stopped before anything is unmapped are not stopped yet.
    pub(super) fn waits_for_fences(&self, inv: &Invalidation) -> bool {
        if !inv.progress().is_some_and(|progress| progress.stopping) {
            return false;
        }
        if inv.is_conversion() {
            // For the detach of devices that keep translations of its range, and for nothing else.
            let active = |domain: DomainId| self.devices.is_busy(domain) && self.ats_active(domain).is_some();
            return self.mappings.concerned(inv.targets()).into_iter().any(active);
        }
        self.mappings.iter().any(|domain| self.devices.is_busy(domain.id()))
    }
}

/// Pauses while mappings are split.
impl Gate {
    /// Before mappings are split: pauses the devices that would lose DMA. Returns true while one of them runs. A pause that
    /// fails, or takes longer than its part of the deadline, is not waited for: no loss is preferred, not required.
    pub(super) fn waits_for_pauses(&mut self, id: InvalidationId, effects: &mut Effects) -> bool {
        let Some(inv) = self.invalidations.get(id) else { return false };
        let Some(progress) = inv.progress() else { return false };
        if self.policy.hitless != Hitless::Prefer || progress.hurried {
            return false;
        }
        let concerned =
            |device: &Device| self.mappings.get(device.domain()).is_some_and(|domain| splits(domain, inv));
        let runs = |device: &Device| !device.traits().tolerant && !device.is_paused() && concerned(device);
        // Each is asked once.
        let (asked, fresh): (Vec<_>, Vec<_>) = self
            .devices
            .iter()
            .filter(|(_, device)| runs(device))
            .partition(|(device, _)| progress.pausing.contains(device));
        let mut waits = asked.iter().any(|(_, device)| device.is_stopping());
        let fresh: Vec<_> =
            fresh.into_iter().filter_map(|(id, device)| Some((id, device.pause_step()?))).collect();
        for (device, step) in fresh {
            self.fence(device, step, id, effects);
            if let Some(progress) = self.invalidations.progress_mut(id) {
                progress.pausing.push(device);
            }
            waits = true;
        }
        waits
    }
}

/// True if the invalidation takes away more than its own pages in a domain, or maps again what it takes away.
fn splits(domain: &Domain, inv: &Invalidation) -> bool {
    let is_merge = matches!(inv.purpose(), Purpose::Merge(_));
    if !inv.sweeps(domain.id()) || (domain.caps().cut && !is_merge) {
        return false;
    }
    inv.targets()
        .iter()
        .filter_map(|target| domain.mapped().extent(*target))
        .any(|extent| is_merge || domain.mapped().whole(extent) != extent)
}
