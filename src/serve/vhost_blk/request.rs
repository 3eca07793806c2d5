//! Parsing of a guest's request from its descriptor chain (virtio 1.2, 2.7 and 5.2.6).
//!
//! Nothing in guest memory is trusted, and nothing is read twice: each descriptor and each header is copied once, and only the
//! copy is checked and used. An invalid *request* is answered by its status byte; a chain without a status byte is
//! [`Malformed`].

use passgate_backends::nvme::{Geometry, Op};
use passgate_backends::window::Segment;
use passgate_bindings::Iova;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::observe::disk::Kind;

/// The length of a sector in bytes, independent of the drive's block size (virtio 1.2, 5.2.6).
pub(super) const SECTOR: u64 = 512;
/// The number of data segments of one request, at most: `seg_max` in the configuration.
pub(super) const MAX_SEGMENTS: usize = 126;
/// The length in bytes of the answer to `VIRTIO_BLK_T_GET_ID` (virtio 1.2, 5.2.6).
const ID_LEN: usize = 20;
/// The length in bytes of a request's header, and of the one range of a discard.
const HEADER_LEN: usize = 16;
/// The number of descriptors of one chain, at most: more than header, data and status take.
const MAX_CHAIN_LEN: u32 = 1024;
/// Bit 0 of the flags of a write-zeroes range: the blocks may be deallocated (virtio 1.2, 5.2.6).
const FLAG_UNMAP: u32 = 1;

/// A chain that cannot be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    /// A table or a descriptor is not in guest memory.
    #[error("a descriptor is not in guest memory")]
    NotInMemory,
    /// The index of a next descriptor is outside the table.
    #[error("a descriptor's next one is outside its table")]
    NextOutOfTable,
    /// The chain loops, or has more than [`MAX_CHAIN_LEN`] descriptors.
    #[error("a chain of descriptors has no end")]
    TooLong,
    /// An indirect descriptor in an indirect table, with a next one, or with a table that is empty or has a partial descriptor.
    #[error("an indirect descriptor is invalid")]
    BadIndirect,
    /// A device-readable descriptor follows a device-writable one, or a buffer ends beyond the address space.
    #[error("the descriptors of a chain are out of order")]
    BadOrder,
    /// There is no device-writable byte for the status.
    #[error("a request has no status byte")]
    NoStatus,
}

/// The limits of requests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits<'a> {
    /// The drive.
    pub(super) drive: &'a Geometry,
    /// True if no request may write to the drive.
    pub(super) read_only: bool,
    /// True if a write must be on the medium before it is answered: the guest cannot flush, or has switched the cache off.
    pub(super) write_through: bool,
}

/// The action that a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Submit this operation to the drive, with the segments.
    Drive(Op),
    /// Write the drive's serial number to the segments.
    Id,
    /// Answer with this status at once.
    Status(u8),
}

/// A request that was read. Its segments are in the buffer of the caller, who reuses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) action: Action,
    /// The type in the request's header.
    pub(super) kind: Kind,
    /// The address of the status byte.
    pub(super) status: GuestAddress,
    /// The number of bytes that the drive writes to the segments.
    pub(super) written: u32,
}

/// The readable or the writable half of a chain.
#[derive(Debug, Default)]
struct ChainHalf {
    /// The total length in bytes.
    len: u64,
    /// True if there were more pieces than [`Chain`] stores.
    too_many: bool,
}

/// The buffers for the pieces (address and length) of a chain while it is read. Reused, so that a request allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Chain {
    readable: Vec<(u64, u32)>,
    writable: Vec<(u64, u32)>,
}

