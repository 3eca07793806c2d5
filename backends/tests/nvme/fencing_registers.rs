//! A controller's registers that fence the drive right after a chosen write: in the middle of the work of the
//! driver's own thread.

use std::os::fd::BorrowedFd;
use std::sync::Weak;

use passgate_backends::{Device, Error, Result, Step};

use super::*;

/// Registers with fences.
#[derive(Debug)]
pub(super) struct FencingRegisters {
    registers: Arc<dyn Registers>,
    fence: Mutex<Option<FenceAfter>>,
    outcome: Mutex<Option<Result<(), Error>>>,
}

/// Fences of a drive, and the number of register writes until they are applied.
#[derive(Debug)]
struct FenceAfter {
    writes: u64,
    drive: Weak<Drive>,
    steps: Vec<Step>,
}

impl FencingRegisters {
    pub(super) fn new(registers: Arc<dyn Registers>) -> Arc<Self> {
        Arc::new(Self { registers, fence: Mutex::default(), outcome: Mutex::default() })
    }

    /// Fences `drive` by `steps` in turn after the `writes`th register write from now on. Doorbells of I/O queues do
    /// not count.
    pub(super) fn fence_after(&self, writes: u64, drive: &Arc<Drive>, steps: &[Step]) {
        let after = FenceAfter { writes, drive: Arc::downgrade(drive), steps: steps.to_vec() };
        *lock(&self.fence) = Some(after);
    }

    /// Returns the result of the fences, once they have been applied.
    pub(super) fn outcome(&self) -> Option<Result<(), Error>> {
        lock(&self.outcome).take()
    }
}

impl Registers for FencingRegisters {
    fn device(&self) -> &Arc<dyn Device> {
        self.registers.device()
    }

    fn is_attached(&self) -> bool {
        self.registers.is_attached()
    }

    fn get(&self, at: u64) -> Result<u32> {
        self.registers.get(at)
    }

    fn set(&self, at: u64, value: u32) -> Result<()> {
        self.registers.set(at, value)?;
        let due = lock(&self.fence).take_if(|fence| {
            fence.writes -= 1;
            fence.writes == 0
        });
        let Some(FenceAfter { drive, steps, .. }) = due else { return Ok(()) };
        // A drive that is being closed is not fenced.
        let Some(drive) = drive.upgrade() else { return Ok(()) };
        let outcome = steps.into_iter().try_for_each(|step| drive.fence(step));
        *lock(&self.outcome) = Some(outcome);
        Ok(())
    }

    fn ring(&self, at: u64, value: u32) -> Result<()> {
        self.registers.ring(at, value)
    }

    fn vectors(&self) -> Result<u32> {
        self.registers.vectors()
    }

    fn set_interrupts(&self, eventfds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        self.registers.set_interrupts(eventfds)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
