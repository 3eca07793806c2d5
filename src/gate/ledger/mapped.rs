//! What is mapped in one domain: every kernel mapping with its exact borders, and what is under way or in doubt.
//!
//! A page is *live* (plainly mapped, in a kernel mapping whose borders are known), or it lies in a *run* (being mapped, being
//! unmapped, failed: in one piece, with its state), or nothing is there. A run may hold pages of which nothing was
//! mapped: an unmap takes neighbours of one range away by one call, with the gaps between them. A page leaves this table only
//! through [`Mapped::remove`], which the gate calls on proof and nowhere else.

use std::collections::BTreeMap;

use passgate_bindings::units::Address;
use passgate_bindings::{Iova, PAGE, PageRange};

use crate::gate::event::JobId;

/// How sure we are of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// A map call is under way.
    Filling {
        /// Which.
        job: JobId,
        /// Bytes per kernel mapping; their borders are multiples of it.
        piece: u64,
    },
    /// An unmap call is under way.
    Removing(JobId),
    /// Out of the translation, but operations issued before are in flight.
    Leaking(JobId),
    /// Out of the translation, but a device that caches translations may have kept a copy of it.
    Cached,
    /// A call failed half-way or came up short: may be mapped, in part or whole. `gone` bytes of it were
    /// reported removed.
    Suspect {
        /// Bytes reported removed so far.
        gone: u64,
        /// The kernel's last answer.
        errno: i32,
    },
}

impl RunState {
    /// Whether it is on its way out or in doubt, and not about to be mapped.
    pub fn unsettled(self) -> bool {
        !matches!(self, Self::Filling { .. })
    }
}

/// Pages that are not plainly mapped, in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where.
    pub range: PageRange<Iova>,
    /// Bytes of it that are mapped, or were before the call.
    pub bytes: u64,
    /// Kernel mappings in it.
    pub objects: u64,
    /// How sure we are.
    pub state: RunState,
}

impl Run {
    /// A run of mappings that are being made: with borders at the multiples of `piece`, a power of two.
    pub fn filling(range: PageRange<Iova>, piece: u64, job: JobId) -> Self {
        let objects = objects(range, piece);
        Self { range, bytes: range.len(), objects, state: RunState::Filling { job, piece } }
    }
}

/// Kernel mappings that cover `range` where their borders are at the multiples of `piece`.
pub fn objects(range: PageRange<Iova>, piece: u64) -> u64 {
    (range.end().raw() - 1) / piece - range.start().raw() / piece + 1
}

/// What is mapped in one domain.
#[derive(Debug, Default)]
pub struct Mapped {
    /// Every kernel mapping that is live: start to end.
    live: BTreeMap<Iova, Iova>,
    runs: BTreeMap<Iova, Run>,
    objects: u64,
    bytes: u64,
    unsettled: usize,
}

impl Mapped {
    /// Kernel mappings in use, or about to be.
    pub fn objects(&self) -> u64 {
        self.objects
    }

    /// Bytes that are mapped, or may be.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Runs on their way out or in doubt.
    pub fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// Runs that are being mapped.
    pub fn filling(&self) -> usize {
        self.runs.len() - self.unsettled
    }

    /// Whether nothing of `range` is live or in a run.
    pub fn is_clear(&self, range: PageRange<Iova>) -> bool {
        self.runs(range).next().is_none() && self.mappings(range).next().is_none()
    }

