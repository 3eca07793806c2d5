//! The registers and interrupt vectors of the simulated controller (NVMe Base 2.0, 3.1.3).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use passgate_backends::nvme::Registers;
use passgate_backends::{Device, Result};
use passgate_bindings::Failed;
use rustix::io::Errno;

use super::Core;
use super::faults::ReadyChange;
use super::state::State;

// Register offsets in BAR 0; the doorbells begin at 1000h. The interrupt masks are not used with MSI-X.
const CAP: u64 = 0x00;
const VS: u64 = 0x08;
const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
pub(super) const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;

// CC (NVMe Base 2.0, 3.1.3.5) and CSTS (3.1.3.6).
const CC_EN: u32 = 1;
/// CC.SHN, both bits.
const CC_SHN: u32 = 3 << 14;
/// CC.IOSQES and CC.IOCQES, and their value for entries of 64 and 16 bytes.
const ENTRY_SIZES: u32 = 0xff << 16;
const EXPECTED_ENTRY_SIZES: u32 = 6 << 16 | 4 << 20;
const CSTS_RDY: u32 = 1;
const CSTS_CFS: u32 = 1 << 1;
const CSTS_SHST_COMPLETE: u32 = 2 << 2;

/// The value of every register of a controller that was removed.
const ALL_ONES: u32 = u32::MAX;

/// The registers of a simulated controller, as its driver accesses them.
#[derive(Debug)]
pub(super) struct SimRegisters {
    core: Arc<Core>,
    device: Arc<dyn Device>,
    /// An eventfd that is readable once the device is requested back.
    pub(super) removal: OwnedFd,
}

impl SimRegisters {
    pub(super) fn new(core: Arc<Core>, device: Arc<dyn Device>, removal: OwnedFd) -> Self {
        Self { core, device, removal }
    }

    /// Returns CAP: contiguous queues, the NVM command set, pages of 4 KiB to 64 KiB.
    fn capabilities(&self) -> u64 {
        let options = &self.core.options;
        u64::from(options.entries.max(2) - 1)
            | 1 << 16
            | u64::from(options.ready_timeout) << 24
            | u64::from(options.stride & 0xf) << 32
            | 1 << 37
            | u64::from(options.several_command_sets) << 43
            | 4 << 52
    }

    /// Handles a write of CC.
    fn configure(&self, state: &mut State, value: u32) {
        let previous = std::mem::replace(&mut state.cc, value);
        match (previous & CC_EN != 0, value & CC_EN != 0) {
            (false, true) => {
                if value & ENTRY_SIZES != EXPECTED_ENTRY_SIZES {
                    state.record_violation("CC.EN was set with wrong entry sizes".to_owned());
                }
                if state.ready {
                    state.record_violation("CC.EN was set while CSTS.RDY was still set".to_owned());
                }
                let change = state.faults.enables.pop_front().unwrap_or(ReadyChange::Immediate);
                state.change_ready(true, change, Instant::now());
            }
            // CC.EN may be cleared again after a clearing that had no effect.
            (true, false) | (false, false) if state.ready => {
                let change = state.faults.disables.pop_front().unwrap_or(ReadyChange::Immediate);
                state.change_ready(false, change, Instant::now());
            }
            (true, false) => state.change_ready(false, ReadyChange::Immediate, Instant::now()),
            _ => {}
        }
        if value & CC_SHN != 0 && previous & CC_SHN == 0 {
            self.core.medium.flush();
            state.is_shut_down = true;
        }
        if value & CC_SHN == 0 {
            state.is_shut_down = false;
        }
    }

    fn status(state: &State) -> u32 {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        bit(state.ready, CSTS_RDY) | bit(state.fatal, CSTS_CFS) | bit(state.is_shut_down, CSTS_SHST_COMPLETE)
    }
}

impl Registers for SimRegisters {
    fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn is_attached(&self) -> bool {
        self.core.port.is_attached()
    }

    fn get(&self, at: u64) -> Result<u32> {
        let mut state = self.core.lock();
        if state.gone {
            return Ok(ALL_ONES);
        }
        Ok(match at {
            CAP => self.capabilities() as u32,
            4 => (self.capabilities() >> 32) as u32,
            VS => 0x0002_0000,
            INTMS | INTMC => 0,
            CC => state.cc,
            CSTS => Self::status(&state),
            AQA => state.aqa,
            ASQ | ACQ => state.base(at) as u32,
            0x2c | 0x34 => (state.base(at - 4) >> 32) as u32,
            _ => {
                state.record_violation(format!("register {at:#x} was read"));
                0
            }
        })
    }

    fn set(&self, at: u64, value: u32) -> Result<()> {
        let mut state = self.core.lock();
        if state.gone {
            return Ok(());
        }
        match at {
            CC => self.configure(&mut state, value),
            AQA => state.aqa = value,
            ASQ | ACQ => {
                let base = state.base_mut(at);
                *base = *base & !0xffff_ffff | u64::from(value);
            }
            0x2c | 0x34 => {
                let base = state.base_mut(at - 4);
                *base = *base & 0xffff_ffff | u64::from(value) << 32;
            }
            INTMS | INTMC => {}
            DOORBELLS.. => {
                let step = 4u64 << (self.core.options.stride & 0xf);
                let nth = (at - DOORBELLS) / step;
                if !(at - DOORBELLS).is_multiple_of(step) {
                    state.record_violation(format!("{at:#x} is between doorbells"));
                } else if let Ok(queue) = u16::try_from(nth / 2) {
                    state.doorbell(queue, nth % 2 == 1, value);
                }
            }
            _ => state.record_violation(format!("{value:#x} was written to register {at:#x}")),
        }
        drop(state);
        self.core.changed.notify_all();
        Ok(())
    }

    fn removal(&self) -> Option<BorrowedFd<'_>> {
        Some(self.removal.as_fd())
    }

    fn vectors(&self) -> Result<u32> {
        Ok(self.core.options.vectors)
    }

    fn set_interrupts(&self, eventfds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        const CALL: &str = "giving a simulated controller its interrupts";
        if eventfds.len() as u64 > u64::from(self.core.options.vectors) {
            return Err(self.core.failed(Failed::new(CALL, Errno::INVAL)));
        }
        let copies = eventfds.iter().map(|fd| fd.map(|fd| fd.try_clone_to_owned()).transpose());
        let copies: std::io::Result<Vec<_>> = copies.collect();
        let copies = copies.map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::MFILE);
            self.core.failed(Failed::new(CALL, errno))
        })?;
        self.core.lock().vectors = copies;
        Ok(())
    }
}
