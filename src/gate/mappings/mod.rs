//! The IOVA domains and their kernel mappings.
//!
//! Here is the only place where a mapping enters or leaves the ledger, and it leaves by proof only: an unmap that returned
//! its full length with nothing in flight, and, where a device may keep a translation, that device detached. An unmap that came
//! back short, failed, or has not come back leaves its run in the ledger, in a state that says so.

mod budget;
mod fragments;
mod shape;

use std::collections::BTreeMap;

use passgate_backends::DomainCaps;
use passgate_bindings::units::{Address, LIMIT};
use passgate_bindings::{Iova, PAGE, PageRange};

use super::event::{MapResult, UnmapResult};
use super::ids::{DomainId, JobId, RegionId};
use super::ledger::exclusions::gaps;
use super::ledger::{Mapped, Run, RunState};
use super::memory::Memory;
use fragments::Fragments;
use shape::Shape;

/// `EPROTO`: a domain reported more bytes gone than were mapped.
pub(super) const EPROTO: i32 = 71;

/// One IOVA domain.
#[derive(Debug)]
pub(super) struct Domain {
    id: DomainId,
    caps: DomainCaps,
    mapped: Mapped,
    /// The number of kernel mappings that open invalidations may yet need, or that regions being added were promised.
    reserved: u64,
    fragments: Fragments,
    /// The size of each region's mappings.
    shapes: BTreeMap<RegionId, Shape>,
}

/// An unmap that is to be asked for.
pub(super) struct Unmap {
    /// Bytes that were reported gone before; none where nobody knows how many were mapped.
    pub(super) already: Option<u64>,
    /// Bytes that are mapped, or were before.
    pub(super) bytes: u64,
}

impl Domain {
    pub(super) fn id(&self) -> DomainId {
        self.id
    }

    pub(super) fn caps(&self) -> DomainCaps {
        self.caps
    }

    /// The ledger of what is mapped, to read.
    pub(super) fn mapped(&self) -> &Mapped {
        &self.mapped
    }

    /// Makes a run over `iova` that is being mapped by `job`. Nothing may be there.
    fn start_map(&mut self, job: JobId, iova: PageRange<Iova>, piece: u64) -> u64 {
        let run = Run::filling(iova, piece, job);
        self.mapped.insert(run);
        run.mapping_count
    }

    /// A map over `iova` has returned. Returns false if no such map was in progress there.
    #[must_use]
    fn end_map(&mut self, job: JobId, iova: PageRange<Iova>, result: MapResult) -> bool {
        let filling =
            |run: &Run| matches!(run.state, RunState::Filling { job: filling, .. } if filling == job);
        if !self.mapped.at(iova.start()).is_some_and(|run| run.range == iova && filling(&run)) {
            return false;
        }
        match result {
            MapResult::Mapped => self.mapped.made(iova.start()),
            MapResult::Refused { .. } => _ = self.mapped.remove(iova.start()),
            MapResult::Unknown { errno } => {
                self.mapped.mark(iova.start(), RunState::Suspect { gone: None, errno });
            }
        }
        true
    }

    /// The mappings over `iova`, or the run there that failed, are being unmapped by `job`. Returns none where nothing can be.
    fn start_unmap(&mut self, job: JobId, iova: PageRange<Iova>) -> Option<Unmap> {
        match self.mapped.at(iova.start()) {
            Some(run) => {
                let RunState::Suspect { gone, .. } = run.state else { return None };
                self.mapped.mark(iova.start(), RunState::Removing(job));
                Some(Unmap { already: gone, bytes: run.bytes })
            }
            None => {
                let run = self.mapped.take(iova, RunState::Removing(job));
                Some(Unmap { already: Some(0), bytes: run.bytes })
            }
        }
    }

    /// The run that `job` is unmapping at `start`.
    pub(super) fn removing(&self, start: Iova, job: JobId) -> Option<Run> {
        self.mapped.at(start).filter(|run| run.state == RunState::Removing(job))
    }

