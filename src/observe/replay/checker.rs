//! The independent checker: promises judged from what calls returned, without any of the gate's code.
//!
//! It keeps which pages of which file are mapped where (a map that returned mapped or unknown, or has not returned;
//! less what an unmap took away at its full length with nothing in flight), which are between begin and end, and which
//! are in quarantine. It never looks at what the gate concluded, but to judge it.

use std::collections::{BTreeMap, HashMap, HashSet};

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::mapped::{Mapped, Pages, bytes, show};
use super::spans::Spans;
use super::waiting::Waiting;
use crate::gate::{
    Caller, ClientId, DomainId, Event, FileId, InvalidationId, JobId, MapResult, Performer, RegionId,
    RegionSpec, UnmapResult, Verdict,
};
use crate::observe::audit::{Line, Said};

/// A call whose result is awaited.
#[derive(Debug)]
struct Job {
    domain: DomainId,
    ranges: Vec<PageRange<Iova>>,
}

#[derive(Debug)]
pub(super) struct Region {
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
    pub(super) begun: u64,
    pub(super) deadline_ns: u64,
    pub(super) answered: bool,
    /// Whether passgate is at the pages itself.
    pub(super) converting: bool,
}

/// What is known at a point of the log.
#[derive(Debug)]
pub(super) struct Checker {
    /// Whether everything since the daemon's start was seen: else what is unknown is not held against anybody.
    pub(super) whole: bool,
    pub(super) mapped: Mapped,
    pub(super) regions: Vec<Region>,
    last_region: u32,
    pub(super) open: BTreeMap<InvalidationId, Open>,
    pub(super) held: HashMap<FileId, Spans>,
    pub(super) quarantine: HashMap<FileId, Spans>,
    jobs: HashMap<JobId, Job>,
    /// What a map has left half made: nobody knows how much of it, so that an unmap of it that succeeds is whole.
    half: HashSet<(DomainId, PageRange<Iova>)>,
    /// Bytes that went in part, by the ranges that were asked for.
    partly: HashMap<(DomainId, Vec<PageRange<Iova>>), u64>,
    waiting: Waiting,
    /// What must be in quarantine by the end of the line, and since which invalidation.
    pub(super) must: Vec<(InvalidationId, Pages)>,
    pub(super) now: u64,
    found: Vec<String>,
}

