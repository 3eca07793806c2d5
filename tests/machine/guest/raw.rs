//! Direct I/O over a part of the disk that a model knows block by block.
//!
//! Each thread owns its blocks, so that what a read must find is never in doubt: the version that the last write which the
//! disk acknowledged gave them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::Wrong;
use super::buffer::Buffer;
use super::pattern::{BLOCK, Numbers, check, fill, sum};
use super::soak::Watch;

/// Blocks in the longest request.
const LONGEST: u64 = 64;
/// The version of a block whose content nobody promises: it was discarded.
const ANY: u64 = u64::MAX;

/// One thread's blocks.
#[derive(Debug)]
pub struct Blocks<'a> {
    pub disk: &'a File,
    pub seed: u64,
    /// The first block, counted from the start of the disk.
    pub first: u64,
    /// What each is known to be.
    pub versions: Vec<u64>,
    numbers: Numbers,
    version: u64,
    watch: &'a Watch,
}

impl<'a> Blocks<'a> {
    pub fn new(disk: &'a File, seed: u64, first: u64, count: u64, watch: &'a Watch) -> Self {
        let versions = vec![ANY; count as usize];
        Self { disk, seed, first, versions, numbers: Numbers::new(seed ^ first), version: 0, watch }
    }

    /// Works until told to stop, then leaves every block written; how much was done.
    pub fn work(&mut self) -> Result<u64, Wrong> {
        let (count, mut done) = (self.versions.len() as u64, 0);
        self.settle()?;
        while !self.watch.stop.load(Ordering::Relaxed) {
            let at = self.numbers.below(count);
            let bits = self.numbers.below(7);
            let len = (1 + self.numbers.below(1 << bits)).min(LONGEST).min(count - at);
            match self.numbers.below(100) {
                0..45 => self.write(at, len)?,
                45..90 => self.read(at, len)?,
                90..94 => self.clear(at, len, FallocateFlags::ZERO_RANGE, 0)?,
                94..96 => {
                    let discard = FallocateFlags::PUNCH_HOLE | FallocateFlags::NO_HIDE_STALE;
                    self.clear(at, len, discard, ANY)?;
                }
                _ => self.watch.timed(|| self.disk.sync_data()).map_err(|e| format!("flush: {e}"))?,
            }
            done += 1;
            self.watch.raw.fetch_add(1, Ordering::Relaxed);
        }
        self.settle()?;
        self.watch.timed(|| self.disk.sync_data()).map_err(|e| format!("flush: {e}"))?;
        Ok(done)
    }

    /// Writes what nobody knows.
    fn settle(&mut self) -> Result<(), Wrong> {
        let mut at = 0;
        while let Some(unknown) = self.versions[at..].iter().position(|&version| version == ANY) {
            at += unknown;
            let len = self.versions[at..].iter().take(LONGEST as usize).take_while(|&&v| v == ANY).count();
            self.write(at as u64, len as u64)?;
        }
        Ok(())
    }

    fn write(&mut self, at: u64, len: u64) -> Result<(), Wrong> {
        self.version += 1;
        let mut buffer = Buffer::anywhere(len as usize * BLOCK, &mut self.numbers);
        for (block, number) in buffer.get().chunks_mut(BLOCK).zip(self.first + at..) {
            fill(block, self.seed, number, self.version);
        }
        let offset = (self.first + at) * BLOCK as u64;
        let written = self.watch.timed(|| self.disk.write_all_at(buffer.get(), offset));
        written.map_err(|e| format!("writing {len} blocks at {}: {e}", self.first + at))?;
        self.versions[at as usize..(at + len) as usize].fill(self.version);
        Ok(())
    }

    /// Reads, and holds what comes to the model.
    fn read(&mut self, at: u64, len: u64) -> Result<(), Wrong> {
        let mut buffer = Buffer::anywhere(len as usize * BLOCK, &mut self.numbers);
        let offset = (self.first + at) * BLOCK as u64;
        let read = self.watch.timed(|| self.disk.read_exact_at(buffer.get(), offset));
        read.map_err(|e| format!("reading {len} blocks at {}: {e}", self.first + at))?;
        let known = &self.versions[at as usize..(at + len) as usize];
        for ((block, number), &version) in buffer.get().chunks(BLOCK).zip(self.first + at..).zip(known) {
            if version != ANY {
                check(block, self.seed, number, version)?;
            }
        }
        Ok(())
    }

    /// Zeroes or discards; a disk that cannot is left as it is.
    fn clear(&mut self, at: u64, len: u64, how: FallocateFlags, version: u64) -> Result<(), Wrong> {
        let (offset, bytes) = ((self.first + at) * BLOCK as u64, len * BLOCK as u64);
        match self.watch.timed(|| fallocate(self.disk, how | FallocateFlags::KEEP_SIZE, offset, bytes)) {
            Ok(()) => self.versions[at as usize..(at + len) as usize].fill(version),
            Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(format!("{how:?} of {len} blocks at {}: {e}", self.first + at)),
        }
        Ok(())
    }

    /// Reads every block again, and the sum of them all, going on from `total`.
    pub fn verify(&mut self, mut total: u64) -> Result<u64, Wrong> {
        let count = self.versions.len() as u64;
        for at in (0..count).step_by(LONGEST as usize) {
            let len = LONGEST.min(count - at);
            self.read(at, len)?;
            let mut block = [0; BLOCK];
            for index in at..at + len {
                fill(&mut block, self.seed, self.first + index, self.versions[index as usize]);
                total = sum(total, &block);
            }
            self.watch.verified.fetch_add(len, Ordering::Relaxed);
            self.watch.report_at_times();
        }
        Ok(total)
    }
}