    /// The run at `start` that `job` has unmapped, with operations still in flight.
    pub(super) fn in_flight(&self, start: Iova, job: JobId) -> Option<Run> {
        self.mapped.at(start).filter(|run| run.state == RunState::Leaking(job))
    }

    /// An unmap of `run` has returned, of which `already` bytes were gone before. `ats` is true while a device of the domain may
    /// go on using a translation that was taken away.
    pub(super) fn end_unmap(
        &mut self,
        job: JobId,
        run: Run,
        already: Option<u64>,
        result: UnmapResult,
        ats: bool,
    ) {
        let (UnmapResult::Gone { bytes }
        | UnmapResult::InFlight { bytes }
        | UnmapResult::Failed { bytes, .. }) = result;
        let (gone, start) = (already.unwrap_or(0).saturating_add(bytes), run.range.start());
        // If nobody knows how many bytes there were, success says that nothing is left.
        let whole = gone == run.bytes || already.is_none() && gone < run.bytes;
        match result {
            UnmapResult::Gone { .. } if whole => self.gone(start, ats),
            // Also where it came up short: what is in flight must end before the rest is tried.
            UnmapResult::InFlight { .. } => self.mapped.mark(start, RunState::Leaking(job)),
            UnmapResult::Gone { .. } | UnmapResult::Failed { .. } => {
                let errno = match result {
                    UnmapResult::Failed { errno, .. } => errno,
                    _ if gone > run.bytes => EPROTO,
                    _ => 0,
                };
                let gone = already.map(|_| gone.min(run.bytes));
                self.mapped.mark(start, RunState::Suspect { gone, errno });
            }
        }
    }

    /// The operations in flight over a run have ended. `already` bytes were reported gone.
    pub(super) fn end_flight(&mut self, run: Run, already: Option<u64>, ats: bool) {
        let start = run.range.start();
        let whole = already == Some(run.bytes);
        if whole {
            self.gone(start, ats);
        } else {
            let gone = already.map(|already| already.min(run.bytes));
            self.mapped.mark(start, RunState::Suspect { gone, errno: 0 });
        }
    }

    /// The run at `start` was reported gone, every byte of it.
    fn gone(&mut self, start: Iova, ats: bool) {
        if ats {
            self.mapped.mark(start, RunState::Cached);
        } else {
            self.mapped.remove(start);
        }
    }

    /// The leftovers of an earlier process at `iova` are being unmapped by `job`.
    pub(super) fn start_leftover(&mut self, job: JobId, iova: PageRange<Iova>) {
        self.mapped.mark(iova.start(), RunState::Removing(job));
    }

    /// An unmap of leftovers at `iova` has returned: they are gone, or were before; or they are in doubt for good.
    pub(super) fn end_leftover(&mut self, iova: PageRange<Iova>, result: UnmapResult, ats: bool) {
        let start = iova.start();
        match result {
            // Success says that nothing is left, however much of it there was.
            UnmapResult::Gone { bytes } if bytes <= iova.len() => self.gone(start, ats),
            UnmapResult::Failed { errno, .. } => {
                self.mapped.mark(start, RunState::Suspect { gone: None, errno });
            }
            UnmapResult::Gone { .. } | UnmapResult::InFlight { .. } => {
                self.mapped.mark(start, RunState::Suspect { gone: None, errno: 0 });
            }
        }
    }

    /// Everything live in `range` is in doubt: nobody knows how much of it there is.
    pub(super) fn doubt(&mut self, range: PageRange<Iova>) {
        for live in self.mapped.live(range).collect::<Vec<_>>() {
            self.mapped.take(live, RunState::Suspect { gone: None, errno: 0 });
        }
    }

    /// The parts of `range` of which nothing is known may be mapped.
    pub(super) fn doubt_unknown(&mut self, range: PageRange<Iova>) {
        let taken = self.mapped.taken(range);
        for range in gaps(range, taken.into_iter()).collect::<Vec<_>>() {
            let state = RunState::Suspect { gone: None, errno: 0 };
            self.mapped.insert(Run { range, bytes: range.len(), mapping_count: 1, state });
        }
    }

