//! Effects: calls on domains and devices, answers, notices.
//!
//! The session executes effects in the order in which they stand. An effect with a job number ends in an event with the
//! same number, whatever happens, unless the call never returns: then the gate depends on nothing but its timers.

use passgate_backends::Step;
use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::event::Caller;
use super::ids::{ClientId, DeviceId, DomainId, FileId, InvalidationId, JobId, RegionId};
use super::ledger::PageState;
use super::receipt::Receipt;
use super::rung::Rung;
use super::verdict::{Reason, Refusal, Verdict};

/// Pages of a file that a conversion covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilePages {
    /// The file.
    pub file: FileId,
    /// The pages of it.
    pub range: PageRange<Offset>,
    /// The guest-physical address of the first of them.
    pub gpa: Gpa,
}

/// An effect that the gate asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Make mappings of `piece` bytes over `iova` → [`super::Event::Mapped`].
    Map {
        /// The number of the call.
        job: JobId,
        /// The domain.
        domain: DomainId,
        /// The whole range.
        iova: PageRange<Iova>,
        /// Bytes per kernel mapping: their borders are the multiples of it.
        piece: u64,
        /// The file that is mapped.
        file: FileId,
        /// The offset in the file, in bytes, of the first page.
        offset: Offset,
        /// True if devices may write.
        writable: bool,
    },
    /// Remove every mapping in `iova` → [`super::Event::Unmapped`].
    Unmap {
        /// The number of the call.
        job: JobId,
        /// The domain.
        domain: DomainId,
        /// The whole range.
        iova: PageRange<Iova>,
        /// Bytes of it that are mapped and have to be removed, the rest is unmapped; none where nobody knows how many are.
        bytes: Option<u64>,
    },
    /// Remove exactly these ranges, all at once, by a page table without them → [`super::Event::Unmapped`].
    Replace {
        /// The number of the call.
        job: JobId,
        /// The domain.
        domain: DomainId,
        /// The ranges: ascending, apart.
        gone: Vec<PageRange<Iova>>,
        /// Bytes that are mapped in them and have to be removed.
        bytes: u64,
    },
    /// Do one fence on one device → [`super::Event::Fenced`].
    Fence {
        /// The number of the call.
        job: JobId,
        /// The device.
        device: DeviceId,
        /// The fence.
        step: Step,
    },
    /// Attach a fenced device to its domain again, with its DMA enabled → [`super::Event::Attached`].
    Attach {
        /// The number of the call.
        job: JobId,
        /// The device.
        device: DeviceId,
    },
    /// Convert these pages now (punch a hole, or in place) → [`super::Event::Converted`].
    Convert {
        /// The invalidation.
        invalidation: InvalidationId,
        /// The pages.
        pages: Vec<FilePages>,
        /// The state that they will have.
        to: PageState,
    },
    /// Wake the gate with [`super::Event::Expired`] once `after_ns` have passed since now. A timer of an
    /// invalidation that is answered meanwhile may be dropped or delivered; the gate ignores it.
    Arm {
        /// The invalidation.
        invalidation: InvalidationId,
        /// The rung that is to be over by then.
        rung: Rung,
        /// Nanoseconds from now: one rung's part of the deadline, the same for each. The session counts from the begin
        /// instead, so that delays do not add up.
        after_ns: u64,
    },
    /// Answer a request.
    Answer {
        /// The caller.
        caller: Caller,
        /// The answer.
        answer: Answer,
    },
    /// Report to every listener.
    Notice(Notice),
    /// The evidence of one invalidation, complete.
    Receipt(Box<Receipt>),
    /// No region and no quarantine needs this file any more: close it.
    ForgetFile {
        /// The file.
        file: FileId,
    },
}

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The region is there. Pages under an open invalidation or in quarantine will be mapped once they may be.
    RegionAdded {
        /// Its number.
        region: RegionId,
        /// Bytes mapped by now, summed over the domains.
        mapped: u64,
    },
    /// The region is gone, and no device sees any of it.
    RegionRemoved {
        /// Its number.
        region: RegionId,
    },
    /// The verdict on a begin (or on a convert, after the conversion).
    Verdict {
        /// The number of the invalidation, for a client's `end`. 0 only where none began.
        invalidation: InvalidationId,
        /// The verdict.
        verdict: Verdict,
    },
    /// The end is recorded.
    Ended {
        /// The invalidation.
        invalidation: InvalidationId,
    },
    /// The range is out of quarantine.
    Released {
        /// Bytes that were in it.
        bytes: u64,
    },
    /// These regions are the client's now.
    Adopted {
        /// The regions.
        regions: Vec<super::status::RegionStatus>,
        /// Conversions in them whose end only their owner knows.
        unended: Vec<super::adopt::Unended>,
    },
    /// The request itself was wrong; nothing changed.
    Refused(Refusal),
}

