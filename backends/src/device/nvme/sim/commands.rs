//! What the simulated controller does for its commands (NVM Express base specification 2.0, 5; NVM command set
//! specification 1.0, 3). Written from the specification, not from the driver's encoding.

use std::ops::Range;

use passgate_bindings::{Iova, PAGE};

use super::Core;
use super::life::Machine;
use super::queues::{Completions, Submission};
use crate::device::Device;

/// Opcodes.
pub mod opcode {
    /// Admin: Delete I/O Submission Queue.
    pub const DELETE_SQ: u8 = 0x00;
    /// Admin: Create I/O Submission Queue.
    pub const CREATE_SQ: u8 = 0x01;
    /// Admin: Delete I/O Completion Queue.
    pub const DELETE_CQ: u8 = 0x04;
    /// Admin: Create I/O Completion Queue.
    pub const CREATE_CQ: u8 = 0x05;
    /// Admin: Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Admin: Abort.
    pub const ABORT: u8 = 0x08;
    /// Admin: Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management; [`super::super::When::over`] does not know its blocks.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// Status codes, with their type in the bits above the code (3.3.3.2.1).
pub(super) mod status {
    pub(in super::super) const INVALID_OPCODE: u16 = 0x01;
    pub(in super::super) const INVALID_FIELD: u16 = 0x02;
    pub(in super::super) const ID_CONFLICT: u16 = 0x03;
    pub(in super::super) const TRANSFER: u16 = 0x04;
    pub(in super::super) const ABORT_REQUESTED: u16 = 0x07;
    pub(in super::super) const QUEUE_DELETED: u16 = 0x08;
    pub(in super::super) const INVALID_NAMESPACE: u16 = 0x0b;
    pub(in super::super) const SEQUENCE: u16 = 0x0c;
    pub(in super::super) const SGL_SEGMENT: u16 = 0x0d;
    pub(in super::super) const SGL_LENGTH: u16 = 0x0f;
    pub(in super::super) const SGL_TYPE: u16 = 0x11;
    pub(in super::super) const PRP_OFFSET: u16 = 0x13;
    pub(in super::super) const SGL_GRANULARITY: u16 = 0x1e;
    pub(in super::super) const WRITE_PROTECTED: u16 = 0x20;
    pub(in super::super) const OUT_OF_RANGE: u16 = 0x80;
    pub(in super::super) const NO_COMPLETION_QUEUE: u16 = 0x100;
    pub(in super::super) const INVALID_QUEUE: u16 = 0x101;
    pub(in super::super) const INVALID_SIZE: u16 = 0x102;
    pub(in super::super) const INVALID_VECTOR: u16 = 0x108;
    pub(in super::super) const INVALID_DELETION: u16 = 0x10c;
}

/// A command as it was read from a queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told {
    pub(super) queue: u16,
    pub(super) words: [u64; 8],
}

/// How a command went.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outcome {
    pub(super) status: u16,
    /// Dword 0 of the completion.
    pub(super) result: u32,
}

impl Outcome {
    pub(super) fn failed(status: u16) -> Self {
        Self { status, result: 0 }
    }
}

impl Told {
    pub(super) fn opcode(&self) -> u8 {
        self.words[0] as u8
    }

    pub(super) fn id(&self) -> u16 {
        (self.words[0] >> 16) as u16
    }

    fn namespace(&self) -> u32 {
        (self.words[0] >> 32) as u32
    }

    pub(super) fn is_sgl(&self) -> bool {
        self.words[0] >> 14 & 3 != 0
    }

    /// The data pointer.
    pub(super) fn pointer(&self) -> (u64, u64) {
        (self.words[3], self.words[4])
    }

    /// A dword, from 10 to 15.
    fn dword(&self, nth: usize) -> u32 {
        (self.words[nth / 2] >> (nth % 2 * 32)) as u32
    }

    /// The blocks that it is about, where it says so itself.
    pub(super) fn blocks(&self) -> Range<u64> {
        let has = matches!(self.opcode(), opcode::READ | opcode::WRITE | opcode::WRITE_ZEROES);
        if self.queue == 0 || !has {
            return 0..0;
        }
        let count = u64::from(self.dword(12) & 0xffff) + 1;
        self.words[5]..self.words[5].saturating_add(count)
    }
}

impl Core {
    /// Does a command.
    pub(super) fn execute(&self, machine: &mut Machine, told: &Told) -> Outcome {
        let result = if told.queue == 0 { self.admin(machine, told) } else { self.io(told).map(|()| 0) };
        match result {
            Ok(result) => Outcome { status: 0, result },
            Err(status) => Outcome::failed(status),
        }
    }