impl Chain {
    /// Reads the request whose chain begins with descriptor `head` of a table of `size` descriptors. Replaces `segments` by its
    /// data segments.
    pub(super) fn read<M: GuestMemory>(
        &mut self,
        memory: &M,
        table: GuestAddress,
        size: u16,
        head: u16,
        limits: Limits<'_>,
        segments: &mut Vec<Segment>,
    ) -> Result<Request, Malformed> {
        segments.clear();
        let (read, mut written) = self.walk(memory, table, size, head)?;
        let Some(last) = self.writable.last_mut().filter(|_| written.len > 0) else {
            return Err(Malformed::NoStatus);
        };
        // The status is the last writable byte, wherever the guest has put it (virtio 1.2, 2.7.4.1: no framing is assumed).
        last.1 -= 1;
        let status = GuestAddress(last.0 + u64::from(last.1));
        if last.1 == 0 {
            self.writable.pop();
        }
        written.len -= 1;
        let (mut kind, mut action) = (Kind::Other, Action::Status(VIRTIO_BLK_S_IOERR as u8));
        if let Some(header) = self.take_header(memory) {
            kind = request_kind(header);
            if !read.too_many && !written.too_many {
                let readable = read.len - HEADER_LEN as u64;
                let parsed = self.parse(memory, limits, header, readable, written.len);
                action = parsed.unwrap_or_else(Action::Status);
            }
        }
        let from = match action {
            Action::Drive(Op::Read { .. }) | Action::Id => &self.writable[..],
            Action::Drive(Op::Write { .. }) => &self.readable[..],
            _ => &[],
        };
        let (action, from) = match from.len() {
            0..=MAX_SEGMENTS => (action, from),
            _ => (Action::Status(VIRTIO_BLK_S_IOERR as u8), &[][..]),
        };
        segments.extend(from.iter().map(|(at, len)| Segment { iova: Iova(*at), len: *len }));
        let reads = matches!(action, Action::Drive(Op::Read { .. }));
        let written = if reads { u32::try_from(written.len).unwrap_or(u32::MAX) } else { 0 };
        Ok(Request { action, kind, status, written })
    }

    /// Walks the chain, and stores the pieces of its two halves.
    fn walk<M: GuestMemory>(
        &mut self,
        memory: &M,
        mut table: GuestAddress,
        size: u16,
        head: u16,
    ) -> Result<(ChainHalf, ChainHalf), Malformed> {
        self.readable.clear();
        self.writable.clear();
        let (mut read, mut written) = (ChainHalf::default(), ChainHalf::default());
        let (mut size, mut next, mut direct) = (u32::from(size), u32::from(head), true);
        for _ in 0..MAX_CHAIN_LEN {
            if next >= size {
                return Err(Malformed::NextOutOfTable);
            }
            let at = table.0.checked_add(u64::from(next) * size_of::<Descriptor>() as u64);
            let at = GuestAddress(at.ok_or(Malformed::NotInMemory)?);
            let descriptor: Descriptor = memory.read_obj(at).map_err(|_| Malformed::NotInMemory)?;
            if descriptor.refers_to_indirect_table() {
                let whole = descriptor.len().is_multiple_of(size_of::<Descriptor>() as u32);
                if !direct || descriptor.has_next() || !whole || descriptor.len() == 0 {
                    return Err(Malformed::BadIndirect);
                }
                (table, size) = (descriptor.addr(), descriptor.len() / size_of::<Descriptor>() as u32);
                (next, direct) = (0, false);
                continue;
            }
            let len = descriptor.len();
            descriptor.addr().0.checked_add(len.into()).ok_or(Malformed::BadOrder)?;
            let (half, pieces) = match descriptor.is_write_only() {
                true => (&mut written, &mut self.writable),
                false if written.len > 0 => return Err(Malformed::BadOrder),
                false => (&mut read, &mut self.readable),
            };
            half.len += u64::from(len);
            // One more than segments, because the header or the status may be in a piece of its own.
            if len > 0 && pieces.len() <= MAX_SEGMENTS {
                pieces.push((descriptor.addr().0, len));
            } else if len > 0 {
                half.too_many = true;
                // The last piece replaces the one before: it has the status byte.
                pieces.pop();
                pieces.push((descriptor.addr().0, len));
            }
            if !descriptor.has_next() {
                return Ok((read, written));
            }
            next = descriptor.next().into();
        }
        Err(Malformed::TooLong)
    }

