//! What each [`Action`] is, done to a world.

use passgate::gate::{
    Backing, ClientId, Event, FileId, InvalidationId, Outcome, PageState, Performer, Ranges, RegionId,
    RegionSpec,
};
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::{MARK, World};
use crate::action::{AUTO, Action, CLIENTS, FILE_PAGES, FILES};
use crate::truth::{Kept, Open, Phase, Region, Stage, broken};

impl World {
    /// Makes one thing happen.
    pub fn apply(&mut self, action: &Action) -> Kept {
        self.note(|| format!("-- {action:?}"));
        match action.clone() {
            Action::Add { client, gpa, pages, file, offset, piece, initial, writable } => {
                let offset = u64::from(offset) % FILE_PAGES;
                let pages = u64::from(pages).clamp(1, FILE_PAGES - offset);
                let files: Vec<FileId> = self.hands.files.keys().copied().collect();
                let file = files[file as usize % FILES];
                let gpa = PageRange::new(u64::from(gpa) * PAGE, pages * PAGE).expect("small numbers");
                let backing = Backing { file, offset: Offset(offset * PAGE) };
                let piece = if piece == AUTO { 0 } else { PAGE << (piece % 10) };
                let spec = RegionSpec { gpa, backing, writable, piece, page: PAGE, initial };
                let caller = self.caller(self.client(client));
                self.feed(Event::AddRegion { caller, spec })
            }
            Action::Remove { region, stranger } => {
                let regions = &self.model.truth.regions;
                let region = regions.get(region as usize % regions.len().max(1));
                let (id, owner) = region.map_or((RegionId(9999), ClientId(0)), |r| (r.id, r.owner));
                let other = self.client(id.0 as u8);
                let alive = self.clients.contains(&owner);
                let caller = self.caller(if stranger || !alive { other } else { owner });
                self.feed(Event::RemoveRegion { caller, region: id })
            }
            Action::Begin { client, region, page, pages, to, passgate, deadline_ns, batch } => {
                // Mostly of a region that stays; where there is none, of whatever is left.
                let stays = |r: &&Region| r.stage != Stage::Closing || region % 8 == 0;
                let regions: Vec<&Region> = self.model.truth.regions.iter().filter(stays).collect();
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
            Action::Touch { granted } => match self.granted(granted) {
                Some(open) => self.touch(&open),
                None => Ok(()),
            },
            Action::End { granted, outcome, stranger } => self.end(granted, outcome, stranger),
            Action::Insist { client } => self.feed(Event::Insists { client: self.client(client) }),
            Action::Gone { client } => {
                let slot = client as usize % CLIENTS;
                let gone = self.clients[slot];
                self.last_client += 1;
                self.clients[slot] = ClientId(self.last_client);
                let of_it = |open: &&Open| open.caller.client == gone && open.phase == Phase::Granted;
                let mine: Vec<_> = self.model.truth.open.iter().filter(of_it).map(|open| open.id).collect();
                for id in mine {
                    self.canaries_live(id)?;
                }
                self.feed(Event::ClientGone { client: gone })
            }
            Action::Work { task, deliver, fault } => match self.task(task) {
                Some(index) => self.work(index, deliver, fault),
                None => Ok(()),
            },
            Action::Hang { task, done } => match self.task(task) {
                Some(index) => {
                    if done {
                        self.hands.execute(index, None, &mut self.model.truth)?;
                    }
                    self.hands.tasks[index].hangs = true;
                    Ok(())
                }
                None => Ok(()),
            },
            Action::Boast { task } => {
                self.task(task).into_iter().for_each(|index| self.hands.boast(index));
                Ok(())
            }
            Action::Flush { domain, stuck } => {
                self.flush(domain, stuck);
                Ok(())
            }
            Action::Advance { ns } => self.advance(ns),
            Action::Settle => self.settle(),
            Action::Dma { domain, device, gpa } => self.dma(domain, device, Iova(u64::from(gpa) * PAGE)),
            Action::AddWild { client, gpa, len, file, offset, piece } => {
                let files: Vec<FileId> = self.hands.files.keys().copied().collect();
                // What is no range, or beyond the numbers of files, never gets past the border.
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
            Action::BeginWild { client, gpa, len, deadline_ns } => {
                let Ok(range) = PageRange::new(gpa, len) else { return Ok(()) };
                let caller = self.caller(self.client(client));
                let (to, performer) = (PageState::Private, Performer::Client);
                let ranges = range.into();
                self.feed(Event::Begin { caller, ranges, to, performer, deadline_ns })
            }
            Action::Guess { client, id, outcome } => {
                let caller = self.caller(self.client(client));
                self.feed(Event::End { caller, invalidation: InvalidationId(id), outcome })?;
                let caller = self.caller(self.client(client));
                self.feed(Event::RemoveRegion { caller, region: RegionId(id as u32) })
            }
            Action::Release { client, held, to } => {
                let all = || self.model.truth.files.iter().flat_map(|file| &file.quarantine);
                let since = all().nth(held as usize % all().count().max(1)).map(|held| held.since);
                since.map_or(Ok(()), |since| self.release(client, since, to))
            }
            Action::ReleaseWild { client, id, to } => self.release(client, InvalidationId(id), to),
            Action::Raw(event) => self.feed(event),
        }
    }

    /// A call that takes pages away together takes what lies between them along: whether a release of that is refused
    /// until the call is over is the gate's choice, and nobody asks.
    fn release(&mut self, client: u8, since: InvalidationId, to: PageState) -> Kept {
        let to =
            if self.model.under_way(since) && !self.model.reached(since) { PageState::Shared } else { to };
        let caller = self.caller(self.client(client));
        self.feed(Event::Release { caller, invalidation: since, to })
    }

    fn touch(&mut self, open: &Open) -> Kept {
        self.canaries_live(open.id)?;
        for (file, range) in &open.pages {
            self.hands.replace(*file, *range, open.id.0);
        }
        if let Some(open) = self.model.truth.open(open.id) {
            open.touched = true;
        }
        self.stamp(open.id);
        self.hands.look(&self.model.truth)
    }

    pub(super) fn end(&mut self, granted: u16, outcome: Outcome, stranger: bool) -> Kept {
        let Some(open) = self.granted(granted) else { return Ok(()) };
        if stranger {
            let other = self.client(open.id.0 as u8);
            let caller = self.caller(other);
            if other != open.caller.client {
                return self.feed(Event::End { caller, invalidation: open.id, outcome });
            }
        }
        let takes_away = matches!(open.to, PageState::Private | PageState::Hole);
        let outcome = match outcome {
            Outcome::NotCommitted if open.touched => Outcome::Committed,
            other => other,
        };
        if outcome == Outcome::Committed && takes_away && !open.touched {
            self.touch(&open)?;
        }
        self.canaries_live(open.id)?;
        let caller = self.caller(open.caller.client);
        self.feed(Event::End { caller, invalidation: open.id, outcome })
    }

    fn dma(&mut self, domain: u8, device: u8, iova: Iova) -> Kept {
        let bus = &self.hands.buses[domain as usize % self.hands.buses.len()];
        let Some((id, device)) = bus.devices.get(device as usize % bus.devices.len().max(1)) else {
            return Ok(());
        };
        let Some(seen) = device.dma(iova) else { return Ok(()) };
        let page = crate::truth::page_range(seen.offset.0 / PAGE);
        let file = self.model.truth.files.iter().find(|file| file.key == seen.file);
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
        if self.hands.memory.replaced_since(seen.file, page, seen.since) {
            broken!(1, "{id:?} reaches an old frame of {page:?} at {iova:?}");
        }
        if seen.writable {
            self.hands.memory.store(&seen, MARK);
        }
        Ok(())
    }
}
