//! The software device: DMA by the kernel without hardware, including DMA that does not end by itself.
//!
//! It uses the domain's translations only and never checks what is mapped: an operation on an unmapped page is really
//! issued, and the kernel returns `EFAULT`. The copy engine moves bytes through a pipe, because for a pipe the kernel
//! copies within the system call (about 1 µs; for a memfd or another file it uses a worker thread, which takes six
//! times as long).
//!
//! Two kinds of DMA do not end by themselves ([`StuckDma`]). One can be cancelled (drain); the other, a zero-copy send
//! to a peer that does not read, ends only when its connection is reset. With them the fences can be tested without an
//! IOMMU.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use passgate_bindings::{Failed, Iova};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::device::pause::{self, Pause};
use crate::device::{Device, Guard, Step, Steps};
use crate::iommu::soft::reaper::Operation;
use crate::iommu::soft::{Dma, IssueError, SoftDomain, lock};
use crate::{Error, Result};

mod stalled_connection;
mod stuck_dma;

pub use stalled_connection::ClosedWindow;
pub use stuck_dma::StuckDma;

use stuck_dma::StuckOperation;

/// A software device in a [`SoftDomain`].
#[derive(Debug)]
pub struct SoftDevice {
    name: String,
    domain: Arc<SoftDomain>,
    engine: Mutex<CopyEngine>,
    /// The fence state: between a drain and the next attach new DMA waits, after a reset it fails.
    pause: Pause,
    held: Mutex<Vec<Arc<StuckOperation>>>,
}

/// The engine for DMA that ends within the call: one operation at a time, through a pipe that is empty between
/// operations.
#[derive(Debug)]
struct CopyEngine {
    operation: Arc<Operation>,
    write_end: OwnedFd,
    read_end: OwnedFd,
    /// The capacity of the pipe in bytes.
    capacity: usize,
    /// A buffer for the rest of a write that faulted half-way, which is discarded.
    discarded: Box<[u8]>,
}

