//! A guest's request, read out of its descriptors (virtio 1.2, 2.7 and 5.2.6).
//!
//! Nothing of a guest's is trusted, and nothing is read twice: each descriptor and each header is copied once, checked,
//! and from then on only the copy is looked at. What is wrong with a *request* is answered to the guest by its status
//! byte; what has no status byte is [`Malformed`].

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

/// Bytes of a sector, whatever the drive's blocks are.
pub(super) const SECTOR: u64 = 512;
/// Pieces of data of one request at most (`seg_max`), as the guest is told.
pub(super) const SEGMENTS: usize = 126;
/// Bytes of the answer to a question for the drive's name.
const ID: usize = 20;
/// Bytes of a request's header, and of the one range of a discard.
const HEADER: usize = 16;
/// Descriptors of one chain at most: more than the header, the data and the status take.
const LONGEST: u32 = 1024;
/// Bit 0 of a range's flags: what is zeroed may be given up as well.
const UNMAP: u32 = 1;

/// A chain that cannot be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    /// A table or a descriptor is not in guest memory.
    #[error("a descriptor is not in guest memory")]
    Nowhere,
    /// A descriptor names a next one that is not in its table.
    #[error("a descriptor goes on outside its table")]
    Beyond,
    /// It loops, or is as good as endless.
    #[error("a chain of descriptors has no end")]
    Endless,
    /// An indirect table in an indirect table, with a next one, or of no whole number of descriptors.
    #[error("an indirect descriptor is not as it must be")]
    Indirect,
    /// What the device writes comes before what it reads, or ends beyond the address space.
    #[error("the descriptors of a chain are out of order")]
    Order,
    /// No byte for the status.
    #[error("a request has no place for its status")]
    NoStatus,
}

/// What a request may be about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits<'a> {
    /// The drive.
    pub(super) drive: &'a Geometry,
    /// Whether nothing may be written.
    pub(super) read_only: bool,
    /// Whether a write is on the medium before it is answered: the guest has no flush, or has switched the cache off.
    pub(super) write_through: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// This, by the drive, with the segments.
    Drive(Op),
    /// The drive's name, into the segments.
    Id,
    /// Nothing: this is the status.
    Status(u8),
}

/// A request, and where its answer goes. The segments are kept by the caller, who uses them again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) wanted: Wanted,
    /// What the guest says that it is.
    pub(super) kind: Kind,
    /// Where the status goes.
    pub(super) status: GuestAddress,
    /// Bytes that the drive writes to the segments.
    pub(super) written: u32,
}

/// One half of a chain, as its pieces follow each other.
#[derive(Debug, Default)]
struct Half {
    len: u64,
    /// Whether there were more pieces than are kept.
    too_many: bool,
}

/// Where the pieces of chains are put while they are read: kept, so that a request allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Chain {
    readable: Vec<(u64, u32)>,
    writable: Vec<(u64, u32)>,
}

