//! What `Status` answers.

use crate::gate::{DeviceStatus, QuarantineStatus, RegionStatus, Step};
use crate::protocol::verbs::{Device, Quarantined, Region, Status};
use crate::session::Session;

/// What is known now, with `clients` connections.
pub fn status(session: &Session, clients: u64) -> Status {
    let snapshot = session.snapshot();
    let (mappings, max_mappings) =
        snapshot.mappings.iter().fold((0, 0), |sum, (_, used, max)| (sum.0 + used, sum.1 + max));
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        iommu: session.domain().map_or("none", |domain| domain.name()).into(),
        mappings,
        max_mappings,
        open: snapshot.open,
        clients,
        regions: snapshot.regions.iter().map(region).collect(),
        devices: snapshot.devices.iter().map(|status| device(session, status)).collect(),
        quarantine: snapshot.quarantine.iter().map(quarantined).collect(),
        totals: session.totals(),
    }
}

fn region(status: &RegionStatus) -> Region {
    let [shared, private, hole, unknown] = status.bytes;
    Region {
        region: status.region.0,
        gpa: status.spec.gpa.start().0,
        length: status.spec.gpa.len(),
        piece: status.spec.piece,
        writable: status.spec.writable,
        shared,
        private,
        hole,
        unknown,
        closing: status.closing,
    }
}

fn device(session: &Session, status: &DeviceStatus) -> Device {
    let able = |step: &Step| session.can(status.device, *step);
    Device {
        device: session.device_name(status.device).into(),
        stop: Step::LADDER.iter().filter(|step| able(step)).map(|step| step.word().into()).collect(),
        fenced: status.fenced.map(|step| step.word().into()),
    }
}

fn quarantined(status: &QuarantineStatus) -> Quarantined {
    Quarantined {
        gpa: status.gpa.map(|gpa| gpa.0),
        offset: status.range.start().0,
        length: status.range.len(),
        cause: status.reason.cause.word().into(),
        invalidation: status.invalidation.0,
    }
}
