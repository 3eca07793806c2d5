//! Execution of commands by the simulated controller (NVMe Base 2.0, 5; NVM Command Set 1.0, 3.2). Written from the
//! specifications and independent of the driver's encoding, so that an error in one is found by the other.

use std::ops::Range;

use passgate_backends::Device;
use passgate_bindings::{Iova, PAGE};

use super::Core;
use super::queues::{CompletionQueue, SubmissionQueue};
use super::state::State;

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
    /// Dataset Management. [`super::super::CommandFilter::over`] does not select it, since its blocks are in memory.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// Status codes, with the Status Code Type above bit 7 (NVMe Base 2.0, 3.3.3.2.1).
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

/// A submission queue entry, as fetched.
#[derive(Debug, Clone, Copy)]
pub(super) struct SimCommand {
    pub(super) queue: u16,
    pub(super) words: [u64; 8],
}

/// The result of a command.
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

impl SimCommand {
    pub(super) fn opcode(&self) -> u8 {
        self.words[0] as u8
    }

    pub(super) fn cid(&self) -> u16 {
        (self.words[0] >> 16) as u16
    }

    fn namespace(&self) -> u32 {
        (self.words[0] >> 32) as u32
    }

    pub(super) fn is_sgl(&self) -> bool {
        self.words[0] >> 14 & 3 != 0
    }

    /// Returns the data pointer.
    pub(super) fn pointer(&self) -> (u64, u64) {
        (self.words[3], self.words[4])
    }

    /// Returns a command dword, 10 to 15.
    fn dword(&self, nth: usize) -> u32 {
        (self.words[nth / 2] >> (nth % 2 * 32)) as u32
    }

    /// Returns the blocks of the command, if they are in the entry itself.
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
    /// Executes a command.
    pub(super) fn execute(&self, state: &mut State, command: &SimCommand) -> Outcome {
        let result =
            if command.queue == 0 { self.admin(state, command) } else { self.io(command).map(|()| 0) };
        match result {
            Ok(result) => Outcome { status: 0, result },
            Err(status) => Outcome::failed(status),
        }
    }

    fn io(&self, command: &SimCommand) -> Result<(), u16> {
        let options = &self.options;
        let broadcast = command.opcode() == opcode::FLUSH && command.namespace() == u32::MAX;
        if command.namespace() != 1 && !broadcast {
            return Err(status::INVALID_NAMESPACE);
        }
        let (blocks, block) = (command.blocks(), u64::from(options.block));
        let (count, bytes) = (blocks.end - blocks.start, (blocks.end - blocks.start) * block);
        if blocks.end > options.blocks {
            return Err(status::OUT_OF_RANGE);
        }
        let writes =
            matches!(command.opcode(), opcode::WRITE | opcode::WRITE_ZEROES | opcode::DATASET_MANAGEMENT);
        if writes && options.read_only {
            return Err(status::WRITE_PROTECTED);
        }
        let max = if options.mdts > 0 { PAGE << options.mdts } else { u64::MAX };
        match command.opcode() {
            opcode::FLUSH => self.medium.flush(),
            opcode::READ | opcode::WRITE if bytes > max => return Err(status::INVALID_FIELD),
            opcode::READ => {
                let found = self.medium.read(blocks.start, count);
                self.write_data(command, &found)?;
            }
            opcode::WRITE => {
                let fua = command.dword(12) & 1 << 30 != 0;
                let got = self.read_data(command, bytes)?;
                self.medium.write_blocks(blocks.start, &got, fua);
            }
            opcode::WRITE_ZEROES if options.wzsl > 0 && bytes > PAGE << options.wzsl => {
                return Err(status::INVALID_FIELD);
            }
            opcode::WRITE_ZEROES if options.write_zeroes => {
                let deallocate = command.dword(12) & 1 << 25 != 0;
                let fua = command.dword(12) & 1 << 30 != 0;
                self.medium.zero(blocks.start, count, deallocate, fua);
            }
            opcode::DATASET_MANAGEMENT if options.discard => self.dataset_management(command)?,
            _ => return Err(status::INVALID_OPCODE),
        }
        Ok(())
    }

