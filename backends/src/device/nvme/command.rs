//! Commands and completions in their encoding in memory (NVMe Base 2.0, 3.3.3 and 5; NVM Command Set 1.0, 3.2).

use passgate_bindings::{Iova, PAGE};

// Opcodes of admin commands (NVMe Base 2.0, 5).
const DELETE_SQ: u64 = 0x00;
const CREATE_SQ: u64 = 0x01;
const DELETE_CQ: u64 = 0x04;
const CREATE_CQ: u64 = 0x05;
const IDENTIFY: u64 = 0x06;
const ABORT: u64 = 0x08;
const SET_FEATURES: u64 = 0x09;
// Opcodes of I/O commands (NVMe Base 2.0, 7; NVM Command Set 1.0, 3.2).
const FLUSH: u64 = 0x00;
const WRITE: u64 = 0x01;
const READ: u64 = 0x02;
const WRITE_ZEROES: u64 = 0x08;
const DATASET_MANAGEMENT: u64 = 0x09;

/// Force Unit Access, in dword 12 of Write and Write Zeroes: the command completes once the blocks are on the medium.
const FUA: u64 = 1 << 30;
/// Deallocate, in dword 12 of Write Zeroes: the controller may deallocate the blocks.
const WRITE_ZEROES_DEALLOCATE: u64 = 1 << 25;
/// Attribute - Deallocate, in dword 11 of Dataset Management: the ranges are deallocated (discarded).
const DSM_DEALLOCATE: u64 = 1 << 2;

/// The feature identifier of Number of Queues.
const NUMBER_OF_QUEUES: u64 = 7;
/// PSDT in dword 0: the data pointer is an SGL descriptor (NVMe Base 2.0, 4.1.2). Without it, the data pointer is two
/// PRP entries (4.1.1).
const PSDT_SGL: u64 = 1 << 14;
// Types of SGL descriptors, in the upper half of their last byte.
const SGL_DATA_BLOCK: u64 = 0x00;
const SGL_LAST_SEGMENT: u64 = 0x30;

/// The memory of a command's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataPointer {
    /// This address and length in bytes: at most two pages, by two PRP entries. The address is a multiple of 4.
    Contiguous(Iova, u64),
    /// These two PRP entries. The second is an address of data or of a PRP list.
    Prp(Iova, u64),
    /// This address and length in bytes, at any alignment, by one SGL data block descriptor.
    SglData(Iova, u64),
    /// A segment of SGL descriptors: its address, and the number of descriptors.
    SglList(Iova, u64),
}

/// A submission queue entry, without its command identifier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Command(pub(super) [u64; 8]);

impl Command {
    /// Delete I/O Submission Queue; completes once the commands that the controller has taken from it have.
    pub(super) fn delete_sq(qid: u16) -> Self {
        Self([DELETE_SQ, 0, 0, 0, 0, qid.into(), 0, 0])
    }

    /// Delete I/O Completion Queue.
    pub(super) fn delete_cq(qid: u16) -> Self {
        Self([DELETE_CQ, 0, 0, 0, 0, qid.into(), 0, 0])
    }

    /// Create I/O Completion Queue: physically contiguous at `base`, with interrupts by `vector`.
    pub(super) fn create_cq(qid: u16, entries: u16, base: Iova, vector: u16) -> Self {
        const CONTIGUOUS: u64 = 1;
        const INTERRUPTS: u64 = 2;
        let cdw11 = CONTIGUOUS | INTERRUPTS | u64::from(vector) << 16;
        Self([CREATE_CQ, 0, 0, base.0, 0, queue_cdw10(qid, entries) | cdw11 << 32, 0, 0])
    }

    /// Create I/O Submission Queue: physically contiguous at `base`, with completions to the completion queue of the same number.
    pub(super) fn create_sq(qid: u16, entries: u16, base: Iova) -> Self {
        const CONTIGUOUS: u64 = 1;
        let cdw11 = CONTIGUOUS | u64::from(qid) << 16;
        Self([CREATE_SQ, 0, 0, base.0, 0, queue_cdw10(qid, entries) | cdw11 << 32, 0, 0])
    }

    /// Set Features, Number of Queues: requests `count` I/O queues of each kind. The completion has the number that
    /// was allocated ([`queues_granted`]).
    pub(super) fn set_queue_count(count: u16) -> Self {
        let count = u64::from(count.max(1) - 1); // counts and sizes in commands are zero-based
        Self([SET_FEATURES, 0, 0, 0, 0, NUMBER_OF_QUEUES | (count | count << 16) << 32, 0, 0])
    }

    /// Abort: requests that command `cid` of submission queue `sqid` be ended.
    pub(super) fn abort(sqid: u16, cid: u16) -> Self {
        Self([ABORT, 0, 0, 0, 0, u64::from(sqid) | u64::from(cid) << 16, 0, 0])
    }

    /// Flush: completes once all blocks whose writes have completed are on the medium.
    pub(super) fn flush(namespace: u32) -> Self {
        Self([FLUSH | u64::from(namespace) << 32, 0, 0, 0, 0, 0, 0, 0])
    }

