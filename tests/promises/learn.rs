//! What the checker can learn from the gate only: the names that it gave.

use passgate::gate::{Answer, Effect, Event, Snapshot};

use crate::model::{Ask, Asked, Model};
use crate::truth::{Kept, Open, Phase, Region, Stage, broken};

impl Model {
    /// Learns the names that the gate gave, before its effects are judged.
    pub fn learn(&mut self, event: &Event, effects: &[Effect], snapshot: impl FnOnce() -> Snapshot) -> Kept {
        match *event {
            Event::AddRegion { caller, spec } => {
                let snapshot = snapshot();
                let status = snapshot.regions.iter().find(|region| {
                    region.spec.gpa.start() == spec.gpa.start()
                        && region.owner == caller.client
                        && self.truth.regions.iter().all(|known| known.id != region.region)
                });
                if let Some(status) = status {
                    let (id, owner) = (status.region, caller.client);
                    self.truth.add(Region { id, owner, spec, stage: Stage::Adding, doomed: false });
                    if let Some(Asked { ask: Ask::Add { region, .. }, .. }) =
                        self.asked.get_mut(&caller.cookie)
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
                if let Some(region) = self.truth.region(region).filter(|_| !refused) {
                    region.stage = Stage::Closing;
                }
            }
            Event::Begin { caller, ref ranges, to, performer, .. } => {
                let fresh = effects.iter().find_map(|effect| match effect {
                    Effect::Arm { invalidation, .. }
                    | Effect::Convert { invalidation, .. }
                    | Effect::Answer { answer: Answer::Verdict { invalidation, .. }, .. }
                        if !self.known.contains(invalidation) =>
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
                    let Ok(part) = self.truth.resolve(range) else {
                        broken!(1, "{event:?} touches addresses that no region covers, and was taken")
                    };
                    pages.extend(part);
                }
                let going = |r: &&Region| {
                    r.stage == Stage::Closing && ranges.iter().any(|range| r.spec.gpa.overlaps(range))
                };
                if let Some(region) = self.truth.regions.iter().find(going) {
                    broken!(8, "{event:?} is taken, but {region:?} is on its way out");
                }
                let mine = self.truth.open.iter().filter(|open| open.caller.client == caller.client).count();
                if mine >= self.policy.max_open as usize {
                    broken!(7, "{event:?} is taken, with {mine} open of {}", self.policy.max_open);
                }
                let phase = Phase::Asked;
                let open =
                    Open { id: new, caller, pages, to, performer, phase, touched: false, out_of_time: false };
                for (id, range) in &open.pages {
                    if let Some(file) = self.truth.file(*id) {
                        file.vouched.remove(range.start().0..range.end().0);
                    }
                }
                self.truth.open.push(open);
                self.known.insert(new);
                if let Some(Asked { ask: Ask::Begin { id, .. }, .. }) = self.asked.get_mut(&caller.cookie) {
                    *id = Some(new);
                }
            }
            _ => {}
        }
        Ok(())
    }
}
