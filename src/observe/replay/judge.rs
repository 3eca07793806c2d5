//! What the checker holds against an answer, a map, the end of a region.

use passgate_bindings::Iova;

use super::checker::Checker;
use super::mapped::{Pages, show};
use crate::gate::{Cause, ClientId, Event, InvalidationId, Outcome, Performer, RegionId, Verdict};

impl Checker {
    /// Between begin and end, and in quarantine, nothing is mapped.
    pub(super) fn may_be_mapped(&mut self, pages: &Pages) {
        let over = |spans: Option<&super::spans::Spans>| {
            spans.and_then(|spans| spans.within(pages.1.clone()).next()).map(|part| show(&(pages.0, part)))
        };
        let (held, kept) = (over(self.held.get(&pages.0)), over(self.quarantine.get(&pages.0)));
        if let Some(at) = held {
            self.broken(format!("a map is made over {at}, which is between begin and end"));
        }
        if let Some(at) = kept {
            self.broken(format!("a map is made over {at}, which is in quarantine"));
        }
    }

    /// Nothing of an invalidation's pages is mapped or in flight, at any alias.
    pub(super) fn is_clear(&mut self, id: InvalidationId, said: &str) {
        let Some(open) = self.open.get(&id) else { return };
        let mut seen = open.iova.iter().find_map(|iova| self.mapped.at(*iova)).map(|(domain, at)| {
            format!("IOVA {:#x}+{:#x} in domain {}", at.start, at.end - at.start, domain.0)
        });
        for pages in &open.pages {
            let found = self.mapped.of_file(pages).next();
            seen = seen.or_else(|| {
                found.map(|(domain, part)| format!("{} in domain {}", show(&(pages.0, part)), domain.0))
            });
        }
        if let Some(at) = seen {
            self.broken(format!("invalidation {}: {said} while {at} is mapped or in flight", id.0));
        }
    }

    pub(super) fn verdict(&mut self, id: InvalidationId, verdict: Verdict) {
        let Some(open) = self.open.get_mut(&id) else {
            // The removal of a region may end in such a word too: whether anybody waits for it was judged already.
            return;
        };
        let (took, limit) = (self.now.saturating_sub(open.begun), open.deadline_ns);
        let (again, performer) = (std::mem::replace(&mut open.answered, true), open.performer);
        if again {
            self.broken(format!("invalidation {} is answered twice", id.0));
        }
        if took > limit {
            self.broken(format!(
                "invalidation {} is answered after {took} ns, its deadline was {limit}",
                id.0
            ));
        }
        if verdict == Verdict::Done {
            self.is_clear(id, "done is said");
            if performer == Performer::Passgate {
                self.close(id);
            }
            return;
        }
        let Some(open) = self.close(id) else { return };
        for pages in &open.pages {
            let outside = self.mapped.of_file(pages).find(|(_, part)| {
                let kept = self.quarantine.get(&pages.0);
                !kept.is_some_and(|spans| spans.covers(part.clone()))
            });
            if let Some((domain, part)) = outside {
                let at = show(&(pages.0, part));
                self.broken(format!(
                    "invalidation {} failed, and {at} is mapped in domain {} and not in quarantine",
                    id.0, domain.0
                ));
            }
        }
        if let Verdict::Unknown { reason, .. } = verdict
            && reason.cause == Cause::OwnerUnknown
        {
            self.must.extend(open.pages.into_iter().map(|pages| (id, pages)));
        }
    }

    pub(super) fn ended(&mut self, client: ClientId, id: InvalidationId, event: &Event) {
        let own = self.open.get(&id).is_some_and(|open| open.answered && open.caller.client == client);
        if !own {
            if self.whole {
                self.broken(format!("client {} ended invalidation {}, which is not its own", client.0, id.0));
            }
            return;
        }
        let Some(open) = self.close(id) else { return };
        if let Event::End { outcome: Outcome::Unknown { .. }, .. } = event {
            self.must.extend(open.pages.into_iter().map(|pages| (id, pages)));
        }
    }

    pub(super) fn region_closed(&mut self, id: RegionId) {
        let Some(index) = self.regions.iter().position(|region| region.id == Some(id)) else { return };
        let spec = self.regions.swap_remove(index).spec;
        let iova = spec.gpa.rebase(passgate_bindings::Gpa(0), Iova(0));
        if let Some((domain, at)) = self.mapped.at(iova) {
            self.broken(format!(
                "region {} is closed while IOVA {:#x}+{:#x} is mapped or in flight in domain {}",
                id.0,
                at.start,
                at.end - at.start,
                domain.0
            ));
        }
    }
}
