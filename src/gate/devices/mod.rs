//! The devices: whether their DMA runs, which call on each is in progress, and which fences are asked of it next.

use std::collections::BTreeMap;

use passgate_backends::{DeviceTraits, Step, Steps};

use super::ids::{DeviceId, DomainId, InvalidationId};

/// The known state of a device's DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dma {
    /// It runs.
    Running,
    /// Its driver was told to issue nothing more; `confirmed` if it has done so. It begins again only when it is attached.
    Drained { confirmed: bool },
    /// A fence or an attach failed and may have stopped it all the same. `drained` as in [`Dma::Drained`].
    Uncertain { drained: bool },
    /// It is stopped: by `strongest`, and out of its domain if it is `detached`. A reset is stronger than a detach and leaves
    /// the device in its domain.
    Fenced { strongest: Step, detached: bool },
}

impl Dma {
    /// Returns the state after a fence has returned.
    fn after(self, step: Step, succeeded: bool) -> Self {
        match (self, step, succeeded) {
            // A device that a drain did not stop is drained again.
            (Self::Running | Self::Drained { .. }, Step::Drain, _) => Self::Drained { confirmed: succeeded },
            (Self::Uncertain { .. }, Step::Drain, _) => Self::Uncertain { drained: succeeded },
            (Self::Fenced { .. }, Step::Drain, _) => self,
            (Self::Fenced { strongest, detached }, _, true) => {
                Self::Fenced { strongest: strongest.max(step), detached: detached || step == Step::Detach }
            }
            (_, _, true) => Self::Fenced { strongest: step, detached: step == Step::Detach },
            (_, _, false) => self.uncertain(),
        }
    }

    /// Returns the state once a call may have changed it or not.
    fn uncertain(self) -> Self {
        match self {
            Self::Running => Self::Uncertain { drained: false },
            Self::Drained { confirmed } => Self::Uncertain { drained: confirmed },
            Self::Uncertain { .. } | Self::Fenced { .. } => self,
        }
    }
}

/// A call in progress on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeviceCall {
    Fence(Step),
    Attach,
}

/// One device.
#[derive(Debug)]
pub(super) struct Device {
    domain: DomainId,
    steps: Steps,
    traits: DeviceTraits,
    dma: Dma,
    call: Option<DeviceCall>,
    /// The fences that are needed after that, weakest first: the strongest, and a detach, which a reset does not include.
    requested: Vec<(Step, InvalidationId)>,
    /// Set while its attach has failed: tried again when memory is added, and at the end of every conversion.
    lost: bool,
}

impl Device {
    pub(super) fn domain(&self) -> DomainId {
        self.domain
    }

    pub(super) fn traits(&self) -> DeviceTraits {
        self.traits
    }

    pub(super) fn has(&self, step: Step) -> bool {
        self.steps.has(step)
    }

    /// Returns the strongest fence that it is under.
    pub(super) fn fence(&self) -> Option<Step> {
        match self.dma {
            Dma::Fenced { strongest, .. } => Some(strongest),
            _ => None,
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }

    pub(super) fn is_busy(&self) -> bool {
        self.call.is_some()
    }

    /// True if it is under `step` or under what includes it.
    fn is_under(&self, step: Step) -> bool {
        match step {
            Step::Detach => self.is_detached(),
            _ => self.fence() >= Some(step),
        }
    }

    fn is_detached(&self) -> bool {
        matches!(self.dma, Dma::Fenced { detached: true, .. })
    }

    /// True if it is out of its domain, and not being attached.
    pub(super) fn is_out(&self) -> bool {
        self.is_detached() && self.call != Some(DeviceCall::Attach)
    }

    /// True if it issues nothing, and is not being attached.
    pub(super) fn is_paused(&self) -> bool {
        let issues_nothing = matches!(
            self.dma,
            Dma::Fenced { .. } | Dma::Drained { confirmed: true } | Dma::Uncertain { drained: true }
        );
        issues_nothing && self.call != Some(DeviceCall::Attach)
    }

    /// True while a fence is in progress or requested: any of them pauses it.
    pub(super) fn is_stopping(&self) -> bool {
        matches!(self.call, Some(DeviceCall::Fence(_))) || !self.requested.is_empty()
    }

    /// True if it runs, and no call on it is in progress or requested.
    pub(super) fn runs(&self) -> bool {
        self.dma == Dma::Running && !self.lost && self.call.is_none()
    }

    /// True if it has to be attached again.
    pub(super) fn is_stopped(&self) -> bool {
        self.dma != Dma::Running && !self.lost
    }

    /// True if it was told to issue nothing for a while, and nothing stronger.
    pub(super) fn is_only_drained(&self) -> bool {
        matches!(self.dma, Dma::Running | Dma::Drained { .. })
    }

    /// Returns the step by which it is paused, where it can be.
    pub(super) fn pause_step(&self) -> Option<Step> {
        [Step::Drain, Step::Stop].into_iter().find(|step| self.has(*step))
    }

    /// True if a gap in its DMA does no harm: it tolerates faults, or can be paused.
    pub(super) fn tolerates_gap(&self) -> bool {
        self.traits.tolerant || self.pause_step().is_some()
    }
}

/// True if a fence of `this` step makes one of `other` needless.
fn includes(this: Step, other: Step) -> bool {
    this == other || (this > other && other != Step::Detach)
}

/// All devices of the VM.
#[derive(Debug, Default)]
pub(super) struct Devices(BTreeMap<DeviceId, Device>);

impl Devices {
    /// Adds a device that runs, unless it is known already.
    pub(super) fn add(&mut self, id: DeviceId, domain: DomainId, steps: Steps, traits: DeviceTraits) {
        let (dma, call, requested, lost) = (Dma::Running, None, Vec::new(), false);
        self.0.entry(id).or_insert(Device { domain, steps, traits, dma, call, requested, lost });
    }

