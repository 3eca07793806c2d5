//! Reads from the gate the ids that it assigned to regions and invalidations.

use passgate::gate::{Answer, Effect, Event, Snapshot};

use crate::model::{Model, Request, RequestKind};
use crate::oracle::{CheckResult, Open, Phase, Region, Stage, broken};

impl Model {
    /// Records the ids that the gate assigned, before its effects are judged.
    pub fn learn_ids(
        &mut self,
        event: &Event,
        effects: &[Effect],
        snapshot: impl FnOnce() -> Snapshot,
    ) -> CheckResult {
        match *event {
            Event::AddRegion { caller, spec } => {
                let snapshot = snapshot();
                let status = snapshot.regions.iter().find(|region| {
                    region.spec.gpa.start() == spec.gpa.start()
                        && region.owner == caller.client
                        && self.oracle.regions.iter().all(|known| known.id != region.region)
                });
                if let Some(status) = status {
                    let (id, owner) = (status.region, caller.client);
                    self.oracle.add(Region { id, owner, spec, stage: Stage::Adding, map_failed: false });
                    if let Some(Request { kind: RequestKind::Add { region, .. }, .. }) =
                        self.requests.get_mut(&caller.cookie)
                    {
                        *region = Some(id);
                    }
                }
            }
            Event::RemoveRegion { caller, region } => {
                let refused = effects.iter().any(|effect| {
                    matches!(effect, Effect::Answer { caller: c, answer: Answer::Refused(_) }
                        if c.cookie == caller.cookie)
                });
                if let Some(region) = self.oracle.region(region).filter(|_| !refused) {
                    region.stage = Stage::Closing;
                }
            }
            Event::Begin { caller, ref ranges, to, performer, .. } => {
                let fresh = effects.iter().find_map(|effect| match effect {
                    Effect::Arm { invalidation, .. }
                    | Effect::Convert { invalidation, .. }
                    | Effect::Answer { answer: Answer::Verdict { invalidation, .. }, .. }
                        if !self.known_invalidations.contains(invalidation) =>
                    {
                        Some(*invalidation)
                    }
                    _ => None,
                });
                let Some(new) = fresh else {
                    let answered = effects.iter().any(
                        |effect| matches!(effect, Effect::Answer { caller: c, .. } if c.cookie == caller.cookie),
                    );
                    if !answered {
                        broken!(4, "{event:?} has neither an answer nor a timer");
                    }
                    return Ok(());
                };
                let mut pages = Vec::new();
                for range in ranges.iter() {
                    let Ok(part) = self.oracle.resolve(range) else {
                        broken!(1, "{event:?} covers addresses without a region, and was accepted")
                    };
                    pages.extend(part);
                }
                let going = |r: &&Region| {
                    r.stage == Stage::Closing && ranges.iter().any(|range| r.spec.gpa.overlaps(range))
                };
                if let Some(region) = self.oracle.regions.iter().find(going) {
                    broken!(8, "{event:?} is accepted, but {region:?} is being closed");
                }
                let mine = self.oracle.open.iter().filter(|open| open.caller.client == caller.client).count();
                if mine >= self.policy.max_open as usize {
                    broken!(7, "{event:?} is accepted, with {mine} open of {}", self.policy.max_open);
                }
                let phase = Phase::Pending;
                let open =
                    Open { id: new, caller, pages, to, performer, phase, changed: false, out_of_time: false };
                for (id, range) in &open.pages {
                    if let Some(file) = self.oracle.file(*id) {
                        file.operator_released.remove(range.start().0..range.end().0);
                    }
                }
                self.oracle.open.push(open);
                self.known_invalidations.insert(new);
                if let Some(Request { kind: RequestKind::Begin { id, .. }, .. }) =
                    self.requests.get_mut(&caller.cookie)
                {
                    *id = Some(new);
                }
            }
            _ => {}
        }
        Ok(())
    }
}
