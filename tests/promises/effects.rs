//! Judges effects, one by one, in the order in which the gate gave them.

use passgate::gate::{Answer, Caller, DeviceId, Effect, Notice, Outcome, Performer, Refusal, Verdict};
use passgate_bindings::{Iova, PageRange};

use crate::model::{Ask, Asked, Model};
use crate::truth::{Held, Kept, Open, Phase, Region, Stage, broken};

impl Model {
    pub fn effect(&mut self, effect: &Effect) -> Kept {
        if let Effect::Unmap { domain, iova, .. } = effect {
            self.no_window(*domain, *iova)?;
        }
        let allowed = self.allowed();
        self.told.effect(effect, &self.policy, allowed)?;
        match effect {
            Effect::Map { iova, file, offset, .. } => {
                let range = iova.rebase(iova.start(), *offset);
                if let Some(open) = self.truth.open_over(*file, range).next() {
                    broken!(3, "{effect:?} over {open:?}");
                }
                let shown = self.truth.aliases(*file, range).any(|(region, at)| {
                    region.stage != Stage::Closing && at.start().0 <= iova.start().0 && iova.end() <= at.end()
                });
                if !shown {
                    broken!(8, "{effect:?} outside every region that stays");
                }
                let Some(file) = self.truth.file(*file) else { return Ok(()) };
                if file.quarantined(range) {
                    broken!(6, "{effect:?} over quarantine {:?}", file.quarantine);
                }
                if let Some(page) = file.first_forbidden(range) {
                    broken!(1, "{effect:?} over page {page}, which is {}", file.describe(page));
                }
            }
            Effect::Unmap { iova, .. } => self.stopped_before(*iova)?,
            Effect::Replace { domain, gone, .. } => {
                for iova in gone {
                    self.stopped_before(*iova)?;
                }
                self.may_break(*domain, effect)?;
            }
            Effect::Fence { job, .. } => {
                if self.dying
                    && let Some(death) = self.deaths.last_mut()
                {
                    death.fences.insert(*job);
                }
            }
            Effect::Arm { invalidation, .. } => {
                if self.known.insert(*invalidation) {
                    self.closing.insert(*invalidation, self.told.clock);
                    if self.dying
                        && let Some(death) = self.deaths.last_mut()
                    {
                        death.closings.push(*invalidation);
                    }
                }
            }
            Effect::Convert { invalidation, pages, to } => {
                let Some(open) = self.truth.open(*invalidation).map(|open| open.clone()) else {
                    broken!(1, "{effect:?} for nothing that is open")
                };
                let said: Vec<_> = pages.iter().map(|part| (part.file, part.range)).collect();
                if open.phase != Phase::Asked || open.performer != Performer::Passgate || said != open.pages {
                    broken!(1, "{effect:?} is not what was asked: {open:?}");
                }
                if *to != open.to {
                    broken!(1, "{effect:?} makes something else of the pages: {open:?}");
                }
                self.converting.insert(*invalidation);
                self.grant(&open, Phase::Converting)?;
            }
            Effect::Answer { caller, answer } => self.answer(*caller, answer)?,
            Effect::Notice(notice) => self.notice(notice)?,
            Effect::Receipt(receipt) => {
                let id = receipt.invalidation;
                self.no_is_the_last_word(receipt)?;
                if !self.receipts.insert(id) {
                    broken!(4, "two receipts of {id:?}");
                }
                if let Some(said) = self.said.remove(&id)
                    && receipt.verdict != Some(said)
                {
                    broken!(4, "{said:?} was said, but the receipt is {receipt:?}");
                }
            }
            Effect::ForgetFile { file: id } => {
                let needs = |region: &&Region| {
                    region.spec.backing.file == *id
                        && (region.stage == Stage::Live || self.told.unproved(region.iova()).is_some())
                };
                if let Some(region) = self.truth.regions.iter().find(needs) {
                    broken!(8, "{effect:?} while {region:?} is there");
                }
                let Some(file) = self.truth.file(*id) else { return Ok(()) };
                if !file.quarantine.is_empty() {
                    broken!(6, "{effect:?} while {:?} is in quarantine", file.quarantine);
                }
                file.held = false;
            }
            Effect::Attach { device, .. } => {
                self.truth.dirty = true;
                self.neighbours_are_back(*device)?;
                self.dead_are_unmapped(*device)?;
            }
        }
        Ok(())
    }

