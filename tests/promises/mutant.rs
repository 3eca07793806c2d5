//! A gate with one fault planted at its interface, to show that the checker finds it.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use passgate::gate::{
    Answer, CallLimits, Caller, ClientId, DomainCaps, Effect, Effects, Event, FileId, Gate, InvalidationId,
    JobId, MapResult, Notice, Outcome, PageState, Platform, Policy, Snapshot, Step, UnmapResult, Verdict,
};
use passgate_bindings::words;

/// A planted fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    Nothing,
    /// Unmaps are reported as done and never executed.
    UnmapsSkipped,
    /// A failed unmap is reported to the gate as complete.
    FailedUnmapIsWhole,
    /// A short unmap is reported to the gate as complete.
    ShortUnmapIsWhole,
    /// An unmap with operations in flight is reported to the gate without them.
    InFlightIsGone,
    /// A map that failed half-way is reported to the gate as refused.
    HalfMapIsRefused,
    /// Pages that become shared are mapped at the grant, not at the end.
    MapsBeforeEnd,
    /// The answer to a new region waits until no invalidation is open.
    AddWaitsForEnd,
    /// Timers never reach the gate.
    NoTimers,
    /// Every verdict is answered twice.
    AnswersTwice,
    /// Notices of quarantine are dropped.
    QuarantineUnreported,
    /// Notices of refusals (and of quarantine) are dropped.
    RefusalUnreported,
    /// An end with an unknown outcome is reported to the gate as committed.
    UnknownIsCommitted,
    /// The gate takes a domain's mapping limit for four times as large.
    BudgetTooLarge,
    /// The gate takes its limit of regions for eight times as large.
    RegionLimitTooLarge,
    /// The end of a client is not reported to the gate.
    ClientGoneLost,
    /// Files are forgotten when their client dies, before anything is unmapped.
    FilesForgottenEarly,
    /// Fences are reported to the gate as done and never executed.
    FencesSkipped,
    /// Bus mastering off counts as proof: an unmap that fails after it is reported as complete.
    MasterIsProof,
    /// The gate takes a strict platform for a contained one.
    NotStrict,
    /// The gate may end a TDI where policy forbids it.
    EndsTdis,
    /// Notices that a fence ends a TDI are dropped.
    TdiEndUnreported,
    /// An operator's release of one quarantine releases another with it.
    ReleasesTooMuch,
    /// Notices of releases are dropped.
    ReleaseUnreported,
    /// An earlier daemon's quarantine is not reported to the gate.
    EarlierQuarantineLost,
    /// A session is reported as closed as soon as the client is gone.
    ClosedEarly,
    /// The gate does not hear that a client cannot be refused.
    MustUnmapLost,
    /// The gate takes every client that removes a region for one that cannot be refused.
    AllMustUnmap,
}

#[derive(Debug)]
pub struct Mutant {
    gate: Gate,
    plant: Plant,
    unmaps: HashMap<JobId, u64>,
    /// The fences that turn bus mastering off.
    bus_master_fences: HashSet<JobId>,
    /// Set once one of them has succeeded.
    bus_master_off: bool,
    shared: HashMap<InvalidationId, Caller>,
    requested_states: HashMap<u64, PageState>,
    files: HashMap<ClientId, Vec<FileId>>,
    check_vfio_accepts: Vec<Effect>,
    /// The hash of every event that the gate handled, and of every effect that it emitted.
    digest: DefaultHasher,
}

impl Mutant {
    pub fn new(policy: Policy, limits: CallLimits, plant: Plant) -> Self {
        let policy = match plant {
            Plant::RegionLimitTooLarge => Policy { max_regions: policy.max_regions * 8, ..policy },
            Plant::NotStrict => Policy { platform: Platform::Contained, ..policy },
            Plant::EndsTdis => Policy { end_tdi: true, ..policy },
            _ => policy,
        };
        let (unmaps, bus_master_fences, bus_master_off, shared, requested_states, files, check_vfio_accepts) =
            Default::default();
        let mut gate = Gate::new(policy, words::private);
        gate.set_call_limits(limits);
        let digest = DefaultHasher::new();
        Self {
            gate,
            plant,
            unmaps,
            bus_master_fences,
            bus_master_off,
            shared,
            requested_states,
            files,
            check_vfio_accepts,
            digest,
        }
    }