    /// The runs that share a page with `range`, whole, in order.
    pub fn runs(&self, range: PageRange<Iova>) -> impl Iterator<Item = Run> + '_ {
        let before = self.runs.range(..range.start()).next_back().map(|(_, run)| *run);
        before
            .filter(|run| run.range.overlaps(range))
            .into_iter()
            .chain(self.runs.range(range.start()..range.end()).map(|(_, run)| *run))
    }

    /// The longest stretches of live pages in `range`, cut to it, in order.
    pub fn live(&self, range: PageRange<Iova>) -> impl Iterator<Item = PageRange<Iova>> + '_ {
        let mut mappings = self.mappings(range).peekable();
        std::iter::from_fn(move || {
            let first = mappings.next()?;
            let mut end = first.end();
            while let Some(next) = mappings.next_if(|next| next.start() == end) {
                end = next.end();
            }
            PageRange::between(first.start().max(range.start()), end.min(range.end()))
        })
    }

    /// What of `range` is live or in a run, in order, cut to it or whole.
    pub fn taken(&self, range: PageRange<Iova>) -> Vec<PageRange<Iova>> {
        let mut taken: Vec<_> = self.live(range).chain(self.runs(range).map(|run| run.range)).collect();
        taken.sort_unstable();
        taken
    }

    /// From the first live page in `range` to the last.
    pub fn extent(&self, range: PageRange<Iova>) -> Option<PageRange<Iova>> {
        let first = self.mappings(range).next()?.start().max(range.start());
        let (_, end) = self.live.range(..range.end()).next_back()?;
        PageRange::between(first, (*end).min(range.end()))
    }

    /// `range`, widened at either end to where no live mapping sticks out of it.
    pub fn whole(&self, range: PageRange<Iova>) -> PageRange<Iova> {
        let first = self.mappings(range).next().map_or(range.start(), |m| m.start().min(range.start()));
        let last = Iova::from_raw(range.end().raw() - PAGE);
        let last = PageRange::between(last, range.end()).and_then(|page| self.mappings(page).next());
        let end = last.map_or(range.end(), |m| m.end().max(range.end()));
        PageRange::between(first, end).unwrap_or(range)
    }

    /// Live kernel mappings that begin in `range`.
    pub fn starts(&self, range: PageRange<Iova>) -> u64 {
        self.live.range(range.start()..range.end()).count() as u64
    }

    /// Puts a run where nothing is.
    pub fn insert(&mut self, run: Run) {
        debug_assert!(self.is_clear(run.range));
        self.objects += run.objects;
        self.bytes += run.bytes;
        self.unsettled += usize::from(run.state.unsettled());
        self.runs.insert(run.range.start(), run);
    }

    /// A kernel mapping that an earlier process made, where nothing is.
    pub fn again(&mut self, mapping: PageRange<Iova>) {
        debug_assert!(self.is_clear(mapping));
        self.objects += 1;
        self.bytes += mapping.len();
        self.live.insert(mapping.start(), mapping.end());
    }

    /// The run at `start` was being mapped, and is live now.
    pub fn made(&mut self, start: Iova) {
        let Some(Run { range, state: RunState::Filling { piece, .. }, .. }) = self.remove(start) else {
            return;
        };
        self.objects += objects(range, piece);
        self.bytes += range.len();
        let mut at = range.start();
        while at < range.end() {
            let next = Iova((at.raw() / piece + 1) * piece).min(range.end());
            self.live.insert(at, next);
            at = next;
        }
    }

    /// Everything live in `range`, in which no run is, becomes one run over the whole of it. Mappings that stick out
    /// are cut.
    pub fn take(&mut self, range: PageRange<Iova>, state: RunState) -> Run {
        debug_assert!(self.runs(range).next().is_none());
        let over: Vec<_> = self.mappings(range).collect();
        let (mut bytes, mut objects) = (0, 0);
        for mapping in over {
            self.live.remove(&mapping.start());
            self.objects -= 1;
            let [left, right] = mapping.without(range);
            for rest in [left, right].into_iter().flatten() {
                self.live.insert(rest.start(), rest.end());
                self.objects += 1;
            }
            bytes += mapping.intersection(range).map_or(0, PageRange::len);
            objects += 1;
        }
        self.bytes -= bytes;
        let run = Run { range, bytes, objects, state };
        self.insert(run);
        run
    }

    /// Changes the state of the run at `start`; not to [`RunState::Filling`].
    pub fn mark(&mut self, start: Iova, state: RunState) {
        if let Some(run) = self.runs.get_mut(&start) {
            self.unsettled -= usize::from(run.state.unsettled());
            self.unsettled += usize::from(state.unsettled());
            self.bytes -= run.left();
            run.state = state;
            self.bytes += run.left();
        }
    }

    /// Takes the run at `start` out of the ledger: the caller has proof that it is gone.
    pub fn remove(&mut self, start: Iova) -> Option<Run> {
        let run = self.runs.remove(&start)?;
        self.objects -= run.objects;
        self.bytes -= run.left();
        self.unsettled -= usize::from(run.state.unsettled());
        Some(run)
    }

    /// The runs in this state, in order.
    pub fn in_state(&self, state: RunState) -> Vec<Run> {
        self.runs.values().filter(|run| run.state == state).copied().collect()
    }

    /// The run that starts at `start`.
    pub fn at(&self, start: Iova) -> Option<Run> {
        self.runs.get(&start).copied()
    }

    /// The live mappings that share a page with `range`, whole, in order.
    pub fn mappings(&self, range: PageRange<Iova>) -> impl Iterator<Item = PageRange<Iova>> + '_ {
        let before = self.live.range(..range.start()).next_back();
        before
            .filter(|(_, end)| **end > range.start())
            .into_iter()
            .chain(self.live.range(range.start()..range.end()))
            .filter_map(|(start, end)| PageRange::between(*start, *end))
    }
}