    /// `spans` are being taken out by a replace. Returns the bytes that are mapped in them.
    fn start_replace(&mut self, job: JobId, spans: &[PageRange<Iova>]) -> u64 {
        let bytes = spans.iter().flat_map(|span| self.mapped.live(*span)).map(PageRange::len).sum();
        // If it fails, nobody knows of the whole mappings how they are.
        let mut last: Option<PageRange<Iova>> = None;
        for span in spans {
            let Some(rest) =
                last.map_or(Some(*span), |last| PageRange::between(last.end().max(span.start()), span.end()))
            else {
                continue;
            };
            // With the gaps in it: nothing may be mapped there while the call is in progress.
            let whole = self.mapped.extent(rest).map_or(rest, |extent| self.mapped.whole(extent));
            let start = rest.start().min(whole.start());
            let Some(range) = PageRange::between(start, rest.end().max(whole.end())) else { continue };
            last = Some(self.mapped.take(range, RunState::Removing(job)).range);
        }
        bytes
    }

    /// Returns the runs that `job`, a replace, is taking out.
    pub(super) fn replaced_by(&self, job: JobId) -> Vec<Run> {
        self.mapped.in_state(RunState::Removing(job))
    }

    /// A replace has taken `gone` out of `runs`: the rest of the mappings is live again.
    pub(super) fn end_replace(&mut self, runs: &[Run], gone: &[PageRange<Iova>], ats: bool) {
        for run in runs {
            self.mapped.remove(run.range.start());
            for range in gone.iter().filter(|_| ats).filter_map(|range| range.intersection(run.range)) {
                self.mapped.insert(Run {
                    range,
                    bytes: range.len(),
                    mapping_count: 1,
                    state: RunState::Cached,
                });
            }
            for rest in gaps(run.range, gone.iter().copied().filter(|range| range.overlaps(run.range))) {
                self.mapped.insert(Run::filling(rest, 1 << 63, JobId(0)));
                self.mapped.made(rest.start());
            }
        }
    }

    /// The last device that may have kept translations is detached: the cached runs are gone now. Removes and returns them.
    pub(super) fn take_cached(&mut self) -> Vec<Run> {
        let gone = self.mapped.in_state(RunState::Cached);
        gone.iter().for_each(|run| _ = self.mapped.remove(run.range.start()));
        gone
    }

    /// Returns the fragmented places that are due to be merged; a tick has passed.
    pub(super) fn take_quiet(&mut self) -> Vec<Iova> {
        self.fragments.take_quiet()
    }

    /// Returns its state as text ([`super::Gate::canonical`]).
    pub(super) fn canonical(&self, text: &mut String) {
        use std::fmt::Write;
        let Self { id, caps: _, mapped, reserved, fragments, shapes } = self;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{id:?} {reserved} {fragments:?} {shapes:?}");
        let Ok(everywhere) = PageRange::<Iova>::new(0, LIMIT) else { return };
        for live in mapped.live(everywhere) {
            let borders = (0..live.pages().min(LISTED_PAGES)).filter(|page| {
                let page = PageRange::<Iova>::new(live.start().raw() + page * PAGE, PAGE);
                page.is_ok_and(|page| mapped.starts(page) > 0)
            });
            let _ = writeln!(text, "{live:?} {} {:?}", mapped.starts(live), borders.collect::<Vec<_>>());
        }
        let _ = writeln!(text, "{:?}", mapped.runs(everywhere).collect::<Vec<_>>());
    }
}

/// The number of pages of one live range whose mappings' borders are listed one by one in [`Domain::canonical`].
const LISTED_PAGES: u64 = 64;

/// All domains of the VM.
#[derive(Debug, Default)]
pub(super) struct Mappings {
    domains: Vec<Domain>,
}

