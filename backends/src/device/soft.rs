//! The software device: real DMA without hardware, and DMA that hangs on request.
//!
//! It goes by the domain's translation alone and never asks what is mapped: an operation on a page that was taken
//! away is really issued, and it is the kernel that answers `EFAULT`. The engine moves bytes through a pipe,
//! because on a pipe the kernel does the copy within the system call (about 1 µs; on a memfd or a file it hands it
//! to a worker thread, six times as dear).
//!
//! Two kinds of DMA do not end by themselves ([`Held`]). One can be cancelled; the other, a zero-copy send to a
//! peer that does not read, only by resetting its connection. They are what makes the ladder of fences real on a
//! machine without an IOMMU.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use passgate_bindings::{Failed, Iova};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::device::pause::{self, Pause};
use crate::device::{Device, FenceStep, Guard, StopClass};
use crate::iommu::soft::reaper::Flight;
use crate::iommu::soft::{Dma, Refusal, SoftDomain, lock};
use crate::{Error, Result};

mod held;
mod window;

pub use held::Held;
pub use window::ClosedWindow;

use held::Holding;

/// A software device in a [`SoftDomain`].
#[derive(Debug)]
pub struct SoftDevice {
    name: String,
    domain: Arc<SoftDomain>,
    line: Mutex<Line>,
    /// Whether it may start DMA: between a drain and the next attach it waits, after a reset it fails.
    pause: Pause,
    held: Mutex<Vec<Arc<Holding>>>,
}

/// The engine for DMA that ends within the call: one operation at a time, through one pipe that is empty between
/// two of them.
#[derive(Debug)]
struct Line {
    flight: Arc<Flight>,
    inlet: OwnedFd,
    outlet: OwnedFd,
    /// Bytes that the pipe holds.
    room: usize,
    /// Where the rest of a write goes that faulted half-way.
    spill: Box<[u8]>,
}

