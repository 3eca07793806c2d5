//! The numbers of a virtio disk that this daemon serves, and their OpenMetrics text (docs/guide/metrics.md).
//!
//! Only numbers, as they were at one look: whoever serves the disk counts, and hands in what it has counted so far.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::protocol::verbs;

/// What a guest may ask of a disk (virtio 1.2, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Blocks to memory.
    Read,
    /// Memory to blocks.
    Write,
    /// What was written is on the medium.
    Flush,
    /// Nobody needs what is in these blocks.
    Discard,
    /// Blocks read as zeroes.
    WriteZeroes,
    /// The drive's name, and what is no request.
    #[default]
    Other,
}

impl Kind {
    /// How many there are.
    pub const COUNT: usize = Self::WORDS.len();
    const WORDS: [&str; 6] = ["read", "write", "flush", "discard", "write_zeroes", "other"];
}

/// Statuses of a request, by their numbers (virtio 1.2, 5.2.6).
pub const STATUSES: [&str; 3] = ["ok", "ioerr", "unsupported"];

/// Why a request was refused because of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A page of it is not shared, or in no region.
    NotShared,
    /// It was held for too long.
    HeldTooLong,
}

impl Refusal {
    /// How many there are.
    pub const COUNT: usize = Self::WORDS.len();
    const WORDS: [&str; 2] = ["not-shared", "held-too-long"];
}

/// What was counted of a disk since its daemon's start, and how it is now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disk {
    /// Requests that were answered, by [`Kind`] and status.
    pub requests: [[u64; STATUSES.len()]; Kind::COUNT],
    /// Bytes that the drive has moved into guest memory.
    pub read: u64,
    /// Bytes that it has taken from there.
    pub written: u64,
    /// Requests that are at the drive now.
    pub in_flight: u64,
    /// Requests that are held now because a page of theirs is not open to the drive.
    pub held: u64,
    /// Requests that were held, for however short a time.
    pub holds: u64,
    /// Requests that were refused because of their memory, by [`Refusal`].
    pub refused: [u64; Refusal::COUNT],
    /// Commands that took too long and were aborted.
    pub aborts: u64,
    /// Resets of the controller that no fence has asked for.
    pub resets: u64,
    /// Whether the drive was given up.
    pub lost: bool,
    /// Whether there is a front-end.
    pub connected: bool,
    /// Front-ends that have come.
    pub front_ends: u64,
}

impl Disk {
    /// What `Status` says of it.
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

    /// What encodes to its text.
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
        for (kind, by_status) in Kind::WORDS.into_iter().zip(&self.requests) {
            for (status, count) in STATUSES.into_iter().zip(by_status) {
                let labels = [("kind", kind), ("status", status)];
                ConstCounter::new(*count).encode(requests.encode_family(&labels)?)?;
            }
        }
        let help = "Requests that were refused because of their memory, by cause.";
        let mut refused = encoder.encode_descriptor("requests_refused", help, None, Counter)?;
        for (cause, count) in Refusal::WORDS.into_iter().zip(self.refused) {
            ConstCounter::new(count).encode(refused.encode_family(&[("cause", cause)])?)?;
        }
        for (name, help, unit, count) in [
            ("read", "Bytes that the drive has moved into guest memory.", Some(Unit::Bytes), self.read),
            ("written", "Bytes that the drive has taken from guest memory.", Some(Unit::Bytes), self.written),
            ("holds", "Requests that were held because a page was not open.", None, self.holds),
            ("aborts", "Commands that took too long and were aborted.", None, self.aborts),
            ("resets", "Resets of the controller that no fence asked for.", None, self.resets),
            ("front_ends", "Front-ends that have come.", None, self.front_ends),
        ] {
            let encoder = encoder.encode_descriptor(name, help, unit.as_ref(), Counter)?;
            ConstCounter::new(count).encode(encoder)?;
        }
        for (name, help, value) in [
            ("requests_in_flight", "Requests that are at the drive.", self.in_flight),
            ("requests_held", "Requests that are held because a page is not open.", self.held),
            ("lost", "Whether the drive was given up.", self.lost.into()),
            ("front_end_connected", "Whether there is a front-end.", self.connected.into()),
        ] {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, Gauge)?)?;
        }
        Ok(())
    }
}
