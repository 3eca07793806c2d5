//! The demo's device: DMA on random pages, all the time, through the translation alone.
//!
//! It knows what a page must hold at least: the generation that it had when the operation was issued (or the
//! next, if it was away then). Older is stale.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use passgate_backends::device::soft::SoftDevice;
use passgate_bindings::{Iova, PAGE};

use super::COUNT;
use super::memory::{MARK, Memory, STAMP, STAMP_LEN};
use super::report::Counters;
use crate::error::{Error, Result};

/// The device at work, on its own thread.
pub(super) struct Engine {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Engine {
    /// Starts it.
    pub(super) fn start(
        device: Arc<SoftDevice>,
        memory: &Arc<Memory>,
        counters: &Arc<Counters>,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let work = Work { device, memory: Arc::clone(memory), counters: Arc::clone(counters) };
        let ended = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("device".into()).spawn(move || work.run(&ended));
        Ok(Self { stop, thread: thread.map_err(Error::Thread)? })
    }

    /// Whether it ended by itself: something is wrong, and [`Engine::stop`] says what.
    pub(super) fn ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Stops it.
    pub(super) fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or(Err(Error::Panicked("device")))
    }
}

struct Work {
    device: Arc<SoftDevice>,
    memory: Arc<Memory>,
    counters: Arc<Counters>,
}

impl Work {
    fn run(self, stop: &AtomicBool) -> Result<()> {
        let mut draw = random();
        while !stop.load(Ordering::Acquire) {
            let draw = draw();
            let page = (draw >> 8) % self.memory.pages();
            let before = self.memory.generation(page);
            let went = if draw & 1 == 0 { self.read(page, before)? } else { self.write(page, before)? };
            self.counters.dma_ops.fetch_add(1, COUNT);
            if before > 0 {
                self.counters.dma_hits_converted.fetch_add(1, COUNT);
            }
            match went {
                Went::Well => {}
                Went::Fault => _ = self.counters.dma_faulted.fetch_add(1, COUNT),
                Went::Stale => _ = self.counters.stale_dma.fetch_add(1, COUNT),
            }
        }
        Ok(())
    }

    fn read(&self, page: u64, before: u64) -> Result<Went> {
        let mut stamp = [0; STAMP_LEN];
        match self.device.read_into(Iova(page * PAGE + STAMP), &mut stamp) {
            Err(passgate_backends::Error::Fault { .. }) => return Ok(Went::Fault),
            result => result?,
        }
        let seen = Memory::read_stamp(page, &stamp);
        Ok(if seen.is_some_and(|generation| generation >= at_least(before)) {
            Went::Well
        } else {
            Went::Stale
        })
    }

    fn write(&self, page: u64, before: u64) -> Result<Went> {
        let mark = self.memory.next_mark();
        match self.device.write_from(Iova(page * PAGE + MARK), &mark.to_le_bytes()) {
            Err(passgate_backends::Error::Fault { .. }) => return Ok(Went::Fault),
            result => result?,
        }
        // Where the page is still the one that it had to be, the owner must see the mark in it.
        let after = self.memory.generation(page);
        if after != before && after != at_least(before) {
            return Ok(Went::Well);
        }
        let seen = self.memory.mark(page)?;
        if self.memory.generation(page) != after {
            return Ok(Went::Well);
        }
        Ok(if seen == mark { Went::Well } else { Went::Stale })
    }
}

/// How an operation went.
enum Went {
    Well,
    Fault,
    Stale,
}

/// The generation that a page must have at least for an operation issued at `before`.
fn at_least(before: u64) -> u64 {
    before.next_multiple_of(2)
}

/// Random enough to pick pages.
pub(super) fn random() -> impl FnMut() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}
