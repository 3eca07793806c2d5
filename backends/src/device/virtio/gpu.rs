//! virtio-gpu (1af4:1050), to try a domain with: commands whose fence number is guest memory.
//!
//! A command with VIRTIO_GPU_FLAG_FENCE carries a number of 8 bytes, and the response brings it back (5.7.6.7). The
//! two lie in buffers of their own within their chains: for a read the device fetches the number from `iova` and
//! returns it to the driver, for a write it takes the number from the driver and puts it at `iova`. So any bytes go
//! either way, exactly, 8 at most by one command (GET_DISPLAY_INFO, which changes nothing), and what a read returns
//! is what the device saw. It is slow, and no picture is involved: a 2D resource can be filled from guest memory,
//! but nothing reads it back, and a DMA that nobody can look at proves nothing.
//!
//! The device cannot tell that a write faulted: look at the memory. A read that faulted is an error, or zeroes
//! ([`crate::device::edu::POISON`]) as in QEMU.

use std::sync::Arc;
use std::time::Duration;

use passgate_bindings::{Failed, Iova, PAGE};

use super::queue::{Buffer, Queue};
use super::transport::Transport;
use crate::device::Device;
use crate::device::driven::{Driven, Engine, await_that};
use crate::device::own::OwnMemory;
use crate::device::vfio::VfioDevice;
use crate::iommu::Domain;
use crate::{Error, Result};

/// Vendor and device id.
pub const IDS: (u16, u16) = (0x1af4, 0x1050);

/// The control queue (5.7.2), of which a chain takes four descriptors.
const CONTROL: u16 = 0;
const QUEUE_SIZE: u16 = 64;
const COMMANDS: usize = 16;

/// Bytes that one command moves: `fence_id` of `struct virtio_gpu_ctrl_hdr` (5.7.6.7).
const FENCE: usize = 8;
/// `type` and `flags` before it, and all of the header.
const HEAD: u32 = 8;
const HEADER: u32 = 24;

/// `VIRTIO_GPU_CMD_GET_DISPLAY_INFO` with a fence, and `VIRTIO_GPU_RESP_OK_DISPLAY_INFO` with it: type, flags.
const COMMAND: u64 = 0x0100 | 1 << 32;
const RESPONSE: u64 = 0x1101 | 1 << 32;
/// Bytes of `struct virtio_gpu_resp_display_info`: a header and 16 displays of 24.
const RESPONSE_LEN: u32 = HEADER + 16 * 24;

/// Where things are in the driver's own memory: the queue, then a slot for each command and its response.
const QUEUE: u64 = 0;
const SLOTS: u64 = PAGE;
const SLOT: u64 = 512;
const ANSWER: u64 = 32;
const PAGES: usize = 3;

/// Commands that take longer never end.
const DEADLINE: Duration = Duration::from_secs(2);

/// The GPU, as a device.
pub type VirtioGpu = Driven<Gpu>;

/// The control queue.
#[derive(Debug)]
pub struct Gpu {
    transport: Transport,
    memory: OwnMemory,
    queue: Queue,
    device: Arc<VfioDevice>,
}

/// Drives `device`, which is in `domain`.
pub fn open(device: VfioDevice, domain: &Arc<dyn Domain>) -> Result<VirtioGpu> {
    let device = Arc::new(device);
    let transport = Transport::find(&device)?;
    transport.reset()?; // what somebody else left in its queues must not meet memory of ours
    let memory = OwnMemory::map(domain, PAGES)?;
    let queue = Queue::new(&memory, QUEUE, QUEUE_SIZE).map_err(|failed| device.failed(failed))?;
    let gpu = Gpu { transport, memory, queue, device: Arc::clone(&device) };
    Driven::new(device, gpu)
}

