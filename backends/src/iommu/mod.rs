//! IOVA domains: the objects in which mappings are made and removed.
//!
//! Every method takes `&self`, blocks for one kernel call, and may be called from several threads at once. A domain's
//! capabilities are probed when it is opened.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PageRange};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::handover::{DomainIds, Handover};

pub mod iommufd;
pub mod pieces;
pub mod soft;
pub mod type1;

/// The capabilities of a domain, probed when it was opened. The serialised names are those of the audit log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainCaps {
    /// The maximum number of mappings in this domain.
    pub max_mappings: u64,
    /// The maximum length of one mapping in bytes (1 GiB for a registered buffer of io_uring).
    #[serde(rename = "max_piece")]
    pub max_mapping_len: u64,
    /// True if an unmap may leave operations in flight ([`Unmap::InFlight`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tickets: bool,
    /// True if an unmap may begin and end inside mappings, whose rest stays mapped without a gap.
    pub cut: bool,
    /// True if [`Domain::replace`] is supported.
    pub replace: bool,
    /// True if an unmap that fails half-way reports the number of bytes that it removed ([`Unmap::Failed`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub counts_partial: bool,
}

impl DomainCaps {
    /// Returns the capabilities of a domain that has these limits and can do nothing besides.
    pub const fn new(max_mappings: u64, max_mapping_len: u64) -> Self {
        let (tickets, cut, replace, counts_partial) = (false, false, false, false);
        Self { max_mappings, max_mapping_len, tickets, cut, replace, counts_partial }
    }
}

/// Identifies the operations that were in flight over pages when an unmap removed them. [`Domain::poll`] returns it
/// when the last of them has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// The result of an unmap. Whatever is not proved to be gone is [`Unmap::Failed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmap {
    /// `bytes` were mapped and are gone; no operation over them is in flight.
    Gone {
        /// The number of bytes that the kernel reports as removed.
        bytes: u64,
    },
    /// `bytes` are gone from the translation, but operations issued before are in flight over them.
    InFlight {
        /// The number of bytes that the kernel reports as removed.
        bytes: u64,
        /// The ticket that [`Domain::poll`] returns once the last of those operations has ended.
        ticket: Ticket,
    },
    /// The call failed. It is unknown which part of the range is still mapped.
    Failed {
        /// The errno of the kernel.
        errno: Errno,
        /// The number of bytes that were removed before the failure, from the lowest address up, with nothing in flight
        /// over them (no ticket is issued). 0 if that is not certain.
        bytes: u64,
    },
}

/// An IOVA domain.
pub trait Domain: Send + Sync + fmt::Debug {
    /// Returns the backend's name, for messages: `iommufd`, `type1`, `soft`, `sim`.
    fn name(&self) -> &'static str;

    /// Returns its capabilities.
    fn capabilities(&self) -> DomainCaps;

    /// Maps the pages of `file` from `offset` on at `iova`, as mappings on a grid of `piece` bytes: each mapping begins
    /// and ends at an IOVA that is a multiple of `piece`, except that the first begins where `iova` does and the last
    /// ends where `iova` does. `piece` is a multiple of the page size and not 0.
    ///
    /// All or nothing: after [`crate::Error::Map`] or [`crate::Error::Memlock`] no part of it is mapped; after
    /// [`crate::Error::HalfMapped`] the state of the range is unknown.
    fn map(
        &self,
        iova: PageRange<Iova>,
        piece: u64,
        file: &Arc<GuestFile>,
        offset: Offset,
        writable: bool,
    ) -> Result<()>;

    /// Unmaps everything in `iova`; unmapped gaps inside are no error. If the domain can [cut](DomainCaps::cut), the
    /// parts of mappings outside `iova` stay mapped, as mappings of their own; if it cannot, a mapping that extends
    /// beyond `iova` makes the call fail ([`Unmap::Failed`]), and that mapping is unchanged. Unless the call fails,
    /// nothing in `iova` is mapped afterwards. Operations over the remains of a partial map
    /// ([`crate::Error::HalfMapped`]) count as in flight.
    fn unmap(&self, iova: PageRange<Iova>) -> Unmap;

    /// Returns the IOVA ranges that all attached devices can use, ascending; empty if unknown. Valid once the devices
    /// are attached, for each device may exclude more.
    fn usable(&self) -> Vec<RangeInclusive<Iova>> {
        Vec::new()
    }

    /// Duplicates the files with which another process can take the domain over ([`crate::resume`]), and returns its
    /// ids.
    fn leave(&self) -> io::Result<(Handover, DomainIds)> {
        Ok((Handover::default(), DomainIds::Nothing))
    }

    /// Announces that `iova` was mapped by an earlier process and still is. Called once for each such range, before any
    /// other call over it.
    fn resumed(&self, iova: PageRange<Iova>) {
        let _ = iova;
    }

    /// Returns true if an unmap of this range would at present wait for anything besides the kernel call.
    fn may_wait(&self, iova: PageRange<Iova>) -> bool {
        let _ = iova;
        false
    }

    /// Unmaps exactly the ranges `gone`, by filling a second page table without them and moving every device to it. The
    /// ranges are ascending and do not overlap; each may begin and end inside mappings, whose rest stays mapped, as
    /// mappings of its own. [`Unmap::Gone`] has the number of bytes that were mapped in all of them. After an error
    /// half-way ([`Unmap::Failed`]) it is unknown which part of `gone` is still mapped. Every other page stays mapped,
    /// in both tables.
    ///
    /// **Not hitless**: VT-d and AMD block the device briefly while it moves, and a DMA in that gap is lost, also one
    /// to a page that stays mapped. The kernel guarantees no more for any IOMMU.
    ///
    /// `ENOSYS` if the domain does not [support it](DomainCaps::replace): nothing has changed then.
    fn replace(&self, gone: &[PageRange<Iova>]) -> Unmap {
        let _ = gone;
        Unmap::Failed { errno: Errno::NOSYS, bytes: 0 }
    }

    /// Appends the tickets whose operations have ended since the last call.
    fn poll(&self, ended: &mut Vec<Ticket>) {
        let _ = ended;
    }

    /// Returns a descriptor that is readable while [`Domain::poll`] has tickets to return; none for a domain without
    /// tickets.
    fn wake(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
