//! Promise 5: whoever cannot be told no is told so only when nothing is left to try, and nobody else is served so.

use passgate::gate::{DeviceId, DomainId, OnStuckDma, Receipt, Step, Steps, Verdict};
use passgate_bindings::{Gpa, Iova};

use crate::model::{Ask, Asked, Model};
use crate::told::span;
use crate::truth::{Kept, broken};

impl Model {
    /// How far fences may go now, for whatever is under way.
    pub fn allowed(&self) -> Steps {
        let policy = self.policy.on_stuck_dma.allows();
        let leaving = if self.deaths.is_empty() { Steps::default() } else { Steps::ALL_BUT_RESET };
        let insisted = if self.is_insisted() { OnStuckDma::Reset.allows() } else { Steps::default() };
        policy.or(leaving).or(insisted)
    }

    /// Whether a region goes whose owner cannot be told no.
    fn is_insisted(&self) -> bool {
        let goes = |asked: &Asked| match asked.ask {
            Ask::Remove { .. } => true,
            Ask::Add { region, .. } => {
                self.truth.regions.iter().any(|known| Some(known.id) == region && known.doomed)
            }
            _ => false,
        };
        let asks = |asked: &Asked| self.insisting.contains(&asked.caller.client) && goes(asked);
        self.asked.values().any(asks)
            || self.deaths.iter().any(|death| self.insisting.contains(&death.client))
    }

    /// What an insisting client removes or leaves behind is given up only where, in a domain in question, every device was
    /// asked for everything that it can do. Where its time ran out there may have been none for the last steps.
    pub fn no_is_the_last_word(&mut self, receipt: &Receipt) -> Kept {
        let id = receipt.invalidation;
        let Some(since) = self.closing.remove(&id) else { return Ok(()) };
        let given_up = matches!(receipt.verdict, Some(Verdict::Refused { .. } | Verdict::Unknown { .. }));
        if !given_up || self.hurried.contains(&id) || !self.insisting.contains(&receipt.caller.client) {
            return Ok(());
        }
        let iova = span(receipt.ranges.first().rebase(Gpa(0), Iova(0)));
        let stuck = self.told.domains.iter().filter(|(_, domain)| domain.stuck(&iova));
        let left: Vec<_> = stuck.map(|(domain, _)| self.untried(*domain, since)).collect();
        if !left.iter().any(Option::is_none) {
            broken!(5, "{receipt:?} is given up, and not everything was tried: {left:?}");
        }
        Ok(())
    }

    /// A device of the domain that was not asked for something that it can do since then; none where there is none.
    fn untried(&self, domain: DomainId, since: u64) -> Option<(DeviceId, Step)> {
        let mut devices = self.told.devices.iter().filter(|(_, device)| device.domain == domain);
        devices.find_map(|(id, device)| {
            let spared = |step: Step| device.nature.tdi && !self.policy.end_tdi && step.ends_tdi();
            let can = |step: &Step| *step > Step::Unmap && device.steps.has(*step) && !spared(*step);
            let step = Step::LADDER.into_iter().filter(can).find(|step| !device.was_tried(*step, since))?;
            Some((*id, step))
        })
    }
}
