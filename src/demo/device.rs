//! The device of the demo: it does DMA on random pages without a break, and consults nothing but the translation.
//!
//! An operation must access a page in the generation that it had when the operation was issued (the next one, if the page was
//! punched then) or in a later one. An older generation is stale.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use passgate_backends::device::soft::SoftDevice;
use passgate_bindings::{Iova, PAGE};

use super::COUNT;
use super::memory::{MARK_OFFSET, Memory, STAMP_LEN, STAMP_OFFSET};
use super::report::Counters;
use crate::error::{Error, Result};

/// The thread on which the device does DMA.
pub(super) struct DmaThread {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl DmaThread {
    /// Starts the thread.
    pub(super) fn start(
        device: Arc<SoftDevice>,
        memory: &Arc<Memory>,
        counters: &Arc<Counters>,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let worker = DmaWorker { device, memory: Arc::clone(memory), counters: Arc::clone(counters) };
        let thread_stop = Arc::clone(&stop);
        let thread =
            std::thread::Builder::new().name("device".into()).spawn(move || worker.run(&thread_stop));
        Ok(Self { stop, thread: thread.map_err(Error::Thread)? })
    }

    /// Returns true if the thread has ended before it was stopped; [`DmaThread::stop`] returns the error.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Stops the thread, and returns its error.
    pub(super) fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or(Err(Error::Panicked("device")))
    }
}

struct DmaWorker {
    device: Arc<SoftDevice>,
    memory: Arc<Memory>,
    counters: Arc<Counters>,
}

impl DmaWorker {
    fn run(self, stop: &AtomicBool) -> Result<()> {
        let mut draw = random();
        while !stop.load(Ordering::Acquire) {
            let draw = draw();
            let page = (draw >> 8) % self.memory.pages();
            let before = self.memory.generation(page);
            let outcome = if draw & 1 == 0 { self.read(page, before)? } else { self.write(page, before)? };
            self.counters.dma_ops.fetch_add(1, COUNT);
            if before > 0 {
                self.counters.dma_hits_converted.fetch_add(1, COUNT);
            }
            match outcome {
                DmaOutcome::Current => {}
                DmaOutcome::Fault => _ = self.counters.dma_faulted.fetch_add(1, COUNT),
                DmaOutcome::Stale => _ = self.counters.stale_dma.fetch_add(1, COUNT),
            }
        }
        Ok(())
    }

    fn read(&self, page: u64, before: u64) -> Result<DmaOutcome> {
        let mut stamp = [0; STAMP_LEN];
        match self.device.read_into(Iova(page * PAGE + STAMP_OFFSET), &mut stamp) {
            Err(passgate_backends::Error::Fault { .. }) => return Ok(DmaOutcome::Fault),
            result => result?,
        }
        let seen = Memory::read_stamp(page, &stamp);
        Ok(if seen.is_some_and(|generation| generation >= min_generation(before)) {
            DmaOutcome::Current
        } else {
            DmaOutcome::Stale
        })
    }

    fn write(&self, page: u64, before: u64) -> Result<DmaOutcome> {
        let mark = self.memory.next_mark();
        match self.device.write_from(Iova(page * PAGE + MARK_OFFSET), &mark.to_le_bytes()) {
            Err(passgate_backends::Error::Fault { .. }) => return Ok(DmaOutcome::Fault),
            result => result?,
        }
        // If the page has not been converted meanwhile, the owner must see the mark in it.
        let after = self.memory.generation(page);
        if after != before && after != min_generation(before) {
            return Ok(DmaOutcome::Current);
        }
        let seen = self.memory.mark(page)?;
        // The page was converted while its mark was read, so the mark proves nothing.
        if self.memory.generation(page) != after {
            return Ok(DmaOutcome::Current);
        }
        Ok(if seen == mark { DmaOutcome::Current } else { DmaOutcome::Stale })
    }
}

/// The outcome of an operation.
enum DmaOutcome {
    /// It accessed the page in a valid generation.
    Current,
    /// The translation had no such page.
    Fault,
    /// It accessed an older page.
    Stale,
}

/// Returns the oldest generation that an operation issued at generation `before` may access.
fn min_generation(before: u64) -> u64 {
    before.next_multiple_of(2)
}

/// Returns a generator of pseudo-random numbers (xorshift64).
pub(super) fn random() -> impl FnMut() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}
