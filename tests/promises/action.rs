//! What may happen next in a [`crate::world::World`]: small numbers, taken modulo what there is, so that every
//! sequence of actions means something and a failing one can be made shorter.

use passgate::gate::{Event, Outcome, PageState};
use passgate_backends::iommu::sim::Fault;
use rustix::io::Errno;

use crate::rng::Rng;

/// Guest-physical pages that actions name; regions may reach beyond.
pub const GPA_PAGES: u64 = 4096;
/// Pages of each file.
pub const FILE_PAGES: u64 = 1024;
/// Leaves it to the gate how large mappings are.
pub const AUTO: u8 = 10;
/// Clients alive at any time.
pub const CLIENTS: usize = 3;
/// Files there are.
pub const FILES: usize = 3;

#[derive(Debug, Clone)]
pub enum Action {
    /// A client adds memory; `piece` is the power of two of pages, or [`AUTO`].
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
    /// A client takes a region away; with `stranger`, one that is not its own.
    Remove { region: u16, stranger: bool },
    /// A client begins `pages` from a page of a region on;
    /// with `batch`, so many times more, a page apart.
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
    /// The owner changes memory that it was granted: the pages get other frames.
    Touch { granted: u16 },
    /// The owner ends what it was granted; with `stranger`, somebody else tries to.
    End { granted: u16, outcome: Outcome, stranger: bool },
    /// A client cannot be told no from now on.
    Insist { client: u8 },
    /// A connection is gone; another takes its place.
    Gone { client: u8 },
    /// A call of the gate's is made, or its result comes in; with `deliver`, both.
    Work { task: u16, deliver: bool, fault: Option<Fault> },
    /// A call does not return (before the end of the run), done or not.
    Hang { task: u16, done: bool },
    /// A domain says that more went than was mapped.
    Boast { task: u16 },
    /// Late flushes of a domain come through; with `stuck`, also what nothing but a fence ended.
    Flush { domain: u8, stuck: bool },
    /// Time passes.
    Advance { ns: u64 },
    /// A moment passes.
    Quiet,
    /// All calls return, all flushes come; then everybody must have an answer.
    Settle,
    /// A device does DMA.
    Dma { domain: u8, device: u8, gpa: u16 },
    /// Memory at the edges of what numbers can say.
    AddWild { client: u8, gpa: u64, len: u64, file: u8, offset: u64, piece: u64 },
    /// A begin there.
    BeginWild { client: u8, gpa: u64, len: u64, deadline_ns: u64 },
    /// A client ends and removes what it made up.
    Guess { client: u8, id: u64, outcome: Outcome },
    /// A person releases what one invalidation left in quarantine.
    Release { client: u8, held: u16, to: PageState },
    /// The same by a number that was made up.
    ReleaseWild { client: u8, id: u64, to: PageState },
    /// A result that nobody asked for.
    Raw(Event),
}

/// How wild a run is.
#[derive(Debug, Clone, Copy)]
pub struct Mix {
    /// Calls that fail, of a hundred.
    pub faults: u64,
    /// Calls that never return, of a thousand.
    pub hangs: u64,
    /// Clients that die, of a thousand actions.
    pub deaths: u64,
}

impl Mix {
    /// Nothing fails.
    pub const CLEAN: Mix = Mix { faults: 0, hangs: 0, deaths: 2 };
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
    /// Something, at random.
    pub fn random(rng: &mut Rng, mix: Mix) -> Self {
        if rng.odds(mix.deaths, 1000) {
            return Action::Gone { client: rng.below(CLIENTS as u64) as u8 };
        }
        match rng.below(1000) {
            0..30 => Self::add(rng),
            30..40 => Action::Remove { region: rng.next() as u16, stranger: rng.odds(1, 10) },
            40..230 => Self::begin(rng),
            230..260 => Action::Touch { granted: rng.next() as u16 },
            260..440 => Action::End {
                granted: rng.next() as u16,
                outcome: Self::outcome(rng),
                stranger: rng.odds(1, 20),
            },
            440..830 => {
                let task = rng.next() as u16;
                if mix.hangs > 0 && rng.odds(mix.hangs, 1000) {
                    return Action::Hang { task, done: rng.odds(1, 2) };
                }
                if mix.faults > 0 && rng.odds(mix.faults, 400) {
                    return Action::Boast { task };
                }
                let fault = rng.odds(mix.faults, 100).then(|| rng.pick(&FAULTS));
                Action::Work { task, deliver: rng.odds(2, 3), fault }
            }
            830..860 => Action::Flush { domain: rng.next() as u8, stuck: rng.odds(1, 8) },
            860..895 => Action::Advance { ns: 1 << rng.below(14) },
            895..896 => Action::Settle,
            896..897 => Action::Quiet,
            897..900 => {
                let (client, held) = (rng.next() as u8, rng.next() as u16);
                Action::Release { client, held, to: rng.pick(&PageState::ALL) }
            }
            900..901 => Action::Insist { client: rng.next() as u8 },
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
        // Aligned to the piece, as real memory is; now and then it is not.
        let grain = if rng.odds(1, 4) || piece == AUTO { 1 } else { 1u64 << piece };
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