    /// Returns the action of a request with this header, `readable` bytes behind it and `writable` bytes before the status;
    /// or the status of the error.
    fn parse<M: GuestMemory>(
        &mut self,
        memory: &M,
        limits: Limits<'_>,
        header: [u8; HEADER_LEN],
        readable: u64,
        writable: u64,
    ) -> Result<Action, u8> {
        let ioerr = VIRTIO_BLK_S_IOERR as u8;
        let (kind, _, sector) = split_fields(header);
        let Limits { drive, read_only, write_through } = limits;
        match kind {
            VIRTIO_BLK_T_IN => {
                let (first, blocks) = blocks(drive, sector, writable).ok_or(ioerr)?;
                Ok(Action::Drive(Op::Read { first, blocks }))
            }
            VIRTIO_BLK_T_OUT if !read_only => {
                let (first, blocks) = blocks(drive, sector, readable).ok_or(ioerr)?;
                Ok(Action::Drive(Op::Write { first, blocks, fua: write_through && drive.volatile_cache }))
            }
            VIRTIO_BLK_T_FLUSH if !drive.volatile_cache => Err(VIRTIO_BLK_S_OK as u8),
            VIRTIO_BLK_T_FLUSH => Ok(Action::Drive(Op::Flush)),
            VIRTIO_BLK_T_GET_ID if writable >= ID_LEN as u64 => Ok(Action::Id),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if !read_only => {
                let zeroes = kind == VIRTIO_BLK_T_WRITE_ZEROES;
                let max_blocks = if zeroes { drive.write_zeroes } else { drive.discard };
                if max_blocks == 0 {
                    return Err(VIRTIO_BLK_S_UNSUPP as u8);
                }
                if readable != HEADER_LEN as u64 {
                    return Err(ioerr); // one range: max_discard_seg and max_write_zeroes_seg are 1
                }
                let range: [u8; HEADER_LEN] = self.take_header(memory).ok_or(ioerr)?;
                // le64 sector, le32 sectors, le32 flags
                let (low, high, counts) = split_fields(range);
                let (sector, sectors, flags) =
                    (u64::from(low) | u64::from(high) << 32, counts as u32, (counts >> 32) as u32);
                if flags & !FLAG_UNMAP != 0 || !zeroes && flags != 0 {
                    return Err(VIRTIO_BLK_S_UNSUPP as u8);
                }
                let (first, blocks) = blocks(drive, sector, u64::from(sectors) * SECTOR).ok_or(ioerr)?;
                if blocks > max_blocks {
                    return Err(ioerr);
                }
                Ok(Action::Drive(if zeroes {
                    let fua = write_through && drive.volatile_cache;
                    Op::WriteZeroes { first, blocks, unmap: flags & FLAG_UNMAP != 0, fua }
                } else {
                    Op::Discard { first, blocks }
                }))
            }
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES | VIRTIO_BLK_T_GET_ID => {
                Err(ioerr)
            }
            _ => Err(VIRTIO_BLK_S_UNSUPP as u8),
        }
    }

    /// Takes the next [`HEADER_LEN`] bytes of the readable half, in whatever pieces they are; none if there are fewer.
    fn take_header<M: GuestMemory>(&mut self, memory: &M) -> Option<[u8; HEADER_LEN]> {
        let mut bytes = [0; HEADER_LEN];
        let mut taken = 0;
        while taken < HEADER_LEN {
            let (at, len) = self.readable.first_mut()?;
            let now = (*len as usize).min(HEADER_LEN - taken);
            memory.read_slice(&mut bytes[taken..taken + now], GuestAddress(*at)).ok()?;
            *at += now as u64;
            *len -= now as u32;
            taken += now;
            if *len == 0 {
                self.readable.remove(0);
            }
        }
        Some(bytes)
    }
}

/// Returns the type in a request's header.
fn request_kind(header: [u8; HEADER_LEN]) -> Kind {
    match split_fields(header).0 {
        VIRTIO_BLK_T_IN => Kind::Read,
        VIRTIO_BLK_T_OUT => Kind::Write,
        VIRTIO_BLK_T_FLUSH => Kind::Flush,
        VIRTIO_BLK_T_DISCARD => Kind::Discard,
        VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
        _ => Kind::Other,
    }
}

/// Splits 16 bytes into le32, le32, le64: the layout of `struct virtio_blk_req` up to its data.
fn split_fields(bytes: [u8; HEADER_LEN]) -> (u32, u32, u64) {
    let all = u128::from_le_bytes(bytes);
    (all as u32, (all >> 32) as u32, (all >> 64) as u64)
}

/// Returns the first block and the number of blocks of `len` bytes from `sector` on; none if they are not whole blocks of the
/// drive, or not on the drive.
fn blocks(drive: &Geometry, sector: u64, len: u64) -> Option<(u64, u32)> {
    let (block, at) = (u64::from(drive.block), sector.checked_mul(SECTOR)?);
    if len == 0 || !at.is_multiple_of(block) || !len.is_multiple_of(block) {
        return None;
    }
    let (first, blocks) = (at / block, len / block);
    let inside = first.checked_add(blocks).is_some_and(|end| end <= drive.blocks);
    inside.then_some((first, u32::try_from(blocks).ok()?))
}

/// Returns the drive's serial number as `VIRTIO_BLK_T_GET_ID` reports it: padded with zeroes.
pub(super) fn serial_id(drive: &Geometry) -> [u8; ID_LEN] {
    let mut id = [0; ID_LEN];
    for (to, from) in id.iter_mut().zip(drive.serial.bytes()) {
        *to = from;
    }
    id
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
