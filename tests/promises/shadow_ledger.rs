//! A second, simpler ledger of mappings. It is derived only from the gate's effects and from the results reported to it.
//!
//! A range *may be mapped* from the map request until the map is refused, or until unmaps over it have reported every byte
//! gone; a range whose map failed half-way, until an unmap of just that range succeeds. It is *in doubt* from the unmap
//! request until then. On a strict platform a range that was unmapped while a device of the domain had ATS active stays
//! both until every such device is detached.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use passgate::gate::{
    DeviceId, DeviceTraits, DomainId, Effect, Event, Hitless, JobId, MapResult, Notice, Platform, Policy,
    Rung, Step, Steps, UnmapResult,
};
use passgate_bindings::{Iova, PageRange};
use rangemap::RangeSet;

use crate::oracle::{CheckResult, broken};

#[derive(Debug, Clone, Copy)]
enum Job {
    Map { domain: DomainId, iova: PageRange<Iova> },
    Unmap { domain: DomainId, iova: PageRange<Iova> },
    Fence { device: DeviceId, step: Step },
    Attach { device: DeviceId },
}

#[derive(Debug, Default)]
pub struct Domain {
    pub may_be_mapped: RangeSet<u64>,
    pub in_doubt: RangeSet<u64>,
    /// The whole ranges of the unmaps behind `in_doubt`, with their gaps: a gap too may not be mapped before its call is settled.
    in_doubt_with_gaps: RangeSet<u64>,
    /// The whole mappings from which a failed replace was to remove a part: the state of all of them is unknown.
    uncertain: RangeSet<u64>,
    /// Ranges that were reported gone while a device could still have them in its translation cache (ATS).
    cached: RangeSet<u64>,
    /// The bytes that were reported gone, by range, of ranges that are not yet proved gone as a whole.
    partial_unmaps: Vec<(Range<u64>, u64)>,
    /// Ranges whose map failed half-way: the number of mapped bytes is unknown.
    half_mapped: RangeSet<u64>,
    pub filling: BTreeMap<JobId, Range<u64>>,
    in_flight: BTreeMap<JobId, Flight>,
}

/// An unmap that has returned while operations issued before it are in flight.
#[derive(Debug)]
struct Flight {
    /// The whole range with its gaps: a gap too may not be mapped before the operations have ended.
    range: Range<u64>,
    /// The parts of it that were mapped.
    parts: RangeSet<u64>,
}

#[derive(Debug)]
pub struct Device {
    pub domain: DomainId,
    pub steps: Steps,
    pub traits: DeviceTraits,
    /// The strongest fence that it is under.
    pub fenced: Option<Step>,
    /// True while it is detached from its domain.
    pub detached: bool,
    /// True while its driver issues nothing.
    pub drained: bool,
    /// True after a fence or an attach failed that may have changed its state all the same.
    pub state_uncertain: bool,
    /// True while an attach is in progress.
    pub attaching: bool,
    /// The number of fences and attaches in progress.
    pub busy: u32,
    /// True if the last attach failed.
    pub lost: bool,
    /// The [`ShadowLedger::event_count`] at the last request for each step, and at its last result.
    fence_times: [(u64, u64); Rung::LADDER.len()],
}