impl SoftDevice {
    pub(crate) fn open(domain: Arc<SoftDomain>, name: &str) -> Result<Arc<Self>> {
        // Non-blocking: an operation that would have to wait fails (EAGAIN), so that this pipe never keeps a slot in
        // use.
        let (read_end, write_end) = pipe(name, PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let capacity = rustix::pipe::fcntl_getpipe_size(&write_end)
            .map_err(|errno| failure(name, Failed::new("F_GETPIPE_SZ", errno)))?;
        let operation = Operation::new(domain.ring().name_op(), true);
        domain.reaper().register(&operation);
        let discarded = vec![0; capacity].into_boxed_slice();
        let engine = CopyEngine { operation, write_end, read_end, capacity, discarded };
        Ok(Arc::new(Self {
            name: name.to_owned(),
            domain,
            engine: Mutex::new(engine),
            pause: Pause::default(),
            held: Mutex::default(),
        }))
    }

    /// The device reads guest memory from `iova` on into `bytes`. It allocates nothing and takes a few microseconds per
    /// page. On [`Error::Fault`] the bytes before the faulting address have been read.
    pub fn read_into(&self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        let engine = self.begin(&self.engine)?;
        let _busy = self.domain.mark_busy();
        let mut done = 0;
        while done < bytes.len() {
            let at = Iova(iova.0 + done as u64);
            let len = (bytes.len() - done).min(engine.capacity);
            let len = self.transfer(&engine, Dma::Read(engine.write_end.as_fd()), at, len)?;
            self.take(&engine, &mut bytes[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// The device writes `bytes` to guest memory from `iova` on. As [`SoftDevice::read_into`].
    pub fn write_from(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let mut engine = self.begin(&self.engine)?;
        let _busy = self.domain.mark_busy();
        let mut at = iova;
        for chunk in bytes.chunks(engine.capacity) {
            let put = rustix::io::write(&engine.write_end, chunk);
            if put != Ok(chunk.len()) {
                return Err(self.failed("write(pipe)", put.err().unwrap_or(Errno::IO)));
            }
            let mut remaining = chunk.len();
            while remaining > 0 {
                match self.transfer(&engine, Dma::Write(engine.read_end.as_fd()), at, remaining) {
                    Ok(len) => (remaining, at) = (remaining - len, Iova(at.0 + len as u64)),
                    Err(error) => {
                        // Empties the pipe for the next operation.
                        let mut discarded = std::mem::take(&mut engine.discarded);
                        let emptied = self.take(&engine, &mut discarded[..remaining]);
                        engine.discarded = discarded;
                        return emptied.and(Err(error));
                    }
                }
            }
        }
        Ok(())
    }

    /// Starts a DMA write to guest memory that waits for its data (`READ_FIXED` from an empty pipe): its pages stay in
    /// use until [`StuckDma::finish`] supplies the data or a fence ends it. It ends at the end of the mapping at the
    /// latest.
    ///
    /// The kernel executes it as task work of the calling thread: when that thread exits, the operation ends too.
    pub fn hold_write(&self, iova: Iova, len: usize) -> Result<StuckDma> {
        let (read_end, write_end) = pipe(&self.name, PipeFlags::CLOEXEC)?;
        self.hold(Dma::Write(read_end.as_fd()), iova, len, StuckOperation::pipe(self.operation(), write_end))
    }

    /// Starts a DMA read from guest memory that only a reset ends: a zero-copy send over `socket`, a TCP connection
    /// whose peer does not read and whose receive window is zero ([`ClosedWindow`] makes one). When the peer reads at
    /// last, it gets the content that the page has *then*.
    pub fn send_zc(&self, iova: Iova, len: usize, socket: OwnedFd) -> Result<StuckDma> {
        let named = |failed| failure(&self.name, failed);
        let held = StuckOperation::socket(self.operation(), socket).map_err(named)?;
        let socket = held.socket_fd().map_err(named)?;
        self.hold(Dma::Send(socket.as_fd()), iova, len, held)
    }

    fn operation(&self) -> Arc<Operation> {
        Operation::new(self.domain.ring().name_op(), false)
    }

    fn hold(&self, dma: Dma<'_>, iova: Iova, len: usize, operation: StuckOperation) -> Result<StuckDma> {
        // The list stays locked from the check of `pause` until the operation is in it, so that a fence, which locks it
        // after changing `pause`, finds every operation that was begun before.
        let mut held = self.begin(&self.held)?;
        held.retain(|other| other.operation.outcome().is_none());
        let operation = Arc::new(operation);
        self.domain.reaper().register(&operation.operation);
        if let Err(error) = self.domain.issue(dma, iova, len, &operation.operation) {
            self.domain.reaper().unregister(&operation.operation);
            return Err(self.not_issued(error, iova));
        }
        // An operation that fails does so immediately.
        if let Some(Err(errno)) = self.domain.outcome(&operation.operation) {
            return Err(self.dma_failed(errno, iova));
        }
        held.push(Arc::clone(&operation));
        Ok(StuckDma::new(Arc::clone(&self.domain), operation))
    }

    /// Waits until DMA may begin and returns the lock that it needs; `ESHUTDOWN` if a fence prevents DMA.
    fn begin<'a, T>(&self, mutex: &'a Mutex<T>) -> Result<MutexGuard<'a, T>> {
        let deadline = Instant::now() + pause::DRAIN_WAIT_TIMEOUT;
        while self.pause.wait_until_up(deadline) {
            let guard = lock(mutex);
            // Checked again under the lock: a fence may have come in between.
            if self.pause.is_up() {
                return Ok(guard);
            }
        }
        Err(Error::Device {
            device: self.name.clone(),
            source: Failed::new("DMA", Errno::SHUTDOWN),
            remedy: "; a fence has stopped the device: attach it again",
        })
    }

    /// Makes one operation of the engine and returns its length.
    fn transfer(&self, engine: &CopyEngine, dma: Dma<'_>, iova: Iova, len: usize) -> Result<usize> {
        engine.operation.rearm();
        let issued = self.domain.issue(dma, iova, len, &engine.operation);
        let len = issued.map_err(|error| self.not_issued(error, iova))?;
        loop {
            match self.domain.outcome(&engine.operation) {
                Some(Ok(done)) if done as usize == len => return Ok(len),
                Some(Ok(_)) => return Err(self.dma_failed(Errno::IO, iova)),
                Some(Err(errno)) => return Err(self.dma_failed(errno, iova)),
                // Only on a kernel that passes operations on pipes to a worker thread.
                None => self.domain.await_completion(Duration::from_millis(1)),
            }
        }
    }

    /// Reads exactly `bytes.len()` bytes from the pipe.
    fn take(&self, engine: &CopyEngine, bytes: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::read(&engine.read_end, &mut bytes[done..]) {
                Ok(0) => return Err(self.failed("read(pipe)", Errno::PIPE)),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("read(pipe)", errno)),
            }
        }
        Ok(())
    }

    fn not_issued(&self, error: IssueError, iova: Iova) -> Error {
        match error {
            IssueError::Fault => Error::Fault { device: self.name.clone(), iova },
            IssueError::Failed(failed) => failure(&self.name, failed),
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

    /// Cancels the operations that the kernel can cancel. Others stay in flight.
    fn cancel(&self, held: &[Arc<StuckOperation>]) -> Result<()> {
        for held in held.iter().filter(|held| held.operation.outcome().is_none()) {
            self.domain.ring().cancel(held.operation.id()).map_err(|failed| failure(&self.name, failed))?;
        }
        Ok(())
    }

    /// Prevents new DMA, waits for the engine, cancels, and disconnects every socket.
    fn reset(&self) -> Result<()> {
        self.pause.stop();
        let mut held = lock(&self.held);
        // Waits for the transfer in progress.
        drop(lock(&self.engine));
        let cancelled = self.cancel(&held);
        let mut disconnected = Ok(());
        held.retain(|operation| match operation.disconnect() {
            Ok(()) => false,
            Err(failed) => {
                disconnected = Err(failure(&self.name, failed));
                true
            }
        });
        cancelled.and(disconnected)
    }
}

impl Device for SoftDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn stop_class(&self) -> Steps {
        Steps::DRAIN | Steps::RESET
    }

    fn fence(&self, step: Step) -> Result<()> {
        match step {
            Step::Drain => {
                self.pause.drain();
                let held = lock(&self.held).clone();
                // Waits for the transfer in progress.
                drop(lock(&self.engine));
                self.cancel(&held)
            }
            Step::Reset => self.reset(),
            _ => Err(Error::Unsupported { device: self.name.clone(), what: "this fence" }),
        }
    }

    fn attach(&self) -> Result<()> {
        self.pause.resume();
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
    /// Ends every operation that it has begun.
    fn drop(&mut self) {
        if let Err(error) = self.reset() {
            log::warn!("{error}");
        }
        let operation = Arc::clone(&lock(&self.engine).operation);
        self.domain.reaper().unregister(&operation);
    }
}

fn pipe(name: &str, flags: PipeFlags) -> Result<(OwnedFd, OwnedFd)> {
    pipe_with(flags).map_err(|errno| failure(name, Failed::new("pipe2", errno)))
}

fn failure(name: &str, source: Failed) -> Error {
    Error::Device { device: name.to_owned(), source, remedy: "" }
}
