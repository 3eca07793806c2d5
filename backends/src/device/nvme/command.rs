//! Commands and completions, as they lie in memory (NVM Express base specification 2.0, 3.3.3 and 4.2; NVM command
//! set specification 1.0, 3).

use passgate_bindings::{Iova, PAGE};

/// Admin commands.
const DELETE_SQ: u64 = 0x00;
const CREATE_SQ: u64 = 0x01;
const DELETE_CQ: u64 = 0x04;
const CREATE_CQ: u64 = 0x05;
const IDENTIFY: u64 = 0x06;
const SET_FEATURES: u64 = 0x09;
/// Commands of the NVM command set.
const WRITE: u64 = 0x01;
const READ: u64 = 0x02;

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

    /// A physically contiguous completion queue of `slots`, with interrupt vector 0.
    pub(super) fn create_cq(id: u16, slots: u16, at: Iova) -> Self {
        const CONTIGUOUS: u64 = 1;
        const INTERRUPTS: u64 = 2;
        Self([CREATE_CQ, 0, 0, at.0, 0, queue(id, slots) | (CONTIGUOUS | INTERRUPTS) << 32, 0, 0])
    }

    /// A physically contiguous submission queue of `slots`, whose completions go to completion queue `id`.
    pub(super) fn create_sq(id: u16, slots: u16, at: Iova) -> Self {
        const CONTIGUOUS: u64 = 1;
        let second = CONTIGUOUS | u64::from(id) << 16;
        Self([CREATE_SQ, 0, 0, at.0, 0, queue(id, slots) | second << 32, 0, 0])
    }

    /// Asks for one queue each way.
    pub(super) fn one_queue_each() -> Self {
        Self([SET_FEATURES, 0, 0, 0, 0, QUEUES, 0, 0])
    }

    /// 4096 bytes about the controller (`namespace` 0) or a namespace, to memory at `to`.
    pub(super) fn identify(namespace: u32, to: Iova) -> Self {
        let what = u64::from(namespace == 0);
        let [first, second] = pages(to, PAGE);
        Self([IDENTIFY | u64::from(namespace) << 32, 0, 0, first, second, what, 0, 0])
    }

    /// `blocks` blocks from `first` on, from memory to the medium.
    pub(super) fn write(first: u64, blocks: u16, from: Data) -> Self {
        Self::transfer(WRITE, first, blocks, from)
    }

    /// `blocks` blocks from `first` on, from the medium to memory.
    pub(super) fn read(first: u64, blocks: u16, to: Data) -> Self {
        Self::transfer(READ, first, blocks, to)
    }

    fn transfer(opcode: u64, first: u64, blocks: u16, data: Data) -> Self {
        const NAMESPACE_1: u64 = 1 << 32;
        let (sgl, [one, two]) = match data {
            Data::Pages(at, len) => (0, pages(at, len)),
            Data::Block(at, len) => (SGL, block(at, len)),
            Data::List(at, count) => (SGL, descriptor(at, count * 16, LAST_SEGMENT)),
        };
        Self([opcode | sgl | NAMESPACE_1, 0, 0, one, two, first, u64::from(blocks - 1), 0])
    }
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
}

impl Completion {
    /// Data Transfer Error: the controller could not reach the memory.
    pub(super) const TRANSFER_ERROR: u16 = 0x04;

    /// From the second half of a completion queue entry; the phase bit is the first after the identifier.
    pub(super) fn of(word: u64) -> Self {
        Self { id: (word >> 32) as u16, status: (word >> 49) as u16 & 0x7ff }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_lie_as_the_specification_has_them() {
        let Command(words) = Command::read(0x1_0000_0002, 8, Data::Pages(Iova(0x1ffc), 4096));
        assert_eq!(words, [0x1_0000_0002, 0, 0, 0x1ffc, 0x2000, 0x1_0000_0002, 7, 0]);
        let Command(words) = Command::write(5, 1, Data::List(Iova(0x3000), 2));
        assert_eq!(words, [0x1_0000_4001, 0, 0, 0x3000, 0x3000_0000_0000_0020, 5, 0, 0]);
        let Command(words) = Command::create_cq(1, 64, Iova(0x4000));
        assert_eq!(words, [5, 0, 0, 0x4000, 0, 0x3_003f_0001, 0, 0]);
        let Command(words) = Command::create_sq(1, 64, Iova(0x5000));
        assert_eq!(words, [1, 0, 0, 0x5000, 0, 0x1_0001_003f_0001, 0, 0]);
        assert_eq!(Command::identify(0, Iova(0x6000)).0, [6, 0, 0, 0x6000, 0, 1, 0, 0]);
        assert_eq!(Command::identify(1, Iova(0x6000)).0, [0x1_0000_0006, 0, 0, 0x6000, 0, 0, 0, 0]);
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
        assert_eq!(Completion::of(word), Completion { id: 7, status: Completion::TRANSFER_ERROR });
        assert_eq!(Completion::of(0x7 << 32).status, 0);
    }
}