#[derive(Debug, Default)]
pub struct ShadowLedger {
    pub domains: BTreeMap<DomainId, Domain>,
    pub devices: BTreeMap<DeviceId, Device>,
    /// The fence that was announced to end a TDI: it must be the next fence.
    announced_tdi_end: Option<(DeviceId, Step)>,
    strict: bool,
    /// The number of events so far.
    pub event_count: u64,
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

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Domain {
    /// True if `over` is proved free of mappings and of operations in flight.
    pub fn is_proved_gone(&self, over: &Range<u64>) -> bool {
        !self.may_be_mapped.overlaps(over) && !self.has_in_flight(over)
    }

    fn has_in_flight(&self, over: &Range<u64>) -> bool {
        self.in_flight.values().any(|flight| flight.parts.overlaps(over))
    }

    /// True if every call over `over` has returned with a plain result.
    pub fn is_settled(&self, over: &Range<u64>) -> bool {
        let under_way = self.filling.values().any(|range| overlap(range, over))
            || self.in_flight.values().any(|flight| overlap(&flight.range, over));
        !self.in_doubt_with_gaps.overlaps(over) && !under_way
    }

    pub fn is_settled_everywhere(&self) -> bool {
        self.in_doubt.is_empty() && self.in_flight.is_empty()
    }

    /// Marks what may be mapped in `over` as in doubt. Gaps in it are not in doubt.
    fn mark_in_doubt(&mut self, over: Range<u64>) {
        self.in_doubt_with_gaps.insert(over.clone());
        let parts: Vec<_> = self.may_be_mapped.overlapping(&over).map(|part| clip(part, &over)).collect();
        self.in_doubt.extend(parts);
    }

    /// Returns the parts of `over` that are in doubt, in flight or being mapped.
    pub fn parts_in_doubt(&self, over: &Range<u64>) -> Vec<Range<u64>> {
        let filling = self.filling.values().filter(|part| overlap(part, over));
        let in_flight = self.in_flight.values().flat_map(|flight| flight.parts.overlapping(over));
        self.in_doubt.overlapping(over).chain(filling).chain(in_flight).map(|part| clip(part, over)).collect()
    }

    /// True if an unmap in `over` is not proved complete. A map in progress does not count.
    pub fn stuck(&self, over: &Range<u64>) -> bool {
        self.in_doubt.overlaps(over) || self.has_in_flight(over)
    }

    fn unmapped(
        &mut self,
        over: Range<u64>,
        bytes_gone: u64,
        result: UnmapResult,
        job: JobId,
        ats_active: bool,
    ) {
        if let UnmapResult::InFlight { .. } = result {
            let parts = self.may_be_mapped.overlapping(&over).map(|part| clip(part, &over)).collect();
            self.in_flight.insert(job, Flight { range: over.clone(), parts });
        }
        let inside = |range: &Range<u64>| over.start <= range.start && range.end <= over.end;
        let reported_before: u64 =
            self.partial_unmaps.iter().filter(|(range, _)| inside(range)).map(|(_, b)| b).sum();
        let (gone, mapped) = (reported_before.saturating_add(bytes_gone), bytes(&self.may_be_mapped, &over));
        let uncounted = self.half_mapped.gaps(&over).next().is_none();
        let whole = gone == mapped || uncounted && gone < mapped;
        if whole && !matches!(result, UnmapResult::Failed { .. }) {
            self.partial_unmaps.retain(|(range, _)| !inside(range));
            if ats_active {
                self.cached.insert(over);
                return;
            }
            self.may_be_mapped.remove(over.clone());
            self.half_mapped.remove(over.clone());
            self.in_doubt.remove(over.clone());
            self.in_doubt_with_gaps.remove(over);
        } else {
            // More bytes than were mapped prove nothing beyond what was mapped.
            let remaining = bytes(&self.may_be_mapped, &over).saturating_sub(reported_before);
            self.partial_unmaps.push((over, bytes_gone.min(remaining)));
        }
    }
}

impl Device {
    /// True if it may still use translations that were removed: ATS is on, and it is not detached, or being attached.
    fn is_ats_active(&self) -> bool {
        self.traits.ats && (!self.detached || self.attaching)
    }

    /// True if `step`, or a step that includes it, has been tried since `since` or is in force, or if a call in progress is in its
    /// way.
    pub fn was_tried(&self, step: Step, since: u64) -> bool {
        let includes = |other: &Step| *other == step || (*other > step && step != Step::Detach);
        let tried = |other: &Step| {
            let (requested, ended) = self.fence_times[*other as usize];
            includes(other) && requested.max(ended) >= since
        };
        let in_force = if step == Step::Detach { self.detached } else { self.fenced >= Some(step) };
        self.busy > 0 || in_force || Step::ALL.iter().any(tried)
    }
}

impl ShadowLedger {
    pub fn new(policy: &Policy) -> Self {
        Self { strict: policy.platform == Platform::Strict, ..Self::default() }
    }

    /// True on a strict platform while a device of the domain may still use translations that were removed.
    fn is_ats_active(&self, domain: DomainId) -> bool {
        self.strict && self.devices.values().any(|device| device.domain == domain && device.is_ats_active())
    }

    /// Once no device of the domain has ATS active, what was unmapped before is proved gone.
    fn drop_cached(&mut self, domain: DomainId) {
        if !self.is_ats_active(domain)
            && let Some(entry) = self.domains.get_mut(&domain)
        {
            for range in std::mem::take(&mut entry.cached) {
                entry.may_be_mapped.remove(range.clone());
                entry.in_doubt.remove(range.clone());
                entry.in_doubt_with_gaps.remove(range);
            }
        }
    }