/// A report to every listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A range was refused: no conversion took place.
    Refused {
        /// The invalidation.
        invalidation: InvalidationId,
        /// The first range that failed.
        range: PageRange<Gpa>,
        /// The reason.
        reason: Reason,
    },
    /// A range must not be handed out again.
    Quarantined {
        /// The invalidation that failed.
        invalidation: InvalidationId,
        /// The file.
        file: FileId,
        /// The pages of it.
        range: PageRange<Offset>,
        /// The guest-physical address of the first of them, while a region covers it.
        gpa: Option<Gpa>,
        /// The reason.
        reason: Reason,
    },
    /// Proof came: a quarantined range may be used again.
    Freed {
        /// The file.
        file: FileId,
        /// The pages of it.
        range: PageRange<Offset>,
        /// The guest-physical address of the first of them, while a region covers it.
        gpa: Option<Gpa>,
    },
    /// An operator ended the quarantine of a range.
    Released {
        /// The client on whose connection the operator asked.
        client: ClientId,
        /// The invalidation that the quarantine dated from.
        invalidation: InvalidationId,
        /// The file.
        file: FileId,
        /// The pages of it.
        range: PageRange<Offset>,
        /// The guest-physical address of the first of them, while a region covers it.
        gpa: Option<Gpa>,
        /// The state of the pages, as the operator said.
        to: PageState,
    },
    /// The fence that comes next ends the device's TDI: its guest must attest it again.
    TdiEnded {
        /// The device.
        device: DeviceId,
        /// The fence.
        step: Step,
    },
    /// A device was stopped.
    DeviceFenced {
        /// The device.
        device: DeviceId,
        /// The fence.
        step: Step,
        /// The kernel's errno; 0 for success.
        errno: i32,
    },
    /// A stopped device is attached to its domain again, or could not be attached.
    DeviceAttached {
        /// The device.
        device: DeviceId,
        /// 0, or the errno because of which the device stays out of its domain.
        errno: i32,
    },
    /// The host wants a device back, and waits until this daemon closes it. Reported by the session, never by the gate.
    DeviceWanted {
        /// The device.
        device: DeviceId,
    },
    /// A wanted mapping could not be made: devices fault there until it can.
    MapFailed {
        /// The domain.
        domain: DomainId,
        /// The addresses.
        iova: PageRange<Iova>,
        /// The kernel's errno; `ENOSPC` where the budget of mappings is used up.
        errno: i32,
    },
    /// The gate's own records contradict each other, which is a fault of passgate's. It goes on with the pages in quarantine.
    Inconsistent {
        /// The contradiction.
        what: &'static str,
        /// The addresses that it is about, where it is about any.
        iova: Option<PageRange<Iova>>,
    },
    /// A region is gone, and no device sees any of it.
    RegionClosed {
        /// The region.
        region: RegionId,
    },
    /// All memory of a client that is gone is closed: its devices were stopped first, then its mappings removed.
    SessionClosed {
        /// The client.
        client: ClientId,
    },
}

/// The effects that [`super::Gate::handle`] asks for, in order. The caller owns the list so that its memory is reused.
pub type Effects = Vec<Effect>;
