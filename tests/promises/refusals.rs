//! Checks that the reason of every refusal is true.

use passgate::gate::{Caller, Hitless, Refusal};
use passgate_bindings::{PAGE, PageRange};

use crate::model::{Model, RequestKind};
use crate::oracle::{CheckResult, Stage, broken};

impl Model {
    /// Judges one refusal.
    pub fn refusal(&mut self, caller: Caller, kind: &RequestKind, refusal: Refusal) -> CheckResult {
        let oracle = &mut self.oracle;
        let fits = match (kind, refusal) {
            (RequestKind::Begin { ranges, .. }, Refusal::NoMemory { gpa }) => {
                ranges.iter().any(|range| range.contains(gpa))
                    && !oracle.regions.iter().any(|r| r.spec.gpa.contains(gpa) && r.stage == Stage::Live)
            }
            (RequestKind::Begin { ranges, .. }, Refusal::Busy { invalidation, gpa }) => {
                let at = PageRange::new(gpa.0, PAGE).ok();
                let pages = at.and_then(|at| oracle.resolve(at).ok()).unwrap_or_default();
                ranges.iter().any(|range| range.contains(gpa))
                    && pages.iter().any(|(f, r)| oracle.open_over(*f, *r).any(|open| open.id == invalidation))
            }
            (RequestKind::Begin { ranges, .. }, Refusal::Quarantined { gpa, cause }) => {
                let at = PageRange::new(gpa.0, PAGE).ok();
                let pages = at.and_then(|at| oracle.resolve(at).ok()).unwrap_or_default();
                ranges.iter().any(|range| range.contains(gpa))
                    && pages
                        .iter()
                        .any(|(f, r)| oracle.file(*f).and_then(|file| file.cause(*r)) == Some(cause))
            }
            (RequestKind::Begin { .. }, Refusal::Budget { what: "mappings", needed, limit }) => {
                needed > limit
            }
            (RequestKind::Begin { .. }, Refusal::Budget { .. }) => {
                let open = oracle.open.iter().filter(|open| open.caller.client == caller.client).count();
                open >= self.policy.max_open as usize
            }
            (RequestKind::Add { spec, region: None }, Refusal::Overlaps { region, gpa }) => {
                spec.gpa.contains(gpa)
                    && oracle.region(region).is_some_and(|other| other.spec.gpa.contains(gpa))
            }
            (RequestKind::Add { spec, region: None }, Refusal::Gap { piece }) => {
                piece > PAGE && piece <= spec.piece && self.policy.hitless != Hitless::Off
            }
            (RequestKind::Add { spec, region: None }, Refusal::BadPiece { piece }) => {
                piece == spec.piece && piece != 0 && !(piece.is_power_of_two() && piece >= PAGE)
            }
            (RequestKind::Add { region: None, .. }, Refusal::Budget { needed, limit, .. }) => needed > limit,
            (RequestKind::Add { region: None, .. }, Refusal::Closing) => {
                self.deaths.iter().any(|death| death.client == caller.client)
            }
            (RequestKind::Add { .. }, Refusal::MapFailed { .. } | Refusal::HalfMapped { .. }) => !self.clean,
            (RequestKind::Remove { region }, Refusal::NotOwner { .. }) => {
                oracle.region(*region).is_none_or(|region| region.owner != caller.client)
            }
            (RequestKind::Remove { region }, Refusal::RegionBusy { .. }) => oracle
                .region(*region)
                .is_some_and(|region| region.owner == caller.client && region.stage != Stage::Live),
            (RequestKind::Remove { region }, Refusal::Busy { invalidation, .. }) => {
                let region = oracle.region(*region).map(|region| region.clone());
                region.is_some_and(|region| {
                    oracle
                        .open_over(region.spec.backing.file, region.pages())
                        .any(|open| open.id == invalidation)
                })
            }
            _ => false,
        };
        if !fits {
            broken!(4, "{refusal:?} to {kind:?} is not true");
        }
        Ok(())
    }
}
