//! The first events of a gate: its domain and its devices.

use std::sync::Arc;

use passgate_backends::{Device, Domain};

use super::call;
use crate::gate::{Able, DeviceId, DomainId, Event, Nature, Step, Steps};

/// Returns the events that describe the domain and its devices to a new gate. Devices named in `tolerant` tolerate gaps in their
/// DMA.
pub(super) fn initial_events(
    domain: &dyn Domain,
    devices: &[Arc<dyn Device>],
    tolerant: &[String],
) -> Vec<Event> {
    let (id, capabilities) = (DomainId(0), domain.capabilities());
    let mut events = vec![Event::DomainAdded {
        domain: id,
        able: Able {
            max_mappings: capabilities.max_mappings,
            max_piece: capabilities.max_mapping_len,
            cut: capabilities.cut,
            replace: capabilities.replace,
        },
    }];
    for (index, device) in devices.iter().enumerate() {
        let steps = Step::LADDER.into_iter().filter(|step| can_step(&**device, *step));
        let steps = steps.fold(Steps::default(), |steps, step| steps.or(Steps::of(&[step])));
        let passgate_backends::Nature { ats, tdi } = device.nature();
        let nature = Nature { ats, tdi, tolerant: tolerant.iter().any(|name| name == device.name()) };
        let device = DeviceId(u16::try_from(index).unwrap_or(u16::MAX));
        events.push(Event::DeviceAdded { device, domain: id, steps, nature });
    }
    events
}

/// Returns true if the device has the fence of this rung, or the rung is no fence.
pub(super) fn can_step(device: &dyn Device, step: Step) -> bool {
    call::fence_step(step).is_none_or(|fence| device.stop_class().has(fence))
}
