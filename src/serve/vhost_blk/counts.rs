//! Counters of the disk (docs/guide/metrics.md).
//!
//! Each worker has counters that its thread alone writes: counting is a load and a store, without a locked instruction or a
//! cache line that another thread writes. A reader adds them up. Each value is exact; together they are no atomic snapshot.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use passgate_backends::nvme::{Drive, Health};

use crate::observe::disk::{Disk, Kind, ReadDisk, Refusal, STATUSES};

/// The counters of one worker, on cache lines of its own (128 bytes, because processors fetch lines in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct WorkerCounters {
    requests: [[AtomicU64; STATUSES.len()]; Kind::COUNT],
    read: AtomicU64,
    written: AtomicU64,
    deferrals: AtomicU64,
    refused: [AtomicU64; Refusal::COUNT],
    in_flight: AtomicU64,
    deferred: AtomicU64,
}

/// Adds to a counter. Only the worker's own thread calls this, so load and store need not be one atomic operation.
fn add(count: &AtomicU64, more: u64) {
    count.store(count.load(Relaxed).wrapping_add(more), Relaxed);
}

impl WorkerCounters {
    /// Counts the answer to a request. `bytes` were transferred if the status is `VIRTIO_BLK_S_OK`.
    pub(super) fn count_answer(&self, kind: Kind, status: u8, bytes: u64) {
        let by_status = self.requests.get(kind as usize);
        if let Some(count) = by_status.and_then(|by_status| by_status.get(usize::from(status))) {
            add(count, 1);
        }
        match kind {
            Kind::Read if status == 0 => add(&self.read, bytes),
            Kind::Write if status == 0 => add(&self.written, bytes),
            _ => {}
        }
    }

    /// Counts a request that is deferred for the first time.
    pub(super) fn count_deferral(&self) {
        add(&self.deferrals, 1);
    }

    /// Counts a request that is refused because of its memory.
    pub(super) fn count_refusal(&self, why: Refusal) {
        if let Some(count) = self.refused.get(why as usize) {
            add(count, 1);
        }
    }

    /// Sets the number of requests that are in flight at the drive, and of those that are deferred.
    pub(super) fn set_gauges(&self, in_flight: u64, deferred: u64) {
        self.in_flight.store(in_flight, Relaxed);
        self.deferred.store(deferred, Relaxed);
    }

    /// Adds these counters to those of a disk.
    pub(super) fn add_to(&self, disk: &mut Disk) {
        let sum = |to: &mut u64, count: &AtomicU64| *to = to.wrapping_add(count.load(Relaxed));
        let requests = disk.requests.iter_mut().flatten().zip(self.requests.iter().flatten());
        requests.for_each(|(to, count)| sum(to, count));
        disk.refused.iter_mut().zip(&self.refused).for_each(|(to, count)| sum(to, count));
        sum(&mut disk.read, &self.read);
        sum(&mut disk.written, &self.written);
        sum(&mut disk.holds, &self.deferrals);
        sum(&mut disk.in_flight, &self.in_flight);
        sum(&mut disk.held, &self.deferred);
    }
}

/// The counters of the disk: those of all workers, of the drive and of front-ends.
#[derive(Debug)]
pub(super) struct DiskCounters {
    drive: Arc<Drive>,
    workers: Vec<Arc<WorkerCounters>>,
    connected: AtomicBool,
    front_ends: AtomicU64,
}

impl DiskCounters {
    /// Returns the counters of a disk with these workers.
    pub(super) fn new(drive: Arc<Drive>, workers: Vec<Arc<WorkerCounters>>) -> Self {
        Self { drive, workers, connected: AtomicBool::new(false), front_ends: AtomicU64::new(0) }
    }

    /// Counts a front-end. It is reported as connected until the returned value is dropped.
    pub(super) fn front_end(&self) -> ConnectedFrontEnd<'_> {
        self.front_ends.fetch_add(1, Relaxed);
        self.connected.store(true, Relaxed);
        ConnectedFrontEnd(self)
    }
}

impl ReadDisk for DiskCounters {
    fn read(&self) -> Disk {
        let Health { aborts, resets, lost } = self.drive.health();
        let (connected, front_ends) = (self.connected.load(Relaxed), self.front_ends.load(Relaxed));
        let mut disk = Disk { aborts, resets, lost, connected, front_ends, ..Disk::default() };
        self.workers.iter().for_each(|counts| counts.add_to(&mut disk));
        disk
    }
}

/// A front-end that is connected. There is one at a time.
#[derive(Debug)]
pub(super) struct ConnectedFrontEnd<'a>(&'a DiskCounters);

impl Drop for ConnectedFrontEnd<'_> {
    fn drop(&mut self) {
        self.0.connected.store(false, Relaxed);
    }
}
