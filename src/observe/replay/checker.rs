//! The independent checker: it checks the promises by the results of calls, without any of the gate's code.
//!
//! It records which pages of which file are mapped at which addresses (by a map that returned mapped or unknown, or has not returned;
//! except those that an unmap removed at its full length with nothing in flight), which are between begin and end, and which are in
//! quarantine. The gate's conclusions are only checked, never used.

use std::collections::{BTreeMap, HashMap, HashSet};

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::mapped::{Mapped, Pages, bytes, show};
use super::spans::Spans;
use super::unanswered::Unanswered;
use crate::gate::{
    Caller, ClientId, DomainId, Event, FileId, InvalidationId, JobId, MapResult, Performer, RegionId,
    RegionSpec, UnmapResult, Verdict,
};
use crate::observe::audit::{Line, LoggedEffect};

/// A call that has not returned, or an unmap whose operations have not ended.
#[derive(Debug)]
struct Job {
    domain: DomainId,
    ranges: Vec<PageRange<Iova>>,
}

/// A region that is being added, or was added.
#[derive(Debug)]
pub(super) struct Region {
    /// Its number; none while it is not known.
    pub(super) id: Option<RegionId>,
    pub(super) caller: Caller,
    pub(super) spec: RegionSpec,
}

/// An invalidation between begin and end.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) caller: Caller,
    pub(super) pages: Vec<Pages>,
    pub(super) iova: Vec<PageRange<Iova>>,
    pub(super) performer: Performer,
    /// The time of the begin, in nanoseconds since the run's start.
    pub(super) begun: u64,
    pub(super) deadline_ns: u64,
    pub(super) answered: bool,
    /// True while passgate converts the pages itself.
    pub(super) converting: bool,
}

/// The state after the lines of the log that were read so far.
#[derive(Debug)]
pub(super) struct Checker {
    /// True if every line since the daemon's start was read; else nothing is reported that an earlier line may explain.
    pub(super) whole: bool,
    pub(super) mapped: Mapped,
    pub(super) regions: Vec<Region>,
    last_region: u32,
    pub(super) open: BTreeMap<InvalidationId, Open>,
    /// The pages of open invalidations.
    pub(super) open_pages: HashMap<FileId, Spans>,
    pub(super) quarantine: HashMap<FileId, Spans>,
    jobs: HashMap<JobId, Job>,
    /// The ranges of maps that failed half-way: it is not known how many bytes are mapped, so a successful unmap is whole with
    /// any number of bytes.
    half_mapped: HashSet<(DomainId, PageRange<Iova>)>,
    /// Bytes that unmaps have removed of ranges that are not wholly gone yet, by the ranges that were asked for.
    partly_gone: HashMap<(DomainId, Vec<PageRange<Iova>>), u64>,
    unanswered: Unanswered,
    /// The pages that must be in quarantine by the end of the line, with the invalidation that left them unknown.
    pub(super) must_be_quarantined: Vec<(InvalidationId, Pages)>,
    /// The time of the present line, in nanoseconds since the run's start.
    pub(super) now: u64,
    /// The violations in the present line.
    violations: Vec<String>,
}

/// Returns the caller of an event that is a request.
fn requester(event: &Event) -> Option<Caller> {
    match event {
        Event::AddRegion { caller, .. }
        | Event::RemoveRegion { caller, .. }
        | Event::Begin { caller, .. }
        | Event::End { caller, .. }
        | Event::Release { caller, .. }
        | Event::Adopt { caller } => Some(*caller),
        _ => None,
    }
}

/// Returns true if the effect answers this caller that its request was refused.
fn refuses(effect: &LoggedEffect<'_>, caller: Caller) -> bool {
    matches!(effect, LoggedEffect::Wrong { to, .. } if *to == caller)
}

impl Checker {
    pub(super) fn new(whole: bool) -> Self {
        Self {
            whole,
            mapped: Mapped::default(),
            regions: Vec::new(),
            last_region: 0,
            open: BTreeMap::new(),
            open_pages: HashMap::new(),
            quarantine: HashMap::new(),
            jobs: HashMap::new(),
            half_mapped: HashSet::new(),
            partly_gone: HashMap::new(),
            unanswered: Unanswered::new(whole),
            must_be_quarantined: Vec::new(),
            now: 0,
            violations: Vec::new(),
        }
    }

