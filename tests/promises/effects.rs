//! Judges effects one by one, in the order in which the gate emitted them.

use passgate::gate::{Answer, Caller, DeviceId, Effect, Notice, Outcome, Performer, Refusal, Verdict};
use passgate_bindings::{Iova, PageRange};

use crate::model::{Model, Request, RequestKind};
use crate::oracle::{CheckResult, Open, Phase, QuarantinedRange, Region, Stage, broken};

impl Model {
    pub fn effect(&mut self, effect: &Effect) -> CheckResult {
        if let Effect::Unmap { domain, iova, .. } = effect {
            self.check_unmap_spares_neighbours(*domain, *iova)?;
        }
        let allowed = self.allowed();
        self.shadow_ledger.effect(effect, &self.policy, allowed)?;
        match effect {
            Effect::Map { iova, file, offset, .. } => {
                let range = iova.rebase(iova.start(), *offset);
                if let Some(open) = self.oracle.open_over(*file, range).next() {
                    broken!(3, "{effect:?} over {open:?}");
                }
                let shown = self.oracle.aliases(*file, range).any(|(region, at)| {
                    region.stage != Stage::Closing && at.start().0 <= iova.start().0 && iova.end() <= at.end()
                });
                if !shown {
                    broken!(8, "{effect:?} outside every region that is not being closed");
                }
                let Some(file) = self.oracle.file(*file) else { return Ok(()) };
                if file.is_quarantined(range) {
                    broken!(6, "{effect:?} over quarantine {:?}", file.quarantine);
                }
                if let Some(page) = file.first_forbidden(range) {
                    broken!(1, "{effect:?} over page {page}, which is {}", file.describe(page));
                }
            }
            Effect::Unmap { iova, .. } => self.check_devices_were_stopped(*iova)?,
            Effect::Replace { domain, gone, .. } => {
                for iova in gone {
                    self.check_devices_were_stopped(*iova)?;
                }
                self.check_gap_allowed(*domain, effect)?;
            }
            Effect::Fence { job, device, .. } => {
                // A stronger fence of a device that is stopped already is asked for what is in doubt.
                let stopped =
                    self.shadow_ledger.devices.get(device).is_some_and(|device| device.fenced.is_some());
                if self.dying
                    && !stopped
                    && let Some(death) = self.deaths.last_mut()
                {
                    death.fences.insert(*job);
                }
            }
            Effect::Arm { invalidation, .. } => {
                if self.known_invalidations.insert(*invalidation) {
                    self.closing.insert(*invalidation, self.shadow_ledger.event_count);
                    if self.dying
                        && let Some(death) = self.deaths.last_mut()
                    {
                        death.closings.push(*invalidation);
                    }
                }
            }
            Effect::Convert { invalidation, pages, to } => {
                let Some(open) = self.oracle.open(*invalidation).map(|open| open.clone()) else {
                    broken!(1, "{effect:?} for no open invalidation")
                };
                let converted: Vec<_> = pages.iter().map(|part| (part.file, part.range)).collect();
                if open.phase != Phase::Pending
                    || open.performer != Performer::Passgate
                    || converted != open.pages
                {
                    broken!(1, "{effect:?} is not what was requested: {open:?}");
                }
                if *to != open.to {
                    broken!(1, "{effect:?} gives the pages another state: {open:?}");
                }
                self.converting.insert(*invalidation);
                self.grant(&open, Phase::Converting)?;
            }
            Effect::Answer { caller, answer } => self.answer(*caller, answer)?,
            Effect::Notice(notice) => self.notice(notice)?,
            Effect::Receipt(receipt) => {
                let id = receipt.invalidation;
                self.check_refusal_is_last_resort(receipt)?;
                if !self.receipts.insert(id) {
                    broken!(4, "two receipts of {id:?}");
                }
                if let Some(answered) = self.verdicts.remove(&id)
                    && receipt.verdict != Some(answered)
                {
                    broken!(4, "{answered:?} was answered, but the receipt is {receipt:?}");
                }
            }
            Effect::ForgetFile { file: id } => {
                let needs = |region: &&Region| {
                    region.spec.backing.file == *id
                        && (region.stage == Stage::Live
                            || self.shadow_ledger.unproved(region.iova()).is_some())
                };
                if let Some(region) = self.oracle.regions.iter().find(needs) {
                    broken!(8, "{effect:?} while {region:?} exists");
                }
                let Some(file) = self.oracle.file(*id) else { return Ok(()) };
                if !file.quarantine.is_empty() {
                    broken!(6, "{effect:?} while {:?} is in quarantine", file.quarantine);
                }
                file.in_use = false;
            }
            Effect::Attach { device, .. } => {
                self.oracle.dirty = true;
                self.check_neighbours_are_mapped(*device)?;
                self.check_gone_clients_are_unmapped(*device)?;
            }
        }
        Ok(())
    }

