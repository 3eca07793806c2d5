//! Commands and completions, as they lie in memory (NVM Express base specification 2.0, 3.3.3 and 4.2; NVM command
//! set specification 1.0, 3).

use passgate_bindings::{Iova, PAGE};

/// Admin commands.
const DELETE_SQ: u64 = 0x00;
const CREATE_SQ: u64 = 0x01;
const DELETE_CQ: u64 = 0x04;
const CREATE_CQ: u64 = 0x05;
const IDENTIFY: u64 = 0x06;
const ABORT: u64 = 0x08;
const SET_FEATURES: u64 = 0x09;
/// Commands of the NVM command set.
const FLUSH: u64 = 0x00;
const WRITE: u64 = 0x01;
const READ: u64 = 0x02;
const WRITE_ZEROES: u64 = 0x08;
const DATASET_MANAGEMENT: u64 = 0x09;

/// In dword 12 of a write or of Write Zeroes: it completes once it is on the medium.
const FUA: u64 = 1 << 30;
/// In dword 12 of Write Zeroes: what is zeroed may be given up.
const DEALLOCATE: u64 = 1 << 25;
/// In dword 11 of Dataset Management: the ranges are given up.
const DISCARD: u64 = 1 << 2;

/// Number of Queues, a feature.
const QUEUES: u64 = 7;
/// In dword 0: the data pointer is an SGL.
const SGL: u64 = 1 << 14;
/// SGL descriptor types, in the last of their bytes.
const DATA_BLOCK: u64 = 0x00;
const LAST_SEGMENT: u64 = 0x30;

/// Where a command's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Data {
    /// At most two pages' worth, by two physical region page entries; the address is a multiple of 4.
    Pages(Iova, u64),
    /// These two physical region page entries.
    Pair(Iova, u64),
    /// So many bytes at any address, by an SGL descriptor.
    Block(Iova, u64),
    /// A list of SGL descriptors at this address, so many.
    List(Iova, u64),
}

/// A command: 64 bytes, without its identifier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Command(pub(super) [u64; 8]);

impl Command {
    /// Submission queue `id` goes; completes once what was in it has.
    pub(super) fn delete_sq(id: u16) -> Self {
        Self([DELETE_SQ, 0, 0, 0, 0, id.into(), 0, 0])
    }

    /// Completion queue `id` goes.
    pub(super) fn delete_cq(id: u16) -> Self {
        Self([DELETE_CQ, 0, 0, 0, 0, id.into(), 0, 0])
    }

    /// A physically contiguous completion queue of `slots`, with interrupts by `vector`.
    pub(super) fn create_cq(id: u16, slots: u16, at: Iova, vector: u16) -> Self {
        const CONTIGUOUS: u64 = 1;
        const INTERRUPTS: u64 = 2;
        let second = CONTIGUOUS | INTERRUPTS | u64::from(vector) << 16;
        Self([CREATE_CQ, 0, 0, at.0, 0, queue(id, slots) | second << 32, 0, 0])
    }

    /// A physically contiguous submission queue of `slots`, whose completions go to completion queue `id`.
    pub(super) fn create_sq(id: u16, slots: u16, at: Iova) -> Self {
        const CONTIGUOUS: u64 = 1;
        let second = CONTIGUOUS | u64::from(id) << 16;
        Self([CREATE_SQ, 0, 0, at.0, 0, queue(id, slots) | second << 32, 0, 0])
    }

    /// Asks for so many queues each way; the completion says how many there are ([`granted`]).
    pub(super) fn queues(count: u16) -> Self {
        let count = u64::from(count.max(1) - 1);
        Self([SET_FEATURES, 0, 0, 0, 0, QUEUES | (count | count << 16) << 32, 0, 0])
    }

    /// Asks that command `id` of submission queue `queue` be ended.
    pub(super) fn abort(queue: u16, id: u16) -> Self {
        Self([ABORT, 0, 0, 0, 0, u64::from(queue) | u64::from(id) << 16, 0, 0])
    }

    /// What was written before is on the medium once it completes.
    pub(super) fn flush(namespace: u32) -> Self {
        Self([FLUSH | u64::from(namespace) << 32, 0, 0, 0, 0, 0, 0, 0])
    }

    /// `blocks` blocks from `first` on read as zeroes; `deallocate` where they may be given up; `fua`: it completes
    /// once that is on the medium.
    pub(super) fn write_zeroes(namespace: u32, first: u64, blocks: u32, deallocate: bool, fua: bool) -> Self {
        let flags = if deallocate { DEALLOCATE } else { 0 } | if fua { FUA } else { 0 };
        let twelve = u64::from(blocks.max(1) - 1) & 0xffff | flags;
        Self([WRITE_ZEROES | u64::from(namespace) << 32, 0, 0, 0, 0, first, twelve, 0])
    }

    /// Gives the blocks up that the one range at `range` names ([`range`]).
    pub(super) fn discard(namespace: u32, range: Iova) -> Self {
        Self([DATASET_MANAGEMENT | u64::from(namespace) << 32, 0, 0, range.0, 0, DISCARD << 32, 0, 0])
    }

    /// 4096 bytes about the controller (`namespace` 0) or a namespace, to memory at `to`.
    pub(super) fn identify(namespace: u32, to: Iova) -> Self {
        let what = u64::from(namespace == 0);
        let [first, second] = pages(to, PAGE);
        Self([IDENTIFY | u64::from(namespace) << 32, 0, 0, first, second, what, 0, 0])
    }