impl SoftDevice {
    pub(crate) fn open(domain: Arc<SoftDomain>, name: &str) -> Result<Arc<Self>> {
        // An operation that would have to wait fails instead (EAGAIN): this pipe never holds a slot.
        let (outlet, inlet) = pipe(name, PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let room = rustix::pipe::fcntl_getpipe_size(&inlet)
            .map_err(|errno| failure(name, Failed::new("F_GETPIPE_SZ", errno)))?;
        let flight = Flight::new(domain.ring().name_op(), true);
        domain.reaper().expect(&flight);
        let line = Line { flight, inlet, outlet, room, spill: vec![0; room].into_boxed_slice() };
        Ok(Arc::new(Self {
            name: name.to_owned(),
            domain,
            line: Mutex::new(line),
            pause: Pause::default(),
            held: Mutex::default(),
        }))
    }

    /// The device reads guest memory from `iova` on into `bytes`. Without allocation; a few microseconds a page.
    /// On [`Error::Fault`] the bytes before the faulting address have been read.
    pub fn read_into(&self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        let line = self.begin(&self.line)?;
        let _at_work = self.domain.at_work();
        let mut done = 0;
        while done < bytes.len() {
            let at = Iova(iova.0 + done as u64);
            let len = (bytes.len() - done).min(line.room);
            let len = self.transfer(&line, Dma::Read(line.inlet.as_fd()), at, len)?;
            self.take(&line, &mut bytes[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// The device writes `bytes` to guest memory from `iova` on. As [`SoftDevice::read_into`].
    pub fn write_from(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let mut line = self.begin(&self.line)?;
        let _at_work = self.domain.at_work();
        let mut at = iova;
        for chunk in bytes.chunks(line.room) {
            let put = rustix::io::write(&line.inlet, chunk);
            if put != Ok(chunk.len()) {
                return Err(self.failed("write(pipe)", put.err().unwrap_or(Errno::IO)));
            }
            let mut left = chunk.len();
            while left > 0 {
                match self.transfer(&line, Dma::Write(line.outlet.as_fd()), at, left) {
                    Ok(len) => (left, at) = (left - len, Iova(at.0 + len as u64)),
                    Err(error) => {
                        let mut spill = std::mem::take(&mut line.spill);
                        let emptied = self.take(&line, &mut spill[..left]);
                        line.spill = spill;
                        return emptied.and(Err(error));
                    }
                }
            }
        }
        Ok(())
    }

    /// Starts a DMA write to guest memory that waits for its data (`READ_FIXED` from an empty pipe): it holds its
    /// pages until [`Held::finish`] supplies the data or a fence ends it. At most to the end of the mapping.
    ///
    /// The kernel carries it on in the calling thread: when that ends, the operation ends too.
    pub fn hold_write(&self, iova: Iova, len: usize) -> Result<Held> {
        let (outlet, inlet) = pipe(&self.name, PipeFlags::CLOEXEC)?;
        self.hold(Dma::Write(outlet.as_fd()), iova, len, Holding::pipe(self.flight(), inlet))
    }

    /// Starts a DMA read from guest memory that nothing but a reset ends: a zero-copy send over `socket`, a TCP
    /// connection whose peer does not read and whose window is closed ([`ClosedWindow`] makes one). What is sent
    /// when the peer reads at last is whatever is in the page *then*.
    pub fn send_zc(&self, iova: Iova, len: usize, socket: OwnedFd) -> Result<Held> {
        let named = |failed| failure(&self.name, failed);
        let holding = Holding::socket(self.flight(), socket).map_err(named)?;
        let socket = holding.socket_fd().map_err(named)?;
        self.hold(Dma::Send(socket.as_fd()), iova, len, holding)
    }

    fn flight(&self) -> Arc<Flight> {
        Flight::new(self.domain.ring().name_op(), false)
    }

    fn hold(&self, dma: Dma<'_>, iova: Iova, len: usize, holding: Holding) -> Result<Held> {
        // Held together with `pause`, so that a fence sees every operation that was begun before it.
        let mut held = self.begin(&self.held)?;
        held.retain(|other| other.flight.outcome().is_none());
        let holding = Arc::new(holding);
        self.domain.reaper().expect(&holding.flight);
        if let Err(refusal) = self.domain.issue(dma, iova, len, &holding.flight) {
            self.domain.reaper().forget(&holding.flight);
            return Err(self.refused(refusal, iova));
        }
        // What fails does so at once.
        if let Some(Err(errno)) = self.domain.outcome(&holding.flight) {
            return Err(self.dma_failed(errno, iova));
        }
        held.push(Arc::clone(&holding));
        Ok(Held::new(Arc::clone(&self.domain), holding))
    }

    /// What a DMA needs held, once it may begin.
    fn begin<'a, T>(&self, needs: &'a Mutex<T>) -> Result<MutexGuard<'a, T>> {
        let deadline = Instant::now() + pause::PATIENCE;
        while self.pause.admits(deadline) {
            let held = lock(needs);
            if self.pause.is_up() {
                return Ok(held);
            }
        }
        Err(Error::Device {
            device: self.name.clone(),
            source: Failed::new("DMA", Errno::SHUTDOWN),
            mend: "; a fence has stopped the device: attach it again",
        })
    }

    /// One operation of the engine, and its length.
    fn transfer(&self, line: &Line, dma: Dma<'_>, iova: Iova, len: usize) -> Result<usize> {
        line.flight.rearm();
        let len = self.domain.issue(dma, iova, len, &line.flight).map_err(|r| self.refused(r, iova))?;
        loop {
            match self.domain.outcome(&line.flight) {
                Some(Ok(done)) if done as usize == len => return Ok(len),
                Some(Ok(_)) => return Err(self.dma_failed(Errno::IO, iova)),
                Some(Err(errno)) => return Err(self.dma_failed(errno, iova)),
                // Only where a kernel hands pipes to a worker.
                None => self.domain.idle(Duration::from_millis(1)),
            }
        }
    }

    /// Takes exactly `bytes` out of the pipe.
    fn take(&self, line: &Line, bytes: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::read(&line.outlet, &mut bytes[done..]) {
                Ok(0) => return Err(self.failed("read(pipe)", Errno::PIPE)),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("read(pipe)", errno)),
            }
        }
        Ok(())
    }

    fn refused(&self, refusal: Refusal, iova: Iova) -> Error {
        match refusal {
            Refusal::Fault => Error::Fault { device: self.name.clone(), iova },
            Refusal::Failed(failed) => failure(&self.name, failed),
        }
    }

    fn dma_failed(&self, errno: Errno, iova: Iova) -> Error {
        match errno {
            Errno::FAULT => Error::Fault { device: self.name.clone(), iova },
            errno => self.failed("DMA", errno),
        }
    }

    fn failed(&self, call: &'static str, errno: Errno) -> Error {
        failure(&self.name, Failed::new(call, errno))
    }

    /// Ends what the kernel can end; the rest is not touched.
    fn cancel(&self, held: &[Arc<Holding>]) -> Result<()> {
        for holding in held.iter().filter(|holding| holding.flight.outcome().is_none()) {
            self.domain.ring().cancel(holding.flight.id()).map_err(|failed| failure(&self.name, failed))?;
        }
        Ok(())
    }

    /// Lets no DMA start any more, waits for the engine, cancels, and cuts every connection.
    fn reset(&self) -> Result<()> {
        self.pause.stop();
        let mut held = lock(&self.held);
        drop(lock(&self.line));
        let cancelled = self.cancel(&held);
        let mut cut = Ok(());
        held.retain(|holding| match holding.cut() {
            Ok(()) => false,
            Err(failed) => {
                cut = Err(failure(&self.name, failed));
                true
            }
        });
        cancelled.and(cut)
    }
}

impl Device for SoftDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn stop_class(&self) -> StopClass {
        StopClass::DRAIN | StopClass::RESET
    }

    fn fence(&self, step: FenceStep) -> Result<()> {
        match step {
            FenceStep::Drain => {
                self.pause.drain();
                let held = lock(&self.held).clone();
                drop(lock(&self.line));
                self.cancel(&held)
            }
            FenceStep::Reset => self.reset(),
            _ => Err(Error::Unsupported { device: self.name.clone(), what: "this fence" }),
        }
    }

    fn attach(&self) -> Result<()> {
        self.pause.lift();
        Ok(())
    }

    fn guard(&self) -> Guard<'_> {
        Guard::None
    }

    fn dma_read(&self, iova: Iova, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_into(iova, &mut bytes)?;
        Ok(bytes)
    }

    fn dma_write(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        self.write_from(iova, bytes)
    }
}

impl Drop for SoftDevice {
    /// What it has begun ends with it.
    fn drop(&mut self) {
        if let Err(error) = self.reset() {
            log::warn!("{error}");
        }
        let flight = Arc::clone(&lock(&self.line).flight);
        self.domain.reaper().forget(&flight);
    }
}

fn pipe(name: &str, flags: PipeFlags) -> Result<(OwnedFd, OwnedFd)> {
    pipe_with(flags).map_err(|errno| failure(name, Failed::new("pipe2", errno)))
}

fn failure(name: &str, source: Failed) -> Error {
    Error::Device { device: name.to_owned(), source, mend: "" }
}
