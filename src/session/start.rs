//! What a gate is told before anything else.

use std::sync::Arc;

use passgate_backends::{Device, Domain};

use super::call;
use crate::gate::{Able, DeviceId, DomainId, Event, Nature, Step, Steps};

/// What a gate is told first: its domain and its devices.
pub(super) fn start(domain: &dyn Domain, devices: &[Arc<dyn Device>], tolerant: &[String]) -> Vec<Event> {
    let (id, able) = (DomainId(0), domain.capabilities());
    let mut events = vec![Event::DomainAdded {
        domain: id,
        able: Able {
            max_mappings: able.max_mappings,
            max_piece: able.max_mapping_len,
            cut: able.cut,
            replace: able.replace,
        },
    }];
    for (index, device) in devices.iter().enumerate() {
        let able = Step::LADDER.into_iter().filter(|step| can(&**device, *step));
        let steps = able.fold(Steps::default(), |steps, step| steps.or(Steps::of(&[step])));
        let passgate_backends::Nature { ats, tdi } = device.nature();
        let nature = Nature { ats, tdi, tolerant: tolerant.iter().any(|name| name == device.name()) };
        let device = DeviceId(u16::try_from(index).unwrap_or(u16::MAX));
        events.push(Event::DeviceAdded { device, domain: id, steps, nature });
    }
    events
}

pub(super) fn can(device: &dyn Device, step: Step) -> bool {
    call::fence_step(step).is_none_or(|fence| device.stop_class().has(fence))
}