    /// Write Zeroes to `blocks` blocks (1 to 65536) from `first` on. `deallocate` permits the controller to
    /// deallocate them; with `fua` it completes once that is on the medium.
    pub(super) fn write_zeroes(namespace: u32, first: u64, blocks: u32, deallocate: bool, fua: bool) -> Self {
        let flags = if deallocate { WRITE_ZEROES_DEALLOCATE } else { 0 } | if fua { FUA } else { 0 };
        let cdw12 = u64::from(blocks.max(1) - 1) & 0xffff | flags;
        Self([WRITE_ZEROES | u64::from(namespace) << 32, 0, 0, 0, 0, first, cdw12, 0])
    }

    /// Dataset Management: deallocates the blocks of the one range that is stored at `range` ([`dsm_range`]).
    pub(super) fn discard(namespace: u32, range: Iova) -> Self {
        Self([DATASET_MANAGEMENT | u64::from(namespace) << 32, 0, 0, range.0, 0, DSM_DEALLOCATE << 32, 0, 0])
    }

    /// Identify Controller (`namespace` 0) or Identify Namespace: writes 4096 bytes to memory at `to`.
    pub fn identify(namespace: u32, to: Iova) -> Self {
        let cns = u64::from(namespace == 0);
        let [prp1, prp2] = prps(to, PAGE);
        Self([IDENTIFY | u64::from(namespace) << 32, 0, 0, prp1, prp2, cns, 0, 0])
    }

    /// Identify: writes the namespace identification descriptors, 4096 bytes, to memory at `to`.
    pub(super) fn identify_descriptors(namespace: u32, to: Iova) -> Self {
        const CNS_DESCRIPTORS: u64 = 3;
        let [prp1, prp2] = prps(to, PAGE);
        Self([IDENTIFY | u64::from(namespace) << 32, 0, 0, prp1, prp2, CNS_DESCRIPTORS, 0, 0])
    }

    /// Identify: writes the controller's limits for the NVM command set, 4096 bytes, to memory at `to`.
    pub(super) fn identify_command_set(to: Iova) -> Self {
        const CNS_COMMAND_SET: u64 = 6;
        let [prp1, prp2] = prps(to, PAGE);
        Self([IDENTIFY, 0, 0, prp1, prp2, CNS_COMMAND_SET, 0, 0])
    }

    /// Write: `blocks` blocks (1 to 65536) from `first` on, from memory; with `fua` it completes once they are on the
    /// medium.
    pub fn write(namespace: u32, first: u64, blocks: u32, from: DataPointer, fua: bool) -> Self {
        let Self(mut words) = Self::transfer(WRITE, namespace, first, blocks, from);
        words[6] |= if fua { FUA } else { 0 };
        Self(words)
    }

    /// Read: `blocks` blocks (1 to 65536) from `first` on, to memory.
    pub fn read(namespace: u32, first: u64, blocks: u32, to: DataPointer) -> Self {
        Self::transfer(READ, namespace, first, blocks, to)
    }

    fn transfer(opcode: u64, namespace: u32, first: u64, blocks: u32, data: DataPointer) -> Self {
        let (sgl, [low, high]) = match data {
            DataPointer::Contiguous(at, len) => (0, prps(at, len)),
            DataPointer::Prp(at, second) => (0, [at.0, second]),
            DataPointer::SglData(at, len) => (PSDT_SGL, sgl_data(at, len)),
            DataPointer::SglList(at, count) => (PSDT_SGL, sgl_descriptor(at, count * 16, SGL_LAST_SEGMENT)),
        };
        let qword0 = opcode | sgl | u64::from(namespace) << 32;
        Self([qword0, 0, 0, low, high, first, u64::from(blocks.max(1) - 1) & 0xffff, 0])
    }
}

/// Returns a range in the format of Dataset Management.
pub(super) fn dsm_range(first: u64, blocks: u32) -> [u64; 2] {
    [u64::from(blocks) << 32, first]
}

/// Returns the number of I/O queues of each kind, from dword 0 of the completion of [`Command::set_queue_count`].
pub(super) fn queues_granted(dword0: u32) -> u16 {
    (dword0 as u16).min((dword0 >> 16) as u16).saturating_add(1)
}

fn queue_cdw10(qid: u16, entries: u16) -> u64 {
    u64::from(qid) | u64::from(entries - 1) << 16
}

/// Returns PRP entries 1 and 2: the address, and the page after it if the data extends into it (NVMe Base 2.0,
/// 4.1.1).
fn prps(at: Iova, len: u64) -> [u64; 2] {
    let next_page = (at.0 / PAGE + 1) * PAGE;
    [at.0, if at.0 + len > next_page { next_page } else { 0 }]
}

fn sgl_descriptor(at: Iova, len: u64, kind: u64) -> [u64; 2] {
    [at.0, len | kind << 56]
}

