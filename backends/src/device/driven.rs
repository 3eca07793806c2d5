//! A device with a driver of ours: what every such driver shares, so that the rules about fences are kept once.
//!
//! An [`Engine`] knows registers and rings. [`Driven`] makes a [`Device`] of it: one transfer at a time, none while a
//! fence holds, a device brought up anew after a transfer that did not end, and a drain with a deadline. A fence
//! stronger than a drain never waits for the engine: it goes to VFIO at once, and a transfer under way then ends by
//! its own deadline.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use passgate_bindings::{Failed, Iova};
use rustix::io::Errno;

use super::{Device, FenceStep, Guard, Nature, STAMP, STAMP_LEN, StopClass};
use crate::{Error, Result};

/// How long a fence or an attach waits for the transfer under way: longer than any transfer's own deadline and the
/// bringing up that may follow it.
const PATIENCE: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// The driver of one kind of device, at work on one device. All calls are made one at a time.
pub trait Engine: Send + fmt::Debug {
    /// Bytes of the longest single transfer.
    const CHUNK: usize;

    /// Forgets all transfers and takes every queue from the device, by registers alone: it need not be able to
    /// do DMA. When it returns the device does none and will begin none.
    fn reset(&mut self) -> Result<()>;

    /// Brings a device up that has been reset, with empty queues.
    fn start(&mut self) -> Result<()>;

    /// Ends what is under way in order; when it returns the device does no DMA and will begin none until
    /// [`Engine::start`].
    fn stop(&mut self) -> Result<()>;

    /// The device reads memory at `iova`, and what it saw is left in `bytes`: at most [`Engine::CHUNK`], not none.
    /// [`Error::Fault`] where that did not come to an end.
    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()>;

    /// The device writes `bytes` to memory at `iova`. As [`Engine::read`].
    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()>;

    /// The device writes something to memory at `iova`; what it is to be. As [`Engine::read`].
    fn touch(&mut self, iova: Iova) -> Result<Vec<u8>> {
        let stamp = vec![STAMP; Self::CHUNK.min(STAMP_LEN)];
        self.write(iova, &stamp)?;
        Ok(stamp)
    }
}

/// A device and its driver. The engine goes before the device, and with it the memory that the two share.
#[derive(Debug)]
pub struct Driven<E: Engine> {
    engine: Mutex<E>,
    /// Whether it may begin transfers: not from a fence on until it is attached again.
    up: AtomicBool,
    device: Arc<dyn Device>,
}

impl<E: Engine> Driven<E> {
    /// Brings `device` up by `engine`, whoever had it before.
    pub(super) fn new(device: Arc<dyn Device>, mut engine: E) -> Result<Self> {
        engine.reset()?;
        engine.start()?;
        Ok(Self { engine: Mutex::new(engine), up: AtomicBool::new(true), device })
    }

    /// One transfer. After one that failed the device is brought up anew, because nobody knows what it still holds.
    fn transfer<T>(&self, run: impl FnOnce(&mut E) -> Result<T>) -> Result<T> {
        let mut engine = self.engine();
        if !self.up.load(Ordering::Acquire) {
            return Err(self.stopped());
        }
        let done = run(&mut engine);
        if matches!(&done, Err(error) if !matches!(error, Error::Unsupported { .. }))
            && self.up.load(Ordering::Acquire)
        {
            // A fence that came meanwhile, and this: neither gives the device anything to do.
            if let Err(error) = engine.reset().and_then(|()| engine.start()) {
                log::warn!("{}: not brought up after a transfer that failed: {error}", self.device.name());
                self.up.store(false, Ordering::Release);
            }
        }
        done
    }

    /// The engine, between two transfers.
    pub(super) fn engine(&self) -> MutexGuard<'_, E> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine, once the transfer under way has ended.
    fn patiently(&self, call: &'static str) -> Result<MutexGuard<'_, E>> {
        let begun = Instant::now();
        loop {
            match self.engine.try_lock() {
                Ok(engine) => return Ok(engine),
                Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if begun.elapsed() > PATIENCE => {
                    return Err(self.failed(Failed::new(call, Errno::TIMEDOUT), ""));
                }
                Err(TryLockError::WouldBlock) => thread::sleep(LOOK_EVERY),
            }
        }
    }

    fn stopped(&self) -> Error {
        let mend = "; a fence has stopped the device: attach it again";
        self.failed(Failed::new("DMA", Errno::SHUTDOWN), mend)
    }

    fn failed(&self, source: Failed, mend: &'static str) -> Error {
        Error::Device { device: self.device.name().to_owned(), source, mend }
    }
}

impl<E: Engine> Device for Driven<E> {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn stop_class(&self) -> StopClass {
        self.device.stop_class() | StopClass::DRAIN
    }

