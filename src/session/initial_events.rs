//! The first events of a gate: its domain and its devices.

use std::sync::Arc;

use passgate_backends::{Device, Domain};

use crate::gate::{DeviceId, DeviceTraits, DomainId, Event};

/// Returns the events that describe the domain and its devices to a new gate. Devices named in `tolerant` tolerate gaps in their
/// DMA.
pub(super) fn initial_events(
    domain: &dyn Domain,
    devices: &[Arc<dyn Device>],
    tolerant: &[String],
) -> Vec<Event> {
    let id = DomainId(0);
    let mut events = vec![Event::DomainAdded { domain: id, caps: domain.capabilities() }];
    for (index, device) in devices.iter().enumerate() {
        let tolerant = tolerant.iter().any(|name| name == device.name());
        let (steps, traits) = (device.stop_class(), DeviceTraits { tolerant, ..device.traits() });
        let device = DeviceId(u16::try_from(index).unwrap_or(u16::MAX));
        events.push(Event::DeviceAdded { device, domain: id, steps, traits });
    }
    events
}
