//! The domain and the devices of one VM.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use passgate_backends::{Device, DeviceTraits, Domain};
use passgate_bindings::{Iova, PageRange};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::gate::{DeviceId, DomainId, Event};

/// The domains and devices, by the gate's numbers.
#[derive(Debug)]
pub(super) struct Hardware {
    domains: Vec<Arc<dyn Domain>>,
    devices: Vec<Arc<dyn Device>>,
    /// The IOVAs that the devices can use, ascending and apart; empty if they are not known.
    usable_iova: Vec<RangeInclusive<Iova>>,
    /// The indices of the devices that the host wants back, once that is reported.
    reported_wanted: HashSet<usize>,
}

impl Hardware {
    /// Returns one domain, to which the devices are attached.
    pub(super) fn new(domain: Arc<dyn Domain>, devices: Vec<Arc<dyn Device>>) -> Self {
        let usable_iova = domain.usable();
        Self { domains: vec![domain], devices, usable_iova, reported_wanted: HashSet::new() }
    }

    /// Returns the events that describe the domain and its devices to a new gate. Devices named in `tolerant` tolerate gaps in
    /// their DMA.
    pub(super) fn initial_events(&self, tolerant: &[String]) -> Vec<Event> {
        let id = DomainId(0);
        let domains = self.domains.iter().take(1);
        let mut events: Vec<_> =
            domains.map(|domain| Event::DomainAdded { domain: id, caps: domain.capabilities() }).collect();
        for (index, device) in self.devices.iter().enumerate() {
            let tolerant = tolerant.iter().any(|name| name == device.name());
            let (steps, traits) = (device.stop_class(), DeviceTraits { tolerant, ..device.traits() });
            events.push(Event::DeviceAdded { device: device_id(index), domain: id, steps, traits });
        }
        events
    }

    /// Returns the domains with their numbers.
    pub(super) fn domains(&self) -> impl Iterator<Item = (DomainId, &Arc<dyn Domain>)> {
        (0..).map(DomainId).zip(&self.domains)
    }

    pub(super) fn domain(&self, id: DomainId) -> Option<&Arc<dyn Domain>> {
        self.domains.get(usize::from(id.0))
    }

    /// Returns the devices, in the order of their numbers.
    pub(super) fn devices(&self) -> &[Arc<dyn Device>] {
        &self.devices
    }

    pub(super) fn device(&self, id: DeviceId) -> Option<&Arc<dyn Device>> {
        self.devices.get(usize::from(id.0))
    }

    /// Returns the IOVAs that the devices can use, ascending and apart; empty if they are not known.
    pub(super) fn usable_iova(&self) -> &[RangeInclusive<Iova>] {
        &self.usable_iova
    }

    /// Returns the IOVAs that drivers of this process use.
    pub(super) fn reserved(&self) -> Vec<PageRange<Iova>> {
        self.devices.iter().filter_map(|device| device.reserved()).collect()
    }

    /// Returns the descriptors that become readable when the host wants a device back (`VFIO_PCI_REQ_IRQ_INDEX`).
    pub(super) fn requests(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.devices.iter().filter_map(|device| device.wanted())
    }

    /// Returns the devices that the host wants back. Each is returned once.
    pub(super) fn newly_wanted(&mut self) -> Vec<DeviceId> {
        let is_requested = |device: &Arc<dyn Device>| {
            // Polled and not read: it must stay readable for whoever else polls it.
            let ready = |request| {
                poll(&mut [PollFd::from_borrowed_fd(request, PollFlags::IN)], Some(&Timespec::default()))
            };
            device.wanted().is_some_and(|request| ready(request).is_ok_and(|count| count > 0))
        };
        let requested = self.devices.iter().enumerate().filter(|(_, device)| is_requested(device));
        let new: Vec<_> = requested.map(|(index, _)| index).collect();
        new.into_iter().filter(|index| self.reported_wanted.insert(*index)).map(device_id).collect()
    }
}

fn device_id(index: usize) -> DeviceId {
    DeviceId(u16::try_from(index).unwrap_or(u16::MAX))
}
