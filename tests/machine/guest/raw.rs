//! Direct I/O to a part of the disk, with a model of every block.
//!
//! Each thread has its own blocks, so the model is exact: a read must find the version of the last write that the disk has
//! acknowledged.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::Failure;
use super::buffer::Buffer;
use super::pattern::{BLOCK, Random, check, fill, sum};
use super::soak::Progress;

/// The largest number of blocks of one request.
const MAX_REQUEST_BLOCKS: u64 = 64;
/// The version of a block with undefined content: never written, or discarded.
const UNKNOWN_VERSION: u64 = u64::MAX;

/// One thread's blocks.
#[derive(Debug)]
pub struct Blocks<'a> {
    pub disk: &'a File,
    pub seed: u64,
    /// The first block, counted from the start of the disk.
    pub first: u64,
    /// The version of each block.
    pub versions: Vec<u64>,
    random: Random,
    version: u64,
    progress: &'a Progress,
}

impl<'a> Blocks<'a> {
    pub fn new(disk: &'a File, seed: u64, first: u64, count: u64, progress: &'a Progress) -> Self {
        let versions = vec![UNKNOWN_VERSION; count as usize];
        Self { disk, seed, first, versions, random: Random::new(seed ^ first), version: 0, progress }
    }

    /// Works until it is to stop, then writes every block with undefined content. Returns the number of requests.
    pub fn work(&mut self) -> Result<u64, Failure> {
        let (count, mut done) = (self.versions.len() as u64, 0);
        self.write_unknown()?;
        while !self.progress.stop.load(Ordering::Relaxed) {
            let at = self.random.below(count);
            let bits = self.random.below(7);
            let len = (1 + self.random.below(1 << bits)).min(MAX_REQUEST_BLOCKS).min(count - at);
            match self.random.below(100) {
                0..45 => self.write(at, len)?,
                45..90 => self.read(at, len)?,
                90..94 => self.clear(at, len, FallocateFlags::ZERO_RANGE, 0)?,
                94..96 => {
                    let discard = FallocateFlags::PUNCH_HOLE | FallocateFlags::NO_HIDE_STALE;
                    self.clear(at, len, discard, UNKNOWN_VERSION)?;
                }
                _ => self.progress.timed(|| self.disk.sync_data()).map_err(|e| format!("flush: {e}"))?,
            }
            done += 1;
            self.progress.raw.fetch_add(1, Ordering::Relaxed);
        }
        self.write_unknown()?;
        self.progress.timed(|| self.disk.sync_data()).map_err(|e| format!("flush: {e}"))?;
        Ok(done)
    }

    /// Writes every block with undefined content.
    fn write_unknown(&mut self) -> Result<(), Failure> {
        let mut at = 0;
        while let Some(unknown) = self.versions[at..].iter().position(|&version| version == UNKNOWN_VERSION) {
            at += unknown;
            let len = self.versions[at..]
                .iter()
                .take(MAX_REQUEST_BLOCKS as usize)
                .take_while(|&&v| v == UNKNOWN_VERSION)
                .count();
            self.write(at as u64, len as u64)?;
        }
        Ok(())
    }

    fn write(&mut self, at: u64, len: u64) -> Result<(), Failure> {
        self.version += 1;
        let mut buffer = Buffer::at_random_sector(len as usize * BLOCK, &mut self.random);
        for (block, number) in buffer.get().chunks_mut(BLOCK).zip(self.first + at..) {
            fill(block, self.seed, number, self.version);
        }
        let offset = (self.first + at) * BLOCK as u64;
        let written = self.progress.timed(|| self.disk.write_all_at(buffer.get(), offset));
        written.map_err(|e| format!("writing {len} blocks at {}: {e}", self.first + at))?;
        self.versions[at as usize..(at + len) as usize].fill(self.version);
        Ok(())
    }

    /// Reads, and compares with the model.
    fn read(&mut self, at: u64, len: u64) -> Result<(), Failure> {
        let mut buffer = Buffer::at_random_sector(len as usize * BLOCK, &mut self.random);
        let offset = (self.first + at) * BLOCK as u64;
        let read = self.progress.timed(|| self.disk.read_exact_at(buffer.get(), offset));
        read.map_err(|e| format!("reading {len} blocks at {}: {e}", self.first + at))?;
        let known = &self.versions[at as usize..(at + len) as usize];
        for ((block, number), &version) in buffer.get().chunks(BLOCK).zip(self.first + at..).zip(known) {
            if version != UNKNOWN_VERSION {
                check(block, self.seed, number, version)?;
            }
        }
        Ok(())
    }

    /// Zeroes or discards blocks; does nothing if the disk does not support it.
    fn clear(&mut self, at: u64, len: u64, mode: FallocateFlags, version: u64) -> Result<(), Failure> {
        let (offset, bytes) = ((self.first + at) * BLOCK as u64, len * BLOCK as u64);
        match self.progress.timed(|| fallocate(self.disk, mode | FallocateFlags::KEEP_SIZE, offset, bytes)) {
            Ok(()) => self.versions[at as usize..(at + len) as usize].fill(version),
            Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(format!("{mode:?} of {len} blocks at {}: {e}", self.first + at)),
        }
        Ok(())
    }

    /// Reads every block; returns the checksum over all of them, continued from `total`.
    pub fn verify(&mut self, mut total: u64) -> Result<u64, Failure> {
        let count = self.versions.len() as u64;
        for at in (0..count).step_by(MAX_REQUEST_BLOCKS as usize) {
            let len = MAX_REQUEST_BLOCKS.min(count - at);
            self.read(at, len)?;
            let mut block = [0; BLOCK];
            for index in at..at + len {
                fill(&mut block, self.seed, self.first + index, self.versions[index as usize]);
                total = sum(total, &block);
            }
            self.progress.verified.fetch_add(len, Ordering::Relaxed);
            self.progress.report_at_times();
        }
        Ok(total)
    }
}