impl Mappings {
    /// Adds a domain, unless it is known already.
    pub(super) fn add_domain(&mut self, id: DomainId, caps: DomainCaps, memory: &Memory) {
        if self.get(id).is_some() {
            return;
        }
        let (mapped, fragments, shapes) =
            (memory.stored_mappings(id), Default::default(), Default::default());
        self.domains.push(Domain { id, caps, mapped, reserved: 0, fragments, shapes });
    }

    pub(super) fn get(&self, id: DomainId) -> Option<&Domain> {
        self.domains.iter().find(|domain| domain.id == id)
    }

    pub(super) fn get_mut(&mut self, id: DomainId) -> Option<&mut Domain> {
        self.domains.iter_mut().find(|domain| domain.id == id)
    }

    /// Returns the domains in the order in which they were added.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Domain> {
        self.domains.iter()
    }

    /// Returns the domains' numbers in the order in which they were added.
    pub(super) fn ids(&self) -> Vec<DomainId> {
        self.domains.iter().map(|domain| domain.id).collect()
    }

    /// Returns every run over any of `ranges`, in every domain; twice where two ranges share it.
    pub(super) fn runs_over(&self, ranges: &[PageRange<Iova>]) -> Vec<(DomainId, Run)> {
        let mut found = Vec::new();
        for domain in &self.domains {
            for range in ranges {
                found.extend(domain.mapped.runs(*range).map(|run| (domain.id, run)));
            }
        }
        found
    }

    /// True where nothing is mapped at `iova`, or in doubt, in any domain.
    pub(super) fn is_clear(&self, iova: PageRange<Iova>) -> bool {
        self.domains.iter().all(|domain| domain.mapped.is_clear(iova))
    }

    /// Returns the domains in which something is mapped over `targets`, or in doubt.
    pub(super) fn concerned(&self, targets: &[PageRange<Iova>]) -> Vec<DomainId> {
        let concerned = self.domains.iter().filter(|d| targets.iter().any(|t| !d.mapped.is_clear(*t)));
        concerned.map(|domain| domain.id).collect()
    }

    /// Returns the number of runs being unmapped or in doubt, in all domains.
    pub(super) fn unsettled(&self) -> usize {
        self.domains.iter().map(|domain| domain.mapped.unsettled()).sum()
    }

    /// Returns the bytes that devices may reach, summed over the domains.
    pub(super) fn bytes(&self) -> u64 {
        self.domains.iter().map(|domain| domain.mapped.bytes()).sum()
    }

    /// True while a fragmented place waits to be merged.
    pub(super) fn is_fragmented(&self) -> bool {
        self.domains.iter().any(|domain| !domain.fragments.is_empty())
    }

    /// Makes a run over `iova` that is being mapped by `job`, out of the region's promise where it has one.
    pub(super) fn start_map(
        &mut self,
        id: DomainId,
        job: JobId,
        region: RegionId,
        iova: PageRange<Iova>,
        piece: u64,
    ) {
        let Some(domain) = self.get_mut(id) else { return };
        let count = domain.start_map(job, iova, piece);
        self.use_promise(id, region, count);
    }

    /// As [`Domain::start_unmap`]; none where the domain is not known either.
    pub(super) fn start_unmap(&mut self, id: DomainId, job: JobId, iova: PageRange<Iova>) -> Option<Unmap> {
        self.get_mut(id)?.start_unmap(job, iova)
    }

    /// As [`Domain::start_replace`]; none where the domain is not known.
    pub(super) fn start_replace(
        &mut self,
        id: DomainId,
        job: JobId,
        spans: &[PageRange<Iova>],
    ) -> Option<u64> {
        Some(self.get_mut(id)?.start_replace(job, spans))
    }

    /// A map over `iova` has returned. Returns false if no such map was in progress there.
    #[must_use]
    pub(super) fn end_map(
        &mut self,
        id: DomainId,
        job: JobId,
        iova: PageRange<Iova>,
        result: MapResult,
    ) -> bool {
        self.get_mut(id).is_some_and(|domain| domain.end_map(job, iova, result))
    }
}