    /// A device comes back only when no memory of a dead client is left in its domain.
    fn dead_are_unmapped(&self, device: DeviceId) -> Kept {
        let Some(domain) = self.told.devices.get(&device).map(|device| device.domain) else { return Ok(()) };
        let Some(told) = self.told.domains.get(&domain) else { return Ok(()) };
        for region in &self.truth.regions {
            let dead = self.deaths.iter().any(|death| death.client == region.owner);
            if dead && !told.proved(&crate::told::span(region.iova())) {
                broken!(8, "{device:?} comes back to {domain:?}, where {region:?} is mapped");
            }
        }
        Ok(())
    }

    /// A dead client's memory is unmapped only after its devices were stopped.
    fn stopped_before(&self, iova: PageRange<Iova>) -> Kept {
        for death in self.deaths.iter().filter(|death| !death.overdue && !death.fences.is_empty()) {
            let of_it = self
                .truth
                .regions
                .iter()
                .filter(|region| death.regions.contains(&region.id) && region.iova().overlaps(iova));
            for region in of_it {
                // Somebody else's invalidation may need the pages gone before that.
                let others = self.truth.open_over(region.spec.backing.file, region.pages()).next().is_some();
                let running = self.told.devices.values().any(|device| device.busy > 0);
                if !others && running && death.fences.iter().any(|job| self.told.waits_for(*job)) {
                    broken!(8, "{iova:?} of {:?} is unmapped before its devices were stopped", death.client);
                }
            }
        }
        Ok(())
    }

    /// Everything that must hold when the owner may change these pages.
    fn grant(&mut self, open: &Open, phase: Phase) -> Kept {
        for (file, range) in &open.pages {
            for (region, iova) in self.truth.aliases(*file, *range) {
                if let Some(domain) = self.told.unproved(iova) {
                    broken!(
                        2,
                        "{:?} is granted, but nothing proves {iova:?} of {region:?} gone from {domain:?}",
                        open.id
                    );
                }
            }
            let taken = self.truth.open_over(*file, *range).find(|other| other.id != open.id);
            if let Some(other) = taken {
                broken!(3, "{:?} is granted inside {other:?}", open.id);
            }
            if let Some(file) = self.truth.file(*file)
                && file.quarantined(*range)
            {
                broken!(6, "{:?} is granted, but {:?} is in quarantine", open.id, file.quarantine);
            }
        }
        self.truth.grant(&open.pages, true);
        if let Some(open) = self.truth.open(open.id) {
            open.phase = phase;
        }
        Ok(())
    }