    /// Checks that a device is attached again only when no memory of a dead client remains in its domain.
    fn check_gone_clients_are_unmapped(&self, device: DeviceId) -> CheckResult {
        let Some(domain) = self.shadow_ledger.devices.get(&device).map(|device| device.domain) else {
            return Ok(());
        };
        let Some(mappings) = self.shadow_ledger.domains.get(&domain) else { return Ok(()) };
        for region in &self.oracle.regions {
            let dead = self.deaths.iter().any(|death| death.client == region.owner);
            if dead && !mappings.is_proved_gone(&crate::shadow_ledger::span(region.iova())) {
                broken!(8, "{device:?} is attached to {domain:?}, where {region:?} is still mapped");
            }
        }
        Ok(())
    }

    /// Checks that a dead client's memory is unmapped only after its devices were stopped.
    fn check_devices_were_stopped(&self, iova: PageRange<Iova>) -> CheckResult {
        for death in self.deaths.iter().filter(|death| !death.fences_overdue && !death.fences.is_empty()) {
            let of_it = self
                .oracle
                .regions
                .iter()
                .filter(|region| death.regions.contains(&region.id) && region.iova().overlaps(iova));
            for region in of_it {
                // Another client's invalidation may have to unmap the pages before that.
                let others = self.oracle.open_over(region.spec.backing.file, region.pages()).next().is_some();
                let running = self.shadow_ledger.devices.values().any(|device| device.busy > 0);
                if !others && running && death.fences.iter().any(|job| self.shadow_ledger.is_pending(*job)) {
                    broken!(8, "{iova:?} of {:?} is unmapped before its devices were stopped", death.client);
                }
            }
        }
        Ok(())
    }

    /// Checks everything that must be true when the owner may change these pages, and records that it may.
    fn grant(&mut self, open: &Open, phase: Phase) -> CheckResult {
        for (file, range) in &open.pages {
            for (region, iova) in self.oracle.aliases(*file, *range) {
                if let Some(domain) = self.shadow_ledger.unproved(iova) {
                    broken!(
                        2,
                        "{:?} is granted, but nothing proves {iova:?} of {region:?} gone from {domain:?}",
                        open.id
                    );
                }
            }
            let taken = self.oracle.open_over(*file, *range).find(|other| other.id != open.id);
            if let Some(other) = taken {
                broken!(3, "{:?} is granted inside {other:?}", open.id);
            }
            if let Some(file) = self.oracle.file(*file)
                && file.is_quarantined(*range)
            {
                broken!(6, "{:?} is granted, but {:?} is in quarantine", open.id, file.quarantine);
            }
        }
        self.oracle.grant(&open.pages, true);
        if let Some(open) = self.oracle.open(open.id) {
            open.phase = phase;
        }
        Ok(())
    }

