//! A device with a driver in this package: the part that all these drivers share, which implements the fences.
//!
//! An [`Engine`] implements registers and rings of one kind of device. [`Driven`] makes a [`Device`] of it: one
//! transfer at a time, none between a fence and the attach, a reset and restart of the device after a transfer that
//! failed, and a drain with a time-out. Transfers that are requested after a drain wait for the attach ([`Pause`]). A
//! fence stronger than a drain never waits for the engine: it is passed to VFIO at once, and a transfer in progress
//! then ends by its own time-out.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use passgate_backends::device::load::Load;
use passgate_backends::device::pause::{self, Pause};
use passgate_backends::device::{Guard, OwnMemory};
use passgate_backends::{Device, DeviceTraits, Error, Result, Step, Steps};
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

mod load;

/// The time for which a drain or an attach waits for the transfer in progress: longer than any transfer's own time-out
/// and the restart of the device that may follow it.
const TRANSFER_WAIT_TIMEOUT: Duration = Duration::from_secs(15);
/// The time between two attempts to lock an engine during a transfer.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// The byte that [`Engine::touch`] writes if the device can write any bytes.
const STAMP: u8 = 0xa5;
/// The number of bytes that it writes.
const STAMP_LEN: usize = 512;

/// The driver of one kind of device, for one device. All calls are made one at a time.
pub trait Engine: Send + fmt::Debug + 'static {
    /// The maximum length of one transfer in bytes.
    const CHUNK: usize;

    /// Discards all transfers and disables every queue, by register accesses only: the device need not be able to do
    /// DMA. When it returns, the device does no DMA and begins none.
    fn reset(&mut self) -> Result<()>;

    /// Initialises a device that has been reset, with empty queues.
    fn start(&mut self) -> Result<()>;

    /// Ends the transfers in progress in an orderly way. When it returns, the device does no DMA and begins none until
    /// [`Engine::start`].
    fn stop(&mut self) -> Result<()>;

    /// The device reads memory at `iova`, and the bytes that it read are stored in `bytes`: at least one and at most
    /// [`Engine::CHUNK`]. [`Error::Fault`] if the transfer did not complete.
    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()>;

    /// The device writes `bytes` to memory at `iova`. As [`Engine::read`].
    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()>;

    /// The device writes bytes of the driver's choosing to memory at `iova`. Returns the expected bytes. As
    /// [`Engine::read`].
    fn touch(&mut self, iova: Iova) -> Result<Vec<u8>> {
        let stamp = vec![STAMP; Self::CHUNK.min(STAMP_LEN)];
        self.write(iova, &stamp)?;
        Ok(stamp)
    }
}

/// A device and its driver, shared with the loads that use it.
#[derive(Debug)]
pub struct Driven<E: Engine>(pub(crate) Arc<Shared<E>>);

/// A device and its driver. The order of the fields drops the engine, with the memory that driver and device share,
/// before the device.
#[derive(Debug)]
pub(crate) struct Shared<E: Engine> {
    engine: Mutex<E>,
    /// The fence state: no transfer begins between a fence and the attach.
    pause: Pause,
    device: Arc<dyn Device>,
}

impl<E: Engine> Driven<E> {
    /// Resets `device`, whatever state its previous user left it in, and starts it.
    pub(crate) fn new(device: Arc<dyn Device>, mut engine: E) -> Result<Self> {
        engine.reset()?;
        engine.start()?;
        Ok(Self(Arc::new(Shared { engine: Mutex::new(engine), pause: Pause::default(), device })))
    }
}

impl<E: Engine> Shared<E> {
    /// Reads memory at `iova` into `bytes`, in chunks.
    pub(super) fn read(&self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        let mut at = iova;
        for chunk in bytes.chunks_mut(E::CHUNK) {
            self.transfer(|engine| engine.read(at, chunk))?;
            at.0 += chunk.len() as u64;
        }
        Ok(())
    }

    /// Writes `bytes` to memory at `iova`, in chunks.
    pub(super) fn write(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let mut at = iova;
        for chunk in bytes.chunks(E::CHUNK) {
            self.transfer(|engine| engine.write(at, chunk))?;
            at.0 += chunk.len() as u64;
        }
        Ok(())
    }