impl Chain {
    /// Reads the request whose chain begins with descriptor `head` of a table of `size`; its segments are left in
    /// `segments`.
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
        last.1 -= 1;
        let status = GuestAddress(last.0 + u64::from(last.1));
        if last.1 == 0 {
            self.writable.pop();
        }
        written.len -= 1;
        let (mut kind, mut wanted) = (Kind::Other, Wanted::Status(VIRTIO_BLK_S_IOERR as u8));
        if let Some(header) = self.take(memory) {
            kind = kind_of(header);
            if !read.too_many && !written.too_many {
                let readable = read.len - HEADER as u64;
                let understood = self.understand(memory, limits, header, readable, written.len);
                wanted = understood.unwrap_or_else(Wanted::Status);
            }
        }
        let from = match wanted {
            Wanted::Drive(Op::Read { .. }) | Wanted::Id => &self.writable[..],
            Wanted::Drive(Op::Write { .. }) => &self.readable[..],
            _ => &[],
        };
        let (wanted, from) = match from.len() {
            0..=SEGMENTS => (wanted, from),
            _ => (Wanted::Status(VIRTIO_BLK_S_IOERR as u8), &[][..]),
        };
        segments.extend(from.iter().map(|(at, len)| Segment { iova: Iova(*at), len: *len }));
        let reads = matches!(wanted, Wanted::Drive(Op::Read { .. }));
        let written = if reads { u32::try_from(written.len).unwrap_or(u32::MAX) } else { 0 };
        Ok(Request { wanted, kind, status, written })
    }

    /// The pieces of the chain, in two halves.
    fn walk<M: GuestMemory>(
        &mut self,
        memory: &M,
        mut table: GuestAddress,
        size: u16,
        head: u16,
    ) -> Result<(Half, Half), Malformed> {
        self.readable.clear();
        self.writable.clear();
        let (mut read, mut written) = (Half::default(), Half::default());
        let (mut size, mut next, mut direct) = (u32::from(size), u32::from(head), true);
        for _ in 0..LONGEST {
            if next >= size {
                return Err(Malformed::Beyond);
            }
            let at = table.0.checked_add(u64::from(next) * size_of::<Descriptor>() as u64);
            let at = GuestAddress(at.ok_or(Malformed::Nowhere)?);
            let descriptor: Descriptor = memory.read_obj(at).map_err(|_| Malformed::Nowhere)?;
            if descriptor.refers_to_indirect_table() {
                let whole = descriptor.len().is_multiple_of(size_of::<Descriptor>() as u32);
                if !direct || descriptor.has_next() || !whole || descriptor.len() == 0 {
                    return Err(Malformed::Indirect);
                }
                (table, size) = (descriptor.addr(), descriptor.len() / size_of::<Descriptor>() as u32);
                (next, direct) = (0, false);
                continue;
            }
            let len = descriptor.len();
            descriptor.addr().0.checked_add(len.into()).ok_or(Malformed::Order)?;
            let (half, pieces) = match descriptor.is_write_only() {
                true => (&mut written, &mut self.writable),
                false if written.len > 0 => return Err(Malformed::Order),
                false => (&mut read, &mut self.readable),
            };
            half.len += u64::from(len);
            // One for the header or the status, which need not be in a piece of their own.
            if len > 0 && pieces.len() <= SEGMENTS {
                pieces.push((descriptor.addr().0, len));
            } else if len > 0 {
                half.too_many = true;
                // The last is where the status is.
                pieces.pop();
                pieces.push((descriptor.addr().0, len));
            }
            if !descriptor.has_next() {
                return Ok((read, written));
            }
            next = descriptor.next().into();
        }
        Err(Malformed::Endless)
    }

    /// What is asked for by a header and `readable` bytes behind it; or the status that says why not.
    fn understand<M: GuestMemory>(
        &mut self,
        memory: &M,
        limits: Limits<'_>,
        header: [u8; HEADER],
        readable: u64,
        writable: u64,
    ) -> Result<Wanted, u8> {
        let ioerr = VIRTIO_BLK_S_IOERR as u8;
        let (kind, _, sector) = fields(header);
        let Limits { drive, read_only, write_through } = limits;
        match kind {
            VIRTIO_BLK_T_IN => {
                let (first, blocks) = blocks(drive, sector, writable).ok_or(ioerr)?;
                Ok(Wanted::Drive(Op::Read { first, blocks }))
            }
            VIRTIO_BLK_T_OUT if !read_only => {
                let (first, blocks) = blocks(drive, sector, readable).ok_or(ioerr)?;
                Ok(Wanted::Drive(Op::Write { first, blocks, fua: write_through && drive.volatile_cache }))
            }
            VIRTIO_BLK_T_FLUSH if !drive.volatile_cache => Err(VIRTIO_BLK_S_OK as u8),
            VIRTIO_BLK_T_FLUSH => Ok(Wanted::Drive(Op::Flush)),
            VIRTIO_BLK_T_GET_ID if writable >= ID as u64 => Ok(Wanted::Id),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if !read_only => {
                let zeroes = kind == VIRTIO_BLK_T_WRITE_ZEROES;
                let most = if zeroes { drive.write_zeroes } else { drive.discard };
                if most == 0 {
                    return Err(VIRTIO_BLK_S_UNSUPP as u8);
                }
                if readable != HEADER as u64 {
                    return Err(ioerr); // one range, as the guest is told
                }
                let range: [u8; HEADER] = self.take(memory).ok_or(ioerr)?;
                // le64 sector, le32 sectors, le32 flags
                let (low, high, counts) = fields(range);
                let (sector, sectors, flags) =
                    (u64::from(low) | u64::from(high) << 32, counts as u32, (counts >> 32) as u32);
                if flags & !UNMAP != 0 || !zeroes && flags != 0 {
                    return Err(VIRTIO_BLK_S_UNSUPP as u8);
                }
                let (first, blocks) = blocks(drive, sector, u64::from(sectors) * SECTOR).ok_or(ioerr)?;
                if blocks > most {
                    return Err(ioerr);
                }
                Ok(Wanted::Drive(if zeroes {
                    let fua = write_through && drive.volatile_cache;
                    Op::WriteZeroes { first, blocks, unmap: flags & UNMAP != 0, fua }
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

    /// Takes the first bytes of what the device reads, however they are cut.
    fn take<M: GuestMemory>(&mut self, memory: &M) -> Option<[u8; HEADER]> {
        let mut bytes = [0; HEADER];
        let mut have = 0;
        while have < HEADER {
            let (at, len) = self.readable.first_mut()?;
            let now = (*len as usize).min(HEADER - have);
            memory.read_slice(&mut bytes[have..have + now], GuestAddress(*at)).ok()?;
            *at += now as u64;
            *len -= now as u32;
            have += now;
            if *len == 0 {
                self.readable.remove(0);
            }
        }
        Some(bytes)
    }
}

/// What a request says that it is.
fn kind_of(header: [u8; HEADER]) -> Kind {
    match fields(header).0 {
        VIRTIO_BLK_T_IN => Kind::Read,
        VIRTIO_BLK_T_OUT => Kind::Write,
        VIRTIO_BLK_T_FLUSH => Kind::Flush,
        VIRTIO_BLK_T_DISCARD => Kind::Discard,
        VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
        _ => Kind::Other,
    }
}

/// le32, le32, le64.
fn fields(bytes: [u8; HEADER]) -> (u32, u32, u64) {
    let all = u128::from_le_bytes(bytes);
    (all as u32, (all >> 32) as u32, (all >> 64) as u64)
}

/// The blocks that `len` bytes from `sector` on are, where they are whole blocks of the drive.
fn blocks(drive: &Geometry, sector: u64, len: u64) -> Option<(u64, u32)> {
    let (block, at) = (u64::from(drive.block), sector.checked_mul(SECTOR)?);
    if len == 0 || !at.is_multiple_of(block) || !len.is_multiple_of(block) {
        return None;
    }
    let (first, blocks) = (at / block, len / block);
    let inside = first.checked_add(blocks).is_some_and(|end| end <= drive.blocks);
    inside.then_some((first, u32::try_from(blocks).ok()?))
}

/// The drive's name as the guest is told it: filled up with zeroes.
pub(super) fn id(drive: &Geometry) -> [u8; ID] {
    let mut id = [0; ID];
    for (to, from) in id.iter_mut().zip(drive.serial.bytes()) {
        *to = from;
    }
    id
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