    /// Judges a fence request: the device must have that fence, the policy must allow it, and the end of a TDI must have been
    /// announced.
    fn fence(
        &mut self,
        effect: &Effect,
        device: DeviceId,
        step: Step,
        policy: &Policy,
        allowed: Steps,
    ) -> CheckResult {
        let event_count = self.event_count;
        let Some(entry) = self.devices.get_mut(&device) else {
            broken!(4, "{effect:?} of a device that does not exist")
        };
        if !entry.steps.has(step) {
            broken!(4, "{effect:?} of a device that has no such fence");
        }
        let strict = self.strict && entry.traits.ats && step == Step::Detach;
        let pause = policy.hitless == Hitless::Prefer && matches!(step, Step::Drain | Step::Stop);
        if !strict && !pause && !allowed.has(step) {
            broken!(4, "{effect:?} exceeds the policy {:?}", policy.on_stuck_dma);
        }
        let ends_tdi = entry.traits.tdi && matches!(step, Step::Master | Step::Reset);
        if ends_tdi && !policy.end_tdi {
            broken!(4, "{effect:?} ends a TDI, which policy forbids");
        }
        if self.announced_tdi_end.take() != ends_tdi.then_some((device, step)) {
            broken!(6, "{effect:?}: a fence that ends a TDI must be announced, and no other may be");
        }
        if entry.busy > 0 {
            broken!(4, "{effect:?} of a device that is busy");
        }
        entry.busy += 1;
        entry.fence_times[step as usize].0 = event_count;
        Ok(())
    }

    /// Records an effect.
    ///
    /// # Errors
    ///
    /// The broken promise, if the gate may not ask for this effect now.
    pub fn effect(&mut self, effect: &Effect, policy: &Policy, allowed: Steps) -> CheckResult {
        match *effect {
            Effect::Map { job, domain, iova, .. } => {
                let entry = self.domains.entry(domain).or_default();
                if entry.may_be_mapped.overlaps(&span(iova)) {
                    broken!(2, "{effect:?} over a mapping that is not proved gone");
                }
                entry.may_be_mapped.insert(span(iova));
                entry.filling.insert(job, span(iova));
                self.jobs.insert(job, Job::Map { domain, iova });
            }
            Effect::Replace { job, domain, ref gone, .. } => {
                let entry = self.domains.entry(domain).or_default();
                gone.iter().for_each(|iova| entry.mark_in_doubt(span(*iova)));
                self.replaces.insert(job, (domain, gone.clone()));
            }
            Effect::Unmap { job, domain, iova, .. } => {
                let entry = self.domains.entry(domain).or_default();
                entry.mark_in_doubt(span(iova));
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
                let only_drained = entry.fenced.is_none() && !entry.state_uncertain;
                if !only_drained && !domain.is_settled_everywhere() {
                    broken!(2, "{effect:?} while mappings of its domain are in doubt: {:?}", domain.in_doubt);
                }
                entry.busy += 1;
                entry.attaching = true;
                self.jobs.insert(job, Job::Attach { device });
            }
            Effect::Notice(Notice::TdiEnded { device, step }) => {
                self.announced_tdi_end = Some((device, step))
            }
            _ => {}
        }
        Ok(())
    }

