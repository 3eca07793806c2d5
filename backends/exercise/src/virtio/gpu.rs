//! virtio-gpu (1af4:1050), for tests of a domain: commands whose fence id is in guest memory.
//!
//! A command with VIRTIO_GPU_FLAG_FENCE has a `fence_id` of 8 bytes, which the response returns (virtio 1.3, 5.7.6.7).
//! The fence id is a buffer of its own in the descriptor chain: for a read the device reads it from `iova` and returns
//! it to the driver, for a write it reads it from driver memory and writes it to `iova`. So each command
//! (GET_DISPLAY_INFO, which has no side effect) transfers up to 8 arbitrary bytes, and a read returns exactly the bytes
//! that the device has read. It is slow. 2D resources are not used: they can be filled from guest memory but not read
//! back, so the DMA could not be verified.
//!
//! The device does not report that a write faulted: a test must check the memory. A read that faulted is an error, or
//! zeroes ([`crate::edu::POISON`]) on QEMU.

use std::sync::Arc;
use std::time::Duration;

use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::device::{OwnMemory, await_that};
use passgate_backends::{Device, Domain, Error, Result};
use passgate_bindings::{Failed, Iova, PAGE};

use super::queue::{Buffer, Queue};
use super::transport::Transport;
use crate::driven::{Driven, Engine};

/// Vendor and device id.
pub const IDS: (u16, u16) = (0x1af4, 0x1050);

/// The control queue (5.7.2). A chain has up to four descriptors.
const CONTROL: u16 = 0;
const QUEUE_SIZE: u16 = 64;
/// The maximum number of commands in flight.
const MAX_COMMANDS: usize = 16;

/// The number of bytes that one command transfers: `fence_id` of `struct virtio_gpu_ctrl_hdr` (5.7.6.7).
const FENCE_ID_BYTES: usize = 8;
/// The offset of `fence_id` in that header, after `type` and `flags`, and the length of the header.
const FENCE_ID_OFFSET: u32 = 8;
const HEADER_LEN: u32 = 24;

/// `type` and `flags` of `VIRTIO_GPU_CMD_GET_DISPLAY_INFO` with a fence, and of its response,
/// `VIRTIO_GPU_RESP_OK_DISPLAY_INFO`.
const COMMAND: u64 = 0x0100 | 1 << 32;
const RESPONSE: u64 = 0x1101 | 1 << 32;
/// The length of `struct virtio_gpu_resp_display_info`: a header and 16 displays of 24 bytes.
const RESPONSE_LEN: u32 = HEADER_LEN + 16 * 24;

/// Offsets in driver memory: the queue, then a slot for each command, with its response at an offset in the slot.
const QUEUE: u64 = 0;
const SLOTS: u64 = PAGE;
const SLOT_BYTES: u64 = 512;
const RESPONSE_OFFSET: u64 = 32;
const PAGES: usize = 3;

/// The time after which commands count as failed.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(2);

/// The GPU, as a device.
pub type VirtioGpu = Driven<Gpu>;

/// The driver, with the control queue.
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
    transport.reset()?; // before driver memory is mapped: the queues of a previous driver may still be enabled
    let memory = OwnMemory::map(domain, PAGES)?;
    let queue = Queue::new(&memory, QUEUE, QUEUE_SIZE).map_err(|failed| device.failed(failed))?;
    let gpu = Gpu { transport, memory, queue, device: Arc::clone(&device) };
    Driven::new(device, gpu)
}

