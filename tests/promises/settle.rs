//! Brings a world to a state in which nothing is in progress: between actions, and at the end, when nothing may remain.

use std::cmp::Reverse;

use passgate::gate::{ClientId, Event, Outcome, RegionId};
use passgate_bindings::PAGE;
use rangemap::RangeSet;

use super::World;
use crate::oracle::{CheckResult, Phase, Stage, broken};

/// The number of calls after which a gate that still requests calls counts as never settling.
const MAX_CALLS: usize = 100_000;

impl World {
    /// Lets all calls return and all late flushes complete. Then every request must have been answered, whatever is open.
    pub fn settle(&mut self) -> CheckResult {
        for _ in 0..MAX_CALLS {
            let next = (0..self.executor.tasks.len()).find(|index| {
                let task = &self.executor.tasks[*index];
                !task.hangs && (task.result.is_none() || self.executor.is_deliverable(*index))
            });
            if let Some(index) = next {
                self.run_task(index, true, None)?;
                continue;
            }
            let flushed: usize = self.executor.buses.iter().map(|bus| bus.sim.flush()).sum();
            self.executor.collect_tickets();
            if flushed == 0 {
                return self.check_settled();
            }
        }
        broken!(4, "after {MAX_CALLS} calls the gate still requests more: {:?}", self.executor.tasks)
    }

    fn check_settled(&mut self) -> CheckResult {
        self.model.compare_snapshot(&self.gate.snapshot())?;
        if !self.executor.is_idle() {
            return Ok(());
        }
        self.model.check_all_answered()?;
        self.check_no_disproved_quarantine()?;
        self.check_doubt_is_quarantined()?;
        if self.model.clean && !self.model.map_failed { self.check_wanted_is_mapped() } else { Ok(()) }
    }

    /// Checks that only ranges in doubt are in quarantine, and those that no proof lifts.
    fn check_no_disproved_quarantine(&self) -> CheckResult {
        for file in &self.model.oracle.files {
            for quarantined in file.quarantine.iter().filter(|quarantined| !quarantined.lasts) {
                let mut aliases = self.model.oracle.aliases(file.id, quarantined.range);
                let ledger = &self.model.shadow_ledger;
                let doubt =
                    aliases.any(|(_, iova)| ledger.unsettled(iova).is_some() || ledger.is_uncertain(iova));
                if !doubt {
                    broken!(6, "{quarantined:?} of {:?} is not in doubt, but still in quarantine", file.id);
                }
            }
        }
        Ok(())
    }

    /// Checks that every range in doubt is in quarantine: no invalidation is clearing it any more.
    fn check_doubt_is_quarantined(&self) -> CheckResult {
        for region in &self.model.oracle.regions {
            let id = region.spec.backing.file;
            let Some(file) = self.model.oracle.files.iter().find(|file| file.id == id) else { continue };
            for part in self.model.pages_in_doubt(id, region.pages()) {
                if !file.is_quarantined_or_released(part) {
                    broken!(
                        6,
                        "{part:?} of {id:?} is in doubt, but not in quarantine: {:?}",
                        file.quarantine
                    );
                }
            }
        }
        Ok(())
    }

    /// Checks that exactly the pages are mapped that are shared, in a region, and not excluded.
    fn check_wanted_is_mapped(&self) -> CheckResult {
        for bus in &self.executor.buses {
            let mapped: RangeSet<u64> =
                bus.sim.mappings().iter().map(|m| m.iova.start().0..m.iova.end().0).collect();
            let mut pages = 0;
            for region in self.model.oracle.regions.iter().filter(|region| region.stage == Stage::Live) {
                let Some(file) =
                    self.model.oracle.files.iter().find(|file| file.id == region.spec.backing.file)
                else {
                    continue;
                };
                for page in 0..region.spec.gpa.pages() {
                    let wanted = file.is_wanted(region.spec.backing.offset.0 / PAGE + page);
                    let iova = region.spec.gpa.start().0 + page * PAGE;
                    if wanted != mapped.contains(&iova) {
                        broken!(
                            3,
                            "{:?}: {iova:#x} should be mapped: {wanted}, is mapped: {}",
                            bus.id,
                            !wanted
                        );
                    }
                    pages += u64::from(wanted);
                }
            }
            // A region that could not be closed in time may still be mapped, in quarantine or until its owner tries again.
            for region in self.model.oracle.regions.iter().filter(|region| region.stage == Stage::Closing) {
                let iova = region.spec.gpa.start().0..region.spec.gpa.end().0;
                let remaining =
                    mapped.overlapping(&iova).map(|m| m.end.min(iova.end) - m.start.max(iova.start));
                let remaining = remaining.sum::<u64>() / PAGE;
                if remaining > 0 && !self.clients.contains(&region.owner) {
                    broken!(
                        8,
                        "{:?} still maps {remaining} pages of {region:?}, whose owner is gone",
                        bus.id
                    );
                }
                pages += remaining;
            }
            let bytes: u64 = mapped.iter().map(|range| range.end - range.start).sum();
            if bytes != pages * PAGE {
                broken!(1, "{:?} maps {bytes} bytes, {} should be mapped", bus.id, pages * PAGE);
            }
        }
        Ok(())
    }