    fn answer(&mut self, caller: Caller, answer: &Answer) -> Kept {
        let Some(Asked { caller: asker, ask, due }) = self.asked.remove(&caller.cookie) else {
            if self.orphans.remove(&caller.cookie) {
                return self.orphan(answer);
            }
            broken!(4, "nobody waits for {answer:?} to {caller:?} (answered twice?)");
        };
        if asker != caller {
            broken!(4, "{asker:?} asked, {caller:?} is answered");
        }
        if self.now > due {
            broken!(4, "{answer:?} to {ask:?} comes at {} ns, it was due at {due}", self.now);
        }
        match (&ask, answer) {
            (Ask::Add { region, spec }, Answer::RegionAdded { region: id, .. }) => {
                if *region != Some(*id) || !(spec.piece == 0 || spec.piece.is_power_of_two()) {
                    broken!(7, "{spec:?} was added as {id:?}, not {region:?}");
                }
                if self.truth.regions.len() > self.policy.max_regions as usize {
                    broken!(7, "{id:?} is one region too many");
                }
                if let Some(region) = self.truth.region(*id) {
                    region.stage = Stage::Live;
                }
                match self.truth.file(spec.backing.file) {
                    Some(file) if !file.held => broken!(8, "{id:?} is added, and its file let go of"),
                    _ => Ok(()),
                }
            }
            (Ask::Add { region, .. }, Answer::Refused(refusal)) => {
                if let Some(region) = region.and_then(|id| self.truth.region(id)) {
                    region.stage = Stage::Closing;
                }
                self.refusal(caller, &ask, *refusal)
            }
            (Ask::Remove { region }, Answer::RegionRemoved { region: id }) => {
                if region != id || self.truth.region(*id).is_some() {
                    broken!(8, "{id:?} is said to be removed, but never closed (asked: {region:?})");
                }
                Ok(())
            }
            (Ask::Remove { region }, Answer::Verdict { invalidation, verdict }) => {
                if *verdict == Verdict::Done {
                    broken!(1, "{verdict:?} to the removal of {region:?}");
                }
                self.owed.notice.push(*invalidation);
                self.said.insert(*invalidation, *verdict);
                Ok(())
            }
            (Ask::Remove { .. }, Answer::Refused(refusal)) => self.refusal(caller, &ask, *refusal),
            (Ask::Begin { .. }, Answer::Refused(refusal)) => self.refusal(caller, &ask, *refusal),
            (Ask::Begin { ranges, id, .. }, Answer::Verdict { invalidation, verdict }) => {
                if *id != Some(*invalidation) {
                    broken!(4, "{answer:?} to {ask:?}");
                }
                if let Verdict::Refused { range: failed, .. } | Verdict::Unknown { range: failed, .. } =
                    verdict
                    && !ranges.iter().any(|range| range.covers(*failed))
                {
                    broken!(6, "{verdict:?} names a range outside {ranges:?}");
                }
                self.said.insert(*invalidation, *verdict);
                self.verdict(*invalidation, *verdict)
            }
            (Ask::End { invalidation, outcome, counts: true }, Answer::Ended { invalidation: id }) => {
                if id != invalidation {
                    broken!(4, "{answer:?} to {ask:?}");
                }
                self.over(*id, matches!(outcome, Outcome::Unknown { .. }));
                Ok(())
            }
            (Ask::End { counts: false, .. }, Answer::Refused(Refusal::NotBegun { .. })) => Ok(()),
            (Ask::Release { bytes, .. }, Answer::Released { bytes: said }) if bytes == said && *said > 0 => {
                Ok(())
            }
            (
                Ask::Release { bytes: 0, hangs: false, reached: false },
                Answer::Refused(Refusal::NotQuarantined { .. }),
            ) => Ok(()),
            (Ask::Release { reached: true, .. }, Answer::Refused(Refusal::StillMapped { .. })) => Ok(()),
            (Ask::Release { hangs: true, .. }, Answer::Refused(Refusal::StillConverting { .. })) => Ok(()),
            _ => broken!(3, "{answer:?} to {ask:?}"),
        }
    }

    /// An answer to a client that is gone: only passgate's own conversion still counts.
    fn orphan(&mut self, answer: &Answer) -> Kept {
        match answer {
            Answer::Verdict { invalidation, verdict } if self.truth.open(*invalidation).is_some() => {
                self.said.insert(*invalidation, *verdict);
                self.verdict(*invalidation, *verdict)
            }
            _ => Ok(()),
        }
    }

    /// The word to a begin.
    fn verdict(&mut self, id: passgate::gate::InvalidationId, verdict: Verdict) -> Kept {
        let Some(open) = self.truth.open(id).map(|open| open.clone()) else {
            broken!(4, "{verdict:?} about {id:?}, which is not open")
        };
        let converted = self.converted.remove(&id);
        if verdict != Verdict::Done {
            self.owed.notice.push(id);
        }
        match (open.phase, verdict) {
            (Phase::Asked, Verdict::Done) if open.performer == Performer::Client => {
                self.grant(&open, Phase::Granted)
            }
            (Phase::Asked, Verdict::Refused { .. } | Verdict::Unknown { .. }) => {
                if self.clean && !open.out_of_time {
                    broken!(4, "{verdict:?} about {open:?}, though nothing failed and there was time left");
                }
                for (file, range) in &open.pages {
                    let doubtful = self.doubtful(*file, *range);
                    self.owed.quarantine.extend(doubtful.into_iter().map(|part| (*file, part)));
                }
                self.over(id, false);
                Ok(())
            }
            (Phase::Converting, _) => {
                let fits = match converted {
                    Some(Outcome::Committed) => verdict == Verdict::Done,
                    Some(Outcome::NotCommitted) => matches!(verdict, Verdict::Refused { .. }),
                    Some(Outcome::Unknown { .. }) => matches!(verdict, Verdict::Unknown { .. }),
                    None => matches!(verdict, Verdict::Unknown { .. }) && open.out_of_time,
                };
                if !fits {
                    broken!(1, "{verdict:?} after a conversion that came to {converted:?}");
                }
                if converted.is_none() {
                    self.truth.become_state(&open.pages, passgate::gate::PageState::Unknown);
                }
                self.over(id, matches!(verdict, Verdict::Unknown { .. }));
                Ok(())
            }
            _ => broken!(4, "{verdict:?} about {open:?}"),
        }
    }

