//! The answers to `Status` and `Adopt`.

use super::Session;
use crate::gate::{
    DeviceStatus, Hitless, OnStuckDma, Platform, Policy, QuarantineStatus, RegionStatus, Rung, Unended,
};
use crate::observe::metrics;
use crate::protocol::verbs::{self, Device, Quarantined, Region, Status};

/// The maximum number of quarantined ranges in a status. The rest is only in the sum of bytes.
const MAX_QUARANTINED: usize = 1024;

impl Session {
    /// Returns the state as `Status` reports it. The server adds the connections, events, refusals and the disk.
    pub fn status(&self, policy: &Policy) -> Status {
        let snapshot = self.snapshot();
        let (mappings, max_mappings) = metrics::mappings(&snapshot);
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            iommu: self.domain().map_or("none", |domain| domain.name()).into(),
            mappings,
            max_mappings,
            forecast: metrics::forecast(&snapshot),
            pinned: snapshot.pinned,
            quarantined: metrics::quarantined(&snapshot),
            open: snapshot.open,
            clients: 0,
            instance: String::new(),
            sequence: 0,
            on_stuck_dma: on_stuck_dma(policy.on_stuck_dma).into(),
            platform: platform(policy.platform).into(),
            hitless: hitless(policy.hitless).into(),
            reserved: snapshot.mappings.iter().map(|one| one.reserved).sum(),
            regions: snapshot.regions.iter().map(region).collect(),
            disk: None,
            devices: snapshot.devices.iter().map(|status| self.device_status(status)).collect(),
            quarantine: snapshot
                .quarantine
                .iter()
                .take(MAX_QUARANTINED)
                .map(|status| self.quarantined(status))
                .collect(),
            refused: Vec::new(),
            totals: self.statistics.totals(),
        }
    }

    fn device_status(&self, status: &DeviceStatus) -> Device {
        let rungs = Rung::LADDER.into_iter().filter(|rung| self.can(status.device, *rung));
        Device {
            device: self.device_name(status.device).into(),
            stop: rungs.map(|rung| rung.word().into()).collect(),
            ats: status.traits.ats,
            tdi: status.traits.tdi,
            fenced: status.fenced.map(|step| step.word().into()),
            lost: status.lost,
        }
    }

    fn quarantined(&self, status: &QuarantineStatus) -> Quarantined {
        Quarantined {
            gpa: self.gpa_of(status).map(|gpa| gpa.0),
            offset: status.range.start().0,
            length: status.range.len(),
            cause: status.reason.cause.word().into(),
            invalidation: status.invalidation.0,
        }
    }
}

fn on_stuck_dma(policy: OnStuckDma) -> &'static str {
    match policy {
        OnStuckDma::Refuse => "refuse",
        OnStuckDma::Fence => "fence",
        OnStuckDma::Reset => "reset",
    }
}

fn platform(platform: Platform) -> &'static str {
    match platform {
        Platform::Contained => "contained",
        Platform::Strict => "strict",
    }
}

fn hitless(policy: Hitless) -> &'static str {
    match policy {
        Hitless::Require => "require",
        Hitless::Prefer => "prefer",
        Hitless::Off => "off",
    }
}

/// The maximum number of conversions without an end in one answer to `Adopt`. The rest is only counted.
const MAX_UNENDED: usize = 4096;

/// Returns the answer to `Adopt`: the regions, and the conversions in them that were open when the earlier daemon ended.
pub fn adopted(regions: &[RegionStatus], unended: &[Unended]) -> verbs::Adopted {
    let region = |status: &RegionStatus| {
        let [shared, private, hole, unknown] = status.bytes;
        verbs::AdoptedRegion {
            region: status.region.0,
            gpa: status.spec.gpa.start().0,
            length: status.spec.gpa.len(),
            device: status.spec.backing.file.device,
            inode: status.spec.backing.file.inode,
            offset: status.spec.backing.offset.0,
            piece: status.pieces.first().copied().unwrap_or(status.spec.piece),
            writable: status.spec.writable,
            shared,
            private,
            hole,
            unknown,
        }
    };
    let one = |one: &Unended| verbs::Unended {
        invalidation: one.invalidation.0,
        gpa: one.range.start().0,
        length: one.range.len(),
    };
    verbs::Adopted {
        regions: regions.iter().map(region).collect(),
        unended: unended.iter().take(MAX_UNENDED).map(one).collect(),
        more_unended: unended.len().saturating_sub(MAX_UNENDED) as u64,
    }
}

fn region(status: &RegionStatus) -> Region {
    let [shared, private, hole, unknown] = status.bytes;
    Region {
        region: status.region.0,
        gpa: status.spec.gpa.start().0,
        length: status.spec.gpa.len(),
        piece: status.pieces.first().copied().unwrap_or(status.spec.piece),
        writable: status.spec.writable,
        shared,
        private,
        hole,
        unknown,
        closing: status.closing,
    }
}