    fn answer(&mut self, caller: Caller, answer: &Answer) -> CheckResult {
        let Some(Request { caller: requester, kind, due }) = self.requests.remove(&caller.cookie) else {
            if self.abandoned_requests.remove(&caller.cookie) {
                return self.answer_to_gone_client(answer);
            }
            broken!(4, "no request waits for {answer:?} to {caller:?} (answered twice?)");
        };
        if requester != caller {
            broken!(4, "{requester:?} sent the request, {caller:?} is answered");
        }
        if self.now > due {
            broken!(4, "{answer:?} to {kind:?} comes at {} ns, it was due at {due}", self.now);
        }
        match (&kind, answer) {
            (RequestKind::Add { region, spec }, Answer::RegionAdded { region: id, .. }) => {
                if *region != Some(*id) || !(spec.piece == 0 || spec.piece.is_power_of_two()) {
                    broken!(7, "{spec:?} was added as {id:?}, not {region:?}");
                }
                if self.oracle.regions.len() > self.policy.max_regions as usize {
                    broken!(7, "{id:?} exceeds the limit of regions");
                }
                if let Some(region) = self.oracle.region(*id) {
                    region.stage = Stage::Live;
                }
                match self.oracle.file(spec.backing.file) {
                    Some(file) if !file.in_use => broken!(8, "{id:?} is added, but its file was forgotten"),
                    _ => Ok(()),
                }
            }
            (RequestKind::Add { region, .. }, Answer::Refused(refusal)) => {
                if let Some(region) = region.and_then(|id| self.oracle.region(id)) {
                    region.stage = Stage::Closing;
                }
                self.refusal(caller, &kind, *refusal)
            }
            (RequestKind::Remove { region }, Answer::RegionRemoved { region: id }) => {
                if region != id || self.oracle.region(*id).is_some() {
                    broken!(8, "{id:?} is reported as removed, but was never closed (requested: {region:?})");
                }
                Ok(())
            }
            (RequestKind::Remove { region }, Answer::Verdict { invalidation, verdict }) => {
                if *verdict == Verdict::Done {
                    broken!(1, "{verdict:?} to the removal of {region:?}");
                }
                self.obligations.must_notice.push(*invalidation);
                self.verdicts.insert(*invalidation, *verdict);
                Ok(())
            }
            (RequestKind::Remove { .. }, Answer::Refused(refusal)) => self.refusal(caller, &kind, *refusal),
            (RequestKind::Begin { .. }, Answer::Refused(refusal)) => self.refusal(caller, &kind, *refusal),
            (RequestKind::Begin { ranges, id, .. }, Answer::Verdict { invalidation, verdict }) => {
                if *id != Some(*invalidation) {
                    broken!(4, "{answer:?} to {kind:?}");
                }
                if let Verdict::Refused { range: failed, .. } | Verdict::Unknown { range: failed, .. } =
                    verdict
                    && !ranges.iter().any(|range| range.covers(*failed))
                {
                    broken!(6, "{verdict:?} names a range outside {ranges:?}");
                }
                self.verdicts.insert(*invalidation, *verdict);
                self.verdict(*invalidation, *verdict)
            }
            (
                RequestKind::End { invalidation, outcome, counts: true },
                Answer::Ended { invalidation: id },
            ) => {
                if id != invalidation {
                    broken!(4, "{answer:?} to {kind:?}");
                }
                self.over(*id, matches!(outcome, Outcome::Unknown { .. }));
                Ok(())
            }
            (RequestKind::End { counts: false, .. }, Answer::Refused(Refusal::NotBegun { .. })) => Ok(()),
            (RequestKind::Release { bytes, .. }, Answer::Released { bytes: released })
                if bytes == released && *released > 0 =>
            {
                Ok(())
            }
            (
                RequestKind::Release { bytes: 0, hangs: false, reachable: false },
                Answer::Refused(Refusal::NotQuarantined { .. }),
            ) => Ok(()),
            (RequestKind::Release { reachable: true, .. }, Answer::Refused(Refusal::StillMapped { .. })) => {
                Ok(())
            }
            (RequestKind::Release { hangs: true, .. }, Answer::Refused(Refusal::StillConverting { .. })) => {
                Ok(())
            }
            _ => broken!(3, "{answer:?} to {kind:?}"),
        }
    }

    /// Judges an answer to a client that is gone: only a verdict of passgate's own conversion still counts.
    fn answer_to_gone_client(&mut self, answer: &Answer) -> CheckResult {
        match answer {
            Answer::Verdict { invalidation, verdict } if self.oracle.open(*invalidation).is_some() => {
                self.verdicts.insert(*invalidation, *verdict);
                self.verdict(*invalidation, *verdict)
            }
            _ => Ok(()),
        }
    }

