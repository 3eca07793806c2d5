//! The counters of a virtio disk that this daemon serves, and their OpenMetrics text (docs/guide/metrics.md).
//!
//! These are copies of the counters at one time; the server of the disk counts.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::protocol::verbs;

/// The type of a request (virtio 1.2, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// `VIRTIO_BLK_T_IN`.
    Read,
    /// `VIRTIO_BLK_T_OUT`.
    Write,
    /// `VIRTIO_BLK_T_FLUSH`.
    Flush,
    /// `VIRTIO_BLK_T_DISCARD`.
    Discard,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`.
    WriteZeroes,
    /// `VIRTIO_BLK_T_GET_ID`, and every type that is not supported.
    #[default]
    Other,
}

impl Kind {
    /// The number of types.
    pub const COUNT: usize = Self::LABELS.len();
    const LABELS: [&str; 6] = ["read", "write", "flush", "discard", "write_zeroes", "other"];
}

/// The status of a request, by its number (virtio 1.2, 5.2.6).
pub const STATUSES: [&str; 3] = ["ok", "ioerr", "unsupported"];

/// The reason why a request was refused because of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A page of it is not shared, or in no region.
    NotShared,
    /// It was held until its time limit because a page was not admitted.
    HeldTooLong,
}

impl Refusal {
    /// The number of reasons.
    pub const COUNT: usize = Self::LABELS.len();
    const LABELS: [&str; 2] = ["not-shared", "held-too-long"];
}

/// The counters of a disk since its daemon's start, and its present state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disk {
    /// The number of requests that were answered, by [`Kind`] and status.
    pub requests: [[u64; STATUSES.len()]; Kind::COUNT],
    /// Bytes that the drive has moved into guest memory.
    pub read: u64,
    /// Bytes that the drive has taken from guest memory.
    pub written: u64,
    /// The number of requests in flight at the drive.
    pub in_flight: u64,
    /// The number of requests that are held because a page of theirs is not admitted to the drive.
    pub held: u64,
    /// The number of requests that were ever held, for however short a time.
    pub holds: u64,
    /// The number of requests that were refused because of their memory, by [`Refusal`].
    pub refused: [u64; Refusal::COUNT],
    /// The number of commands that took too long and were aborted.
    pub aborts: u64,
    /// The number of controller resets that no fence has asked for.
    pub resets: u64,
    /// True once the drive was given up.
    pub lost: bool,
    /// True while a front-end is connected.
    pub connected: bool,
    /// The number of front-ends that have connected.
    pub front_ends: u64,
}

/// The server of a disk, as its daemon asks it for the counters.
pub trait ReadDisk: Send + Sync + fmt::Debug {
    /// Returns the current values, without blocking.
    fn read(&self) -> Disk;
}

impl Disk {
    /// Returns the disk as `Status` reports it.
    pub fn status(&self) -> verbs::Disk {
        let all = |status: usize| self.requests.iter().filter_map(|kind| kind.get(status)).sum::<u64>();
        verbs::Disk {
            connected: self.connected,
            lost: self.lost,
            in_flight: self.in_flight,
            held: self.held,
            done: all(0),
            failed: all(1) + all(2),
            refused: self.refused.iter().sum(),
        }
    }

    /// Returns a registry that encodes to the OpenMetrics text.
    pub(super) fn registry(self) -> Registry {
        let mut registry = Registry::with_prefix("passgate_disk");
        registry.register_collector(Box::new(self));
        registry
    }
}

impl Collector for Disk {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        use MetricType::{Counter, Gauge};
        let mut requests =
            encoder.encode_descriptor("requests", "Requests that were answered.", None, Counter)?;
        for (kind, by_status) in Kind::LABELS.into_iter().zip(&self.requests) {
            for (status, count) in STATUSES.into_iter().zip(by_status) {
                let labels = [("kind", kind), ("status", status)];
                ConstCounter::new(*count).encode(requests.encode_family(&labels)?)?;
            }
        }
        let help = "Requests that were refused because of their memory, by cause.";
        let mut refused = encoder.encode_descriptor("requests_refused", help, None, Counter)?;
        for (cause, count) in Refusal::LABELS.into_iter().zip(self.refused) {
            ConstCounter::new(count).encode(refused.encode_family(&[("cause", cause)])?)?;
        }
        for (name, help, unit, count) in [
            ("read", "Bytes that the drive has moved into guest memory.", Some(Unit::Bytes), self.read),
            ("written", "Bytes that the drive has taken from guest memory.", Some(Unit::Bytes), self.written),
            ("holds", "Requests that were held because a page was not admitted.", None, self.holds),
            ("aborts", "Commands that took too long and were aborted.", None, self.aborts),
            ("resets", "Resets of the controller that no fence asked for.", None, self.resets),
            ("front_ends", "Front-ends that have connected.", None, self.front_ends),
        ] {
            let encoder = encoder.encode_descriptor(name, help, unit.as_ref(), Counter)?;
            ConstCounter::new(count).encode(encoder)?;
        }
        for (name, help, value) in [
            ("requests_in_flight", "Requests in flight at the drive.", self.in_flight),
            ("requests_held", "Requests that are held because a page is not admitted.", self.held),
            ("lost", "1 once the drive was given up.", self.lost.into()),
            ("front_end_connected", "1 while a front-end is connected.", self.connected.into()),
        ] {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, Gauge)?)?;
        }
        Ok(())
    }
}