    /// Takes one line; appends the violations in it to `violations`.
    pub(super) fn line(&mut self, line: &Line, violations: &mut Vec<String>) {
        self.now = line.t;
        self.event(line);
        for (nth, effect) in line.x.iter().enumerate() {
            if matches!(effect, LoggedEffect::Verdict { verdict, .. } if *verdict != Verdict::Done) {
                // The answer comes before the notices of the quarantine that it leaves, but all effects of one event belong
                // together.
                line.x[nth..].iter().for_each(|later| self.quarantined_by(later));
            }
            if let Some(to) = effect.answers()
                && !self.unanswered.answered(to)
            {
                let Caller { client, cookie, .. } = to;
                self.violated(format!("client {} is answered request {cookie} twice, or unasked", client.0));
            }
            self.effect(effect, &line.e);
        }
        for (id, pages) in std::mem::take(&mut self.must_be_quarantined) {
            let safe = self.quarantine.get(&pages.0).is_some_and(|spans| spans.covers(pages.1.clone()));
            if !safe {
                let at = show(&pages);
                self.violated(format!("invalidation {} left {at} unknown and not in quarantine", id.0));
            }
        }
        violations.append(&mut self.violations);
    }

    /// Checks at the end of the log that every begin was answered whose deadline has passed.
    pub(super) fn end(&mut self, violations: &mut Vec<String>) {
        for (id, open) in &self.open {
            if !open.answered && self.now.saturating_sub(open.begun) > open.deadline_ns {
                violations.push(format!("invalidation {} was not answered within its deadline", id.0));
            }
        }
    }