    /// Returns a number that is equal for two runs only if the gate handled the same events and emitted the same effects.
    pub fn digest(&self) -> u64 {
        self.digest.finish()
    }

    pub fn snapshot(&self) -> Snapshot {
        self.gate.snapshot()
    }

    pub fn handle(&mut self, event: Event, effects: &mut Effects) {
        if self.plant == Plant::Nothing {
            let (from, event_text) = (effects.len(), format!("{event:?}"));
            self.gate.handle(event, effects);
            event_text.hash(&mut self.digest);
            format!("{:?}", &effects[from..]).hash(&mut self.digest);
            return;
        }
        let Some(event) = self.mutate_event(event, effects) else { return };
        let from = effects.len();
        self.gate.handle(event, effects);
        let emitted = effects.split_off(from);
        for effect in emitted {
            self.mutate_effect(effect, effects);
        }
        if self.plant == Plant::AddWaitsForEnd && self.gate.snapshot().open == 0 {
            effects.append(&mut self.check_vfio_accepts);
        }
    }

    fn mutate_event(&mut self, event: Event, effects: &mut Effects) -> Option<Event> {
        match (self.plant, event) {
            (
                Plant::FailedUnmapIsWhole,
                Event::Unmapped { job, result: UnmapResult::Failed { .. }, took_ns },
            ) => Some(self.whole_unmap(job, took_ns)),
            (
                Plant::ShortUnmapIsWhole,
                Event::Unmapped { job, result: UnmapResult::Gone { .. }, took_ns },
            ) => Some(self.whole_unmap(job, took_ns)),
            (
                Plant::InFlightIsGone,
                Event::Unmapped { job, result: UnmapResult::InFlight { bytes }, took_ns },
            ) => Some(Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns }),
            (Plant::HalfMapIsRefused, Event::Mapped { job, result: MapResult::Unknown { errno } }) => {
                Some(Event::Mapped { job, result: MapResult::Refused { errno } })
            }
            (Plant::MasterIsProof, Event::Unmapped { job, result: UnmapResult::Failed { .. }, took_ns })
                if self.bus_master_off =>
            {
                Some(self.whole_unmap(job, took_ns))
            }
            (Plant::MasterIsProof, Event::Fenced { job, errno: 0, took_ns }) => {
                self.bus_master_off |= self.bus_master_fences.contains(&job);
                Some(Event::Fenced { job, errno: 0, took_ns })
            }
            (Plant::ReleasesTooMuch, Event::Release { caller, invalidation, to }) => {
                let quarantined = self.gate.snapshot().quarantine.into_iter();
                if let Some(other) =
                    quarantined.map(|quarantined| quarantined.invalidation).find(|id| *id != invalidation)
                {
                    let mut extra = Effects::new();
                    self.gate.handle(Event::Release { caller, invalidation: other, to }, &mut extra);
                    effects.extend(extra.into_iter().filter(|e| !matches!(e, Effect::Answer { .. })));
                }
                Some(Event::Release { caller, invalidation, to })
            }
            (Plant::EarlierQuarantineLost, Event::Quarantine { .. }) => None,
            (Plant::NoTimers, Event::Expired { .. }) => None,
            (
                Plant::UnknownIsCommitted,
                Event::End { caller, invalidation, outcome: Outcome::Unknown { .. } },
            ) => Some(Event::End { caller, invalidation, outcome: Outcome::Committed }),
            (Plant::BudgetTooLarge, Event::DomainAdded { domain, caps }) => {
                let caps = DomainCaps { max_mappings: caps.max_mappings * 4, ..caps };
                Some(Event::DomainAdded { domain, caps })
            }
            (Plant::ClientGoneLost, Event::ClientGone { .. }) => None,
            (Plant::MustUnmapLost, Event::MustUnmap { .. }) => None,
            (Plant::AllMustUnmap, Event::RemoveRegion { caller, region }) => {
                self.gate.handle(Event::MustUnmap { client: caller.client }, effects);
                Some(Event::RemoveRegion { caller, region })
            }
            (Plant::FilesForgottenEarly, Event::ClientGone { client }) => {
                let files = self.files.remove(&client).unwrap_or_default();
                effects.extend(files.into_iter().map(|file| Effect::ForgetFile { file }));
                Some(Event::ClientGone { client })
            }
            (Plant::ClosedEarly, Event::ClientGone { client }) => {
                effects.push(Effect::Notice(Notice::SessionClosed { client }));
                Some(Event::ClientGone { client })
            }
            (_, event) => {
                if let Event::AddRegion { caller, spec } = &event {
                    self.files.entry(caller.client).or_default().push(spec.backing.file);
                }
                if let Event::Begin { caller, to, .. } = &event {
                    self.requested_states.insert(caller.cookie, *to);
                }
                Some(event)
            }
        }
    }

    fn whole_unmap(&self, job: JobId, took_ns: u64) -> Event {
        let bytes = self.unmaps.get(&job).copied().unwrap_or(0);
        Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns }
    }

    fn mutate_effect(&mut self, effect: Effect, effects: &mut Effects) {
        match (self.plant, effect) {
            (_, Effect::Unmap { job, domain, iova, bytes }) => {
                self.unmaps.insert(job, bytes.unwrap_or(iova.len()));
                effects.push(Effect::Unmap { job, domain, iova, bytes });
            }
            (
                Plant::MapsBeforeEnd,
                Effect::Answer { caller, answer: Answer::Verdict { invalidation, verdict: Verdict::Done } },
            ) if self.requested_states.get(&caller.cookie) == Some(&PageState::Shared) => {
                effects.push(Effect::Answer {
                    caller,
                    answer: Answer::Verdict { invalidation, verdict: Verdict::Done },
                });
                let mut early = Effects::new();
                let outcome = Outcome::Committed;
                self.gate.handle(Event::End { caller, invalidation, outcome }, &mut early);
                effects.extend(early.into_iter().filter(|effect| matches!(effect, Effect::Map { .. })));
                self.shared.insert(invalidation, caller);
            }
            (
                Plant::AddWaitsForEnd,
                Effect::Answer { caller, answer: answer @ Answer::RegionAdded { .. } },
            ) => self.check_vfio_accepts.push(Effect::Answer { caller, answer }),
            (Plant::AnswersTwice, Effect::Answer { caller, answer: answer @ Answer::Verdict { .. } }) => {
                effects.push(Effect::Answer { caller, answer: answer.clone() });
                effects.push(Effect::Answer { caller, answer });
            }
            (Plant::QuarantineUnreported, Effect::Notice(Notice::Quarantined { .. }))
            | (
                Plant::RefusalUnreported,
                Effect::Notice(Notice::Refused { .. } | Notice::Quarantined { .. }),
            )
            | (Plant::TdiEndUnreported, Effect::Notice(Notice::TdiEnded { .. }))
            | (Plant::ReleaseUnreported, Effect::Notice(Notice::Released { .. })) => {}
            (Plant::MasterIsProof, Effect::Fence { job, device, step: Step::Master }) => {
                self.bus_master_fences.insert(job);
                effects.push(Effect::Fence { job, device, step: Step::Master });
            }
            (Plant::FencesSkipped, Effect::Fence { job, .. }) => {
                let mut next = Effects::new();
                self.gate.handle(Event::Fenced { job, errno: 0, took_ns: 0 }, &mut next);
                for effect in next {
                    self.mutate_effect(effect, effects);
                }
            }
            (_, effect) => effects.push(effect),
        }
    }
}