impl Gpu {
    /// Submits the commands in the first slots, one for each of `chains`, and checks the responses. Returns false if
    /// they did not all succeed.
    fn run(&mut self, chains: &[([Buffer; 3], [Buffer; 3])]) -> Result<bool> {
        let failed = |failed| self.device.failed(failed);
        for (reads, writes) in chains {
            self.queue.submit(&self.memory, not_empty(reads), not_empty(writes)).map_err(failed)?;
        }
        self.transport.notify(CONTROL, &self.queue)?;
        let mut done = 0;
        await_that(COMMAND_TIMEOUT, || {
            while let Some((_, written)) = self.queue.pop_used(&self.memory).map_err(failed)? {
                done += usize::from(written == RESPONSE_LEN);
            }
            Ok(done == chains.len() || self.transport.needs_reset()?)
        })?;
        if done < chains.len() {
            return Ok(false);
        }
        for n in 0..chains.len() {
            if self.memory.file().load(slot(n) + RESPONSE_OFFSET).map_err(failed)? != RESPONSE {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Prepares slot `n`: a command with this fence id, and an empty response.
    fn prepare(&self, n: usize, fence_id: &[u8]) -> Result<(), Failed> {
        let mut bytes = [0; FENCE_ID_BYTES];
        bytes[..fence_id.len()].copy_from_slice(fence_id);
        let file = self.memory.file();
        file.store(slot(n), COMMAND)?;
        file.store(slot(n) + 8, u64::from_le_bytes(bytes))?;
        file.store(slot(n) + 16, 0)?;
        file.store(slot(n) + RESPONSE_OFFSET, 0)?;
        file.store(slot(n) + RESPONSE_OFFSET + 8, 0)
    }

    /// Returns a buffer in slot `n` of driver memory.
    fn slot_buffer(&self, n: usize, at: u64, len: u32) -> Buffer {
        (self.memory.iova(slot(n) + at), len)
    }

    /// Returns the buffers of a command or response of `len` bytes whose fence id is in guest memory, in `guest`.
    fn with_guest_fence_id(&self, n: usize, at: u64, len: u32, guest: Buffer) -> [Buffer; 3] {
        let rest = FENCE_ID_OFFSET + guest.1;
        [
            self.slot_buffer(n, at, FENCE_ID_OFFSET),
            guest,
            self.slot_buffer(n, at + u64::from(rest), len - rest),
        ]
    }

    fn fault(&self, iova: Iova) -> Error {
        Error::Fault { device: self.device.name().to_owned(), iova }
    }
}

/// Returns the offset of slot `n` in driver memory.
fn slot(n: usize) -> u64 {
    SLOTS + n as u64 * SLOT_BYTES
}

/// Returns the buffers up to the first empty one: a descriptor of length 0 is not allowed in a chain.
fn not_empty(buffers: &[Buffer; 3]) -> &[Buffer] {
    let len = buffers.iter().take_while(|(_, len)| *len > 0).count();
    &buffers[..len]
}

/// Returns the pieces of `len` bytes from `iova` on that one command each transfers, with their index.
fn pieces(iova: Iova, len: usize) -> impl Iterator<Item = (usize, Buffer)> {
    let piece = move |n: usize| {
        let at = n * FENCE_ID_BYTES;
        (Iova(iova.0 + at as u64), FENCE_ID_BYTES.min(len - at) as u32) // at most 8
    };
    (0..len.div_ceil(FENCE_ID_BYTES)).map(move |n| (n, piece(n)))
}

impl Engine for Gpu {
    const CHUNK: usize = MAX_COMMANDS * FENCE_ID_BYTES;

    fn reset(&mut self) -> Result<()> {
        self.transport.reset()
    }

    fn start(&mut self) -> Result<()> {
        self.queue =
            Queue::new(&self.memory, QUEUE, QUEUE_SIZE).map_err(|failed| self.device.failed(failed))?;
        self.transport.negotiate()?;
        self.transport.set_up(CONTROL, &mut self.queue, &self.memory)?;
        self.transport.set_driver_ok()
    }

    /// Between transfers nothing is in flight; the remains of a failed transfer end only by a reset.
    fn stop(&mut self) -> Result<()> {
        self.transport.reset()
    }

    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        let mut chains = Vec::with_capacity(MAX_COMMANDS);
        for (n, guest) in pieces(iova, bytes.len()) {
            self.prepare(n, &[]).map_err(|failed| self.device.failed(failed))?;
            let response = [self.slot_buffer(n, RESPONSE_OFFSET, RESPONSE_LEN), (Iova(0), 0), (Iova(0), 0)];
            chains.push((self.with_guest_fence_id(n, 0, HEADER_LEN, guest), response));
        }
        if !self.run(&chains)? {
            return Err(self.fault(iova));
        }
        for (n, piece) in bytes.chunks_mut(FENCE_ID_BYTES).enumerate() {
            let echo = self.memory.file().read(slot(n) + RESPONSE_OFFSET + 8, piece);
            echo.map_err(|failed| self.device.failed(failed))?;
        }
        Ok(())
    }

    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let mut chains = Vec::with_capacity(MAX_COMMANDS);
        for ((n, guest), piece) in pieces(iova, bytes.len()).zip(bytes.chunks(FENCE_ID_BYTES)) {
            self.prepare(n, piece).map_err(|failed| self.device.failed(failed))?;
            let command = [self.slot_buffer(n, 0, HEADER_LEN), (Iova(0), 0), (Iova(0), 0)];
            chains.push((command, self.with_guest_fence_id(n, RESPONSE_OFFSET, RESPONSE_LEN, guest)));
        }
        if self.run(&chains)? { Ok(()) } else { Err(self.fault(iova)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_transferred_by_one_command() {
        let found: Vec<_> = pieces(Iova(0x1003), 17).collect();
        assert_eq!(found, [(0, (Iova(0x1003), 8)), (1, (Iova(0x100b), 8)), (2, (Iova(0x1013), 1))]);
        assert_eq!(pieces(Iova(0), Gpu::CHUNK).count(), MAX_COMMANDS);
        assert!(MAX_COMMANDS * 4 <= usize::from(QUEUE_SIZE) && slot(MAX_COMMANDS) <= PAGES as u64 * PAGE);
    }
}
