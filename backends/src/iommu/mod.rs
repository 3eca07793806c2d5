//! IOVA domains: where mappings are made and taken back.
//!
//! A domain answers for itself alone, on whatever thread calls it: every method takes `&self`, blocks for one
//! kernel call, and may be called from several threads at once. What it can do is probed when it is opened.

use std::fmt;
use std::io;
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
        /// Bytes that it says it removed before, with nothing in flight over them: whoever adds up what is gone
        /// waits for no ticket here. 0 where that is not certain.
        bytes: u64,
    },
}

/// An IOVA domain.
pub trait Domain: Send + Sync + fmt::Debug {
    /// For messages: `iommufd`, `type1`, `soft`, `sim`.
    fn name(&self) -> &'static str;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Makes mappings of `piece` bytes each (the last may be shorter) that together cover `iova`, of the pages
    /// of `file` from `offset` on. All or nothing: on [`crate::Error::Map`] nothing is left of it, on
    /// [`crate::Error::HalfMapped`] the range is unknown. `piece` is a multiple of the page size, not 0.
    fn map(
        &self,
        iova: PageRange<Iova>,
        piece: u64,
        file: &Arc<GuestFile>,
        offset: Offset,
        writable: bool,
    ) -> Result<()>;

    /// Takes away every mapping that lies wholly inside `iova`; holes inside are no error. A mapping that
    /// `iova` would cut in two is [`Unmap::Failed`], with nothing changed for it.
    fn unmap(&self, iova: PageRange<Iova>) -> Unmap;

    /// Copies of the files by which another process can go on with it ([`crate::resume`]), and its ids.
    fn leave(&self) -> io::Result<(Left, Ids)> {
        Ok((Left::default(), Ids::Nothing))
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