    /// The invalidation holds nothing any more; with `unknown`, quarantine does.
    fn over(&mut self, id: passgate::gate::InvalidationId, unknown: bool) {
        let Some(index) = self.truth.open.iter().position(|open| open.id == id) else { return };
        let open = self.truth.open.swap_remove(index);
        self.truth.grant(&open.pages, false);
        if unknown {
            self.owed.quarantine.extend(open.pages);
        }
    }

    fn notice(&mut self, notice: &Notice) -> Kept {
        match *notice {
            Notice::Refused { invalidation, .. } => {
                self.owed.noticed.insert(invalidation);
            }
            Notice::Quarantined { invalidation, file, range, reason, .. } => {
                self.owed.noticed.insert(invalidation);
                let lasts = self.lasts(invalidation, reason);
                let Some(file) = self.truth.file(file) else { return Ok(()) };
                if file.quarantined(range) {
                    broken!(6, "{notice:?} is in quarantine already: {:?}", file.quarantine);
                }
                file.vouched.remove(range.start().0..range.end().0);
                file.quarantine.push(Held { range, reason, since: invalidation, lasts });
            }
            Notice::Freed { file: id, range, .. } => {
                self.freed = true;
                for (region, iova) in self.truth.aliases(id, range) {
                    if let Some(domain) = self.told.unsettled(iova) {
                        broken!(2, "{notice:?} while {iova:?} of {region:?} is in doubt in {domain:?}");
                    }
                }
                let Some(file) = self.truth.file(id) else { return Ok(()) };
                let before = file.quarantine.len();
                file.quarantine.retain(|held| held.range != range || held.lasts);
                if file.quarantine.len() + 1 != before {
                    broken!(6, "{notice:?} frees what is not to be freed: {:?}", file.quarantine);
                }
            }
            Notice::Released { file: id, range, .. } => {
                let Some(index) = self.owed.released.iter().position(|part| *part == (id, range)) else {
                    broken!(6, "{notice:?}, of which nobody spoke")
                };
                self.owed.released.swap_remove(index);
                let Some(file) = self.truth.file(id) else { return Ok(()) };
                file.quarantine.retain(|held| held.range != range);
            }
            // What comes out of quarantine does so whatever the room.
            Notice::MapFailed { errno: 28, .. } if self.clean && !self.freed => {
                broken!(7, "{notice:?}: refused too late")
            }
            Notice::MapFailed { .. } => self.map_failed = true,
            Notice::RegionClosed { region } => {
                let Some(entry) = self.truth.region(region).map(|entry| entry.clone()) else {
                    broken!(8, "{notice:?}, which is not there")
                };
                if let Some(domain) = self.told.unproved(entry.iova()) {
                    broken!(2, "{notice:?}, but nothing proves it gone from {domain:?}");
                }
                self.truth.remove(region);
            }
            Notice::SessionClosed { client } => {
                if let Some(region) = self.truth.regions.iter().find(|region| region.owner == client) {
                    broken!(8, "{notice:?} while {region:?} is there");
                }
                self.deaths.retain(|death| death.client != client);
            }
            Notice::DeviceFenced { .. }
            | Notice::DeviceAttached { .. }
            | Notice::DeviceWanted { .. }
            | Notice::TdiEnded { .. } => {}
        }
        Ok(())
    }
}