    fn io(&self, told: &Told) -> Result<(), u16> {
        let options = &self.options;
        let broadcast = told.opcode() == opcode::FLUSH && told.namespace() == u32::MAX;
        if told.namespace() != 1 && !broadcast {
            return Err(status::INVALID_NAMESPACE);
        }
        let (blocks, block) = (told.blocks(), u64::from(options.block));
        let (count, bytes) = (blocks.end - blocks.start, (blocks.end - blocks.start) * block);
        if blocks.end > options.blocks {
            return Err(status::OUT_OF_RANGE);
        }
        let writes =
            matches!(told.opcode(), opcode::WRITE | opcode::WRITE_ZEROES | opcode::DATASET_MANAGEMENT);
        if writes && options.read_only {
            return Err(status::WRITE_PROTECTED);
        }
        let most = if options.mdts > 0 { PAGE << options.mdts } else { u64::MAX };
        match told.opcode() {
            opcode::FLUSH => self.medium.flush(),
            opcode::READ | opcode::WRITE if bytes > most => return Err(status::INVALID_FIELD),
            opcode::READ => {
                let found = self.medium.read(blocks.start, count);
                self.give(told, &found)?;
            }
            opcode::WRITE => {
                let through = told.dword(12) & 1 << 30 != 0;
                let got = self.get(told, bytes)?;
                self.medium.put(blocks.start, &got, through);
            }
            opcode::WRITE_ZEROES if options.zeroes > 0 && bytes > PAGE << options.zeroes => {
                return Err(status::INVALID_FIELD);
            }
            opcode::WRITE_ZEROES if options.write_zeroes => {
                let give_up = told.dword(12) & 1 << 25 != 0;
                let through = told.dword(12) & 1 << 30 != 0;
                self.medium.clear(blocks.start, count, give_up, through);
            }
            opcode::DATASET_MANAGEMENT if options.discard => self.manage(told)?,
            _ => return Err(status::INVALID_OPCODE),
        }
        Ok(())
    }

