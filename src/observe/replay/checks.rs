//! The checks of a map, an answer and the close of a region.

use passgate_bindings::Iova;

use super::checker::Checker;
use super::mapped::{Pages, show};
use crate::gate::{Cause, ClientId, Event, InvalidationId, Outcome, Performer, RegionId, Verdict};

impl Checker {
    /// Checks a map: nothing may be mapped between begin and end, or in quarantine.
    pub(super) fn check_map(&mut self, pages: &Pages) {
        let over = |spans: Option<&super::spans::Spans>| {
            spans.and_then(|spans| spans.within(pages.1.clone()).next()).map(|part| show(&(pages.0, part)))
        };
        let open = over(self.open_pages.get(&pages.0));
        let quarantined = over(self.quarantine.get(&pages.0));
        if let Some(at) = open {
            self.violated(format!("a map is made over {at}, which is between begin and end"));
        }
        if let Some(at) = quarantined {
            self.violated(format!("a map is made over {at}, which is in quarantine"));
        }
    }

    /// Checks that no page of an invalidation is mapped or in flight at any alias, when `statement` is made.
    pub(super) fn check_clear(&mut self, id: InvalidationId, statement: &str) {
        let Some(open) = self.open.get(&id) else { return };
        let mut mapped = open.iova.iter().find_map(|iova| self.mapped.at(*iova)).map(|(domain, at)| {
            format!("IOVA {:#x}+{:#x} in domain {}", at.start, at.end - at.start, domain.0)
        });
        for pages in &open.pages {
            let found = self.mapped.of_file(pages).next();
            mapped = mapped.or_else(|| {
                found.map(|(domain, part)| format!("{} in domain {}", show(&(pages.0, part)), domain.0))
            });
        }
        if let Some(at) = mapped {
            self.violated(format!("invalidation {}: {statement} while {at} is mapped or in flight", id.0));
        }
    }

    /// Checks a verdict: it is the first, in time, and what it states about the pages is so.
    pub(super) fn check_verdict(&mut self, id: InvalidationId, verdict: Verdict) {
        let Some(open) = self.open.get_mut(&id) else {
            // The removal of a region may be answered by a verdict, too. That its caller waits for an answer was checked before.
            return;
        };
        let (took, limit) = (self.now.saturating_sub(open.begun), open.deadline_ns);
        let (again, performer) = (std::mem::replace(&mut open.answered, true), open.performer);
        if again {
            self.violated(format!("invalidation {} is answered twice", id.0));
        }
        if took > limit {
            self.violated(format!(
                "invalidation {} is answered after {took} ns, its deadline was {limit}",
                id.0
            ));
        }
        if verdict == Verdict::Done {
            self.check_clear(id, "done is said");
            if performer == Performer::Passgate {
                self.close(id);
            }
            return;
        }
        let Some(open) = self.close(id) else { return };
        for pages in &open.pages {
            let outside = self.mapped.of_file(pages).find(|(_, part)| {
                let quarantine = self.quarantine.get(&pages.0);
                !quarantine.is_some_and(|spans| spans.covers(part.clone()))
            });
            if let Some((domain, part)) = outside {
                let at = show(&(pages.0, part));
                self.violated(format!(
                    "invalidation {} failed, and {at} is mapped in domain {} and not in quarantine",
                    id.0, domain.0
                ));
            }
        }
        if let Verdict::Unknown { reason, .. } = verdict
            && reason.cause == Cause::OwnerUnknown
        {
            self.must_be_quarantined.extend(open.pages.into_iter().map(|pages| (id, pages)));
        }
    }

    /// Checks an end: the client that began the invalidation ends it, and an unknown outcome is followed by a quarantine.
    pub(super) fn check_end(&mut self, client: ClientId, id: InvalidationId, event: &Event) {
        let own = self.open.get(&id).is_some_and(|open| open.answered && open.caller.client == client);
        if !own {
            if self.whole {
                self.violated(format!(
                    "client {} ended invalidation {}, which is not its own",
                    client.0, id.0
                ));
            }
            return;
        }
        let Some(open) = self.close(id) else { return };
        if let Event::End { outcome: Outcome::Unknown { .. }, .. } = event {
            self.must_be_quarantined.extend(open.pages.into_iter().map(|pages| (id, pages)));
        }
    }

    /// Checks that nothing of a region that is closed is mapped or in flight.
    pub(super) fn check_region_closed(&mut self, id: RegionId) {
        let Some(index) = self.regions.iter().position(|region| region.id == Some(id)) else { return };
        let spec = self.regions.swap_remove(index).spec;
        let iova = spec.gpa.rebase(passgate_bindings::Gpa(0), Iova(0));
        if let Some((domain, at)) = self.mapped.at(iova) {
            self.violated(format!(
                "region {} is closed while IOVA {:#x}+{:#x} is mapped or in flight in domain {}",
                id.0,
                at.start,
                at.end - at.start,
                domain.0
            ));
        }
    }
}
