//! The simulated controller's registers and interrupt vectors (NVM Express base specification 2.0, 3.1.3).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use passgate_bindings::Failed;
use rustix::io::Errno;

use super::super::registers::{
    ACQ, AQA, ASQ, CAP, CC, CC_ENABLE, CSTS, CSTS_FATAL, CSTS_READY, CSTS_SHUTDOWN_DONE, DOORBELLS, GONE,
    Registers,
};
use super::Core;
use super::faults::Turn;
use super::life::Machine;
use crate::Result;
use crate::device::Device;

/// Version.
const VS: u64 = 0x08;
/// Interrupt masks, which nobody needs who has MSI-X.
const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;
/// CC.SHN.
const SHUT_DOWN: u32 = 3 << 14;
/// CC.IOSQES and CC.IOCQES, for entries of 64 and 16 bytes.
const ENTRIES: u32 = 0xff << 16;
const RIGHT_ENTRIES: u32 = 6 << 16 | 4 << 20;

/// What a driver sees of a controller.
#[derive(Debug)]
pub(super) struct Wires {
    core: Arc<Core>,
    device: Arc<dyn Device>,
    /// Readable once it is wanted back.
    pub(super) removal: OwnedFd,
}

impl Wires {
    pub(super) fn new(core: Arc<Core>, device: Arc<dyn Device>, removal: OwnedFd) -> Self {
        Self { core, device, removal }
    }

    /// CAP: queues contiguous, the NVM command set, pages of 4 KiB to 64 KiB.
    fn capabilities(&self) -> u64 {
        let options = &self.core.options;
        u64::from(options.entries.max(2) - 1)
            | 1 << 16
            | u64::from(options.patience) << 24
            | u64::from(options.stride & 0xf) << 32
            | 1 << 37
            | u64::from(options.several_command_sets) << 43
            | 4 << 52
    }

    fn configure(&self, machine: &mut Machine, value: u32) {
        let was = std::mem::replace(&mut machine.cc, value);
        match (was & CC_ENABLE != 0, value & CC_ENABLE != 0) {
            (false, true) => {
                if value & ENTRIES != RIGHT_ENTRIES {
                    machine.complain("it was enabled with entries of a size that it has not".to_owned());
                }
                if machine.ready {
                    machine.complain("it was enabled before it was not ready any more".to_owned());
                }
                let turn = machine.rules.enables.pop_front().unwrap_or(Turn::Prompt);
                machine.turn(true, turn, Instant::now());
            }
            // It is tried again where it had not come to anything.
            (true, false) | (false, false) if machine.ready => {
                let turn = machine.rules.disables.pop_front().unwrap_or(Turn::Prompt);
                machine.turn(false, turn, Instant::now());
            }
            (true, false) => machine.turn(false, Turn::Prompt, Instant::now()),
            _ => {}
        }
        if value & SHUT_DOWN != 0 && was & SHUT_DOWN == 0 {
            self.core.medium.flush();
            machine.is_shut_down = true;
        }
        if value & SHUT_DOWN == 0 {
            machine.is_shut_down = false;
        }
    }

    fn status(machine: &Machine) -> u32 {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        bit(machine.ready, CSTS_READY)
            | bit(machine.fatal, CSTS_FATAL)
            | bit(machine.is_shut_down, CSTS_SHUTDOWN_DONE)
    }
}

impl Registers for Wires {
    fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn is_attached(&self) -> bool {
        self.core.port.is_attached()
    }

    fn get(&self, at: u64) -> Result<u32> {
        let mut machine = self.core.lock();
        if machine.gone {
            return Ok(GONE);
        }
        Ok(match at {
            CAP => self.capabilities() as u32,
            4 => (self.capabilities() >> 32) as u32,
            VS => 0x0002_0000,
            INTMS | INTMC => 0,
            CC => machine.cc,
            CSTS => Self::status(&machine),
            AQA => machine.aqa,
            ASQ | ACQ => machine.base(at) as u32,
            0x2c | 0x34 => (machine.base(at - 4) >> 32) as u32,
            _ => {
                machine.complain(format!("register {at:#x} was read"));
                0
            }
        })
    }

    fn set(&self, at: u64, value: u32) -> Result<()> {
        let mut machine = self.core.lock();
        if machine.gone {
            return Ok(());
        }
        match at {
            CC => self.configure(&mut machine, value),
            AQA => machine.aqa = value,
            ASQ | ACQ => {
                let base = machine.base_mut(at);
                *base = *base & !0xffff_ffff | u64::from(value);
            }
            0x2c | 0x34 => {
                let base = machine.base_mut(at - 4);
                *base = *base & 0xffff_ffff | u64::from(value) << 32;
            }
            INTMS | INTMC => {}
            DOORBELLS.. => {
                let step = 4u64 << (self.core.options.stride & 0xf);
                let nth = (at - DOORBELLS) / step;
                if !(at - DOORBELLS).is_multiple_of(step) {
                    machine.complain(format!("{at:#x} is between doorbells"));
                } else if let Ok(queue) = u16::try_from(nth / 2) {
                    machine.doorbell(queue, nth % 2 == 1, value);
                }
            }
            _ => machine.complain(format!("{value:#x} was written to register {at:#x}")),
        }
        drop(machine);
        self.core.changed.notify_all();
        Ok(())
    }

    fn removal(&self) -> Option<BorrowedFd<'_>> {
        Some(self.removal.as_fd())
    }

    fn vectors(&self) -> Result<u32> {
        Ok(self.core.options.vectors)
    }

    fn interrupts(&self, eventfds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
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
