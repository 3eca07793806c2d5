//! What the gate wants done: calls on domains and devices, answers, notices.
//!
//! The session executes effects in the order in which they stand. Effects with a job id end in an event with the
//! same id, whatever happens, unless the call never returns: the gate counts on nothing but its timers then.

use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::event::{Caller, ClientId, DeviceId, DomainId, FileId, InvalidationId, JobId, RegionId};
use super::fence::Step;
use super::ledger::PageState;
use super::receipt::Receipt;
use super::verdict::{Reason, Refusal, Verdict};

/// Pages of a file that a conversion covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilePages {
    /// The file.
    pub file: FileId,
    /// Which pages of it.
    pub range: PageRange<Offset>,
    /// Where the guest sees the first of them.
    pub gpa: Gpa,
}

/// What the gate wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Make mappings of `piece` bytes over `iova` → [`super::Event::Mapped`].
    Map {
        /// Names the result.
        job: JobId,
        /// Where.
        domain: DomainId,
        /// The whole range.
        iova: PageRange<Iova>,
        /// Bytes per kernel mapping: their borders are the multiples of it.
        piece: u64,
        /// Of this file,
        file: FileId,
        /// from this offset on.
        offset: Offset,
        /// Whether devices may write.
        writable: bool,
    },
    /// Take every mapping in `iova` away → [`super::Event::Unmapped`].
    Unmap {
        /// Names the result.
        job: JobId,
        /// Where.
        domain: DomainId,
        /// The whole range.
        iova: PageRange<Iova>,
        /// Bytes of it that are mapped and have to go, the rest is gaps; none where nobody knows how many are.
        bytes: Option<u64>,
    },
    /// Take just these ranges out, all at once, by a page table without them → [`super::Event::Unmapped`].
    Replace {
        /// Names the result.
        job: JobId,
        /// Where.
        domain: DomainId,
        /// What goes: ascending, apart. Nothing else goes.
        gone: Vec<PageRange<Iova>>,
        /// Bytes that are mapped in them and have to go.
        bytes: u64,
    },
    /// Do one fence on one device → [`super::Event::Fenced`].
    Fence {
        /// Names the result.
        job: JobId,
        /// The device.
        device: DeviceId,
        /// Which fence.
        step: Step,
    },
    /// Put a fenced device back into its domain → [`super::Event::Attached`].
    Attach {
        /// Names the result.
        job: JobId,
        /// The device.
        device: DeviceId,
    },
    /// Change these pages now (punch, or in place) → [`super::Event::Converted`].
    Convert {
        /// Names the result.
        invalidation: InvalidationId,
        /// What changes.
        pages: Vec<FilePages>,
        /// What it will be.
        to: PageState,
    },
    /// Wake the gate with [`super::Event::Expired`] once `after_ns` have passed since now. A timer of an
    /// invalidation that is answered meanwhile may be dropped or delivered; the gate ignores it.
    Arm {
        /// For which invalidation.
        invalidation: InvalidationId,
        /// Which rung is to be over by then.
        rung: Step,
        /// Nanoseconds from now: a rung's part of the deadline, the same for each of them. Who can counts from the begin.
        after_ns: u64,
    },
    /// Answer a request.
    Answer {
        /// Whom.
        caller: Caller,
        /// What.
        answer: Answer,
    },
    /// Tell everybody who listens.
    Notice(Notice),
    /// The evidence of one invalidation, complete.
    Receipt(Box<Receipt>),
    /// No region and no quarantine needs this file any more: let go of it.
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
        /// Its name.
        region: RegionId,
        /// Bytes mapped by now, summed over the domains.
        mapped: u64,
    },
    /// The region is gone, and no device sees any of it.
    RegionRemoved {
        /// Its name.
        region: RegionId,
    },
    /// What became of a begin (or of a convert, after the conversion).
    Verdict {
        /// Names the invalidation; for a client's `end`. 0 only where none came about.
        invalidation: InvalidationId,
        /// The word.
        verdict: Verdict,
    },
    /// The end is taken down.
    Ended {
        /// Of which invalidation.
        invalidation: InvalidationId,
    },
    /// The range is out of quarantine.
    Released {
        /// Bytes that were in it.
        bytes: u64,
    },
    /// These regions are the client's now.
    Adopted {
        /// Which, and what of them is known.
        regions: Vec<super::snapshot::RegionStatus>,
        /// Conversions in them of which only their owner knows how they ended.
        unended: Vec<super::adopt::Unended>,
    },
    /// The request itself was wrong; nothing changed.
    Refused(Refusal),
}

/// What everybody who listens is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A range was refused: no conversion took place.
    Refused {
        /// The invalidation.
        invalidation: InvalidationId,
        /// What was asked.
        range: PageRange<Gpa>,
        /// Why, where, by whom.
        reason: Reason,
    },
    /// A range must not be handed out again.
    Quarantined {
        /// The invalidation that failed.
        invalidation: InvalidationId,
        /// Pages of this file,
        file: FileId,
        /// these,
        range: PageRange<Offset>,
        /// where the guest sees the first of them, while a region covers it.
        gpa: Option<Gpa>,
        /// Why.
        reason: Reason,
    },
    /// Proof came: a quarantined range may be used again.
    Freed {
        /// Pages of this file,
        file: FileId,
        /// these,
        range: PageRange<Offset>,
        /// where the guest sees the first of them, while a region covers it.
        gpa: Option<Gpa>,
    },
    /// A person took a range out of quarantine.
    Released {
        /// On whose connection.
        client: ClientId,
        /// Since which invalidation it was there.
        invalidation: InvalidationId,
        /// Pages of this file,
        file: FileId,
        /// these,
        range: PageRange<Offset>,
        /// where the guest sees the first of them, while a region covers it.
        gpa: Option<Gpa>,
        /// What they are, as the person said.
        to: PageState,
    },
    /// The fence that comes next ends the device's TDI: its guest must attest it again.
    TdiEnded {
        /// Which device.
        device: DeviceId,
        /// Which fence.
        step: Step,
    },
    /// A device was stopped.
    DeviceFenced {
        /// Which.
        device: DeviceId,
        /// How.
        step: Step,
        /// 0, or why the fence failed.
        errno: i32,
    },
    /// A stopped device is back in its domain, or could not be brought back.
    DeviceAttached {
        /// Which.
        device: DeviceId,
        /// 0, or why not: the device stays out.
        errno: i32,
    },
    /// The host wants a device back, and waits until this daemon lets go of it. Of the session's, not of the gate's.
    DeviceWanted {
        /// Which.
        device: DeviceId,
    },
    /// A wanted mapping could not be made: devices fault there until it can.
    MapFailed {
        /// Where.
        domain: DomainId,
        /// What.
        iova: PageRange<Iova>,
        /// The kernel's answer; `ENOSPC` where the budget of mappings is used up.
        errno: i32,
    },
    /// A region is gone, and no device sees any of it.
    RegionClosed {
        /// Which.
        region: RegionId,
    },
    /// All that a client had is closed: its devices were stopped first, then its mappings went.
    SessionClosed {
        /// Which client.
        client: ClientId,
    },
}

/// What [`super::Gate::handle`] wants done, in order. Kept by the caller so that its memory is reused.
pub type Effects = Vec<Effect>;
