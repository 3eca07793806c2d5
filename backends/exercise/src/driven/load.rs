//! Continuous DMA by any [`Driven`](super::Driven) device: a thread that requests one transfer after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use passgate_backends::device::load::{Counts, Load};
use passgate_backends::{Error, Result};
use passgate_bindings::{Iova, PAGE};
use rustix::io::Errno;

use super::{Engine, Shared};
use crate::edu::POISON;

/// The time between polls of a fenced device that is not attached yet.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Starts a load over `pages`. Each page is written and read back; reading back [`POISON`] counts as a fault.
pub(super) fn start<E: Engine>(device: Arc<Shared<E>>, pages: &[Iova]) -> Result<Box<dyn Load>> {
    if pages.is_empty() {
        return Err(Error::Host { what: "a load over no page".to_owned(), remedy: "name one" });
    }
    let (counters, pages) = (Arc::new(Counters::default()), pages.to_vec());
    let thread = {
        let counters = Arc::clone(&counters);
        thread::Builder::new().name("dma-load".to_owned()).spawn(move || run(&device, &pages, &counters))
    };
    let thread = thread.map_err(|error| Error::Host {
        what: format!("no thread for a load: {error}"),
        remedy: "allow this process more threads (ulimit -u)",
    })?;
    Ok(Box::new(Running { counters, thread: Some(thread) }))
}

/// The counters of a load, and the request to stop it.
#[derive(Debug, Default)]
struct Counters {
    done: AtomicU64,
    faults: AtomicU64,
    wrong: AtomicU64,
    stop: AtomicBool,
}

/// A load and its thread, until the thread has been joined.
#[derive(Debug)]
struct Running {
    counters: Arc<Counters>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Running {
    /// Stops and joins the thread. Each transfer has its own time-out, so the thread ends.
    fn end(&mut self) -> Result<()> {
        self.counters.stop.store(true, Ordering::Release);
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(ended)) => ended,
            Some(Err(_)) => {
                Err(Error::Host { what: "a load's thread has panicked".to_owned(), remedy: "report this" })
            }
        }
    }
}

impl Load for Running {
    fn counts(&self) -> Counts {
        let count = |of: &AtomicU64| of.load(Ordering::Acquire);
        Counts {
            done: count(&self.counters.done),
            faults: count(&self.counters.faults),
            wrong: count(&self.counters.wrong),
        }
    }

    fn stop(mut self: Box<Self>) -> Result<Counts> {
        self.end()?;
        Ok(self.counts())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::warn!("a load ended: {error}");
        }
    }
}

/// Writes each page and reads it back, in a loop, until it is stopped or a transfer fails for another reason than a
/// fault or a fence.
fn run<E: Engine>(device: &Shared<E>, pages: &[Iova], counters: &Counters) -> Result<()> {
    let add = |to: &AtomicU64| {
        to.fetch_add(1, Ordering::AcqRel);
    };
    let (mut sent, mut seen) = (vec![0; PAGE as usize], vec![0; PAGE as usize]);
    for (round, page) in (0_u64..).zip(pages.iter().cycle()) {
        if counters.stop.load(Ordering::Acquire) {
            break;
        }
        pattern(&mut sent, round);
        let written = device.write(*page, &sent);
        if written.is_ok() {
            add(&counters.done);
        }
        match written.and_then(|()| device.read(*page, &mut seen)) {
            Ok(()) if seen == sent => add(&counters.done),
            Ok(()) if seen.iter().all(|byte| *byte == POISON) => add(&counters.faults),
            Ok(()) => add(&counters.wrong),
            Err(Error::Fault { .. }) => add(&counters.faults),
            // After a drain the transfer itself has waited for the attach; after any other fence the load waits here.
            Err(error) if error.errno() == Some(Errno::SHUTDOWN) => thread::sleep(POLL_INTERVAL),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Fills `bytes` with a pattern for this round: no byte is [`POISON`] or above 120, and adjacent rounds differ.
fn pattern(bytes: &mut [u8], round: u64) {
    for (n, byte) in (0_u64..).zip(bytes) {
        *byte = 1 + ((n * 31 + n / 256 + round * 17) % 120) as u8; // below 121
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Instant;

    use passgate_backends::{Device, DeviceTraits, Step, Steps};
    use passgate_sim::iommu::{Memory, Sim};

    use super::*;
    use crate::driven::Driven;

    /// An engine with a few pages of memory.
    #[derive(Debug)]
    struct MemoryEngine {
        pages: BTreeMap<u64, Vec<u8>>,
        /// True if reads return other bytes than were written.
        corrupts: bool,
    }

    impl MemoryEngine {
        fn page(&mut self, iova: Iova) -> Result<&mut Vec<u8>> {
            let fault = Error::Fault { device: String::new(), iova };
            self.pages.get_mut(&iova.0).ok_or(fault)
        }
    }

    impl Engine for MemoryEngine {
        const CHUNK: usize = PAGE as usize;
        fn reset(&mut self) -> Result<()> {
            Ok(())
        }
        fn start(&mut self) -> Result<()> {
            Ok(())
        }
        fn stop(&mut self) -> Result<()> {
            Ok(())
        }
        fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
            bytes.copy_from_slice(&self.page(iova)?[..bytes.len()]);
            bytes[0] ^= u8::from(self.corrupts);
            Ok(())
        }
        fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
            self.page(iova)?[..bytes.len()].copy_from_slice(bytes);
            Ok(())
        }
    }

    fn device(corrupts: bool) -> Driven<MemoryEngine> {
        let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let pages = [0, 2 * PAGE].map(|at| (at, vec![0; PAGE as usize])).into();
        Driven::new(
            Arc::new(sim.device("plain", Steps::DETACH, DeviceTraits::default())),
            MemoryEngine { pages, corrupts },
        )
        .unwrap()
    }

    fn until(load: &dyn Load, enough: impl Fn(Counts) -> bool) {
        let begun = Instant::now();
        while !enough(load.counts()) {
            assert!(begun.elapsed() < Duration::from_secs(20), "never: {:?}", load.counts());
            thread::yield_now();
        }
    }

    #[test]
    fn load_counts_its_transfers_and_stops() {
        let driven = device(false);
        assert!(driven.start(&[]).is_err());
        let load = driven.start(&[Iova(0), Iova(2 * PAGE)]).unwrap();
        until(&*load, |counts| counts.done > 10);
        let counts = load.stop().unwrap();
        assert_eq!((counts.faults, counts.wrong), (0, 0));

        let load = driven.start(&[Iova(0), Iova(PAGE)]).unwrap();
        until(&*load, |counts| counts.done > 10 && counts.faults > 3);
        assert_eq!(load.stop().unwrap().wrong, 0);

        let load = device(true).start(&[Iova(0)]).unwrap();
        until(&*load, |counts| counts.wrong > 3);
        assert_eq!(load.stop().unwrap().faults, 0);
    }

    #[test]
    fn fence_stops_a_load_and_attach_resumes_it() {
        for step in [Step::Drain, Step::Detach] {
            let device = device(false);
            let load = device.start(&[Iova(0)]).unwrap();
            for _ in 0..20 {
                let before = load.counts().done;
                until(&*load, |counts| counts.done > before + 3);
                device.fence(step).unwrap();
                device.attach().unwrap();
            }
            let counts = load.stop().unwrap();
            assert_eq!((counts.faults, counts.wrong), (0, 0), "after {step:?}");
        }
    }
}
