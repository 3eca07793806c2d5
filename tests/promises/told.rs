//! What the gate was told about its mappings, and what that proves: a second, simpler ledger.
//!
//! A range is *maybe* mapped from the moment a map is asked for until it is refused or until unmaps over it have
//! reported every byte gone; where a map was left half made, until an unmap of just that succeeds. It is *in doubt* from
//! the moment an unmap is asked for until then. On a strict platform what went while a device of the domain could keep a
//! copy stays both until all such devices are detached.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use passgate::gate::{
    DeviceId, DomainId, Effect, Event, Hitless, JobId, MapResult, Nature, Notice, Platform, Policy, Step,
    Steps, UnmapResult,
};
use passgate_bindings::{Iova, PageRange};
use rangemap::RangeSet;

use crate::truth::{Kept, broken};

#[derive(Debug, Clone, Copy)]
enum Job {
    Map { domain: DomainId, iova: PageRange<Iova> },
    Unmap { domain: DomainId, iova: PageRange<Iova> },
    Fence { device: DeviceId, step: Step },
    Attach { device: DeviceId },
}

#[derive(Debug, Default)]
pub struct Domain {
    pub maybe: RangeSet<u64>,
    pub doubt: RangeSet<u64>,
    /// The same with the gaps between, which nobody may use before the call is settled either.
    wide: RangeSet<u64>,
    /// Around what a replace that failed was to take out: nobody knows of the whole mappings how they are.
    shaken: RangeSet<u64>,
    /// Reported gone, but a device may have kept a copy.
    copies: RangeSet<u64>,
    /// Bytes reported gone, of ranges not yet proved gone whole.
    credits: Vec<(Range<u64>, u64)>,
    /// Mapped in part: nobody knows how much of it.
    half: RangeSet<u64>,
    pub filling: BTreeMap<JobId, Range<u64>>,
    flying: BTreeMap<JobId, Flight>,
}

/// An unmap whose operations have not ended.
#[derive(Debug)]
struct Flight {
    /// The whole range with its gaps, which nobody may use before the operations have ended either.
    wide: Range<u64>,
    /// What of it was mapped.
    parts: RangeSet<u64>,
}

#[derive(Debug)]
pub struct Device {
    pub domain: DomainId,
    pub steps: Steps,
    pub nature: Nature,
    /// The strongest fence that it is under.
    pub fenced: Option<Step>,
    /// Whether it is out of its domain.
    pub detached: bool,
    /// Whether its driver issues nothing.
    pub drained: bool,
    /// Whether a fence failed that may have stopped it.
    pub shaken: bool,
    /// Whether it is on its way back.
    pub returning: bool,
    /// Fences and attaches without a result.
    pub busy: u32,
    /// Whether the last attach failed.
    pub lost: bool,
    /// When each step was last asked, and when it was over, by [`Told::clock`].
    asked: [(u64, u64); Step::LADDER.len()],
}

#[derive(Debug, Default)]
pub struct Told {
    pub domains: BTreeMap<DomainId, Domain>,
    pub devices: BTreeMap<DeviceId, Device>,
    /// The end of a TDI that was told, and is the next fence.
    ending: Option<(DeviceId, Step)>,
    strict: bool,
    /// Events so far.
    pub clock: u64,
    jobs: HashMap<JobId, Job>,
    replaces: HashMap<JobId, (DomainId, Vec<PageRange<Iova>>)>,
}

pub fn span(range: PageRange<Iova>) -> Range<u64> {
    range.start().0..range.end().0
}

fn bytes(set: &RangeSet<u64>, over: &Range<u64>) -> u64 {
    set.overlapping(over).map(|part| part.end.min(over.end) - part.start.max(over.start)).sum()
}

fn clip(part: &Range<u64>, over: &Range<u64>) -> Range<u64> {
    part.start.max(over.start)..part.end.min(over.end)
}