    /// Returns the pages that are in quarantine now.
    pub(super) fn quarantined(&self) -> impl Iterator<Item = Pages> + '_ {
        self.quarantine.iter().flat_map(|(file, spans)| spans.iter().map(|range| (*file, range)))
    }

    pub(super) fn violated(&mut self, what: String) {
        self.violations.push(what);
    }

    fn event(&mut self, line: &Line) {
        if let Some(caller) = requester(&line.e) {
            self.unanswered.requested(caller);
        }
        match &line.e {
            Event::AddRegion { caller, spec } => {
                let (caller, spec) = (*caller, *spec);
                if !line.x.iter().any(|effect| refuses(effect, caller)) {
                    self.last_region += 1;
                    let id = self.whole.then_some(RegionId(self.last_region));
                    self.regions.retain(|other| !other.spec.gpa.overlaps(spec.gpa));
                    self.regions.push(Region { id, caller, spec });
                }
            }
            Event::Begin { .. } => self.begin(line),
            Event::Mapped { job, result } => {
                let Some(Job { domain, ranges }) = self.jobs.remove(job) else { return };
                for iova in ranges {
                    match result {
                        MapResult::Mapped => {}
                        MapResult::Refused { .. } => self.mapped.remove(domain, iova),
                        MapResult::Unknown { .. } => _ = self.half_mapped.insert((domain, iova)),
                    }
                }
            }
            Event::Unmapped { job, result, .. } => self.unmapped(*job, *result),
            Event::FlightEnded { job } => {
                if let Some(Job { domain, ranges }) = self.jobs.remove(job) {
                    self.remove_if_complete(domain, ranges);
                }
            }
            Event::ClientGone { client } => self.client_gone(*client),
            Event::Quarantine { file, range, .. } => {
                self.quarantine.entry(*file).or_default().insert(bytes(*range));
            }
            _ => {}
        }
    }

    fn begin(&mut self, line: &Line) {
        let Event::Begin { caller, ranges, performer, deadline_ns, .. } = &line.e else { return };
        let (caller, performer, deadline_ns) = (*caller, *performer, *deadline_ns);
        let number = line.x.iter().find_map(|effect| match effect {
            LoggedEffect::Arm { invalidation, .. }
            | LoggedEffect::Verdict { invalidation, .. }
            | LoggedEffect::Convert { invalidation } => Some(*invalidation),
            _ => None,
        });
        let Some(id) = number else {
            if !line.x.iter().any(|effect| refuses(effect, caller)) {
                self.violated("a begin has neither an answer nor an alarm that would bring one".to_owned());
            }
            return;
        };
        let shown = |range: PageRange<Gpa>| {
            self.regions.iter().filter_map(move |region| {
                let part = region.spec.gpa.intersection(range)?;
                let pages = part.rebase(region.spec.gpa.start(), region.spec.backing.offset);
                Some((region.spec.backing.file, bytes(pages)))
            })
        };
        let pages: Vec<Pages> = ranges.iter().flat_map(shown).collect();
        for (file, range) in &pages {
            self.open_pages.entry(*file).or_default().insert(range.clone());
        }
        let iova = ranges.iter().map(|range| range.rebase(Gpa(0), Iova(0))).collect();
        let open = Open {
            caller,
            pages,
            iova,
            performer,
            begun: line.t,
            deadline_ns,
            answered: false,
            converting: false,
        };
        if self.open.insert(id, open).is_some() {
            self.violated(format!("invalidation {} was begun twice", id.0));
        }
    }

    fn unmapped(&mut self, job: JobId, result: UnmapResult) {
        let Some(Job { domain, ranges }) = self.jobs.remove(&job) else { return };
        let (UnmapResult::Gone { bytes }
        | UnmapResult::InFlight { bytes }
        | UnmapResult::Failed { bytes, .. }) = result;
        let mapped = self.mapped_bytes(domain, &ranges);
        let gone = self.partly_gone.entry((domain, ranges.clone())).or_default();
        *gone = gone.saturating_add(bytes);
        match result {
            UnmapResult::Gone { .. } => self.remove_if_complete(domain, ranges),
            UnmapResult::InFlight { .. } => _ = self.jobs.insert(job, Job { domain, ranges }),
            UnmapResult::Failed { .. } => *gone = (*gone).min(mapped),
        }
    }

    /// Removes the mappings in these ranges if their full length was reported gone. Nothing may be in flight any more.
    fn remove_if_complete(&mut self, domain: DomainId, ranges: Vec<PageRange<Iova>>) {
        let mapped = self.mapped_bytes(domain, &ranges);
        let half_mapped = matches!(ranges[..], [iova] if self.half_mapped.contains(&(domain, iova)));
        let key = (domain, ranges);
        let Some(gone) = self.partly_gone.get_mut(&key) else { return };
        // More than is known to be mapped: the rest was mapped before the first line that was read.
        if *gone == mapped || (half_mapped && *gone < mapped) || (!self.whole && *gone > mapped) {
            self.partly_gone.remove(&key);
            for iova in key.1 {
                self.mapped.remove(domain, iova);
                self.half_mapped.remove(&(domain, iova));
            }
        } else {
            *gone = (*gone).min(mapped);
        }
    }

    /// Returns the number of bytes that are mapped in these ranges, which may have gaps.
    fn mapped_bytes(&self, domain: DomainId, ranges: &[PageRange<Iova>]) -> u64 {
        ranges.iter().map(|iova| self.mapped.bytes_at(domain, *iova)).sum()
    }

    fn client_gone(&mut self, client: ClientId) {
        self.unanswered.gone(client);
        // A conversion by passgate continues, and ends by its own result.
        let over: Vec<InvalidationId> = self
            .open
            .iter()
            .filter(|(_, open)| open.caller.client == client && !open.converting)
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            let Some(open) = self.close(id) else { continue };
            if open.answered {
                self.must_be_quarantined.extend(open.pages.into_iter().map(|pages| (id, pages)));
            }
        }
    }

    /// Ends an invalidation. Returns it.
    pub(super) fn close(&mut self, id: InvalidationId) -> Option<Open> {
        let open = self.open.remove(&id)?;
        for (file, range) in &open.pages {
            if let Some(spans) = self.open_pages.get_mut(file) {
                spans.remove(range.clone());
                if spans.is_empty() {
                    self.open_pages.remove(file);
                }
            }
        }
        Some(open)
    }

    fn quarantined_by(&mut self, effect: &LoggedEffect<'_>) {
        if let LoggedEffect::Quarantined { file, range, .. } = effect {
            self.quarantine.entry(*file).or_default().insert(bytes(*range));
        }
    }

    fn effect(&mut self, effect: &LoggedEffect<'_>, event: &Event) {
        match effect {
            LoggedEffect::Map { job, domain, iova, file, offset, .. } => {
                let pages = (*file, offset.raw()..offset.raw().saturating_add(iova.len()));
                self.check_map(&pages);
                self.mapped.insert(*domain, *iova, *file, offset.raw());
                self.jobs.insert(*job, Job { domain: *domain, ranges: vec![*iova] });
            }
            LoggedEffect::Unmap { job, domain, iova } => {
                self.jobs.insert(*job, Job { domain: *domain, ranges: vec![*iova] });
            }
            LoggedEffect::Replace { job, domain, gone } => {
                self.jobs.insert(*job, Job { domain: *domain, ranges: gone.clone() });
            }
            LoggedEffect::Convert { invalidation } => {
                self.check_clear(*invalidation, "passgate converts");
                if let Some(open) = self.open.get_mut(invalidation) {
                    open.converting = true;
                }
            }
            LoggedEffect::Verdict { invalidation, verdict, .. } => {
                self.check_verdict(*invalidation, *verdict);
            }
            LoggedEffect::Ended { to, invalidation } => self.check_end(to.client, *invalidation, event),
            LoggedEffect::Added { to, region, .. } => {
                let added = self.regions.iter_mut().find(|known| known.caller == *to);
                added.into_iter().for_each(|known| known.id = Some(*region));
            }
            // A region whose number is known stays until the notice that it is closed.
            LoggedEffect::Wrong { to, .. } => {
                self.regions.retain(|region| region.caller != *to || region.id.is_some())
            }
            LoggedEffect::Closed { region } => self.check_region_closed(*region),
            LoggedEffect::Quarantined { .. } => self.quarantined_by(effect),
            LoggedEffect::Freed { file, range } | LoggedEffect::OperatorReleased { file, range, .. } => {
                if let Some(spans) = self.quarantine.get_mut(file) {
                    spans.remove(bytes(*range));
                }
            }
            _ => {}
        }
    }
}
