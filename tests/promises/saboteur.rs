//! A gate with one fault planted at its seam, so that the checker can be seen to find it.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use passgate::gate::{
    Able, Answer, Caller, ClientId, Effect, Effects, Event, FileId, Gate, InvalidationId, JobId, MapResult,
    Notice, Outcome, PageState, Platform, Policy, Snapshot, Step, UnmapResult, Verdict,
};

/// A planted fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    Nothing,
    /// Unmaps are reported as done and never made.
    PretendUnmaps,
    /// The gate is told that an unmap went whole when it failed.
    ErrorsAreSuccess,
    /// The gate is told that an unmap went whole when it came up short.
    ShortIsWhole,
    /// The gate is told that nothing is in flight.
    FlightIsOver,
    /// A half-made mapping is told to have left nothing.
    HalfIsNothing,
    /// To shared: mapped when it is granted, not when it is ended.
    MapsBeforeEnd,
    /// A region is answered only when nothing is open.
    AddWaitsForEnd,
    /// Timers never reach the gate.
    NoTimers,
    /// Every verdict is said twice.
    AnswersTwice,
    /// Quarantine is kept to itself.
    SilentQuarantine,
    /// A refusal is kept out of the event stream.
    SilentRefusal,
    /// An unknown end is taken for a committed one.
    UnknownIsCommitted,
    /// The gate believes in four times the mappings there are.
    GenerousBudget,
    /// The gate believes in more regions than it may have.
    ManyRegions,
    /// The death of a client is not heard of.
    DeafToDeath,
    /// Files are let go when their client dies, before anything is unmapped.
    EarlyForget,
    /// The devices of a dead client are told to be stopped, and are not.
    FencesSkipped,
    /// Bus mastering off is taken for proof: what fails after it counts as gone.
    MasterIsProof,
    /// The gate believes that a stale write is contained, where it is not.
    NotStrict,
    /// The gate believes that it may end a TDI.
    EndsTdis,
    /// That a TDI ends is kept to itself.
    SilentTdi,
    /// A person who releases one range releases another with it.
    GenerousRelease,
    /// A release is kept out of the event stream.
    SilentRelease,
    /// What an earlier daemon had in quarantine is not heard of.
    ForgottenSeed,
    /// A session is said to be closed as soon as the client is gone.
    EarlyClosed,
    /// That a client cannot be told no is not heard of.
    DeafToInsistence,
    /// Every client is taken for one that cannot be told no.
    AllInsist,
}

#[derive(Debug)]
pub struct Saboteur {
    gate: Gate,
    plant: Plant,
    unmaps: HashMap<JobId, u64>,
    /// Fences that turn bus mastering off, and whether one has.
    masters: HashSet<JobId>,
    mastered: bool,
    shared: HashMap<InvalidationId, Caller>,
    callers: HashMap<u64, PageState>,
    files: HashMap<ClientId, Vec<FileId>>,
    withheld: Vec<Effect>,
    /// Of every event that the gate was given, and every effect that it wanted.
    digest: DefaultHasher,
}

impl Saboteur {
    pub fn new(policy: Policy, plant: Plant) -> Self {
        let policy = match plant {
            Plant::ManyRegions => Policy { max_regions: policy.max_regions * 8, ..policy },
            Plant::NotStrict => Policy { platform: Platform::Contained, ..policy },
            Plant::EndsTdis => Policy { end_tdi: true, ..policy },
            _ => policy,
        };
        let (unmaps, masters, mastered, shared, callers, files, withheld) = Default::default();
        let gate = Gate::new(policy);
        let digest = DefaultHasher::new();
        Self { gate, plant, unmaps, masters, mastered, shared, callers, files, withheld, digest }
    }

    /// Returns a number that two runs share only if the gate was given the same events and wanted the same effects.
    pub fn digest(&self) -> u64 {
        self.digest.finish()
    }

    pub fn snapshot(&self) -> Snapshot {
        self.gate.snapshot()
    }

    pub fn handle(&mut self, event: Event, effects: &mut Effects) {
        if self.plant == Plant::Nothing {
            let (from, said) = (effects.len(), format!("{event:?}"));
            self.gate.handle(event, effects);
            said.hash(&mut self.digest);
            format!("{:?}", &effects[from..]).hash(&mut self.digest);
            return;
        }
        let Some(event) = self.incoming(event, effects) else { return };
        let from = effects.len();
        self.gate.handle(event, effects);
        let said = effects.split_off(from);
        for effect in said {
            self.outgoing(effect, effects);
        }
        if self.plant == Plant::AddWaitsForEnd && self.gate.snapshot().open == 0 {
            effects.append(&mut self.withheld);
        }
    }

