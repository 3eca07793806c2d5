//! A device with a driver of ours: what every such driver shares, so that the rules about fences are kept once.
//!
//! An [`Engine`] knows registers and rings. [`Driven`] makes a [`Device`] of it: one transfer at a time, none while a
//! fence holds, a device brought up anew after a transfer that did not end, and a drain with a deadline. A drain is a
//! pause: what is asked for meanwhile waits for the attach (`pause.rs`). A fence stronger than a drain never
//! waits for the engine: it goes to VFIO at once, and a transfer under way then ends by its own deadline.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::load::Load;
use super::pause::{self, Pause};
use super::{Device, FenceStep, Guard, Nature, STAMP, STAMP_LEN, StopClass, driven_load, own};
use crate::{Error, Result};

/// How long a fence or an attach waits for the transfer under way: longer than any transfer's own deadline and the
/// bringing up that may follow it.
const PATIENCE: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// The driver of one kind of device, at work on one device. All calls are made one at a time.
pub trait Engine: Send + fmt::Debug + 'static {
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

/// A device and its driver, shared with the loads that run on it.
#[derive(Debug)]
pub struct Driven<E: Engine>(pub(super) Arc<Shared<E>>);

/// The engine goes before the device, and with it the memory that the two share.
#[derive(Debug)]
pub(super) struct Shared<E: Engine> {
    engine: Mutex<E>,
    /// Whether it may begin transfers: not from a fence on until it is attached again.
    pause: Pause,
    device: Arc<dyn Device>,
}

impl<E: Engine> Driven<E> {
    /// Brings `device` up by `engine`, whoever had it before.
    pub(super) fn new(device: Arc<dyn Device>, mut engine: E) -> Result<Self> {
        engine.reset()?;
        engine.start()?;
        Ok(Self(Arc::new(Shared { engine: Mutex::new(engine), pause: Pause::default(), device })))
    }
}

impl<E: Engine> Shared<E> {
    /// Memory at `iova` into `bytes`, in chunks.
    pub(super) fn read(&self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        let mut at = iova;
        for chunk in bytes.chunks_mut(E::CHUNK) {
            self.transfer(|engine| engine.read(at, chunk))?;
            at.0 += chunk.len() as u64;
        }
        Ok(())
    }

    /// `bytes` to memory at `iova`, in chunks.
    pub(super) fn write(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let mut at = iova;
        for chunk in bytes.chunks(E::CHUNK) {
            self.transfer(|engine| engine.write(at, chunk))?;
            at.0 += chunk.len() as u64;
        }
        Ok(())
    }

    /// One transfer. After one that failed the device is brought up anew, because nobody knows what it still holds.
    fn transfer<T>(&self, run: impl FnOnce(&mut E) -> Result<T>) -> Result<T> {
        let deadline = Instant::now() + pause::PATIENCE;
        let mut engine = loop {
            // Waited for without the engine, which drain and attach need.
            if !self.pause.admits(deadline) {
                return Err(self.stopped());
            }
            let engine = self.engine();
            if self.pause.is_up() {
                break engine;
            }
        };
        let done = run(&mut engine);
        if matches!(&done, Err(error) if !matches!(error, Error::Unsupported { .. })) && self.pause.is_up() {
            // A fence that came meanwhile, and this: neither gives the device anything to do.
            if let Err(error) = engine.reset().and_then(|()| engine.start()) {
                log::warn!("{}: not brought up after a transfer that failed: {error}", self.device.name());
                self.pause.stop();
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
        self.0.device.name()
    }

    fn stop_class(&self) -> StopClass {
        self.0.device.stop_class() | StopClass::DRAIN
    }

    fn wanted(&self) -> Option<BorrowedFd<'_>> {
        self.0.device.wanted()
    }

    fn nature(&self) -> Nature {
        self.0.device.nature()
    }

    /// From any fence on, done or failed, no transfer begins until [`Device::attach`]: after a drain it waits for
    /// that, after anything stronger it fails.
    fn fence(&self, step: FenceStep) -> Result<()> {
        if !self.stop_class().has(step) {
            return self.0.device.fence(step); // which says so
        }
        if step == FenceStep::Drain {
            self.0.pause.drain();
            return self.0.patiently("drain")?.stop();
        }
        self.0.pause.stop();
        self.0.device.fence(step)
    }

    /// The queues go before the device comes back: what was in them may be nobody's any more.
    fn attach(&self) -> Result<()> {
        let mut engine = self.0.patiently("attach")?;
        engine.reset()?;
        self.0.device.attach()?;
        engine.start()?;
        self.0.pause.lift();
        Ok(())
    }

    fn guard(&self) -> Guard<'_> {
        self.0.device.guard()
    }

    fn reserved(&self) -> Option<PageRange<Iova>> {
        own::window()
    }

    fn touch(&self, iova: Iova) -> Result<Vec<u8>> {
        self.0.transfer(|engine| engine.touch(iova))
    }

    fn dma_read(&self, iova: Iova, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.0.read(iova, &mut bytes)?;
        Ok(bytes)
    }

    fn dma_write(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        self.0.write(iova, bytes)
    }

    fn start(&self, pages: &[Iova]) -> Result<Box<dyn Load>> {
        driven_load::start(Arc::clone(&self.0), pages)
    }
}

impl<E: Engine> Drop for Shared<E> {
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
mod tests;