    /// Dataset Management: ranges of 16 bytes, each with its length at 4 and its first block at 8.
    fn manage(&self, told: &Told) -> Result<(), u16> {
        let ranges = self.get(told, (u64::from(told.dword(10) & 0xff) + 1) * 16)?;
        let word = |at: usize| {
            let bytes = ranges.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let ranges: Vec<_> = (0..ranges.len()).step_by(16).map(|at| (word(at + 8), word(at) >> 32)).collect();
        let fits = |(first, count): &(u64, u64)| first.saturating_add(*count) <= self.options.blocks;
        if !ranges.iter().all(fits) {
            return Err(status::OUT_OF_RANGE);
        }
        let most = u64::from(self.options.range);
        if most > 0 && ranges.iter().any(|(_, count)| *count > most) {
            return Err(status::INVALID_FIELD);
        }
        if told.dword(11) & 1 << 2 != 0 {
            ranges.into_iter().for_each(|(first, count)| self.medium.clear(first, count, true, false));
        }
        Ok(())
    }

    fn admin(&self, machine: &mut Machine, told: &Told) -> Result<u32, u16> {
        let (ten, eleven) = (told.dword(10), told.dword(11));
        let (id, size) = (ten as u16, (ten >> 16) + 1);
        let is_new = |there: bool| if there || id == 0 { Err(status::INVALID_QUEUE) } else { Ok(()) };
        match told.opcode() {
            opcode::IDENTIFY => {
                let said = match ten & 0xff {
                    0 if told.namespace() == 1 => self.namespace(),
                    0 => return Err(status::INVALID_NAMESPACE),
                    1 => self.controller(),
                    3 if self.options.descriptors && told.namespace() == 1 => self.descriptors(),
                    6 if self.options.zeroes > 0 || self.options.range > 0 => self.command_set(),
                    _ => return Err(status::INVALID_FIELD),
                };
                self.give(told, &said)?;
            }
            opcode::SET_FEATURES if ten & 0xff == 7 => {
                if machine.submissions.len() + machine.completions.len() > 2 {
                    return Err(status::SEQUENCE);
                }
                let wanted = (eleven & 0xffff).min(eleven >> 16) + 1;
                machine.granted = (wanted.min(u32::from(u16::MAX)) as u16).min(self.options.queues).max(1);
                let most = u32::from(machine.granted) - 1;
                return Ok(most | most << 16);
            }
            opcode::SET_FEATURES => return Err(status::INVALID_FIELD),
            opcode::CREATE_CQ | opcode::CREATE_SQ if id > machine.granted => {
                machine.complain(format!("queue {id} is created where {} are granted", machine.granted));
                return Err(status::INVALID_QUEUE);
            }
            opcode::CREATE_CQ | opcode::CREATE_SQ if size < 2 || size > u32::from(self.options.entries) => {
                return Err(status::INVALID_SIZE);
            }
            opcode::CREATE_CQ | opcode::CREATE_SQ
                if eleven & 1 == 0 || !told.pointer().0.is_multiple_of(PAGE) =>
            {
                return Err(status::INVALID_FIELD);
            }
            opcode::CREATE_CQ => {
                is_new(machine.completions.contains_key(&id))?;
                let vector = (eleven & 2 != 0).then_some((eleven >> 16) as u16);
                if vector.is_some_and(|vector| u32::from(vector) >= self.options.vectors) {
                    return Err(status::INVALID_VECTOR);
                }
                machine.completions.insert(id, Completions::new(told.pointer().0, size, vector));
            }
            opcode::CREATE_SQ => {
                is_new(machine.submissions.contains_key(&id))?;
                let to = (eleven >> 16) as u16;
                if to == 0 || !machine.completions.contains_key(&to) {
                    return Err(status::NO_COMPLETION_QUEUE);
                }
                machine.submissions.insert(id, Submission::new(told.pointer().0, size, to));
            }
            opcode::DELETE_SQ if id == 0 || !machine.submissions.contains_key(&id) => {
                return Err(status::INVALID_QUEUE);
            }
            opcode::DELETE_SQ => {
                end(machine, |of| of.queue == id, status::QUEUE_DELETED);
                machine.submissions.remove(&id);
            }
            opcode::DELETE_CQ if id == 0 || !machine.completions.contains_key(&id) => {
                return Err(status::INVALID_QUEUE);
            }
            opcode::DELETE_CQ => {
                if machine.submissions.values().any(|submission| submission.to == id) {
                    return Err(status::INVALID_DELETION);
                }
                machine.completions.remove(&id);
            }
            opcode::ABORT => {
                let which = (ten >> 16) as u16;
                let is_it = |of: &Told| of.queue == id && of.id() == which;
                let ended = !machine.rules.deaf_to_aborts && end(machine, is_it, status::ABORT_REQUESTED) > 0;
                return Ok(u32::from(!ended));
            }
            _ => return Err(status::INVALID_OPCODE),
        }
        Ok(0)
    }

    /// Moves bytes to the memory of a command.
    fn give(&self, told: &Told, mut bytes: &[u8]) -> Result<(), u16> {
        for (at, len) in self.spans(told, bytes.len() as u64)? {
            let (now, rest) = bytes.split_at(len as usize);
            self.port.dma_write(Iova(at), now).map_err(|_| self.faulted())?;
            bytes = rest;
        }
        Ok(())
    }

    /// Fetches bytes from the memory of a command.
    fn get(&self, told: &Told, bytes: u64) -> Result<Vec<u8>, u16> {
        let mut got = Vec::with_capacity(bytes as usize);
        for (at, len) in self.spans(told, bytes)? {
            got.extend(self.port.dma_read(Iova(at), len as usize).map_err(|_| self.faulted())?);
        }
        Ok(got)
    }

    /// Identify Controller (5.17.2.1).
    fn controller(&self) -> Vec<u8> {
        let options = &self.options;
        let mut said = vec![0; PAGE as usize];
        let mut put = |at: usize, bytes: &[u8]| said[at..at + bytes.len()].copy_from_slice(bytes);
        let padded = |text: &str, len: usize| format!("{text:<len$.len$}").into_bytes();
        put(4, &padded(&options.serial, 20));
        put(24, &padded(&options.model, 40));
        put(64, &padded("1", 8));
        put(77, &[options.mdts]);
        put(80, &0x0002_0000u32.to_le_bytes());
        put(512, &[0x66, 0x44]);
        put(516, &1u32.to_le_bytes());
        let optional = u16::from(options.discard) << 2 | u16::from(options.write_zeroes) << 3;
        put(520, &optional.to_le_bytes());
        put(525, &[u8::from(options.volatile_cache)]);
        put(536, &u32::from(options.sgl & 3).to_le_bytes());
        said
    }

    /// Namespace Identification Descriptor list (5.17.2.3): a UUID, and the command set.
    fn descriptors(&self) -> Vec<u8> {
        let mut said = vec![0; PAGE as usize];
        (said[0], said[1]) = (3, 16);
        said[4..20].fill(0x77);
        (said[20], said[21], said[24]) = (4, 1, self.options.command_set);
        said
    }

    /// I/O Command Set specific Identify Controller (NVM command set specification 1.0, 4.1.5.2).
    fn command_set(&self) -> Vec<u8> {
        let mut said = vec![0; PAGE as usize];
        said[1] = self.options.zeroes;
        said[4..8].copy_from_slice(&self.options.range.to_le_bytes());
        said
    }

    /// Identify Namespace (NVM command set specification 1.0, 4.1.5.1).
    fn namespace(&self) -> Vec<u8> {
        let mut said = vec![0; PAGE as usize];
        for at in [0, 8, 16] {
            said[at..at + 8].copy_from_slice(&self.options.blocks.to_le_bytes());
        }
        said[99] = u8::from(self.options.read_only);
        said[130] = self.options.block.trailing_zeros() as u8;
        said
    }
}

/// Ends what is held of these commands; how many there were.
fn end(machine: &mut Machine, which: impl Fn(&Told) -> bool, status: u16) -> usize {
    let ended: Vec<_> = machine.pending.extract_if(.., |pending| which(&pending.told)).collect();
    for pending in &ended {
        machine.complete(pending.told.queue, pending.told.id(), Outcome::failed(status));
    }
    ended.len()
}