    /// Dataset Management: ranges of 16 bytes, each with the length at byte 4 and the first block at byte 8.
    fn dataset_management(&self, command: &SimCommand) -> Result<(), u16> {
        let ranges = self.read_data(command, (u64::from(command.dword(10) & 0xff) + 1) * 16)?;
        let word = |at: usize| {
            let bytes = ranges.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let ranges: Vec<_> = (0..ranges.len()).step_by(16).map(|at| (word(at + 8), word(at) >> 32)).collect();
        let fits = |(first, count): &(u64, u64)| first.saturating_add(*count) <= self.options.blocks;
        if !ranges.iter().all(fits) {
            return Err(status::OUT_OF_RANGE);
        }
        let max = u64::from(self.options.dmrsl);
        if max > 0 && ranges.iter().any(|(_, count)| *count > max) {
            return Err(status::INVALID_FIELD);
        }
        if command.dword(11) & 1 << 2 != 0 {
            ranges.into_iter().for_each(|(first, count)| self.medium.zero(first, count, true, false));
        }
        Ok(())
    }

    fn admin(&self, state: &mut State, command: &SimCommand) -> Result<u32, u16> {
        let (cdw10, cdw11) = (command.dword(10), command.dword(11));
        let (qid, size) = (cdw10 as u16, (cdw10 >> 16) + 1);
        let is_new = |there: bool| if there || qid == 0 { Err(status::INVALID_QUEUE) } else { Ok(()) };
        match command.opcode() {
            opcode::IDENTIFY => {
                let data = match cdw10 & 0xff {
                    0 if command.namespace() == 1 => self.identify_namespace(),
                    0 => return Err(status::INVALID_NAMESPACE),
                    1 => self.identify_controller(),
                    3 if self.options.descriptors && command.namespace() == 1 => self.identify_descriptors(),
                    6 if self.options.wzsl > 0 || self.options.dmrsl > 0 => self.identify_command_set(),
                    _ => return Err(status::INVALID_FIELD),
                };
                self.write_data(command, &data)?;
            }
            opcode::SET_FEATURES if cdw10 & 0xff == 7 => {
                if state.submissions.len() + state.completions.len() > 2 {
                    return Err(status::SEQUENCE);
                }
                let wanted = (cdw11 & 0xffff).min(cdw11 >> 16) + 1;
                state.granted = (wanted.min(u32::from(u16::MAX)) as u16).min(self.options.queues).max(1);
                let max = u32::from(state.granted) - 1;
                return Ok(max | max << 16);
            }
            opcode::SET_FEATURES => return Err(status::INVALID_FIELD),
            opcode::CREATE_CQ | opcode::CREATE_SQ if qid > state.granted => {
                state.record_violation(format!("queue {qid} is created where {} are granted", state.granted));
                return Err(status::INVALID_QUEUE);
            }
            opcode::CREATE_CQ | opcode::CREATE_SQ if size < 2 || size > u32::from(self.options.entries) => {
                return Err(status::INVALID_SIZE);
            }
            opcode::CREATE_CQ | opcode::CREATE_SQ
                if cdw11 & 1 == 0 || !command.pointer().0.is_multiple_of(PAGE) =>
            {
                return Err(status::INVALID_FIELD);
            }
            opcode::CREATE_CQ => {
                is_new(state.completions.contains_key(&qid))?;
                let vector = (cdw11 & 2 != 0).then_some((cdw11 >> 16) as u16);
                if vector.is_some_and(|vector| u32::from(vector) >= self.options.vectors) {
                    return Err(status::INVALID_VECTOR);
                }
                state.completions.insert(qid, CompletionQueue::new(command.pointer().0, size, vector));
            }
            opcode::CREATE_SQ => {
                is_new(state.submissions.contains_key(&qid))?;
                let cqid = (cdw11 >> 16) as u16;
                if cqid == 0 || !state.completions.contains_key(&cqid) {
                    return Err(status::NO_COMPLETION_QUEUE);
                }
                state.submissions.insert(qid, SubmissionQueue::new(command.pointer().0, size, cqid));
            }
            opcode::DELETE_SQ if qid == 0 || !state.submissions.contains_key(&qid) => {
                return Err(status::INVALID_QUEUE);
            }
            opcode::DELETE_SQ => {
                complete_pending(state, |of| of.queue == qid, status::QUEUE_DELETED);
                state.submissions.remove(&qid);
            }
            opcode::DELETE_CQ if qid == 0 || !state.completions.contains_key(&qid) => {
                return Err(status::INVALID_QUEUE);
            }
            opcode::DELETE_CQ => {
                if state.submissions.values().any(|submission| submission.cqid == qid) {
                    return Err(status::INVALID_DELETION);
                }
                state.completions.remove(&qid);
            }
            opcode::ABORT => {
                let cid = (cdw10 >> 16) as u16;
                let is_it = |of: &SimCommand| of.queue == qid && of.cid() == cid;
                let ended = !state.faults.ignore_aborts
                    && complete_pending(state, is_it, status::ABORT_REQUESTED) > 0;
                return Ok(u32::from(!ended)); // bit 0: the command was not aborted
            }
            _ => return Err(status::INVALID_OPCODE),
        }
        Ok(0)
    }

    /// Writes bytes to the memory of a command.
    fn write_data(&self, command: &SimCommand, mut bytes: &[u8]) -> Result<(), u16> {
        for (at, len) in self.spans(command, bytes.len() as u64)? {
            let (now, rest) = bytes.split_at(len as usize);
            self.port.dma_write(Iova(at), now).map_err(|_| self.count_fault())?;
            bytes = rest;
        }
        Ok(())
    }

    /// Reads bytes from the memory of a command.
    fn read_data(&self, command: &SimCommand, bytes: u64) -> Result<Vec<u8>, u16> {
        let mut got = Vec::with_capacity(bytes as usize);
        for (at, len) in self.spans(command, bytes)? {
            got.extend(self.port.dma_read(Iova(at), len as usize).map_err(|_| self.count_fault())?);
        }
        Ok(got)
    }

    /// Returns the Identify Controller data (NVMe Base 2.0, 5.17.2.1).
    fn identify_controller(&self) -> Vec<u8> {
        let options = &self.options;
        let mut data = vec![0; PAGE as usize];
        let mut put = |at: usize, bytes: &[u8]| data[at..at + bytes.len()].copy_from_slice(bytes);
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
        data
    }

    /// Returns the Namespace Identification Descriptor list (NVMe Base 2.0, 5.17.2.3): a UUID and the command set.
    fn identify_descriptors(&self) -> Vec<u8> {
        let mut data = vec![0; PAGE as usize];
        (data[0], data[1]) = (3, 16);
        data[4..20].fill(0x77);
        (data[20], data[21], data[24]) = (4, 1, self.options.command_set);
        data
    }

    /// Returns the I/O Command Set specific Identify Controller data (NVM Command Set 1.0, 4.1.5).
    fn identify_command_set(&self) -> Vec<u8> {
        let mut data = vec![0; PAGE as usize];
        data[1] = self.options.wzsl;
        data[4..8].copy_from_slice(&self.options.dmrsl.to_le_bytes());
        data
    }

    /// Returns the Identify Namespace data (NVM Command Set 1.0, 4.1.5).
    fn identify_namespace(&self) -> Vec<u8> {
        let mut data = vec![0; PAGE as usize];
        for at in [0, 8, 16] {
            data[at..at + 8].copy_from_slice(&self.options.blocks.to_le_bytes());
        }
        data[99] = u8::from(self.options.read_only);
        data[130] = self.options.block.trailing_zeros() as u8;
        data
    }
}

/// Completes the stalled commands that `which` selects, with `status`. Returns their number.
fn complete_pending(state: &mut State, which: impl Fn(&SimCommand) -> bool, status: u16) -> usize {
    let ended: Vec<_> = state.pending.extract_if(.., |pending| which(&pending.command)).collect();
    for pending in &ended {
        state.complete(pending.command.queue, pending.command.cid(), Outcome::failed(status));
    }
    ended.len()
}
