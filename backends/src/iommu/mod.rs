//! IOVA domains: where mappings are made and taken back.
//!
//! A domain answers for itself alone, on whatever thread calls it: every method takes `&self`, blocks for one
//! kernel call, and may be called from several threads at once. What it can do is probed when it is opened.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PageRange};
use rustix::io::Errno;

use crate::Result;
use crate::resume::{Ids, Left};

pub mod iommufd;
mod pieces;
pub mod sim;
pub mod soft;
pub mod type1;

/// What a domain can do, probed when it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Mappings that the kernel lets this domain hold at most.
    pub max_mappings: u64,
    /// Longest single mapping in bytes (a registered buffer ends at 1 GiB).
    pub max_mapping_len: u64,
    /// Whether a mapping can be made by file and offset.
    pub by_file: bool,
    /// Whether an unmap may leave operations in flight ([`Unmap::InFlight`]).
    pub tickets: bool,
    /// Whether an unmap may begin and end inside mappings: what is left of them stays mapped without a moment's
    /// break.
    pub cut: bool,
    /// Whether [`Domain::replace`] can take ranges out.
    pub replace: bool,
    /// True where an unmap that fails half-way reports the bytes that it removed before ([`Unmap::Failed`]).
    pub counts_partial: bool,
}

/// Names operations in flight over pages that an unmap took out of a domain; comes back from [`Domain::poll`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// How an unmap went. Nothing here is "probably": what is not known to be gone is [`Unmap::Failed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmap {
    /// `bytes` were mapped and are gone; no operation over them is in flight.
    Gone {
        /// Bytes that the kernel says it removed.
        bytes: u64,
    },
    /// `bytes` are gone from the translation, but operations issued before still run over them.
    InFlight {
        /// Bytes that the kernel says it removed.
        bytes: u64,
        /// [`Domain::poll`] returns it once the last of those operations has ended.
        ticket: Ticket,
    },
    /// The call failed. What of the range is still mapped is unknown.
    Failed {
        /// The kernel's answer.
        errno: Errno,
        /// Bytes that it says it removed before, the lowest addresses first, with nothing in flight over them: whoever
        /// adds up what is gone waits for no ticket here. 0 where that is not certain.
        bytes: u64,
    },
}

/// An IOVA domain.
pub trait Domain: Send + Sync + fmt::Debug {
    /// For messages: `iommufd`, `type1`, `soft`, `sim`.
    fn name(&self) -> &'static str;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Makes mappings that together cover `iova`, of the pages of `file` from `offset` on. They lie on a grid:
    /// each begins and ends at an IOVA that is a multiple of `piece` bytes, but for the first, which begins where
    /// `iova` does, and the last, which ends where `iova` does. All or nothing: on [`crate::Error::Map`] nothing
    /// is left of it, on [`crate::Error::HalfMapped`] the range is unknown. `piece` is a multiple of the page
    /// size, not 0.
    fn map(
        &self,
        iova: PageRange<Iova>,
        piece: u64,
        file: &Arc<GuestFile>,
        offset: Offset,
        writable: bool,
    ) -> Result<()>;

    /// Takes away what is mapped in `iova`; holes inside are no error. Where the domain can
    /// [cut](Capabilities::cut), what sticks out of `iova` stays as mappings of its own; where it cannot, a
    /// mapping that `iova` would cut in two is [`Unmap::Failed`], with nothing changed for it. Unless it fails, nothing in
    /// `iova` is mapped afterwards, whatever was; operations over what a map left half made count as in flight.
    fn unmap(&self, iova: PageRange<Iova>) -> Unmap;

    /// Returns the IOVAs that its devices can use, in order; none where that is not known. Asked once the devices are
    /// attached: each may take some away.
    fn usable(&self) -> Vec<RangeInclusive<Iova>> {
        Vec::new()
    }

    /// Copies of the files by which another process can go on with it ([`crate::resume`]), and its ids.
    fn leave(&self) -> io::Result<(Left, Ids)> {
        Ok((Left::default(), Ids::Nothing))
    }

    /// These pages were mapped by an earlier process, with this domain's files, and still are. Told once per range
    /// before any other call over it.
    fn resumed(&self, iova: PageRange<Iova>) {
        let _ = iova;
    }

    /// Whether an unmap of this range would wait for more than the kernel, as things are now.
    fn may_wait(&self, iova: PageRange<Iova>) -> bool {
        let _ = iova;
        false
    }

    /// Takes exactly the ranges `gone` out at once, by filling a second page table without them and moving every
    /// device to it. They are sorted and do not overlap; each may begin and end inside mappings, and what sticks
    /// out stays as mappings of its own. [`Unmap::Gone`] has the sum of what was mapped in them; on any error
    /// half-way it is [`Unmap::Failed`], and what of `gone` is still mapped is unknown. Every other page is mapped
    /// before and after, in both tables.
    ///
    /// **Not hitless**: VT-d and AMD block the device for a moment while it moves, and a DMA that comes then,
    /// also to a page that stays, is lost (the kernel promises no more, whatever the IOMMU).
    ///
    /// `ENOSYS` where the domain [cannot](Capabilities::replace): nothing has changed then.
    fn replace(&self, gone: &[PageRange<Iova>]) -> Unmap {
        let _ = gone;
        Unmap::Failed { errno: Errno::NOSYS, bytes: 0 }
    }

    /// Appends the tickets whose operations have ended since the last call.
    fn poll(&self, ended: &mut Vec<Ticket>) {
        let _ = ended;
    }

    /// Readable whenever [`Domain::poll`] has something to say; none for a domain without tickets.
    fn wake(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