fn meet(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Domain {
    /// Whether `over` is proved free of mappings and of operations in flight.
    pub fn proved(&self, over: &Range<u64>) -> bool {
        !self.maybe.overlaps(over) && !self.flies(over)
    }

    fn flies(&self, over: &Range<u64>) -> bool {
        self.flying.values().any(|flight| flight.parts.overlaps(over))
    }

    /// Whether every call over `over` came back and said plainly how it is.
    pub fn settled(&self, over: &Range<u64>) -> bool {
        let under_way = self.filling.values().any(|range| meet(range, over))
            || self.flying.values().any(|flight| meet(&flight.wide, over));
        !self.wide.overlaps(over) && !under_way
    }

    pub fn settled_everywhere(&self) -> bool {
        self.doubt.is_empty() && self.flying.is_empty()
    }

    /// What of `over` may be mapped is in doubt from now on; of gaps in it there is none.
    fn doubts(&mut self, over: Range<u64>) {
        self.wide.insert(over.clone());
        let parts: Vec<_> = self.maybe.overlapping(&over).map(|part| clip(part, &over)).collect();
        self.doubt.extend(parts);
    }

    /// The parts of `over` that are in doubt, in flight or under way.
    pub fn doubtful(&self, over: &Range<u64>) -> Vec<Range<u64>> {
        let filling = self.filling.values().filter(|part| meet(part, over));
        let flying = self.flying.values().flat_map(|flight| flight.parts.overlapping(over));
        self.doubt.overlapping(over).chain(filling).chain(flying).map(|part| clip(part, over)).collect()
    }

    /// Whether what was to go from `over` is not proved gone. A map that takes its time is none of that.
    pub fn stuck(&self, over: &Range<u64>) -> bool {
        self.doubt.overlaps(over) || self.flies(over)
    }

    fn unmapped(&mut self, over: Range<u64>, bytes_gone: u64, result: UnmapResult, job: JobId, copies: bool) {
        if let UnmapResult::InFlight { .. } = result {
            let parts = self.maybe.overlapping(&over).map(|part| clip(part, &over)).collect();
            self.flying.insert(job, Flight { wide: over.clone(), parts });
        }
        let inside = |range: &Range<u64>| over.start <= range.start && range.end <= over.end;
        let credit: u64 = self.credits.iter().filter(|(range, _)| inside(range)).map(|(_, b)| b).sum();
        let (gone, most) = (credit.saturating_add(bytes_gone), bytes(&self.maybe, &over));
        let uncounted = self.half.gaps(&over).next().is_none();
        let whole = gone == most || uncounted && gone < most;
        if whole && !matches!(result, UnmapResult::Failed { .. }) {
            self.credits.retain(|(range, _)| !inside(range));
            if copies {
                self.copies.insert(over);
                return;
            }
            self.maybe.remove(over.clone());
            self.half.remove(over.clone());
            self.doubt.remove(over.clone());
            self.wide.remove(over);
        } else {
            // Who boasts of more than there was has not said more than that it is gone.
            let left = bytes(&self.maybe, &over).saturating_sub(credit);
            self.credits.push((over, bytes_gone.min(left)));
        }
    }
}

impl Device {
    /// Whether it may go on using translations that were taken away.
    fn keeps_copies(&self) -> bool {
        self.nature.ats && (!self.detached || self.returning)
    }

    /// Whether `step`, or what includes it, was tried since then, or is in force, or a call that hangs is in its way.
    pub fn was_tried(&self, step: Step, since: u64) -> bool {
        let includes = |other: &Step| *other == step || (*other > step && step != Step::Detach);
        let tried = |other: &Step| {
            let (asked, over) = self.asked[*other as usize];
            includes(other) && asked.max(over) >= since
        };
        let in_force = if step == Step::Detach { self.detached } else { self.fenced >= Some(step) };
        self.busy > 0 || in_force || Step::LADDER.iter().any(tried)
    }
}

impl Told {
    pub fn new(policy: &Policy) -> Self {
        Self { strict: policy.platform == Platform::Strict, ..Self::default() }
    }

    /// Whether a device of the domain may go on using what was unmapped.
    fn keeps_copies(&self, domain: DomainId) -> bool {
        self.strict && self.devices.values().any(|device| device.domain == domain && device.keeps_copies())
    }

    /// Where no device of the domain keeps copies any more, what was unmapped before is gone now.
    fn copies_gone(&mut self, domain: DomainId) {
        if !self.keeps_copies(domain)
            && let Some(entry) = self.domains.get_mut(&domain)
        {
            for range in std::mem::take(&mut entry.copies) {
                entry.maybe.remove(range.clone());
                entry.doubt.remove(range.clone());
                entry.wide.remove(range);
            }
        }
    }

    /// A fence is asked: it must be the device's, within the policy, and no TDI may end unsaid.
    fn fence(
        &mut self,
        effect: &Effect,
        device: DeviceId,
        step: Step,
        policy: &Policy,
        allowed: Steps,
    ) -> Kept {
        let clock = self.clock;
        let Some(entry) = self.devices.get_mut(&device) else {
            broken!(4, "{effect:?} of a device that does not exist")
        };
        if !entry.steps.has(step) {
            broken!(4, "{effect:?} of a device that has no such fence");
        }
        let strict = self.strict && entry.nature.ats && step == Step::Detach;
        let pause = policy.hitless == Hitless::Prefer && matches!(step, Step::Drain | Step::Stop);
        if !strict && !pause && !allowed.has(step) {
            broken!(4, "{effect:?} goes beyond the policy {:?}", policy.on_stuck_dma);
        }
        let ends_tdi = entry.nature.tdi && matches!(step, Step::Master | Step::Reset);
        if ends_tdi && !policy.end_tdi {
            broken!(4, "{effect:?} ends a TDI without leave");
        }
        if self.ending.take() != ends_tdi.then_some((device, step)) {
            broken!(6, "{effect:?}: that it ends a TDI is not what was told");
        }
        if entry.busy > 0 {
            broken!(4, "{effect:?} of a device that is busy");
        }
        entry.busy += 1;
        entry.asked[step as usize].0 = clock;
        Ok(())
    }

    /// Takes down what the gate wants done; breaks a promise where it should not want that.
    pub fn effect(&mut self, effect: &Effect, policy: &Policy, allowed: Steps) -> Kept {
        match *effect {
            Effect::Map { job, domain, iova, .. } => {
                let entry = self.domains.entry(domain).or_default();
                if entry.maybe.overlaps(&span(iova)) {
                    broken!(2, "{effect:?} over a mapping that is not proved gone");
                }
                entry.maybe.insert(span(iova));
                entry.filling.insert(job, span(iova));
                self.jobs.insert(job, Job::Map { domain, iova });
            }
            Effect::Replace { job, domain, ref gone, .. } => {
                let entry = self.domains.entry(domain).or_default();
                gone.iter().for_each(|iova| entry.doubts(span(*iova)));
                self.replaces.insert(job, (domain, gone.clone()));
            }
            Effect::Unmap { job, domain, iova, .. } => {
                let entry = self.domains.entry(domain).or_default();
                entry.doubts(span(iova));
                self.jobs.insert(job, Job::Unmap { domain, iova });
            }
            Effect::Fence { job, device, step } => {
                self.fence(effect, device, step, policy, allowed)?;
                self.jobs.insert(job, Job::Fence { device, step });
            }
            Effect::Attach { job, device } => {
                let Some(entry) = self.devices.get_mut(&device) else {
                    broken!(2, "{effect:?} of a device that does not exist")
                };
                let domain = self.domains.entry(entry.domain).or_default();
                let only_drained = entry.fenced.is_none() && !entry.shaken;
                if !only_drained && !domain.settled_everywhere() {
                    broken!(2, "{effect:?} while mappings of its domain are in doubt: {:?}", domain.doubt);
                }
                entry.busy += 1;
                entry.returning = true;
                self.jobs.insert(job, Job::Attach { device });
            }
            Effect::Notice(Notice::TdiEnded { device, step }) => self.ending = Some((device, step)),
            _ => {}
        }
        Ok(())
    }

    /// Takes down what the gate is about to be told.
    pub fn event(&mut self, event: &Event) {
        self.clock += 1;
        let clock = self.clock;
        match *event {
            Event::DomainAdded { domain, .. } => {
                self.domains.entry(domain).or_default();
            }
            Event::DeviceAdded { device, domain, steps, nature } => {
                self.devices.entry(device).or_insert(Device {
                    domain,
                    steps,
                    nature,
                    fenced: None,
                    detached: false,
                    drained: false,
                    shaken: false,
                    returning: false,
                    busy: 0,
                    lost: false,
                    asked: Default::default(),
                });
            }
            Event::Mapped { job, result } => {
                let Some(Job::Map { domain, iova }) = self.jobs.get(&job).copied() else { return };
                self.jobs.remove(&job);
                let entry = self.domains.entry(domain).or_default();
                entry.filling.remove(&job);
                match result {
                    MapResult::Mapped => {}
                    MapResult::Refused { .. } => entry.maybe.remove(span(iova)),
                    MapResult::Unknown { .. } => {
                        entry.half.insert(span(iova));
                        entry.doubts(span(iova));
                    }
                }
            }
            Event::Unmapped { job, result, .. } => {
                if let Some((domain, gone)) = self.replaces.remove(&job) {
                    let copies = self.keeps_copies(domain);
                    let entry = self.domains.entry(domain).or_default();
                    let all = gone.iter().map(|iova| bytes(&entry.maybe, &span(*iova))).sum();
                    if result != (UnmapResult::Gone { bytes: all }) {
                        let around =
                            |iova: &PageRange<Iova>| entry.maybe.overlapping(&span(*iova)).cloned().collect();
                        let around: Vec<Vec<_>> = gone.iter().map(around).collect();
                        entry.shaken.extend(around.into_iter().flatten());
                        return;
                    }
                    for iova in gone {
                        let bytes = bytes(&entry.maybe, &span(iova));
                        entry.unmapped(span(iova), bytes, UnmapResult::Gone { bytes }, job, copies);
                    }
                    return;
                }
                let Some(Job::Unmap { domain, iova }) = self.jobs.get(&job).copied() else { return };
                self.jobs.remove(&job);
                let (UnmapResult::Gone { bytes }
                | UnmapResult::InFlight { bytes }
                | UnmapResult::Failed { bytes, .. }) = result;
                let copies = self.keeps_copies(domain);
                self.domains.entry(domain).or_default().unmapped(span(iova), bytes, result, job, copies);
            }
            Event::Released { job } => {
                for domain in self.domains.values_mut() {
                    domain.flying.remove(&job);
                }
            }
            Event::Fenced { job, errno, .. } => {
                let Some(Job::Fence { device, step }) = self.jobs.get(&job).copied() else { return };
                self.jobs.remove(&job);
                let Some(entry) = self.devices.get_mut(&device) else { return };
                entry.busy -= 1;
                entry.asked[step as usize].1 = clock;
                if errno == 0 && step > Step::Drain {
                    entry.fenced = entry.fenced.max(Some(step));
                    entry.detached |= step == Step::Detach;
                }
                entry.drained |= errno == 0 && step == Step::Drain;
                entry.shaken |= errno != 0 && step > Step::Drain;
                let domain = entry.domain;
                self.copies_gone(domain);
            }
            Event::DeviceNature { device, ats, tdi } => {
                let Some(entry) = self.devices.get_mut(&device) else { return };
                entry.nature = Nature { ats, tdi, ..entry.nature };
                let domain = entry.domain;
                self.copies_gone(domain);
            }
            Event::Attached { job, errno } => {
                let Some(Job::Attach { device }) = self.jobs.get(&job).copied() else { return };
                self.jobs.remove(&job);
                if let Some(entry) = self.devices.get_mut(&device) {
                    entry.busy -= 1;
                    entry.lost = errno != 0;
                    entry.returning = false;
                    // One that failed says nothing of where the device is, and takes back what was said of it.
                    (entry.fenced, entry.detached, entry.shaken) = (None, false, errno != 0);
                    entry.drained = false;
                }
            }
            _ => {}
        }
    }

    /// Where a map under way maps.
    pub fn map_of(&self, job: JobId) -> Option<PageRange<Iova>> {
        match self.jobs.get(&job)? {
            Job::Map { iova, .. } => Some(*iova),
            _ => None,
        }
    }

    /// Whether the result of `job` has not come yet.
    pub fn waits_for(&self, job: JobId) -> bool {
        self.jobs.contains_key(&job)
    }

    /// Whether any domain may still map `iova`, or has operations over it in flight.
    pub fn unproved(&self, iova: PageRange<Iova>) -> Option<DomainId> {
        self.domains.iter().find(|(_, domain)| !domain.proved(&span(iova))).map(|(id, _)| *id)
    }

    /// Whether a replace that failed may have left `iova` in doubt somewhere.
    pub fn shaken(&self, iova: PageRange<Iova>) -> bool {
        self.domains.values().any(|domain| domain.shaken.overlaps(&span(iova)))
    }

    /// A domain in which `iova` is in doubt.
    pub fn unsettled(&self, iova: PageRange<Iova>) -> Option<DomainId> {
        self.domains.iter().find(|(_, domain)| !domain.settled(&span(iova))).map(|(id, _)| *id)
    }
}
