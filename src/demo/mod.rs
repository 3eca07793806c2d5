//! `passgate demo`: the main job on this machine, without hardware.
//!
//! An *owner* (what a VMM is) converts random pages of real guest_memfd through a real control socket, while a
//! software *device* reads and writes random pages all the time through io_uring's registered buffers, which are
//! real long-term pins. Every page carries its number and generation; the device checks them on every read, and
//! the owner's view is checked after every write. Neither looks at passgate's ledger.
//!
//! `--pins` does it the old way (mapped once, never taken back) and shows what happens then.

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
use device::Engine;
use memory::Memory;
use owner::Owner;
use raw::RawLoop;
pub use report::{Counters, Summary};

/// Pages of the demo's guest memory: few enough that the device meets every one of them often.
const PAGES: u64 = 256;
/// How long passgate and the raw loop take turns.
const TURN: Duration = Duration::from_millis(50);

/// What the demo is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long to run, in seconds.
    pub seconds: u64,
    /// Whether to do it the old way.
    pub pins: bool,
}

/// Runs the demo; `progress` is called several times a second with the seconds gone and the counters.
pub fn run(options: Options, mut progress: impl FnMut(f64, &Counters)) -> Result<Summary> {
    let memory = Arc::new(Memory::new(PAGES)?);
    let counters = Arc::new(Counters::default());
    let domain = SoftDomain::open()?;
    let mut owner =
        if options.pins { Owner::pinning(&memory, &domain)? } else { Owner::asking(&memory, &domain)? };
    let mut raw = RawLoop::new()?;
    let engine = Engine::start(domain.device("soft:0")?, &memory, &counters)?;
    let (start, length) = (Instant::now(), Duration::from_secs(options.seconds));
    let mut shown = Duration::ZERO;
    let mut turns = report::Turns::default();
    while start.elapsed() < length && !engine.ended() {
        turns.passgate(owner.turn(TURN, &counters)?);
        if !options.pins {
            turns.raw(raw.turn(TURN)?);
        }
        let gone = start.elapsed();
        if gone - shown > Duration::from_millis(200) {
            shown = gone;
            progress(gone.as_secs_f64(), &counters);
        }
    }
    owner.settle(&counters)?;
    engine.stop()?;
    let seconds = start.elapsed().as_secs_f64();
    owner.close()?;
    Ok(Summary::new(options, &memory, seconds, &counters, turns))
}

/// `Relaxed` is enough for numbers that are only counted.
const COUNT: Ordering = Ordering::Relaxed;
