//! What stands in the way of an invalidation, and the unmaps that are plainly due.

use passgate_bindings::{Iova, PageRange};

use super::effect::{Effect, Effects};
use super::event::{DomainId, InvalidationId, JobId};
use super::ledger::{Run, RunState};
use super::{Gate, Job};

/// What stands in the way of an invalidation.
#[derive(Default)]
pub(super) struct Sight {
    /// What failed.
    pub(super) suspects: Vec<(DomainId, Run)>,
    /// Whether something is under way.
    pub(super) waiting: bool,
}

impl Gate {
    /// Unmaps what is plainly mapped over the targets; tells what is left to wait for, and what failed.
    pub(super) fn look(
        &mut self,
        id: InvalidationId,
        targets: &[PageRange<Iova>],
        effects: &mut Effects,
    ) -> Sight {
        let mut sight = Sight::default();
        for index in 0..self.domains.len() {
            let domain = self.domains[index].id;
            for target in targets {
                let job = JobId(self.last_job + 1);
                let runs = &mut self.domains[index].runs;
                if runs.is_clear(*target) {
                    continue;
                }
                if let Some(iova) = runs.carve(*target, RunState::Removing(job)) {
                    self.next_job(Job::Unmap { domain, iova, already: 0, invalidation: id });
                    effects.push(Effect::Unmap { job, domain, iova });
                    sight.waiting = true;
                    continue;
                }
                runs.isolate(*target);
                let mut live: Option<PageRange<Iova>> = None;
                let mut stretches = Vec::new();
                for run in runs.overlapping(*target) {
                    match run.state {
                        RunState::Live => match live {
                            Some(before) if before.end() == run.range.start() => {
                                live = PageRange::between(before.start(), run.range.end());
                            }
                            _ => stretches.extend(live.replace(run.range)),
                        },
                        // Targets overlap where a range shows a page twice: each run is tried once.
                        RunState::Suspect { .. } | RunState::Cached
                            if !sight.suspects.contains(&(domain, run)) =>
                        {
                            sight.suspects.push((domain, run));
                        }
                        RunState::Suspect { .. } | RunState::Cached => {}
                        RunState::Filling(_) | RunState::Removing(_) | RunState::Leaking(_) => {
                            sight.waiting = true;
                        }
                    }
                }
                stretches.extend(live);
                sight.waiting |= !stretches.is_empty();
                for stretch in stretches {
                    self.unmap(id, domain, stretch, effects);
                }
            }
        }
        sight
    }

    /// Asks for one unmap of runs that fill `iova` exactly.
    pub(super) fn unmap(
        &mut self,
        invalidation: InvalidationId,
        domain: DomainId,
        iova: PageRange<Iova>,
        effects: &mut Effects,
    ) {
        let already = match self.runs(domain).and_then(|runs| runs.overlapping(iova).next()) {
            Some(Run { state: RunState::Suspect { gone, .. }, .. }) => gone,
            _ => 0,
        };
        let job = self.next_job(Job::Unmap { domain, iova, already, invalidation });
        if let Some(runs) = self.runs(domain) {
            runs.fuse(iova, RunState::Removing(job));
        }
        effects.push(Effect::Unmap { job, domain, iova });
    }
}
