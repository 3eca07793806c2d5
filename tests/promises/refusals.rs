//! A refusal must be true: what it says is in the way is in the way.

use passgate::gate::{Caller, Hitless, Refusal};
use passgate_bindings::{PAGE, PageRange};

use crate::model::{Ask, Model};
use crate::truth::{Kept, Stage, broken};

impl Model {
    /// Judges one.
    pub fn refusal(&mut self, caller: Caller, ask: &Ask, refusal: Refusal) -> Kept {
        let truth = &mut self.truth;
        let fits = match (ask, refusal) {
            (Ask::Begin { ranges, .. }, Refusal::NoMemory { gpa }) => {
                ranges.iter().any(|range| range.contains(gpa))
                    && !truth.regions.iter().any(|r| r.spec.gpa.contains(gpa) && r.stage == Stage::Live)
            }
            (Ask::Begin { ranges, .. }, Refusal::Busy { invalidation, gpa }) => {
                let at = PageRange::new(gpa.0, PAGE).ok();
                let pages = at.and_then(|at| truth.resolve(at).ok()).unwrap_or_default();
                ranges.iter().any(|range| range.contains(gpa))
                    && pages.iter().any(|(f, r)| truth.open_over(*f, *r).any(|open| open.id == invalidation))
            }
            (Ask::Begin { ranges, .. }, Refusal::Quarantined { gpa, cause }) => {
                let at = PageRange::new(gpa.0, PAGE).ok();
                let pages = at.and_then(|at| truth.resolve(at).ok()).unwrap_or_default();
                ranges.iter().any(|range| range.contains(gpa))
                    && pages
                        .iter()
                        .any(|(f, r)| truth.file(*f).and_then(|file| file.cause(*r)) == Some(cause))
            }
            (Ask::Begin { .. }, Refusal::Budget { what: "mappings", needed, limit }) => needed > limit,
            (Ask::Begin { .. }, Refusal::Budget { .. }) => {
                let open = truth.open.iter().filter(|open| open.caller.client == caller.client).count();
                open >= self.policy.max_open as usize
            }
            (Ask::Add { spec, region: None }, Refusal::Overlaps { region, gpa }) => {
                spec.gpa.contains(gpa)
                    && truth.region(region).is_some_and(|other| other.spec.gpa.contains(gpa))
            }
            (Ask::Add { spec, region: None }, Refusal::Window { piece }) => {
                piece > PAGE && piece <= spec.piece && self.policy.hitless != Hitless::Off
            }
            (Ask::Add { spec, region: None }, Refusal::BadPiece { piece }) => {
                piece == spec.piece && piece != 0 && !(piece.is_power_of_two() && piece >= PAGE)
            }
            (Ask::Add { region: None, .. }, Refusal::Budget { needed, limit, .. }) => needed > limit,
            (Ask::Add { region: None, .. }, Refusal::Closing) => {
                self.deaths.iter().any(|death| death.client == caller.client)
            }
            (Ask::Add { .. }, Refusal::MapFailed { .. } | Refusal::HalfMapped { .. }) => !self.clean,
            (Ask::Remove { region }, Refusal::NotOwner { .. }) => truth
                .region(*region)
                .is_none_or(|region| region.owner != caller.client || region.stage != Stage::Live),
            (Ask::Remove { region }, Refusal::Busy { invalidation, .. }) => {
                let region = truth.region(*region).map(|region| region.clone());
                region.is_some_and(|region| {
                    truth
                        .open_over(region.spec.backing.file, region.pages())
                        .any(|open| open.id == invalidation)
                })
            }
            _ => false,
        };
        if !fits {
            broken!(4, "{refusal:?} to {ask:?} is not true");
        }
        Ok(())
    }
}
