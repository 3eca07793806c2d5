//! DMA without a break by any [`Driven`] device: a thread that asks for one transfer after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use passgate_bindings::{Iova, PAGE};
use rustix::io::Errno;

use super::driven::{Engine, Shared};
use super::edu::POISON;
use super::load::{Counts, Load};
use crate::{Error, Result};

/// How often it looks whether a fenced device is attached again.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Starts a load over `pages`. A page is written and read back; [`POISON`] read back is counted as a fault.
pub(super) fn start<E: Engine>(device: Arc<Shared<E>>, pages: &[Iova]) -> Result<Box<dyn Load>> {
    if pages.is_empty() {
        return Err(Error::Host { what: "a load over no page".to_owned(), mend: "name one" });
    }
    let (tally, pages) = (Arc::new(Tally::default()), pages.to_vec());
    let thread = {
        let tally = Arc::clone(&tally);
        thread::Builder::new().name("dma-load".to_owned()).spawn(move || run(&device, &pages, &tally))
    };
    let thread = thread.map_err(|error| Error::Host {
        what: format!("no thread for a load: {error}"),
        mend: "allow this process more threads (ulimit -u)",
    })?;
    Ok(Box::new(Running { tally, thread: Some(thread) }))
}

#[derive(Debug, Default)]
struct Tally {
    done: AtomicU64,
    faults: AtomicU64,
    wrong: AtomicU64,
    stop: AtomicBool,
}

/// A load and its thread, until that has been joined.
#[derive(Debug)]
struct Running {
    tally: Arc<Tally>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Running {
    /// Each transfer has its own deadline, so the thread ends.
    fn end(&mut self) -> Result<()> {
        self.tally.stop.store(true, Ordering::Release);
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(ended)) => ended,
            Some(Err(_)) => {
                Err(Error::Host { what: "a load's thread has panicked".to_owned(), mend: "report this" })
            }
        }
    }
}

impl Load for Running {
    fn counts(&self) -> Counts {
        let count = |of: &AtomicU64| of.load(Ordering::Acquire);
        Counts {
            done: count(&self.tally.done),
            faults: count(&self.tally.faults),
            wrong: count(&self.tally.wrong),
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

/// Writes each page and reads it back, round and round, until told to stop or until the device fails of anything
/// but a fault or a fence.
fn run<E: Engine>(device: &Shared<E>, pages: &[Iova], tally: &Tally) -> Result<()> {
    let add = |to: &AtomicU64| {
        to.fetch_add(1, Ordering::AcqRel);
    };
    let (mut sent, mut seen) = (vec![0; PAGE as usize], vec![0; PAGE as usize]);
    for (round, page) in (0_u64..).zip(pages.iter().cycle()) {
        if tally.stop.load(Ordering::Acquire) {
            break;
        }
        pattern(&mut sent, round);
        let written = device.write(*page, &sent);
        if written.is_ok() {
            add(&tally.done);
        }
        match written.and_then(|()| device.read(*page, &mut seen)) {
            Ok(()) if seen == sent => add(&tally.done),
            Ok(()) if seen.iter().all(|byte| *byte == POISON) => add(&tally.faults),
            Ok(()) => add(&tally.wrong),
            Err(Error::Fault { .. }) => add(&tally.faults),
            // Behind a drain it has waited already; behind another fence it waits here.
            Err(error) if error.errno() == Some(Errno::SHUTDOWN) => thread::sleep(LOOK_EVERY),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Fills `bytes` for this round: nowhere [`POISON`], nowhere 0x80 or above, and unlike the rounds beside it.
fn pattern(bytes: &mut [u8], round: u64) {
    for (n, byte) in (0_u64..).zip(bytes) {
        *byte = 1 + ((n * 31 + n / 256 + round * 17) % 120) as u8; // below 121
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Instant;

    use super::*;
    use crate::device::driven::Driven;
    use crate::device::{Device, FenceStep, StopClass};
    use crate::iommu::sim::{Memory, Sim};

    /// An engine that has a few pages of memory and, told so, returns other bytes than it was given.
    #[derive(Debug)]
    struct Plain {
        pages: BTreeMap<u64, Vec<u8>>,
        lies: bool,
    }

    impl Plain {
        fn page(&mut self, iova: Iova) -> Result<&mut Vec<u8>> {
            let fault = Error::Fault { device: String::new(), iova };
            self.pages.get_mut(&iova.0).ok_or(fault)
        }
    }

    impl Engine for Plain {
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
            bytes[0] ^= u8::from(self.lies);
            Ok(())
        }
        fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
            self.page(iova)?[..bytes.len()].copy_from_slice(bytes);
            Ok(())
        }
    }

    fn plain(lies: bool) -> Driven<Plain> {
        let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let pages = [0, 2 * PAGE].map(|at| (at, vec![0; PAGE as usize])).into();
        Driven::new(
            Arc::new(sim.device("plain", StopClass::DETACH, crate::Nature::default())),
            Plain { pages, lies },
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
    fn a_load_counts_what_it_does_and_ends_when_told() {
        let device = plain(false);
        assert!(device.start(&[]).is_err());
        let load = device.start(&[Iova(0), Iova(2 * PAGE)]).unwrap();
        until(&*load, |counts| counts.done > 10);
        let counts = load.stop().unwrap();
        assert_eq!((counts.faults, counts.wrong), (0, 0));

        let load = device.start(&[Iova(0), Iova(PAGE)]).unwrap();
        until(&*load, |counts| counts.done > 10 && counts.faults > 3);
        assert_eq!(load.stop().unwrap().wrong, 0);

        let load = plain(true).start(&[Iova(0)]).unwrap();
        until(&*load, |counts| counts.wrong > 3);
        assert_eq!(load.stop().unwrap().faults, 0);
    }

    #[test]
    fn a_fence_holds_a_load_and_an_attach_lets_it_go_on() {
        for step in [FenceStep::Drain, FenceStep::Detach] {
            let device = plain(false);
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
