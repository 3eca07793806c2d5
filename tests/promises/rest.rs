//! How a world comes to rest: in between, and at its end, when nothing may be left.

use std::cmp::Reverse;

use passgate::gate::{ClientId, Event, Outcome, RegionId};
use passgate_bindings::PAGE;
use rangemap::RangeSet;

use super::World;
use crate::truth::{Kept, Phase, Stage, broken};

/// Calls after which a gate that comes to no rest never will.
const PATIENCE: usize = 100_000;

impl World {
    /// All calls return and all late flushes come; then everybody must have an answer, whatever is open.
    pub fn settle(&mut self) -> Kept {
        for _ in 0..PATIENCE {
            let next = (0..self.hands.tasks.len()).find(|index| {
                let task = &self.hands.tasks[*index];
                !task.hangs && (task.result.is_none() || self.hands.ripe(*index))
            });
            if let Some(index) = next {
                self.work(index, true, None)?;
                continue;
            }
            let flushed: usize = self.hands.buses.iter().map(|bus| bus.sim.flush()).sum();
            self.hands.collect();
            if flushed == 0 {
                return self.rested();
            }
        }
        broken!(4, "after {PATIENCE} calls the gate still wants more: {:?}", self.hands.tasks)
    }

    fn rested(&mut self) -> Kept {
        self.model.compare(&self.gate.snapshot())?;
        if !self.hands.idle() {
            return Ok(());
        }
        self.model.quiet()?;
        self.proof_has_freed()?;
        self.doubt_is_told()?;
        if self.model.clean && !self.model.map_failed { self.all_wanted_is_mapped() } else { Ok(()) }
    }

    /// What is in quarantine is in doubt, or the owner's doing.
    fn proof_has_freed(&self) -> Kept {
        for file in &self.model.truth.files {
            for held in file.quarantine.iter().filter(|held| !held.lasts) {
                let mut aliases = self.model.truth.aliases(file.id, held.range);
                let told = &self.model.told;
                let doubt = aliases.any(|(_, iova)| told.unsettled(iova).is_some() || told.shaken(iova));
                if !doubt {
                    broken!(6, "{held:?} of {:?} is in no doubt, and still in quarantine", file.id);
                }
            }
        }
        Ok(())
    }

    /// What is in doubt is in quarantine: nobody is at it any more.
    fn doubt_is_told(&self) -> Kept {
        for region in &self.model.truth.regions {
            let id = region.spec.backing.file;
            let Some(file) = self.model.truth.files.iter().find(|file| file.id == id) else { continue };
            for part in self.model.doubtful(id, region.pages()) {
                if !file.is_told(part) {
                    broken!(6, "{part:?} of {id:?} is in doubt, and nobody was told: {:?}", file.quarantine);
                }
            }
        }
        Ok(())
    }

    /// Devices see exactly what is shared, in a region, and held by nobody.
    fn all_wanted_is_mapped(&self) -> Kept {
        for bus in &self.hands.buses {
            let mapped: RangeSet<u64> =
                bus.sim.mappings().iter().map(|m| m.iova.start().0..m.iova.end().0).collect();
            let mut pages = 0;
            for region in self.model.truth.regions.iter().filter(|region| region.stage == Stage::Live) {
                let Some(file) =
                    self.model.truth.files.iter().find(|file| file.id == region.spec.backing.file)
                else {
                    continue;
                };
                for page in 0..region.spec.gpa.pages() {
                    let wanted = file.is_wanted(region.spec.backing.offset.0 / PAGE + page);
                    let iova = region.spec.gpa.start().0 + page * PAGE;
                    if wanted != mapped.contains(&iova) {
                        broken!(3, "{:?}: {iova:#x} is wanted: {wanted}, mapped: {}", bus.id, !wanted);
                    }
                    pages += u64::from(wanted);
                }
            }
            // What could not be closed in time may be there still, in quarantine or until its owner tries again.
            for region in self.model.truth.regions.iter().filter(|region| region.stage == Stage::Closing) {
                let iova = region.spec.gpa.start().0..region.spec.gpa.end().0;
                let left = mapped.overlapping(&iova).map(|m| m.end.min(iova.end) - m.start.max(iova.start));
                let left = left.sum::<u64>() / PAGE;
                if left > 0 && !self.clients.contains(&region.owner) {
                    broken!(8, "{:?} still maps {left} pages of {region:?}, whose owner is gone", bus.id);
                }
                pages += left;
            }
            let bytes: u64 = mapped.iter().map(|range| range.end - range.start).sum();
            if bytes != pages * PAGE {
                broken!(1, "{:?} maps {bytes} bytes, only {} are wanted", bus.id, pages * PAGE);
            }
        }
        Ok(())
    }

    /// Everything is ended, removed and let go of; then nothing may be left but what is in quarantine.
    pub fn drain(&mut self) -> Kept {
        for round in 0..4 {
            self.hands.tasks.iter_mut().for_each(|task| task.hangs = false);
            for domain in 0..self.hands.buses.len() {
                self.flush(domain as u8, true);
            }
            self.settle()?;
            while let Some(Reverse((at, ..))) = self.timers.peek().copied() {
                self.advance(at.saturating_sub(self.clock))?;
                self.settle()?;
            }
            while self.model.truth.open.iter().any(|open| open.phase == Phase::Granted) {
                self.end(0, Outcome::Committed, false)?;
                self.settle()?;
            }
            let regions: Vec<(RegionId, ClientId)> =
                self.model.truth.regions.iter().map(|region| (region.id, region.owner)).collect();
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
        self.nothing_is_left()
    }

    fn nothing_is_left(&mut self) -> Kept {
        self.model.quiet()?;
        if let Some(open) = self.model.truth.open.first() {
            broken!(4, "{open:?} is still open");
        }
        if let Some((id, said)) = self.model.said.first_key_value() {
            broken!(4, "{said:?} about {id:?} has no receipt");
        }
        for region in &self.model.truth.regions {
            if self.model.told.unproved(region.iova()).is_none() {
                broken!(8, "{region:?} is clear, and was not closed");
            }
            if self.model.clean {
                broken!(8, "{region:?} is left, though nothing failed");
            }
        }
        for death in &self.model.deaths {
            if !self.model.truth.regions.iter().any(|region| region.owner == death.client) {
                broken!(8, "nothing is left of {:?}, and no notice says so", death.client);
            }
        }
        for bus in &self.hands.buses {
            for mapping in bus.sim.mappings() {
                let file = self.model.truth.files.iter().find(|file| file.key == mapping.file);
                if !file.is_some_and(|file| file.quarantined_whole(mapping.pages())) {
                    broken!(2, "{:?} still maps {mapping:?}, and nobody remembers", bus.id);
                }
            }
        }
        for file in &self.model.truth.files {
            let needed = self.model.truth.regions.iter().any(|region| region.spec.backing.file == file.id);
            if file.held && !needed && file.quarantine.is_empty() {
                broken!(8, "{:?} was never let go of", file.id);
            }
        }
        for (id, device) in &self.model.told.devices {
            let settled = self.model.told.domains.get(&device.domain).is_some_and(|d| d.settled_everywhere());
            if settled
                && self.model.deaths.is_empty()
                && (device.fenced.is_some() || device.shaken)
                && !device.lost
            {
                broken!(2, "{id:?} was never brought back: {device:?}");
            }
            if settled && self.model.deaths.is_empty() && !device.lost && !self.hands.runs(*id) {
                broken!(4, "{id:?} stays out, and nobody knows: {device:?}");
            }
        }
        Ok(())
    }
}
