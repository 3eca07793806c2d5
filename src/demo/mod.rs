//! `passgate demo`: conversions under DMA on this machine, without passthrough hardware.
//!
//! An *owner*, which does what a VMM does, converts random pages of a guest_memfd through a control socket. Meanwhile a
//! software *device* reads and writes random pages without a break through registered buffers of io_uring, which are
//! long-term pins of the kernel. Every page contains its number and generation: the device checks them on every read, and
//! the owner's view is checked after every write. Neither consults passgate's ledger.
//!
//! `--pins` maps the memory once and never unmaps it, as is done without passgate, and shows the stale DMA.

mod device;
mod memory;
mod owner;
mod raw;
mod report;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use passgate_backends::iommu::soft::SoftDomain;

use crate::error::Result;
use device::DmaThread;
use memory::Memory;
use owner::Owner;
use raw::RawLoop;
pub use report::{Counters, Summary};

/// The number of pages of the guest memory: few enough that the device accesses each of them often.
const PAGES: u64 = 256;
/// The duration of one turn: passgate and the raw loop are measured in turns.
const TURN_DURATION: Duration = Duration::from_millis(50);

/// The options of the demo.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The duration in seconds.
    pub seconds: u64,
    /// True if the memory is mapped once and never unmapped.
    pub pins: bool,
}

/// Runs the demo. Calls `progress` several times a second, with the elapsed seconds and the counters.
pub fn run(options: Options, mut progress: impl FnMut(f64, &Counters)) -> Result<Summary> {
    let memory = Arc::new(Memory::new(PAGES)?);
    let counters = Arc::new(Counters::default());
    let domain = SoftDomain::open()?;
    let mut owner =
        if options.pins { Owner::pinned(&memory, &domain)? } else { Owner::revocable(&memory, &domain)? };
    let mut raw = RawLoop::new()?;
    let dma = DmaThread::start(domain.device("soft:0")?, &memory, &counters)?;
    let (start, duration) = (Instant::now(), Duration::from_secs(options.seconds));
    let mut reported = Duration::ZERO;
    let mut turns = report::Turns::default();
    while start.elapsed() < duration && !dma.has_ended() {
        turns.passgate(owner.turn(TURN_DURATION, &counters)?);
        if !options.pins {
            turns.raw(raw.turn(TURN_DURATION)?);
        }
        let elapsed = start.elapsed();
        if elapsed - reported > Duration::from_millis(200) {
            reported = elapsed;
            progress(elapsed.as_secs_f64(), &counters);
        }
    }
    owner.finish(&counters)?;
    dma.stop()?;
    let seconds = start.elapsed().as_secs_f64();
    owner.close()?;
    Ok(Summary::new(options, &memory, seconds, &counters, turns))
}

/// The ordering of all counters: they order no other access, so `Relaxed` is enough.
const COUNT: Ordering = Ordering::Relaxed;