impl Run {
    /// Bytes of it that may be mapped.
    fn left(&self) -> u64 {
        match self.state {
            RunState::Suspect { gone, .. } => self.bytes.saturating_sub(gone),
            _ => self.bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(page: u64, pages: u64) -> PageRange<Iova> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    fn mapped(parts: &[(u64, u64, u64)]) -> Mapped {
        let mut mapped = Mapped::default();
        for (page, pages, piece) in parts {
            mapped.insert(Run::filling(range(*page, *pages), piece * PAGE, JobId(1)));
            mapped.made(Iova(page * PAGE));
        }
        mapped
    }

    fn live(mapped: &Mapped) -> Vec<PageRange<Iova>> {
        mapped.live(range(0, 1 << 20)).collect()
    }

    #[test]
    fn borders_lie_on_the_grid_and_stay_where_they_are() {
        let mut mapped = mapped(&[(3, 30, 8)]);
        assert_eq!((mapped.objects(), mapped.bytes()), (5, 30 * PAGE));
        assert_eq!(mapped.whole(range(9, 1)), range(8, 8));
        assert_eq!(mapped.whole(range(0, 5)), range(0, 8));
        assert_eq!(mapped.whole(range(15, 2)), range(8, 16));
        assert_eq!(mapped.whole(range(32, 8)), range(32, 8));
        assert_eq!(mapped.whole(range(40, 8)), range(40, 8));
        let run = mapped.take(range(8, 8), RunState::Removing(JobId(2)));
        assert_eq!((run.bytes, run.objects, mapped.objects()), (8 * PAGE, 1, 5));
        assert!(!mapped.is_clear(range(9, 1)) && mapped.unsettled() == 1);
        mapped.remove(Iova(8 * PAGE));
        assert_eq!((mapped.objects(), mapped.bytes()), (4, 22 * PAGE));
        assert_eq!(live(&mapped), [range(3, 5), range(16, 17)]);
    }

    #[test]
    fn a_cut_leaves_two_and_a_gap_comes_along() {
        let mut mapped = mapped(&[(0, 16, 16), (20, 4, 16)]);
        let run = mapped.take(range(5, 2), RunState::Removing(JobId(2)));
        assert_eq!((run.bytes, run.objects), (2 * PAGE, 1));
        assert_eq!(mapped.objects(), 4, "left, the run, right, and the other");
        mapped.remove(run.range.start());
        assert_eq!((mapped.objects(), live(&mapped)), (3, vec![range(0, 5), range(7, 9), range(20, 4)]));
        assert_eq!(mapped.whole(range(10, 1)), range(7, 9));
        let run = mapped.take(range(8, 14), RunState::Removing(JobId(3)));
        assert_eq!((run.bytes, run.objects), (10 * PAGE, 2));
        mapped.mark(run.range.start(), RunState::Suspect { gone: PAGE, errno: 5 });
        assert_eq!(mapped.bytes(), (5 + 1 + 9 + 2) * PAGE);
        assert!(!mapped.is_clear(range(17, 1)), "what the call covers may not be mapped meanwhile");
    }
}