impl Gpu {
    /// Has the device do the commands in the first slots, one for each of `chains`, and checks what it answered.
    /// False where it did not.
    fn run(&mut self, chains: &[([Buffer; 3], [Buffer; 3])]) -> Result<bool> {
        let failed = |failed| self.device.failed(failed);
        for (reads, writes) in chains {
            self.queue.put(&self.memory, used(reads), used(writes)).map_err(failed)?;
        }
        self.transport.notify(CONTROL, &self.queue)?;
        let mut done = 0;
        await_that(DEADLINE, || {
            while let Some((_, written)) = self.queue.take(&self.memory).map_err(failed)? {
                done += usize::from(written == RESPONSE_LEN);
            }
            Ok(done == chains.len() || self.transport.broken()?)
        })?;
        if done < chains.len() {
            return Ok(false);
        }
        for n in 0..chains.len() {
            if self.memory.file().load(slot(n) + ANSWER).map_err(failed)? != RESPONSE {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Prepares slot `n`: a command with this fence number, and no response yet.
    fn prepare(&self, n: usize, fence: &[u8]) -> Result<(), Failed> {
        let mut number = [0; FENCE];
        number[..fence.len()].copy_from_slice(fence);
        let file = self.memory.file();
        file.store(slot(n), COMMAND)?;
        file.store(slot(n) + 8, u64::from_le_bytes(number))?;
        file.store(slot(n) + 16, 0)?;
        file.store(slot(n) + ANSWER, 0)?;
        file.store(slot(n) + ANSWER + 8, 0)
    }

    /// A buffer in slot `n`.
    fn own(&self, n: usize, at: u64, len: u32) -> Buffer {
        (self.memory.iova(slot(n) + at), len)
    }

    /// A header or response of `len` bytes, of which `theirs` stands where the fence number begins.
    fn around(&self, n: usize, at: u64, len: u32, theirs: Buffer) -> [Buffer; 3] {
        let rest = HEAD + theirs.1;
        [self.own(n, at, HEAD), theirs, self.own(n, at + u64::from(rest), len - rest)]
    }

    fn fault(&self, iova: Iova) -> Error {
        Error::Fault { device: self.device.name().to_owned(), iova }
    }
}

/// Where slot `n` is.
fn slot(n: usize) -> u64 {
    SLOTS + n as u64 * SLOT
}

/// The buffers that hold anything: one of no length may be in no chain.
fn used(buffers: &[Buffer; 3]) -> &[Buffer] {
    let len = buffers.iter().take_while(|(_, len)| *len > 0).count();
    &buffers[..len]
}

/// The pieces of `len` bytes from `iova` on that one command each moves: which, where, how long.
fn words(iova: Iova, len: usize) -> impl Iterator<Item = (usize, Buffer)> {
    let piece = move |n: usize| (Iova(iova.0 + (n * FENCE) as u64), FENCE.min(len - n * FENCE) as u32); // at most 8
    (0..len.div_ceil(FENCE)).map(move |n| (n, piece(n)))
}

impl Engine for Gpu {
    const CHUNK: usize = COMMANDS * FENCE;

    fn reset(&mut self) -> Result<()> {
        self.transport.reset()
    }

    fn start(&mut self) -> Result<()> {
        self.queue =
            Queue::new(&self.memory, QUEUE, QUEUE_SIZE).map_err(|failed| self.device.failed(failed))?;
        self.transport.negotiate()?;
        self.transport.set_up(CONTROL, &mut self.queue, &self.memory)?;
        self.transport.go()
    }

    /// Nothing is under way between transfers; what one that failed has left ends with a reset only.
    fn stop(&mut self) -> Result<()> {
        self.transport.reset()
    }

    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        let mut chains = Vec::with_capacity(COMMANDS);
        for (n, theirs) in words(iova, bytes.len()) {
            self.prepare(n, &[]).map_err(|failed| self.device.failed(failed))?;
            let answer = [self.own(n, ANSWER, RESPONSE_LEN), (Iova(0), 0), (Iova(0), 0)];
            chains.push((self.around(n, 0, HEADER, theirs), answer));
        }
        if !self.run(&chains)? {
            return Err(self.fault(iova));
        }
        for (n, piece) in bytes.chunks_mut(FENCE).enumerate() {
            let echo = self.memory.file().read(slot(n) + ANSWER + 8, piece);
            echo.map_err(|failed| self.device.failed(failed))?;
        }
        Ok(())
    }

    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let mut chains = Vec::with_capacity(COMMANDS);
        for ((n, theirs), piece) in words(iova, bytes.len()).zip(bytes.chunks(FENCE)) {
            self.prepare(n, piece).map_err(|failed| self.device.failed(failed))?;
            let command = [self.own(n, 0, HEADER), (Iova(0), 0), (Iova(0), 0)];
            chains.push((command, self.around(n, ANSWER, RESPONSE_LEN, theirs)));
        }
        if self.run(&chains)? { Ok(()) } else { Err(self.fault(iova)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_moved_by_one_command() {
        let found: Vec<_> = words(Iova(0x1003), 17).collect();
        assert_eq!(found, [(0, (Iova(0x1003), 8)), (1, (Iova(0x100b), 8)), (2, (Iova(0x1013), 1))]);
        assert_eq!(words(Iova(0), Gpu::CHUNK).count(), COMMANDS);
        assert!(COMMANDS * 4 <= usize::from(QUEUE_SIZE) && slot(COMMANDS) <= PAGES as u64 * PAGE);
    }
}