/// Returns an SGL data block descriptor of `len` bytes at `at`.
pub fn sgl_data(at: Iova, len: u64) -> [u64; 2] {
    sgl_descriptor(at, len, SGL_DATA_BLOCK)
}

/// A completion queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The identifier of the command that it completes.
    pub cid: u16,
    /// Status Code Type and Status Code (NVMe Base 2.0, 3.3.3.2.1); 0 for success.
    pub status: u16,
    /// Dword 0, whose meaning depends on the command.
    pub result: u32,
}

impl Completion {
    /// Data Transfer Error: the controller could not access the memory.
    pub const TRANSFER_ERROR: u16 = 0x04;

    /// Command Abort Requested: the command was ended by an Abort command.
    pub(super) const ABORTED: u16 = 0x07;

    /// Command Interrupted: the controller could not process the command now; the host retries it.
    pub(super) const INTERRUPTED: u16 = 0x21;

    /// Parses the second quadword of a completion queue entry. The Phase Tag is bit 48, between the CID and the
    /// status.
    pub(super) fn parse(word: u64) -> Self {
        Self { cid: (word >> 32) as u16, status: (word >> 49) as u16 & 0x7ff, result: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfer_and_queue_commands_have_the_specified_encoding() {
        let Command(words) = Command::read(1, 0x1_0000_0002, 8, DataPointer::Contiguous(Iova(0x1ffc), 4096));
        assert_eq!(words, [0x1_0000_0002, 0, 0, 0x1ffc, 0x2000, 0x1_0000_0002, 7, 0]);
        let Command(words) = Command::write(1, 5, 1, DataPointer::SglList(Iova(0x3000), 2), false);
        assert_eq!(words, [0x1_0000_4001, 0, 0, 0x3000, 0x3000_0000_0000_0020, 5, 0, 0]);
        let Command(words) = Command::create_cq(1, 64, Iova(0x4000), 2);
        assert_eq!(words, [5, 0, 0, 0x4000, 0, 0x2_0003_003f_0001, 0, 0]);
        let Command(words) = Command::create_sq(1, 64, Iova(0x5000));
        assert_eq!(words, [1, 0, 0, 0x5000, 0, 0x1_0001_003f_0001, 0, 0]);
        assert_eq!(Command::identify(0, Iova(0x6000)).0, [6, 0, 0, 0x6000, 0, 1, 0, 0]);
        assert_eq!(Command::identify_command_set(Iova(0x6000)).0, [6, 0, 0, 0x6000, 0, 6, 0, 0]);
        assert_eq!(
            Command::identify_descriptors(2, Iova(0x6000)).0,
            [0x2_0000_0006, 0, 0, 0x6000, 0, 3, 0, 0]
        );
        assert_eq!(Command::identify(1, Iova(0x6000)).0, [0x1_0000_0006, 0, 0, 0x6000, 0, 0, 0, 0]);
    }

    #[test]
    fn other_commands_have_the_specified_encoding() {
        assert_eq!(Command::set_queue_count(4).0, [9, 0, 0, 0, 0, 0x0003_0003_0000_0007, 0, 0]);
        assert_eq!(queues_granted(0x0003_0001), 2);
        assert_eq!(Command::abort(2, 9).0, [8, 0, 0, 0, 0, 0x0009_0002, 0, 0]);
        assert_eq!(Command::flush(3).0, [3 << 32, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            Command::write_zeroes(1, 7, 65536, true, false).0,
            [1 << 32 | 8, 0, 0, 0, 0, 7, 0x0200_ffff, 0]
        );
        assert_eq!(
            Command::write_zeroes(1, 7, 8, false, true).0,
            [1 << 32 | 8, 0, 0, 0, 0, 7, 0x4000_0007, 0]
        );
        assert_eq!(Command::discard(1, Iova(0x5000)).0, [1 << 32 | 9, 0, 0, 0x5000, 0, 4 << 32, 0, 0]);
        assert_eq!(dsm_range(9, 8), [8 << 32, 9]);
        let Command(words) = Command::write(1, 0, 8, DataPointer::Prp(Iova(0x1000), 0x2000), true);
        assert_eq!(words, [1 << 32 | 1, 0, 0, 0x1000, 0x2000, 0, 0x4000_0007, 0]);
    }

    #[test]
    fn second_prp_entry_is_set_only_if_data_crosses_a_page() {
        assert_eq!(prps(Iova(0x1000), 4096), [0x1000, 0]);
        assert_eq!(prps(Iova(0x1004), 4096), [0x1004, 0x2000]);
        assert_eq!(prps(Iova(0x1ffc), 4), [0x1ffc, 0]);
    }

    #[test]
    fn completion_is_parsed_without_its_phase_tag() {
        let word = 0x7 << 32 | 1 << 48 | 0x4004 << 49;
        assert_eq!(
            Completion::parse(word),
            Completion { cid: 7, status: Completion::TRANSFER_ERROR, result: 0 }
        );
        assert_eq!(Completion::parse(0x7 << 32).status, 0);
    }
}
