//! Performs each [`Action`] on a world.

use passgate::gate::{
    Backing, ClientId, Event, FileId, InvalidationId, Outcome, PageState, Performer, Ranges, RegionId,
    RegionSpec,
};
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::{DMA_PATTERN, World};
use crate::action::{Action, CLIENTS, FILE_PAGES, FILES, PIECE_AUTO};
use crate::oracle::{CheckResult, Open, Phase, Region, Stage, broken};

impl World {
    /// Performs one action.
    pub fn apply(&mut self, action: &Action) -> CheckResult {
        self.trace_line(|| format!("-- {action:?}"));
        match action.clone() {
            Action::Add { client, gpa, pages, file, offset, piece, initial, writable } => {
                let offset = u64::from(offset) % FILE_PAGES;
                let pages = u64::from(pages).clamp(1, FILE_PAGES - offset);
                let files: Vec<FileId> = self.executor.files.keys().copied().collect();
                let file = files[file as usize % FILES];
                let gpa = PageRange::new(u64::from(gpa) * PAGE, pages * PAGE).expect("small numbers");
                let backing = Backing { file, offset: Offset(offset * PAGE) };
                let piece = if piece == PIECE_AUTO { 0 } else { PAGE << (piece % 10) };
                let spec = RegionSpec { gpa, backing, writable, piece, page: PAGE, initial };
                let caller = self.caller(self.client(client));
                self.feed(Event::AddRegion { caller, spec })
            }
            Action::Remove { region, by_other } => {
                let regions = &self.model.oracle.regions;
                let region = regions.get(region as usize % regions.len().max(1));
                let (id, owner) = region.map_or((RegionId(9999), ClientId(0)), |r| (r.id, r.owner));
                let other = self.client(id.0 as u8);
                let alive = self.clients.contains(&owner);
                let caller = self.caller(if by_other || !alive { other } else { owner });
                self.feed(Event::RemoveRegion { caller, region: id })
            }
            Action::Begin { client, region, page, pages, to, passgate, deadline_ns, batch } => {
                // Mostly of a region that is not being closed.
                let stays = |r: &&Region| r.stage != Stage::Closing || region % 8 == 0;
                let regions: Vec<&Region> = self.model.oracle.regions.iter().filter(stays).collect();
                let region = regions.get(region as usize % regions.len().max(1));
                let start = region.map_or(u64::from(page), |region| {
                    region.spec.gpa.start().0 / PAGE + u64::from(page) % region.spec.gpa.pages()
                });
                let pages = u64::from(pages.max(1));
                let range = |n: u64| PageRange::new((start + n * (pages + 1)) * PAGE, pages * PAGE).ok();
                let ranges: Option<Vec<_>> = (0..=u64::from(batch)).map(range).collect();
                let Some(ranges) = ranges.and_then(|ranges| Ranges::try_from(ranges).ok()) else {
                    return Ok(());
                };
                let performer = if passgate { Performer::Passgate } else { Performer::Client };
                let caller = self.caller(self.client(client));
                self.feed(Event::Begin { caller, ranges, to, performer, deadline_ns })
            }
            Action::Quiet => self.feed(Event::Quiet),
            Action::ChangePages { granted } => match self.granted(granted) {
                Some(open) => self.touch(&open),
                None => Ok(()),
            },
            Action::End { granted, outcome, by_other } => self.end(granted, outcome, by_other),
            Action::MustUnmap { client } => self.feed(Event::MustUnmap { client: self.client(client) }),
            Action::ClientGone { client } => {
                let slot = client as usize % CLIENTS;
                let gone = self.clients[slot];
                self.last_client += 1;
                self.clients[slot] = ClientId(self.last_client);
                let of_it = |open: &&Open| open.caller.client == gone && open.phase == Phase::Granted;
                let mine: Vec<_> = self.model.oracle.open.iter().filter(of_it).map(|open| open.id).collect();
                for id in mine {
                    self.check_canaries(id)?;
                }
                self.feed(Event::ClientGone { client: gone })
            }
            Action::RunTask { task, deliver, fault } => match self.task(task) {
                Some(index) => self.run_task(index, deliver, fault),
                None => Ok(()),
            },
            Action::HangTask { task, done } => match self.task(task) {
                Some(index) => {
                    if done {
                        self.executor.execute(index, None, &mut self.model.oracle)?;
                    }
                    self.executor.tasks[index].hangs = true;
                    Ok(())
                }
                None => Ok(()),
            },
            Action::OverreportUnmap { task } => {
                self.task(task).into_iter().for_each(|index| self.executor.overreport_unmap(index));
                Ok(())
            }
            Action::Flush { domain, stuck } => {
                self.flush(domain, stuck);
                Ok(())
            }
            Action::Advance { ns } => self.advance(ns),
            Action::Settle => self.settle(),
            Action::Dma { domain, device, gpa } => self.dma(domain, device, Iova(u64::from(gpa) * PAGE)),
            Action::AddExtreme { client, gpa, len, file, offset, piece } => {
                let files: Vec<FileId> = self.executor.files.keys().copied().collect();
                // The session refuses an invalid range before it reaches the gate.
                let (Ok(gpa), Ok(pages)) = (PageRange::new(gpa, len), PageRange::<Offset>::new(offset, len))
                else {
                    return Ok(());
                };
                let backing = Backing { file: files[file as usize % FILES], offset: pages.start() };
                let (initial, page) = (PageState::Shared, PAGE);
                let spec = RegionSpec { gpa, backing, writable: true, piece, page, initial };
                let caller = self.caller(self.client(client));
                self.feed(Event::AddRegion { caller, spec })
            }
            Action::BeginExtreme { client, gpa, len, deadline_ns } => {
                let Ok(range) = PageRange::new(gpa, len) else { return Ok(()) };
                let caller = self.caller(self.client(client));
                let (to, performer) = (PageState::Private, Performer::Client);
                let ranges = range.into();
                self.feed(Event::Begin { caller, ranges, to, performer, deadline_ns })
            }
            Action::EndMadeUp { client, id, outcome } => {
                let caller = self.caller(self.client(client));
                self.feed(Event::End { caller, invalidation: InvalidationId(id), outcome })?;
                let caller = self.caller(self.client(client));
                self.feed(Event::RemoveRegion { caller, region: RegionId(id as u32) })
            }
            Action::Release { client, quarantine, to } => {
                let all = || self.model.oracle.files.iter().flat_map(|file| &file.quarantine);
                let since = all()
                    .nth(quarantine as usize % all().count().max(1))
                    .map(|quarantined| quarantined.since);
                since.map_or(Ok(()), |since| self.release(client, since, to))
            }
            Action::ReleaseMadeUp { client, id, to } => self.release(client, InvalidationId(id), to),
            Action::Raw(event) => self.feed(event),
        }
    }