/// Who asked, where an event is a request.
fn asked(event: &Event) -> Option<Caller> {
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

impl Checker {
    pub(super) fn new(whole: bool) -> Self {
        Self {
            whole,
            mapped: Mapped::default(),
            regions: Vec::new(),
            last_region: 0,
            open: BTreeMap::new(),
            held: HashMap::new(),
            quarantine: HashMap::new(),
            jobs: HashMap::new(),
            half: HashSet::new(),
            partly: HashMap::new(),
            waiting: Waiting::new(whole),
            must: Vec::new(),
            now: 0,
            found: Vec::new(),
        }
    }

    /// Takes one line in; what it broke is appended to `found`.
    pub(super) fn line(&mut self, line: &Line, found: &mut Vec<String>) {
        self.now = line.t;
        self.event(line);
        for (nth, said) in line.x.iter().enumerate() {
            if matches!(said, Said::Verdict { verdict, .. } if *verdict != Verdict::Done) {
                // The answer leaves before the notices of what it left in quarantine: all of one event is one fact.
                line.x[nth..].iter().for_each(|later| self.quarantined_by(later));
            }
            if let Some(to) = said.answers()
                && !self.waiting.answered(to)
            {
                let Caller { client, cookie, .. } = to;
                self.broken(format!("client {} is answered request {cookie} twice, or unasked", client.0));
            }
            self.said(said, &line.e);
        }
        for (id, pages) in std::mem::take(&mut self.must) {
            let safe = self.quarantine.get(&pages.0).is_some_and(|spans| spans.covers(pages.1.clone()));
            if !safe {
                let at = show(&pages);
                self.broken(format!("invalidation {} left {at} unknown and not in quarantine", id.0));
            }
        }
        found.append(&mut self.found);
    }

    /// The log is over: who should have had an answer by then?
    pub(super) fn end(&mut self, found: &mut Vec<String>) {
        for (id, open) in &self.open {
            if !open.answered && self.now.saturating_sub(open.begun) > open.deadline_ns {
                found.push(format!("invalidation {} was not answered within its deadline", id.0));
            }
        }
    }

    /// What is in quarantine at this point.
    pub(super) fn quarantined(&self) -> impl Iterator<Item = Pages> + '_ {
        self.quarantine.iter().flat_map(|(file, spans)| spans.iter().map(|range| (*file, range)))
    }

    pub(super) fn broken(&mut self, what: String) {
        self.found.push(what);
    }

    fn event(&mut self, line: &Line) {
        if let Some(caller) = asked(&line.e) {
            self.waiting.asked(caller);
        }
        match &line.e {
            Event::AddRegion { caller, spec } => {
                let (caller, spec) = (*caller, *spec);
                let refused = |said: &Said<'_>| matches!(said, Said::Wrong { to, .. } if *to == caller);
                if !line.x.iter().any(refused) {
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
                        MapResult::Unknown { .. } => _ = self.half.insert((domain, iova)),
                    }
                }
            }
            Event::Unmapped { job, result, .. } => self.unmapped(*job, *result),
            Event::Released { job } => {
                if let Some(Job { domain, ranges }) = self.jobs.remove(job) {
                    self.gone_if_whole(domain, ranges);
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
        let named = line.x.iter().find_map(|said| match said {
            Said::Arm { invalidation, .. }
            | Said::Verdict { invalidation, .. }
            | Said::Convert { invalidation } => Some(*invalidation),
            _ => None,
        });
        let Some(id) = named else {
            if !line.x.iter().any(|said| matches!(said, Said::Wrong { to, .. } if *to == caller)) {
                self.broken("a begin has neither an answer nor an alarm that would bring one".to_owned());
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
            self.held.entry(*file).or_default().insert(range.clone());
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
            self.broken(format!("invalidation {} was begun twice", id.0));
        }
    }

    fn unmapped(&mut self, job: JobId, result: UnmapResult) {
        let Some(Job { domain, ranges }) = self.jobs.remove(&job) else { return };
        let (UnmapResult::Gone { bytes }
        | UnmapResult::InFlight { bytes }
        | UnmapResult::Failed { bytes, .. }) = result;
        let asked = self.asked(domain, &ranges);
        let partly = self.partly.entry((domain, ranges.clone())).or_default();
        *partly = partly.saturating_add(bytes);
        match result {
            UnmapResult::Gone { .. } => self.gone_if_whole(domain, ranges),
            UnmapResult::InFlight { .. } => _ = self.jobs.insert(job, Job { domain, ranges }),
            UnmapResult::Failed { .. } => *partly = (*partly).min(asked),
        }
    }

    /// Nothing is in flight any more: if its full length was reported gone, it is.
    fn gone_if_whole(&mut self, domain: DomainId, ranges: Vec<PageRange<Iova>>) {
        let asked = self.asked(domain, &ranges);
        let half = matches!(ranges[..], [iova] if self.half.contains(&(domain, iova)));
        let key = (domain, ranges);
        let Some(partly) = self.partly.get_mut(&key) else { return };
        // What was mapped before the log begins goes too, and was not seen.
        if *partly == asked || (half && *partly < asked) || (!self.whole && *partly > asked) {
            self.partly.remove(&key);
            for iova in key.1 {
                self.mapped.remove(domain, iova);
                self.half.remove(&(domain, iova));
            }
        } else {
            *partly = (*partly).min(asked);
        }
    }

    /// Bytes that an unmap of these ranges has to take away: there may be gaps in them.
    fn asked(&self, domain: DomainId, ranges: &[PageRange<Iova>]) -> u64 {
        ranges.iter().map(|iova| self.mapped.bytes_at(domain, *iova)).sum()
    }

    fn client_gone(&mut self, client: ClientId) {
        self.waiting.gone(client);
        let over: Vec<InvalidationId> = self
            .open
            .iter()
            .filter(|(_, open)| open.caller.client == client && !open.converting)
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            let Some(open) = self.close(id) else { continue };
            if open.answered {
                self.must.extend(open.pages.into_iter().map(|pages| (id, pages)));
            }
        }
    }

    /// Takes an invalidation out of the open ones; its pages are no longer held.
    pub(super) fn close(&mut self, id: InvalidationId) -> Option<Open> {
        let open = self.open.remove(&id)?;
        for (file, range) in &open.pages {
            if let Some(spans) = self.held.get_mut(file) {
                spans.remove(range.clone());
                if spans.is_empty() {
                    self.held.remove(file);
                }
            }
        }
        Some(open)
    }

    fn quarantined_by(&mut self, said: &Said<'_>) {
        if let Said::Quarantined { file, range, .. } = said {
            self.quarantine.entry(*file).or_default().insert(bytes(*range));
        }
    }

    fn said(&mut self, said: &Said<'_>, event: &Event) {
        match said {
            Said::Map { job, domain, iova, file, offset, .. } => {
                let pages = (*file, offset.raw()..offset.raw().saturating_add(iova.len()));
                self.may_be_mapped(&pages);
                self.mapped.insert(*domain, *iova, *file, offset.raw());
                self.jobs.insert(*job, Job { domain: *domain, ranges: vec![*iova] });
            }
            Said::Unmap { job, domain, iova } => {
                self.jobs.insert(*job, Job { domain: *domain, ranges: vec![*iova] });
            }
            Said::Replace { job, domain, gone } => {
                self.jobs.insert(*job, Job { domain: *domain, ranges: gone.clone() });
            }
            Said::Convert { invalidation } => {
                self.is_clear(*invalidation, "passgate converts");
                if let Some(open) = self.open.get_mut(invalidation) {
                    open.converting = true;
                }
            }
            Said::Verdict { invalidation, verdict, .. } => self.verdict(*invalidation, *verdict),
            Said::Ended { to, invalidation } => self.ended(to.client, *invalidation, event),
            Said::Added { to, region, .. } => {
                let added = self.regions.iter_mut().find(|known| known.caller == *to);
                added.into_iter().for_each(|known| known.id = Some(*region));
            }
            // Where its name is known it is told when it closes.
            Said::Wrong { to, .. } => {
                self.regions.retain(|region| region.caller != *to || region.id.is_some())
            }
            Said::Closed { region } => self.region_closed(*region),
            Said::Quarantined { .. } => self.quarantined_by(said),
            Said::Freed { file, range } | Said::LetGo { file, range, .. } => {
                if let Some(spans) = self.quarantine.get_mut(file) {
                    spans.remove(bytes(*range));
                }
            }
            _ => {}
        }
    }
}