    pub(super) fn get(&self, id: DeviceId) -> Option<&Device> {
        self.0.get(&id)
    }

    /// Returns all devices, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (DeviceId, &Device)> {
        self.0.iter().map(|(id, device)| (*id, device))
    }

    /// Returns the devices of a domain, in order.
    pub(super) fn of(&self, domain: DomainId) -> impl Iterator<Item = (DeviceId, &Device)> {
        self.iter().filter(move |(_, device)| device.domain == domain)
    }

    /// Returns the first device of a domain, to name in a reason.
    pub(super) fn first_of(&self, domain: DomainId) -> Option<DeviceId> {
        self.of(domain).next().map(|(id, _)| id)
    }

    /// True while a device of the domain is being fenced or attached.
    pub(super) fn is_busy(&self, domain: DomainId) -> bool {
        self.of(domain).any(|(_, device)| device.is_busy())
    }

    /// Requests `step` of a device. Returns the device if the call has to be made now: nothing else is in progress on it, and it is
    /// under no fence that includes the step.
    pub(super) fn request(
        &mut self,
        id: DeviceId,
        step: Step,
        invalidation: InvalidationId,
    ) -> Option<&Device> {
        let device = self.0.get_mut(&id)?;
        match device.call {
            Some(DeviceCall::Fence(other)) if includes(other, step) => None,
            Some(_) => {
                if !device.requested.iter().any(|(other, _)| includes(*other, step)) {
                    device.requested.retain(|(other, _)| !includes(step, *other));
                    device.requested.push((step, invalidation));
                    device.requested.sort_unstable();
                }
                None
            }
            None if device.is_under(step) => None,
            None => {
                device.call = Some(DeviceCall::Fence(step));
                Some(device)
            }
        }
    }

    /// A fence has returned. Returns false if no such fence was in progress: then the device may be anywhere.
    #[must_use]
    pub(super) fn fence_ended(&mut self, id: DeviceId, step: Step, succeeded: bool) -> bool {
        let Some(device) = self.0.get_mut(&id) else { return false };
        if device.call != Some(DeviceCall::Fence(step)) {
            device.dma = device.dma.uncertain();
            return false;
        }
        device.dma = device.dma.after(step, succeeded);
        device.call = None;
        true
    }

    /// The device is being attached.
    pub(super) fn attach_started(&mut self, id: DeviceId) {
        if let Some(device) = self.0.get_mut(&id) {
            device.call = Some(DeviceCall::Attach);
        }
    }

    /// An attach has returned. One that failed may have left the device anywhere between its fence and its domain, at work
    /// or not: no fence from before it proves anything any more.
    /// Returns false if no attach was in progress.
    #[must_use]
    pub(super) fn attach_ended(&mut self, id: DeviceId, succeeded: bool) -> bool {
        let Some(device) = self.0.get_mut(&id) else { return false };
        if device.call != Some(DeviceCall::Attach) {
            device.dma = device.dma.uncertain();
            return false;
        }
        device.dma = match succeeded {
            true => Dma::Running,
            false => Dma::Uncertain { drained: false },
        };
        device.lost = !succeeded;
        device.call = None;
        true
    }

    /// Removes and returns the fences that are requested of a device, weakest first.
    pub(super) fn take_requested(&mut self, id: DeviceId) -> Vec<(Step, InvalidationId)> {
        self.0.get_mut(&id).map(|device| std::mem::take(&mut device.requested)).unwrap_or_default()
    }

    /// Requests that were taken and are still needed are made again.
    pub(super) fn put_back(&mut self, id: DeviceId, requested: impl Iterator<Item = (Step, InvalidationId)>) {
        if let Some(device) = self.0.get_mut(&id) {
            device.requested.extend(requested);
        }
    }

    /// Sets what was read of a device's ATS and TDI.
    pub(super) fn set_traits(&mut self, id: DeviceId, ats: bool, tdi: bool) -> Option<&Device> {
        let device = self.0.get_mut(&id)?;
        device.traits = DeviceTraits { ats, tdi, ..device.traits };
        Some(device)
    }

    /// A replace that failed may have left devices of its domain detached: each is attached again as one that was told to
    /// pause, and has perhaps not done so.
    pub(super) fn perhaps_detached(&mut self, domain: DomainId) {
        for device in self.0.values_mut().filter(|device| device.domain == domain) {
            if device.dma == Dma::Running {
                device.dma = Dma::Drained { confirmed: false };
            }
        }
    }

    /// A call of an earlier gate on a device may or may not have been made: it is attached again as one that was stopped.
    pub(super) fn make_uncertain(&mut self, id: DeviceId) {
        if let Some(device) = self.0.get_mut(&id) {
            device.dma = device.dma.uncertain();
        }
    }

    /// Attaches that failed are worth another try.
    pub(super) fn retry_lost(&mut self) {
        self.0.values_mut().for_each(|device| device.lost = false);
    }
}