    /// Records an event before the gate handles it.
    pub fn event(&mut self, event: &Event) {
        self.event_count += 1;
        let event_count = self.event_count;
        match *event {
            Event::DomainAdded { domain, .. } => {
                self.domains.entry(domain).or_default();
            }
            Event::DeviceAdded { device, domain, steps, traits } => {
                self.devices.entry(device).or_insert(Device {
                    domain,
                    steps,
                    traits,
                    fenced: None,
                    detached: false,
                    drained: false,
                    state_uncertain: false,
                    attaching: false,
                    busy: 0,
                    lost: false,
                    fence_times: Default::default(),
                });
            }
            Event::Mapped { job, result } => {
                let Some(Job::Map { domain, iova }) = self.jobs.get(&job).copied() else { return };
                self.jobs.remove(&job);
                let entry = self.domains.entry(domain).or_default();
                entry.filling.remove(&job);
                match result {
                    MapResult::Mapped => {}
                    MapResult::Refused { .. } => entry.may_be_mapped.remove(span(iova)),
                    MapResult::Unknown { .. } => {
                        entry.half_mapped.insert(span(iova));
                        entry.mark_in_doubt(span(iova));
                    }
                }
            }
            Event::Unmapped { job, result, .. } => {
                if let Some((domain, gone)) = self.replaces.remove(&job) {
                    let ats_active = self.is_ats_active(domain);
                    let entry = self.domains.entry(domain).or_default();
                    let all = gone.iter().map(|iova| bytes(&entry.may_be_mapped, &span(*iova))).sum();
                    if result != (UnmapResult::Gone { bytes: all }) {
                        let around = |iova: &PageRange<Iova>| {
                            entry.may_be_mapped.overlapping(&span(*iova)).cloned().collect()
                        };
                        let around: Vec<Vec<_>> = gone.iter().map(around).collect();
                        entry.uncertain.extend(around.into_iter().flatten());
                        return;
                    }
                    for iova in gone {
                        let bytes = bytes(&entry.may_be_mapped, &span(iova));
                        entry.unmapped(span(iova), bytes, UnmapResult::Gone { bytes }, job, ats_active);
                    }
                    return;
                }
                let Some(Job::Unmap { domain, iova }) = self.jobs.get(&job).copied() else { return };
                self.jobs.remove(&job);
                let (UnmapResult::Gone { bytes }
                | UnmapResult::InFlight { bytes }
                | UnmapResult::Failed { bytes, .. }) = result;
                let ats_active = self.is_ats_active(domain);
                self.domains.entry(domain).or_default().unmapped(span(iova), bytes, result, job, ats_active);
            }
            Event::FlightEnded { job } => {
                for domain in self.domains.values_mut() {
                    domain.in_flight.remove(&job);
                }
            }
            Event::Fenced { job, errno, .. } => {
                let Some(Job::Fence { device, step }) = self.jobs.get(&job).copied() else { return };
                self.jobs.remove(&job);
                let Some(entry) = self.devices.get_mut(&device) else { return };
                entry.busy -= 1;
                entry.fence_times[step as usize].1 = event_count;
                if errno == 0 && step > Step::Drain {
                    entry.fenced = entry.fenced.max(Some(step));
                    entry.detached |= step == Step::Detach;
                }
                entry.drained |= errno == 0 && step == Step::Drain;
                entry.state_uncertain |= errno != 0 && step > Step::Drain;
                let domain = entry.domain;
                self.drop_cached(domain);
            }
            Event::DeviceTraits { device, ats, tdi } => {
                let Some(entry) = self.devices.get_mut(&device) else { return };
                entry.traits = DeviceTraits { ats, tdi, ..entry.traits };
                let domain = entry.domain;
                self.drop_cached(domain);
            }
            Event::Attached { job, errno } => {
                let Some(Job::Attach { device }) = self.jobs.get(&job).copied() else { return };
                self.jobs.remove(&job);
                if let Some(entry) = self.devices.get_mut(&device) {
                    entry.busy -= 1;
                    entry.lost = errno != 0;
                    entry.attaching = false;
                    // A failed attach may have left the device anywhere between its fence and its domain: nothing is known of it.
                    (entry.fenced, entry.detached, entry.state_uncertain) = (None, false, errno != 0);
                    entry.drained = false;
                }
            }
            _ => {}
        }
    }

    /// Returns the range of a map in progress.
    pub fn map_of(&self, job: JobId) -> Option<PageRange<Iova>> {
        match self.jobs.get(&job)? {
            Job::Map { iova, .. } => Some(*iova),
            _ => None,
        }
    }

    /// Returns the bytes of `iova` that may be mapped or have operations in flight, over all domains.
    pub fn bytes_in_the_way(&self, iova: PageRange<Iova>) -> u64 {
        let in_flight = |flight: &Flight| bytes(&flight.parts, &span(iova));
        let of_domain = |domain: &Domain| {
            bytes(&domain.may_be_mapped, &span(iova)) + domain.in_flight.values().map(in_flight).sum::<u64>()
        };
        self.domains.values().map(of_domain).sum()
    }

    /// True while `job` has no result.
    pub fn is_pending(&self, job: JobId) -> bool {
        self.jobs.contains_key(&job)
    }

    /// Returns a domain that may still map `iova`, or has operations over it in flight.
    pub fn unproved(&self, iova: PageRange<Iova>) -> Option<DomainId> {
        self.domains.iter().find(|(_, domain)| !domain.is_proved_gone(&span(iova))).map(|(id, _)| *id)
    }

    /// True if a failed replace left the state of `iova` unknown in some domain.
    pub fn is_uncertain(&self, iova: PageRange<Iova>) -> bool {
        self.domains.values().any(|domain| domain.uncertain.overlaps(&span(iova)))
    }

    /// Returns a domain in which a call over `iova` has not returned with a plain result.
    pub fn unsettled(&self, iova: PageRange<Iova>) -> Option<DomainId> {
        self.domains.iter().find(|(_, domain)| !domain.is_settled(&span(iova))).map(|(id, _)| *id)
    }
}
