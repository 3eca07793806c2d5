//! QEMU's `edu` device (1234:11e8; QEMU's docs/specs/edu.rst): DMA on demand, for tests of a domain.
//!
//! The engine has a buffer of 4096 bytes that only DMA can fill and empty. So every transfer goes through a scratch
//! page of driver memory, which is mapped during the transfer. One DMA takes about 100 ms. QEMU must be started with
//! `edu,dma_mask=0xffffffffffffffff`: otherwise the engine truncates addresses to 28 bits.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::device::{Guard, OwnMemory};
use passgate_backends::{Device, DeviceTraits, Domain, Error, Result, Step, Steps};
use passgate_bindings::vfio::device::Region;
use passgate_bindings::{Failed, Iova};
use rustix::io::Errno;

/// Vendor and device id.
pub const IDS: (u16, u16) = (0x1234, 0x11e8);

/// The value of bytes in a DMA read that faulted. QEMU stores zeroes for a read that the IOMMU refuses, whatever was in
/// the engine's buffer, so no other value is possible: a test must read memory that is not zero.
pub const POISON: u8 = 0;

/// Registers in BAR 0. Addresses are 64 bits wide.
const SOURCE: u64 = 0x80;
const TARGET: u64 = 0x88;
const COUNT: u64 = 0x90;
const RUN: u64 = 0x98;

/// Bits of the run register: start a transfer, and its direction.
const GO: u32 = 1;
const TO_MEMORY: u32 = 2;

/// The address of the engine's buffer, in the device's address space, and its length in bytes.
const BUFFER: u64 = 0x40000;
const BUFFER_LEN: usize = 4096;

/// The time after which a transfer counts as failed. A transfer takes 100 ms of the machine's virtual time.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The engine.
#[derive(Debug)]
pub struct Edu {
    registers: Region,
    /// Locked during a transfer: the device has one engine.
    engine: Mutex<()>,
    device: VfioDevice,
    domain: Arc<dyn Domain>,
}

impl Edu {
    /// Drives `device`, which is in `domain`.
    pub fn new(device: VfioDevice, domain: Arc<dyn Domain>) -> Result<Self> {
        let registers = device.region(0)?;
        let edu = Self { registers, engine: Mutex::new(()), device, domain };
        // The device has no reset. A transfer that its previous user has started must end before this driver maps
        // memory; the domain is still empty.
        edu.wait()?;
        Ok(edu)
    }

    /// Calls `transfers` with a mapped scratch page. Calls are serialised, because the device has one engine.
    fn with_scratch<T>(&self, transfers: impl FnOnce(&OwnMemory) -> Result<T>) -> Result<T> {
        let _engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        transfers(&OwnMemory::map(&self.domain, 1)?)
    }

    /// Copies `len` bytes from memory at `from` into the engine's buffer.
    fn fill(&self, from: Iova, len: usize) -> Result<()> {
        self.run(from.0, BUFFER, len, GO)
    }

    /// Copies `len` bytes of the engine's buffer to memory at `to`.
    fn drain(&self, to: Iova, len: usize) -> Result<()> {
        self.run(BUFFER, to.0, len, GO | TO_MEMORY)
    }

    /// Makes one transfer. The engine ignores register writes while it runs, so an earlier transfer must end first.
    fn run(&self, source: u64, target: u64, len: usize, command: u32) -> Result<()> {
        self.wait()?;
        self.set_address(SOURCE, source)?;
        self.set_address(TARGET, target)?;
        self.set_word(COUNT, len as u32)?; // at most BUFFER_LEN
        self.set_word(RUN, command)?;
        self.wait()
    }

    /// Waits until no transfer is in progress.
    fn wait(&self) -> Result<()> {
        wait_until_idle(&self.device, self.registers)
    }

    /// Sets an address register. An access of 4 bytes sets all 64 bits, with zeroes in the upper half. An address
    /// beyond 4 GiB needs an access of 8 bytes, which VFIO makes from Linux 6.14 on and splits before, so the result is
    /// read back.
    fn set_address(&self, register: u64, address: u64) -> Result<()> {
        if let Ok(low) = u32::try_from(address) {
            return self.set_word(register, low);
        }
        let file = self.device.file();
        let whole = |failed: Failed<usize>| self.device.failed(failed.without_partial());
        let mut read = [0; 8];
        file.write(self.registers, register, &address.to_le_bytes()).map_err(whole)?;
        file.read(self.registers, register, &mut read).map_err(whole)?;
        if u64::from_le_bytes(read) == address {
            Ok(())
        } else {
            Err(self.error("setting an edu address beyond 4 GiB (needs Linux 6.14)", Errno::OVERFLOW))
        }
    }

    fn set_word(&self, register: u64, value: u32) -> Result<()> {
        self.device.write_u32(self.registers, register, value)
    }

    fn error(&self, call: &'static str, errno: Errno) -> Error {
        self.device.failed(Failed::new(call, errno))
    }
}

/// Waits until a device without a driver has no transfer in progress.
pub(crate) fn await_idle(device: &VfioDevice) -> Result<()> {
    wait_until_idle(device, device.region(0)?)
}

fn wait_until_idle(device: &VfioDevice, registers: Region) -> Result<()> {
    let begun = Instant::now();
    while device.read_u32(registers, RUN)? & GO != 0 {
        if begun.elapsed() > TRANSFER_TIMEOUT {
            return Err(device.failed(Failed::new("edu DMA", Errno::TIMEDOUT)));
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

impl Device for Edu {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn stop_class(&self) -> Steps {
        self.device.stop_class()
    }

    fn wanted(&self) -> Option<BorrowedFd<'_>> {
        self.device.wanted()
    }

    fn traits(&self) -> DeviceTraits {
        self.device.traits()
    }

    fn fence(&self, step: Step) -> Result<()> {
        self.device.fence(step)
    }

    fn attach(&self) -> Result<()> {
        self.device.attach()
    }

    fn guard(&self) -> Guard<'_> {
        self.device.guard()
    }

    /// The engine does not report that a DMA faulted: bytes that it could not read are [`POISON`].
    fn dma_read(&self, iova: Iova, len: usize) -> Result<Vec<u8>> {
        self.with_scratch(|scratch| {
            let failed = |failed| self.device.failed(failed);
            let mut bytes = vec![POISON; len];
            let mut at = iova;
            for chunk in bytes.chunks_mut(BUFFER_LEN) {
                // A faulting read leaves zeroes in the engine. If the copy to the page faults too, the page still has
                // the zeroes written here.
                scratch.file().write(0, chunk).map_err(failed)?;
                self.fill(at, chunk.len())?;
                self.drain(scratch.iova(0), chunk.len())?;
                scratch.file().read(0, chunk).map_err(failed)?;
                at.0 += chunk.len() as u64;
            }
            Ok(bytes)
        })
    }

    /// The engine does not report that a DMA faulted: a test must check the memory.
    fn dma_write(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        self.with_scratch(|scratch| {
            let mut at = iova;
            for chunk in bytes.chunks(BUFFER_LEN) {
                scratch.file().write(0, chunk).map_err(|failed| self.device.failed(failed))?;
                self.fill(scratch.iova(0), chunk.len())?;
                self.drain(at, chunk.len())?;
                at.0 += chunk.len() as u64;
            }
            Ok(())
        })
    }
}
