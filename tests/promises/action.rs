//! The actions of a [`crate::world::World`]. Their numbers are indexes, taken modulo the number of objects that exist, so that
//! every sequence of actions is valid and a failing one can be shrunk.

use passgate::gate::{Event, Outcome, PageState};
use passgate_sim::iommu::Fault;
use rustix::io::Errno;

use crate::rng::Rng;

/// The number of guest-physical pages at which regions start; a region may extend beyond.
pub const GPA_PAGES: u64 = 4096;
/// The number of pages of each file.
pub const FILE_PAGES: u64 = 1024;
/// A `piece` for which the gate chooses the size of mappings.
pub const PIECE_AUTO: u8 = 10;
/// The number of clients connected at any time.
pub const CLIENTS: usize = 3;
/// The number of files.
pub const FILES: usize = 3;

#[derive(Debug, Clone)]
pub enum Action {
    /// A client adds memory; `piece` is the binary logarithm of the pages per mapping, or [`PIECE_AUTO`].
    Add {
        client: u8,
        gpa: u16,
        pages: u16,
        file: u8,
        offset: u16,
        piece: u8,
        initial: PageState,
        writable: bool,
    },
    /// A client removes a region; with `by_other`, another client than its owner.
    Remove { region: u16, by_other: bool },
    /// A client begins an invalidation of `pages` pages from a page of a region on, and of `batch` more ranges as long, each one
    /// page after the last.
    Begin {
        client: u8,
        region: u16,
        page: u16,
        pages: u16,
        to: PageState,
        passgate: bool,
        deadline_ns: u64,
        batch: u8,
    },
    /// The owner changes pages that were granted to it: they get other frames.
    ChangePages { granted: u16 },
    /// The owner ends a granted invalidation; with `by_other`, another client tries to.
    End { granted: u16, outcome: Outcome, by_other: bool },
    /// A client cannot be refused from now on.
    MustUnmap { client: u8 },
    /// A connection ends; another client replaces it.
    ClientGone { client: u8 },
    /// A call that the gate requested is executed, or its result is reported; with `deliver`, both.
    RunTask { task: u16, deliver: bool, fault: Option<Fault> },
    /// A call does not return before the end of the run; it is executed if `done`.
    HangTask { task: u16, done: bool },
    /// A domain reports more bytes unmapped than were mapped.
    OverreportUnmap { task: u16 },
    /// The late flushes of a domain complete; with `stuck`, also those that only a fence would end.
    Flush { domain: u8, stuck: bool },
    /// Time passes.
    Advance { ns: u64 },
    /// A tick of [`Event::Quiet`] passes.
    Quiet,
    /// All calls return and all flushes complete; then every request must have been answered.
    Settle,
    /// A device does DMA.
    Dma { domain: u8, device: u8, gpa: u16 },
    /// A client adds memory with numbers at the limits of their types.
    AddExtreme { client: u8, gpa: u64, len: u64, file: u8, offset: u64, piece: u64 },
    /// A client begins an invalidation with numbers at the limits of their types.
    BeginExtreme { client: u8, gpa: u64, len: u64, deadline_ns: u64 },
    /// A client ends an invalidation and removes a region by a made-up id.
    EndMadeUp { client: u8, id: u64, outcome: Outcome },
    /// An operator releases what one invalidation left in quarantine.
    Release { client: u8, quarantine: u16, to: PageState },
    /// An operator releases a quarantine by a made-up id.
    ReleaseMadeUp { client: u8, id: u64, to: PageState },
    /// An event that is passed to the gate as it is, such as a result of no call.
    Raw(Event),
}

/// The frequencies of faults in a run.
#[derive(Debug, Clone, Copy)]
pub struct FaultRates {
    /// Calls that fail, per hundred.
    pub faults: u64,
    /// Calls that never return, per thousand.
    pub hangs: u64,
    /// Clients that die, per thousand actions.
    pub deaths: u64,
}

impl FaultRates {
    /// No call fails.
    pub const CLEAN: FaultRates = FaultRates { faults: 0, hangs: 0, deaths: 2 };
}

pub const FAULTS: [Fault; 10] = [
    Fault::Errno(Errno::BUSY),
    Fault::Errno(Errno::NOENT),
    Fault::HalfMapped(Errno::IO),
    Fault::HalfUnmapped(Errno::IO),
    Fault::HalfDone(Errno::IO),
    Fault::Short,
    Fault::Late,
    Fault::ShortLate,
    Fault::Stuck,
    Fault::Cached,
];