    /// Judges the verdict of an invalidation.
    fn verdict(&mut self, id: passgate::gate::InvalidationId, verdict: Verdict) -> CheckResult {
        let Some(open) = self.oracle.open(id).map(|open| open.clone()) else {
            broken!(4, "{verdict:?} about {id:?}, which is not open")
        };
        let converted = self.converted.remove(&id);
        if verdict != Verdict::Done {
            self.obligations.must_notice.push(id);
        }
        match (open.phase, verdict) {
            (Phase::Pending, Verdict::Done) if open.performer == Performer::Client => {
                self.grant(&open, Phase::Granted)
            }
            (Phase::Pending, Verdict::Refused { .. } | Verdict::Unknown { .. }) => {
                if self.clean && !open.out_of_time {
                    broken!(
                        4,
                        "{verdict:?} about {open:?}, though nothing failed and its last timer has not expired"
                    );
                }
                for (file, range) in &open.pages {
                    let doubtful = self.pages_in_doubt(*file, *range);
                    self.obligations.must_quarantine.extend(doubtful.into_iter().map(|part| (*file, part)));
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
                    broken!(1, "{verdict:?} after a conversion with outcome {converted:?}");
                }
                if converted.is_none() {
                    self.oracle.set_state(&open.pages, passgate::gate::PageState::Unknown);
                }
                self.over(id, matches!(verdict, Verdict::Unknown { .. }));
                Ok(())
            }
            _ => broken!(4, "{verdict:?} about {open:?}"),
        }
    }

    /// The invalidation is over and excludes nothing any more. With `unknown`, its pages must be in quarantine.
    fn over(&mut self, id: passgate::gate::InvalidationId, unknown: bool) {
        let Some(index) = self.oracle.open.iter().position(|open| open.id == id) else { return };
        let open = self.oracle.open.swap_remove(index);
        self.oracle.grant(&open.pages, false);
        if unknown {
            self.obligations.must_quarantine.extend(open.pages);
        }
    }

    fn notice(&mut self, notice: &Notice) -> CheckResult {
        match *notice {
            Notice::Refused { invalidation, .. } => {
                self.obligations.noticed.insert(invalidation);
            }
            Notice::Quarantined { invalidation, file, range, reason, .. } => {
                self.obligations.noticed.insert(invalidation);
                let lasts = self.lasts(invalidation, reason);
                let Some(file) = self.oracle.file(file) else { return Ok(()) };
                if file.is_quarantined(range) {
                    broken!(6, "{notice:?} is in quarantine already: {:?}", file.quarantine);
                }
                file.operator_released.remove(range.start().0..range.end().0);
                file.quarantine.push(QuarantinedRange { range, reason, since: invalidation, lasts });
            }
            Notice::Freed { file: id, range, .. } => {
                self.freed = true;
                for (region, iova) in self.oracle.aliases(id, range) {
                    if let Some(domain) = self.shadow_ledger.unsettled(iova) {
                        broken!(2, "{notice:?} while {iova:?} of {region:?} is in doubt in {domain:?}");
                    }
                }
                let Some(file) = self.oracle.file(id) else { return Ok(()) };
                let before = file.quarantine.len();
                file.quarantine.retain(|quarantined| quarantined.range != range || quarantined.lasts);
                if file.quarantine.len() + 1 != before {
                    broken!(6, "{notice:?} lifts no liftable quarantine: {:?}", file.quarantine);
                }
            }
            Notice::Released { file: id, range, .. } => {
                let Some(index) = self.obligations.must_report.iter().position(|part| *part == (id, range))
                else {
                    broken!(6, "{notice:?}, which no operator requested")
                };
                self.obligations.must_report.swap_remove(index);
                let Some(file) = self.oracle.file(id) else { return Ok(()) };
                file.quarantine.retain(|quarantined| quarantined.range != range);
            }
            // ENOSPC (28): the mappings of a conversion are reserved at its begin. Those of what comes out of quarantine are not.
            Notice::MapFailed { errno: 28, .. } if self.clean && !self.freed => {
                broken!(7, "{notice:?}: it should have been refused at its request")
            }
            Notice::MapFailed { .. } => self.map_failed = true,
            Notice::RegionClosed { region } => {
                let Some(entry) = self.oracle.region(region).map(|entry| entry.clone()) else {
                    broken!(8, "{notice:?} of no region")
                };
                if let Some(domain) = self.shadow_ledger.unproved(entry.iova()) {
                    broken!(2, "{notice:?}, but nothing proves it gone from {domain:?}");
                }
                self.oracle.remove(region);
            }
            Notice::SessionClosed { client } => {
                if let Some(region) = self.oracle.regions.iter().find(|region| region.owner == client) {
                    broken!(8, "{notice:?} while {region:?} exists");
                }
                self.deaths.retain(|death| death.client != client);
            }
            Notice::Inconsistent { .. } => broken!(2, "{notice:?}"),
            Notice::DeviceFenced { .. }
            | Notice::DeviceAttached { .. }
            | Notice::DeviceWanted { .. }
            | Notice::TdiEnded { .. } => {}
        }
        Ok(())
    }
}