    fn nature(&self) -> Nature {
        self.device.nature()
    }

    /// From any fence on, done or failed, no transfer begins until [`Device::attach`].
    fn fence(&self, step: FenceStep) -> Result<()> {
        if !self.stop_class().has(step) {
            return self.device.fence(step); // which says so
        }
        self.up.store(false, Ordering::Release);
        match step {
            FenceStep::Drain => self.patiently("drain")?.stop(),
            _ => self.device.fence(step),
        }
    }

    /// The queues go before the device comes back: what was in them may be nobody's any more.
    fn attach(&self) -> Result<()> {
        let mut engine = self.patiently("attach")?;
        engine.reset()?;
        self.device.attach()?;
        engine.start()?;
        self.up.store(true, Ordering::Release);
        Ok(())
    }

    fn guard(&self) -> Guard<'_> {
        self.device.guard()
    }

    fn touch(&self, iova: Iova) -> Result<Vec<u8>> {
        self.transfer(|engine| engine.touch(iova))
    }

    fn dma_read(&self, iova: Iova, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut at = iova;
        for chunk in bytes.chunks_mut(E::CHUNK) {
            self.transfer(|engine| engine.read(at, chunk))?;
            at.0 += chunk.len() as u64;
        }
        Ok(bytes)
    }

    fn dma_write(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let mut at = iova;
        for chunk in bytes.chunks(E::CHUNK) {
            self.transfer(|engine| engine.write(at, chunk))?;
            at.0 += chunk.len() as u64;
        }
        Ok(())
    }
}

impl<E: Engine> Drop for Driven<E> {
    /// The memory that driver and device share goes next: the device must have let go of it.
    fn drop(&mut self) {
        let engine = self.engine.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = engine.reset() {
            log::warn!("closing: {error}");
        }
    }
}