    fn incoming(&mut self, event: Event, effects: &mut Effects) -> Option<Event> {
        match (self.plant, event) {
            (
                Plant::ErrorsAreSuccess,
                Event::Unmapped { job, result: UnmapResult::Failed { .. }, took_ns },
            ) => Some(self.whole(job, took_ns)),
            (Plant::ShortIsWhole, Event::Unmapped { job, result: UnmapResult::Gone { .. }, took_ns }) => {
                Some(self.whole(job, took_ns))
            }
            (
                Plant::FlightIsOver,
                Event::Unmapped { job, result: UnmapResult::InFlight { bytes }, took_ns },
            ) => Some(Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns }),
            (Plant::HalfIsNothing, Event::Mapped { job, result: MapResult::Unknown { errno } }) => {
                Some(Event::Mapped { job, result: MapResult::Refused { errno } })
            }
            (Plant::MasterIsProof, Event::Unmapped { job, result: UnmapResult::Failed { .. }, took_ns })
                if self.mastered =>
            {
                Some(self.whole(job, took_ns))
            }
            (Plant::MasterIsProof, Event::Fenced { job, errno: 0, took_ns }) => {
                self.mastered |= self.masters.contains(&job);
                Some(Event::Fenced { job, errno: 0, took_ns })
            }
            (Plant::GenerousRelease, Event::Release { caller, invalidation, to }) => {
                let held = self.gate.snapshot().quarantine.into_iter();
                if let Some(other) = held.map(|held| held.invalidation).find(|id| *id != invalidation) {
                    let mut unsaid = Effects::new();
                    self.gate.handle(Event::Release { caller, invalidation: other, to }, &mut unsaid);
                    effects.extend(unsaid.into_iter().filter(|e| !matches!(e, Effect::Answer { .. })));
                }
                Some(Event::Release { caller, invalidation, to })
            }
            (Plant::ForgottenSeed, Event::Quarantine { .. }) => None,
            (Plant::NoTimers, Event::Expired { .. }) => None,
            (
                Plant::UnknownIsCommitted,
                Event::End { caller, invalidation, outcome: Outcome::Unknown { .. } },
            ) => Some(Event::End { caller, invalidation, outcome: Outcome::Committed }),
            (Plant::GenerousBudget, Event::DomainAdded { domain, able }) => {
                let able = Able { max_mappings: able.max_mappings * 4, ..able };
                Some(Event::DomainAdded { domain, able })
            }
            (Plant::DeafToDeath, Event::ClientGone { .. }) => None,
            (Plant::DeafToInsistence, Event::Insists { .. }) => None,
            (Plant::AllInsist, Event::RemoveRegion { caller, region }) => {
                self.gate.handle(Event::Insists { client: caller.client }, effects);
                Some(Event::RemoveRegion { caller, region })
            }
            (Plant::EarlyForget, Event::ClientGone { client }) => {
                let files = self.files.remove(&client).unwrap_or_default();
                effects.extend(files.into_iter().map(|file| Effect::ForgetFile { file }));
                Some(Event::ClientGone { client })
            }
            (Plant::EarlyClosed, Event::ClientGone { client }) => {
                effects.push(Effect::Notice(Notice::SessionClosed { client }));
                Some(Event::ClientGone { client })
            }
            (_, event) => {
                if let Event::AddRegion { caller, spec } = &event {
                    self.files.entry(caller.client).or_default().push(spec.backing.file);
                }
                if let Event::Begin { caller, to, .. } = &event {
                    self.callers.insert(caller.cookie, *to);
                }
                Some(event)
            }
        }
    }

    fn whole(&self, job: JobId, took_ns: u64) -> Event {
        let bytes = self.unmaps.get(&job).copied().unwrap_or(0);
        Event::Unmapped { job, result: UnmapResult::Gone { bytes }, took_ns }
    }

    fn outgoing(&mut self, effect: Effect, effects: &mut Effects) {
        match (self.plant, effect) {
            (_, Effect::Unmap { job, domain, iova, bytes }) => {
                self.unmaps.insert(job, bytes.unwrap_or(iova.len()));
                effects.push(Effect::Unmap { job, domain, iova, bytes });
            }
            (
                Plant::MapsBeforeEnd,
                Effect::Answer { caller, answer: Answer::Verdict { invalidation, verdict: Verdict::Done } },
            ) if self.callers.get(&caller.cookie) == Some(&PageState::Shared) => {
                effects.push(Effect::Answer {
                    caller,
                    answer: Answer::Verdict { invalidation, verdict: Verdict::Done },
                });
                let mut hasty = Effects::new();
                let outcome = Outcome::Committed;
                self.gate.handle(Event::End { caller, invalidation, outcome }, &mut hasty);
                effects.extend(hasty.into_iter().filter(|effect| matches!(effect, Effect::Map { .. })));
                self.shared.insert(invalidation, caller);
            }
            (
                Plant::AddWaitsForEnd,
                Effect::Answer { caller, answer: answer @ Answer::RegionAdded { .. } },
            ) => self.withheld.push(Effect::Answer { caller, answer }),
            (Plant::AnswersTwice, Effect::Answer { caller, answer: answer @ Answer::Verdict { .. } }) => {
                effects.push(Effect::Answer { caller, answer: answer.clone() });
                effects.push(Effect::Answer { caller, answer });
            }
            (Plant::SilentQuarantine, Effect::Notice(Notice::Quarantined { .. }))
            | (Plant::SilentRefusal, Effect::Notice(Notice::Refused { .. } | Notice::Quarantined { .. }))
            | (Plant::SilentTdi, Effect::Notice(Notice::TdiEnded { .. }))
            | (Plant::SilentRelease, Effect::Notice(Notice::Released { .. })) => {}
            (Plant::MasterIsProof, Effect::Fence { job, device, step: Step::Master }) => {
                self.masters.insert(job);
                effects.push(Effect::Fence { job, device, step: Step::Master });
            }
            (Plant::FencesSkipped, Effect::Fence { job, .. }) => {
                let mut next = Effects::new();
                self.gate.handle(Event::Fenced { job, errno: 0, took_ns: 0 }, &mut next);
                for effect in next {
                    self.outgoing(effect, effects);
                }
            }
            (_, effect) => effects.push(effect),
        }
    }
}