    /// Performs an operator's release. One call that unmaps several ranges also covers the gaps between them: the promises leave
    /// open whether a release of such a gap is refused until the call returns, so it is released as shared, which is never
    /// refused for that.
    fn release(&mut self, client: u8, since: InvalidationId, to: PageState) -> CheckResult {
        let to = if self.model.is_call_in_progress(since) && !self.model.is_reachable(since) {
            PageState::Shared
        } else {
            to
        };
        let caller = self.caller(self.client(client));
        self.feed(Event::Release { caller, invalidation: since, to })
    }

    fn touch(&mut self, open: &Open) -> CheckResult {
        self.check_canaries(open.id)?;
        for (file, range) in &open.pages {
            self.executor.replace_pages(*file, *range, open.id.0);
        }
        if let Some(open) = self.model.oracle.open(open.id) {
            open.changed = true;
        }
        self.write_canaries(open.id);
        self.executor.check_reachable(&self.model.oracle)
    }

    pub(super) fn end(&mut self, granted: u16, outcome: Outcome, by_other: bool) -> CheckResult {
        let Some(open) = self.granted(granted) else { return Ok(()) };
        if by_other {
            let other = self.client(open.id.0 as u8);
            let caller = self.caller(other);
            if other != open.caller.client {
                return self.feed(Event::End { caller, invalidation: open.id, outcome });
            }
        }
        let takes_away = matches!(open.to, PageState::Private | PageState::Hole);
        let outcome = match outcome {
            Outcome::NotCommitted if open.changed => Outcome::Committed,
            other => other,
        };
        if outcome == Outcome::Committed && takes_away && !open.changed {
            self.touch(&open)?;
        }
        self.check_canaries(open.id)?;
        let caller = self.caller(open.caller.client);
        self.feed(Event::End { caller, invalidation: open.id, outcome })
    }

    fn dma(&mut self, domain: u8, device: u8, iova: Iova) -> CheckResult {
        let bus = &self.executor.buses[domain as usize % self.executor.buses.len()];
        let Some((id, device)) = bus.devices.get(device as usize % bus.devices.len().max(1)) else {
            return Ok(());
        };
        let Some(seen) = device.dma(iova) else { return Ok(()) };
        let page = crate::oracle::page_range(seen.offset.0 / PAGE);
        let file = self.model.oracle.files.iter().find(|file| file.key == seen.file);
        if let Some(file) = file
            && file.first_forbidden(page).is_some()
        {
            broken!(
                1,
                "{id:?} reaches {page:?} of {:?} at {iova:?}: {}",
                file.id,
                file.describe(page.start().0 / PAGE)
            );
        }
        if self.executor.memory.replaced_since(seen.file, page, seen.since) {
            broken!(1, "{id:?} reaches an old frame of {page:?} at {iova:?}");
        }
        if seen.writable {
            self.executor.memory.store(&seen, DMA_PATTERN);
        }
        Ok(())
    }
}