    /// The namespace's identification descriptors, 4096 bytes, to memory at `to`.
    pub(super) fn identify_descriptors(namespace: u32, to: Iova) -> Self {
        const DESCRIPTORS: u64 = 3;
        let [first, second] = pages(to, PAGE);
        Self([IDENTIFY | u64::from(namespace) << 32, 0, 0, first, second, DESCRIPTORS, 0, 0])
    }

    /// 4096 bytes about what the controller does of the NVM command set, to memory at `to`.
    pub(super) fn identify_command_set(to: Iova) -> Self {
        const COMMAND_SET: u64 = 6;
        let [first, second] = pages(to, PAGE);
        Self([IDENTIFY, 0, 0, first, second, COMMAND_SET, 0, 0])
    }

    /// `blocks` blocks from `first` on, from memory to the medium; `fua`: it completes once they are there.
    pub(super) fn write(namespace: u32, first: u64, blocks: u32, from: Data, fua: bool) -> Self {
        let Self(mut words) = Self::transfer(WRITE, namespace, first, blocks, from);
        words[6] |= if fua { FUA } else { 0 };
        Self(words)
    }

    /// `blocks` blocks from `first` on, from the medium to memory.
    pub(super) fn read(namespace: u32, first: u64, blocks: u32, to: Data) -> Self {
        Self::transfer(READ, namespace, first, blocks, to)
    }

    fn transfer(opcode: u64, namespace: u32, first: u64, blocks: u32, data: Data) -> Self {
        let (sgl, [one, two]) = match data {
            Data::Pages(at, len) => (0, pages(at, len)),
            Data::Pair(at, second) => (0, [at.0, second]),
            Data::Block(at, len) => (SGL, block(at, len)),
            Data::List(at, count) => (SGL, descriptor(at, count * 16, LAST_SEGMENT)),
        };
        let head = opcode | sgl | u64::from(namespace) << 32;
        Self([head, 0, 0, one, two, first, u64::from(blocks.max(1) - 1) & 0xffff, 0])
    }
}

/// A range of blocks, as Dataset Management reads it.
pub(super) fn range(first: u64, blocks: u32) -> [u64; 2] {
    [u64::from(blocks) << 32, first]
}

/// Queues each way that there are, from the completion of [`Command::queues`].
pub(super) fn granted(dword0: u32) -> u16 {
    (dword0 as u16).min((dword0 >> 16) as u16).saturating_add(1)
}

fn queue(id: u16, slots: u16) -> u64 {
    u64::from(id) | u64::from(slots - 1) << 16
}

/// PRP 1 and 2: the address, and the page that the data goes on in.
fn pages(at: Iova, len: u64) -> [u64; 2] {
    let next = (at.0 / PAGE + 1) * PAGE;
    [at.0, if at.0 + len > next { next } else { 0 }]
}

fn descriptor(at: Iova, len: u64, kind: u64) -> [u64; 2] {
    [at.0, len | kind << 56]
}

/// An SGL descriptor of `len` bytes at `at`.
pub(super) fn block(at: Iova, len: u64) -> [u64; 2] {
    descriptor(at, len, DATA_BLOCK)
}

/// What became of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Completion {
    /// The command's identifier.
    pub(super) id: u16,
    /// Status code and type (3.3.3.2.1); 0 for success.
    pub(super) status: u16,
    /// Dword 0, by its command.
    pub(super) result: u32,
}

impl Completion {
    /// Data Transfer Error: the controller could not reach the memory.
    pub(super) const TRANSFER_ERROR: u16 = 0x04;

    /// Command Abort Requested.
    pub(super) const ABORTED: u16 = 0x07;

    /// Command Interrupted: the controller had something more urgent, and wants it asked for again.
    pub(super) const INTERRUPTED: u16 = 0x21;

    /// From the second half of a completion queue entry; the phase bit is the first after the identifier.
    pub(super) fn of(word: u64) -> Self {
        Self { id: (word >> 32) as u16, status: (word >> 49) as u16 & 0x7ff, result: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_lie_as_the_specification_has_them() {
        let Command(words) = Command::read(1, 0x1_0000_0002, 8, Data::Pages(Iova(0x1ffc), 4096));
        assert_eq!(words, [0x1_0000_0002, 0, 0, 0x1ffc, 0x2000, 0x1_0000_0002, 7, 0]);
        let Command(words) = Command::write(1, 5, 1, Data::List(Iova(0x3000), 2), false);
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
    fn what_is_not_a_transfer_lies_as_the_specification_has_it_too() {
        assert_eq!(Command::queues(4).0, [9, 0, 0, 0, 0, 0x0003_0003_0000_0007, 0, 0]);
        assert_eq!(granted(0x0003_0001), 2);
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
        assert_eq!(range(9, 8), [8 << 32, 9]);
        let Command(words) = Command::write(1, 0, 8, Data::Pair(Iova(0x1000), 0x2000), true);
        assert_eq!(words, [1 << 32 | 1, 0, 0, 0x1000, 0x2000, 0, 0x4000_0007, 0]);
    }

    #[test]
    fn a_page_list_goes_on_only_where_the_data_does() {
        assert_eq!(pages(Iova(0x1000), 4096), [0x1000, 0]);
        assert_eq!(pages(Iova(0x1004), 4096), [0x1004, 0x2000]);
        assert_eq!(pages(Iova(0x1ffc), 4), [0x1ffc, 0]);
    }

    #[test]
    fn a_completion_is_read_past_its_phase() {
        let word = 0x7 << 32 | 1 << 48 | 0x4004 << 49;
        assert_eq!(Completion::of(word), Completion { id: 7, status: Completion::TRANSFER_ERROR, result: 0 });
        assert_eq!(Completion::of(0x7 << 32).status, 0);
    }
}