    /// Makes one transfer. If it fails, the device is reset and started again, because it may still have queued work.
    fn transfer<T>(&self, run: impl FnOnce(&mut E) -> Result<T>) -> Result<T> {
        let deadline = Instant::now() + pause::DRAIN_WAIT_TIMEOUT;
        let mut engine = loop {
            // Waits without the engine's lock, which drain and attach need.
            if !self.pause.wait_until_up(deadline) {
                return Err(self.stopped());
            }
            let engine = self.engine();
            // Checked again under the lock: a fence may have come in between.
            if self.pause.is_up() {
                break engine;
            }
        };
        let done = run(&mut engine);
        if matches!(&done, Err(error) if !matches!(error, Error::Unsupported { .. })) && self.pause.is_up() {
            // A stronger fence may come during the restart. That is safe: a restarted device has empty queues and does
            // no DMA.
            if let Err(error) = engine.reset().and_then(|()| engine.start()) {
                log::warn!("{}: not restarted after a transfer that failed: {error}", self.device.name());
                self.pause.stop();
            }
        }
        done
    }

    /// Returns the engine, once no transfer is in progress.
    pub(crate) fn engine(&self) -> MutexGuard<'_, E> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the engine, once the transfer in progress has ended; `ETIMEDOUT` after [`TRANSFER_WAIT_TIMEOUT`].
    fn engine_within_timeout(&self, call: &'static str) -> Result<MutexGuard<'_, E>> {
        let begun = Instant::now();
        loop {
            match self.engine.try_lock() {
                Ok(engine) => return Ok(engine),
                Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if begun.elapsed() > TRANSFER_WAIT_TIMEOUT => {
                    return Err(self.failed(Failed::new(call, Errno::TIMEDOUT), ""));
                }
                Err(TryLockError::WouldBlock) => thread::sleep(POLL_INTERVAL),
            }
        }
    }

    fn stopped(&self) -> Error {
        let remedy = "; a fence has stopped the device: attach it again";
        self.failed(Failed::new("DMA", Errno::SHUTDOWN), remedy)
    }

    fn failed(&self, source: Failed, remedy: &'static str) -> Error {
        Error::Device { device: self.device.name().to_owned(), source, remedy }
    }
}

impl<E: Engine> Device for Driven<E> {
    fn name(&self) -> &str {
        self.0.device.name()
    }

    fn stop_class(&self) -> Steps {
        self.0.device.stop_class() | Steps::DRAIN
    }

    fn wanted(&self) -> Option<BorrowedFd<'_>> {
        self.0.device.wanted()
    }

    fn traits(&self) -> DeviceTraits {
        self.0.device.traits()
    }

    /// After any fence, successful or not, no transfer begins until [`Device::attach`]: after a drain a transfer waits
    /// for the attach, after any other fence it fails.
    fn fence(&self, step: Step) -> Result<()> {
        if !self.stop_class().has(step) {
            return self.0.device.fence(step); // returns the error
        }
        if step == Step::Drain {
            self.0.pause.drain();
            return self.0.engine_within_timeout("drain")?.stop();
        }
        // Without the engine's lock: a strong fence must not wait for a transfer that may never end.
        self.0.pause.stop();
        self.0.device.fence(step)
    }

    /// The engine is reset before the device is attached: its queues may refer to memory that was unmapped since.
    fn attach(&self) -> Result<()> {
        let mut engine = self.0.engine_within_timeout("attach")?;
        engine.reset()?;
        self.0.device.attach()?;
        engine.start()?;
        self.0.pause.resume();
        Ok(())
    }

    fn guard(&self) -> Guard<'_> {
        self.0.device.guard()
    }

    fn reserved(&self) -> Option<PageRange<Iova>> {
        OwnMemory::reserved()
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
        load::start(Arc::clone(&self.0), pages)
    }
}

impl<E: Engine> Drop for Shared<E> {
    /// Resets the device before the memory that it shares with the driver is unmapped.
    fn drop(&mut self) {
        let engine = self.engine.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = engine.reset() {
            log::warn!("closing: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
