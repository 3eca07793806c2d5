//! What the door counts (docs/guide/metrics.md).
//!
//! Each worker has numbers of its own, which its thread alone writes: to count is a load and a store, without a locked
//! instruction or a cache line that somebody else writes. Whoever asks adds them up; each number is true, but not all of
//! them are of one moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use passgate_backends::nvme::{Drive, Health};

use crate::observe::disk::{Disk, Kind, Refusal, STATUSES};

/// What one worker counts, on cache lines of its own (two, because processors fetch them in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Counts {
    requests: [[AtomicU64; STATUSES.len()]; Kind::COUNT],
    read: AtomicU64,
    written: AtomicU64,
    holds: AtomicU64,
    refused: [AtomicU64; Refusal::COUNT],
    in_flight: AtomicU64,
    held: AtomicU64,
}

/// Only the worker's own thread calls this.
fn add(count: &AtomicU64, more: u64) {
    count.store(count.load(Relaxed).wrapping_add(more), Relaxed);
}

impl Counts {
    /// A request is answered with this status; where that is *ok* so many bytes have moved.
    pub(super) fn answered(&self, kind: Kind, status: u8, bytes: u64) {
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

    /// A request is held, for the first time.
    pub(super) fn holds(&self) {
        add(&self.holds, 1);
    }

    /// A request is refused because of its memory.
    pub(super) fn refused(&self, why: Refusal) {
        if let Some(count) = self.refused.get(why as usize) {
            add(count, 1);
        }
    }

    /// How many requests are at the drive, and how many are held.
    pub(super) fn now(&self, in_flight: u64, held: u64) {
        self.in_flight.store(in_flight, Relaxed);
        self.held.store(held, Relaxed);
    }

    pub(super) fn add_to(&self, disk: &mut Disk) {
        let sum = |to: &mut u64, count: &AtomicU64| *to = to.wrapping_add(count.load(Relaxed));
        let requests = disk.requests.iter_mut().flatten().zip(self.requests.iter().flatten());
        requests.for_each(|(to, count)| sum(to, count));
        disk.refused.iter_mut().zip(&self.refused).for_each(|(to, count)| sum(to, count));
        sum(&mut disk.read, &self.read);
        sum(&mut disk.written, &self.written);
        sum(&mut disk.holds, &self.holds);
        sum(&mut disk.in_flight, &self.in_flight);
        sum(&mut disk.held, &self.held);
    }
}

/// What a whole door counts.
#[derive(Debug)]
pub(in crate::serve) struct Counted {
    drive: Arc<Drive>,
    workers: Vec<Arc<Counts>>,
    connected: AtomicBool,
    front_ends: AtomicU64,
}

impl Counted {
    /// With these workers.
    pub(super) fn new(drive: Arc<Drive>, workers: Vec<Arc<Counts>>) -> Self {
        Self { drive, workers, connected: AtomicBool::new(false), front_ends: AtomicU64::new(0) }
    }

    /// A front-end is served, until what is returned is dropped.
    pub(super) fn front_end(&self) -> FrontEnd<'_> {
        self.front_ends.fetch_add(1, Relaxed);
        self.connected.store(true, Relaxed);
        FrontEnd(self)
    }

    /// Everything as it is now; waits for nobody.
    pub(in crate::serve) fn read(&self) -> Disk {
        let Health { aborts, resets, lost } = self.drive.health();
        let (connected, front_ends) = (self.connected.load(Relaxed), self.front_ends.load(Relaxed));
        let mut disk = Disk { aborts, resets, lost, connected, front_ends, ..Disk::default() };
        self.workers.iter().for_each(|counts| counts.add_to(&mut disk));
        disk
    }
}

/// A front-end that is served. There is one at a time.
#[derive(Debug)]
pub(super) struct FrontEnd<'a>(&'a Counted);

impl Drop for FrontEnd<'_> {
    fn drop(&mut self) {
        self.0.connected.store(false, Relaxed);
    }
}