    /// Ends every conversion, removes every region and disconnects every client. Then nothing may remain but quarantine.
    pub fn drain(&mut self) -> CheckResult {
        for round in 0..4 {
            self.executor.tasks.iter_mut().for_each(|task| task.hangs = false);
            for domain in 0..self.executor.buses.len() {
                self.flush(domain as u8, true);
            }
            self.settle()?;
            while let Some(Reverse((at, ..))) = self.timers.peek().copied() {
                self.advance(at.saturating_sub(self.clock))?;
                self.settle()?;
            }
            while self.model.oracle.open.iter().any(|open| open.phase == Phase::Granted) {
                self.end(0, Outcome::Committed, false)?;
                self.settle()?;
            }
            let regions: Vec<(RegionId, ClientId)> =
                self.model.oracle.regions.iter().map(|region| (region.id, region.owner)).collect();
            for (region, owner) in regions {
                if self.clients.contains(&owner) {
                    let caller = self.caller(owner);
                    self.feed(Event::RemoveRegion { caller, region })?;
                }
            }
            self.settle()?;
            if round == 2 {
                for client in self.clients {
                    self.feed(Event::ClientGone { client })?;
                }
            }
        }
        self.check_nothing_remains()
    }

    fn check_nothing_remains(&mut self) -> CheckResult {
        self.model.check_all_answered()?;
        if let Some(open) = self.model.oracle.open.first() {
            broken!(4, "{open:?} is still open");
        }
        if let Some((id, verdict)) = self.model.verdicts.first_key_value() {
            broken!(4, "{verdict:?} of {id:?} has no receipt");
        }
        for region in &self.model.oracle.regions {
            if self.model.shadow_ledger.unproved(region.iova()).is_none() {
                broken!(8, "{region:?} is clear, but was not closed");
            }
            if self.model.clean {
                broken!(8, "{region:?} remains, though nothing failed");
            }
        }
        for death in &self.model.deaths {
            if !self.model.oracle.regions.iter().any(|region| region.owner == death.client) {
                broken!(8, "{:?} has no region any more, but no notice reports it as closed", death.client);
            }
        }
        for bus in &self.executor.buses {
            for mapping in bus.sim.mappings() {
                let file = self.model.oracle.files.iter().find(|file| file.key == mapping.file);
                if !file.is_some_and(|file| file.is_fully_quarantined(mapping.pages())) {
                    broken!(2, "{:?} still maps {mapping:?}, which is not in quarantine", bus.id);
                }
            }
        }
        for file in &self.model.oracle.files {
            let needed = self.model.oracle.regions.iter().any(|region| region.spec.backing.file == file.id);
            if file.in_use && !needed && file.quarantine.is_empty() {
                broken!(8, "{:?} was never forgotten", file.id);
            }
        }
        for (id, device) in &self.model.shadow_ledger.devices {
            let settled = self
                .model
                .shadow_ledger
                .domains
                .get(&device.domain)
                .is_some_and(|d| d.is_settled_everywhere());
            if settled
                && self.model.deaths.is_empty()
                && (device.fenced.is_some() || device.state_uncertain)
                && !device.lost
            {
                broken!(2, "{id:?} was never attached again: {device:?}");
            }
            if settled && self.model.deaths.is_empty() && !device.lost && !self.executor.runs(*id) {
                broken!(4, "{id:?} does not run, although the ledger has it running: {device:?}");
            }
        }
        Ok(())
    }
}