/// Looks every while whether `done` says so; false when `within` is over.
pub(super) fn await_that(within: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
    let begun = Instant::now();
    let mut pause = Duration::from_micros(20);
    while !done()? {
        if begun.elapsed() > within {
            return Ok(false);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LOOK_EVERY);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    type Log = Arc<Mutex<Vec<&'static str>>>;

    /// A device that notes what is asked of it, and an engine for it whose transfers go as they are told.
    #[derive(Debug)]
    struct Noted(Log);

    #[derive(Debug)]
    struct Told {
        log: Log,
        begun: Sender<usize>,
        goes: Receiver<bool>,
        starts: bool,
    }

    impl Device for Noted {
        fn name(&self) -> &str {
            "noted"
        }
        fn stop_class(&self) -> StopClass {
            StopClass::DETACH | StopClass::RESET
        }
        fn fence(&self, step: FenceStep) -> Result<()> {
            self.0.lock().unwrap().push("fence");
            let failed = Failed::new("fence", Errno::IO);
            match step {
                FenceStep::Detach => Ok(()),
                FenceStep::Reset => Err(Error::Device { device: String::new(), source: failed, mend: "" }),
                _ => Err(self.no_dma()),
            }
        }
        fn attach(&self) -> Result<()> {
            self.0.lock().unwrap().push("attach");
            Ok(())
        }
        fn guard(&self) -> Guard<'_> {
            Guard::None
        }
    }

    impl Told {
        fn note(&self, what: &'static str) -> Result<()> {
            self.log.lock().unwrap().push(what);
            Ok(())
        }
        fn go(&self, iova: Iova, len: usize) -> Result<()> {
            self.begun.send(len).unwrap();
            if self.goes.recv().unwrap() {
                return Ok(());
            }
            self.note("failed")?;
            Err(Error::Fault { device: String::new(), iova })
        }
    }

    impl Engine for Told {
        const CHUNK: usize = 100;
        fn reset(&mut self) -> Result<()> {
            self.note("reset")
        }
        fn start(&mut self) -> Result<()> {
            self.note("start")?;
            if self.starts { Ok(()) } else { Err(Error::Fault { device: String::new(), iova: Iova(0) }) }
        }
        fn stop(&mut self) -> Result<()> {
            self.note("stop")
        }
        fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
            bytes.fill(7);
            self.go(iova, bytes.len())
        }
        fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
            self.go(iova, bytes.len())
        }
    }

    /// A device, what was asked of it since last time, the lengths of its transfers, and how the next ones go.
    struct Scene {
        device: Driven<Told>,
        log: Log,
        begun: Receiver<usize>,
        goes: Sender<bool>,
    }

    impl Scene {
        fn new() -> Self {
            let (log, (begin, begun), (goes, go)) = (Log::default(), channel(), channel());
            let engine = Told { log: Arc::clone(&log), begun: begin, goes: go, starts: true };
            let device = Driven::new(Arc::new(Noted(Arc::clone(&log))), engine).unwrap();
            let scene = Self { device, log, begun, goes };
            assert_eq!(scene.since(), ["reset", "start"], "whoever had it before");
            scene
        }
        fn since(&self) -> Vec<&'static str> {
            std::mem::take(&mut self.log.lock().unwrap())
        }
        fn moves(&self) -> bool {
            self.goes.send(true).unwrap();
            let moved = self.device.dma_write(Iova(0), &[1]);
            match &moved {
                Ok(()) => drop(self.begun.recv().unwrap()),
                Err(error) => {
                    assert_eq!(error.errno(), Some(Errno::SHUTDOWN));
                    self.device.engine.lock().unwrap().goes.recv().unwrap();
                }
            }
            moved.is_ok()
        }
    }

    #[test]
    fn long_transfers_are_made_in_chunks() {
        let scene = Scene::new();
        (0..3).for_each(|_| scene.goes.send(true).unwrap());
        assert_eq!(scene.device.dma_read(Iova(0), 250).unwrap(), [7; 250]);
        assert_eq!(scene.begun.try_iter().collect::<Vec<_>>(), [100, 100, 50]);
        assert_eq!(scene.device.dma_read(Iova(0), 0).unwrap(), []);
    }

    #[test]
    fn a_device_is_brought_up_anew_after_a_transfer_that_failed() {
        let scene = Scene::new();
        scene.goes.send(false).unwrap();
        assert_eq!(scene.device.dma_read(Iova(0), 1).unwrap_err().errno(), Some(Errno::FAULT));
        assert_eq!(scene.since(), ["failed", "reset", "start"]);
        assert_eq!(scene.begun.recv(), Ok(1));
        assert!(scene.moves());
    }

    #[test]
    fn a_device_that_does_not_come_up_waits_for_its_attach() {
        let scene = Scene::new();
        scene.device.engine.lock().unwrap().starts = false;
        scene.goes.send(false).unwrap();
        assert_eq!(scene.device.dma_read(Iova(0), 1).unwrap_err().errno(), Some(Errno::FAULT));
        assert!(!scene.moves());
        assert!(scene.device.attach().is_err());
        scene.device.engine.lock().unwrap().starts = true;
        assert!(!scene.moves(), "the attach failed");
        scene.device.attach().unwrap();
        scene.begun.try_iter().for_each(drop);
        assert!(scene.moves());
    }

    #[test]
    fn from_a_fence_to_the_attach_nothing_moves() {
        let scene = Scene::new();
        for (step, works, asked) in [
            (FenceStep::Drain, true, "stop"),
            (FenceStep::Detach, true, "fence"),
            (FenceStep::Reset, false, "fence"), // who knows how far it came
        ] {
            assert_eq!(scene.device.fence(step).is_ok(), works);
            assert_eq!(scene.since(), [asked]);
            assert!(!scene.moves());
            scene.device.attach().unwrap();
            assert_eq!(scene.since(), ["reset", "attach", "start"], "old transfers go before it can do any");
            assert!(scene.moves());
        }
    }

    #[test]
    fn a_fence_that_the_device_lacks_stops_nothing() {
        let scene = Scene::new();
        assert_eq!(scene.device.fence(FenceStep::Stop).unwrap_err().errno(), Some(Errno::OPNOTSUPP));
        assert!(scene.moves());
    }

    #[test]
    fn a_strong_fence_does_not_wait_for_a_transfer_and_a_drain_does() {
        let scene = Scene::new();
        thread::scope(|scope| {
            let hangs = scope.spawn(|| scene.device.dma_write(Iova(0), &[1]));
            scene.begun.recv().unwrap();
            let (fenced, asked) = (scene.device.fence(FenceStep::Detach), scene.since());
            let drained = scope.spawn(|| scene.device.fence(FenceStep::Drain));
            scene.goes.send(false).unwrap(); // before any assertion: a thread that waits would never end
            assert!(hangs.join().unwrap().is_err() && drained.join().unwrap().is_ok());
            assert!(fenced.is_ok());
            assert_eq!(asked, ["fence"]);
            assert_eq!(scene.since(), ["failed", "stop"], "and under a fence nothing is brought up");
        });
    }
}