impl Action {
    /// Returns a random action.
    pub fn random(rng: &mut Rng, rates: FaultRates) -> Self {
        if rng.odds(rates.deaths, 1000) {
            return Action::ClientGone { client: rng.below(CLIENTS as u64) as u8 };
        }
        match rng.below(1000) {
            0..30 => Self::add(rng),
            30..40 => Action::Remove { region: rng.next() as u16, by_other: rng.odds(1, 10) },
            40..230 => Self::begin(rng),
            230..260 => Action::ChangePages { granted: rng.next() as u16 },
            260..440 => Action::End {
                granted: rng.next() as u16,
                outcome: Self::outcome(rng),
                by_other: rng.odds(1, 20),
            },
            440..830 => {
                let task = rng.next() as u16;
                if rates.hangs > 0 && rng.odds(rates.hangs, 1000) {
                    return Action::HangTask { task, done: rng.odds(1, 2) };
                }
                if rates.faults > 0 && rng.odds(rates.faults, 400) {
                    return Action::OverreportUnmap { task };
                }
                let fault = rng.odds(rates.faults, 100).then(|| rng.pick(&FAULTS));
                Action::RunTask { task, deliver: rng.odds(2, 3), fault }
            }
            830..860 => Action::Flush { domain: rng.next() as u8, stuck: rng.odds(1, 8) },
            860..895 => Action::Advance { ns: 1 << rng.below(14) },
            895..896 => Action::Settle,
            896..897 => Action::Quiet,
            897..900 => {
                let (client, quarantine) = (rng.next() as u8, rng.next() as u16);
                Action::Release { client, quarantine, to: rng.pick(&PageState::ALL) }
            }
            900..901 => Action::MustUnmap { client: rng.next() as u8 },
            _ => Action::Dma {
                domain: rng.next() as u8,
                device: rng.next() as u8,
                gpa: rng.below(GPA_PAGES) as u16,
            },
        }
    }

    fn add(rng: &mut Rng) -> Self {
        let pages = match rng.below(8) {
            0 => 512 + rng.below(512),
            1 | 2 => 1 + rng.below(256),
            _ => 1 + rng.below(24),
        };
        let piece = if pages > 64 { rng.pick(&[3, 6, 9, 10]) } else { rng.pick(&[0, 0, 1, 2, 4, 10]) };
        let initial = match rng.below(10) {
            0 => PageState::Private,
            1 => PageState::Hole,
            _ => PageState::Shared,
        };
        // Mostly aligned to the piece, as real memory is.
        let grain = if rng.odds(1, 4) || piece == PIECE_AUTO { 1 } else { 1u64 << piece };
        let room = FILE_PAGES.saturating_sub(pages) + 1;
        Action::Add {
            client: rng.next() as u8,
            gpa: (rng.below(GPA_PAGES) / grain * grain) as u16,
            pages: pages as u16,
            file: rng.next() as u8,
            offset: (rng.below(room) / grain * grain) as u16,
            piece,
            initial,
            writable: rng.odds(9, 10),
        }
    }

    fn begin(rng: &mut Rng) -> Self {
        let to = match rng.below(40) {
            0 => PageState::Unknown,
            1..20 => PageState::Shared,
            20..30 => PageState::Private,
            _ => PageState::Hole,
        };
        Action::Begin {
            client: rng.next() as u8,
            region: rng.next() as u16,
            page: rng.next() as u16,
            pages: if rng.odds(1, 12) { 1 + rng.below(700) as u16 } else { 1 + rng.below(6) as u16 },
            to,
            passgate: rng.odds(1, 5),
            deadline_ns: if rng.odds(1, 30) { rng.pick(&[0, 1, u64::MAX]) } else { 1 << rng.below(18) },
            batch: if rng.odds(1, 8) { rng.below(16) as u8 } else { 0 },
        }
    }

    fn outcome(rng: &mut Rng) -> Outcome {
        match rng.below(60) {
            0 => Outcome::Unknown { errno: 5, offset: 4096 },
            1..14 => Outcome::NotCommitted,
            _ => Outcome::Committed,
        }
    }
}
