//! Clients that cannot be told no.
//!
//! A vhost-user front-end that takes memory away waits for the reply and then does with the pages what it likes: its
//! protocol has no words for "not yet" or "never". So whatever such a client removes, or leaves behind, goes whatever
//! that takes, a reset of its devices too, however far policy goes otherwise. For what others ask policy stays as it is.

use super::Gate;
use super::event::ClientId;
use super::fence::{OnStuckDma, Steps};
use super::invalidation::{After, Invalidation};

impl Gate {
    /// From now on this client cannot be told no.
    pub(super) fn insist(&mut self, client: ClientId) {
        self.insisting.insert(client);
    }

    /// The client is gone, and so is everything that it had.
    pub(super) fn insist_no_more(&mut self, client: ClientId) {
        self.insisting.remove(&client);
    }

    /// How far fences go for an invalidation of this kind.
    pub(super) fn allowed(&self, inv: &Invalidation) -> Steps {
        let policy = self.policy.on_stuck_dma.allows();
        match inv.after {
            After::Grant(_) | After::Merged(_) | After::Resumed => policy,
            _ if self.insisting.contains(&inv.receipt.caller.client) => OnStuckDma::Reset.allows(),
            After::Gone => policy.or(Steps::ALL_BUT_RESET),
            After::Removed(_) | After::AddFailed(..) => policy,
        }
    }
}

#[cfg(test)]
mod tests {
    use passgate_bindings::units::Offset;
    use passgate_bindings::{PAGE, PageRange};

    use super::super::*;

    const CALLER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };

    struct World {
        gate: Gate,
        effects: Effects,
        fences: Vec<Step>,
    }

    impl World {
        /// A client with a page of memory, and a device of which every fence but a reset does nothing.
        fn new(policy: OnStuckDma, insists: bool) -> Self {
            let gate = Gate::new(Policy { on_stuck_dma: policy, ..Policy::default() });
            let mut world = Self { gate, effects: Vec::new(), fences: Vec::new() };
            let (domain, device) = (DomainId(0), DeviceId(0));
            let able = Able { max_mappings: 1000, max_piece: 1 << 30, cut: false, replace: false };
            let nature = Nature { ats: false, tdi: false, tolerant: false };
            world.tell(Event::DomainAdded { domain, able });
            world.tell(Event::DeviceAdded { device, domain, steps: Steps::of(&Step::LADDER), nature });
            if insists {
                world.tell(Event::Insists { client: CALLER.client });
            }
            let backing = Backing { file: FileId { device: 1, inode: 1 }, offset: Offset(0) };
            let gpa = PageRange::new(0, PAGE).unwrap();
            let initial = PageState::Shared;
            let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
            world.tell(Event::AddRegion { caller: CALLER, spec });
            world.settle();
            world
        }

        fn tell(&mut self, event: Event) {
            self.gate.handle(event, &mut self.effects);
        }

        /// Every call returns; an unmap fails until the device was reset.
        fn settle(&mut self) {
            while let Some(effect) = self.effects.pop() {
                match effect {
                    Effect::Map { job, .. } => self.tell(Event::Mapped { job, result: MapResult::Mapped }),
                    Effect::Unmap { job, bytes, .. } => {
                        let result = match self.fences.contains(&Step::Reset) {
                            true => UnmapResult::Gone { bytes: bytes.unwrap() },
                            false => UnmapResult::Failed { errno: 16, bytes: 0 },
                        };
                        self.tell(Event::Unmapped { job, result, took_ns: 1 });
                    }
                    Effect::Fence { job, step, .. } => {
                        self.fences.push(step);
                        self.tell(Event::Fenced { job, errno: 0, took_ns: 1 });
                    }
                    Effect::Attach { job, .. } => self.tell(Event::Attached { job, errno: 0 }),
                    _ => {}
                }
            }
        }

        fn regions(&self) -> usize {
            self.gate.snapshot().regions.len()
        }
    }

    #[test]
    fn what_an_insisting_client_removes_goes_whatever_it_takes() {
        for policy in [OnStuckDma::Refuse, OnStuckDma::Fence, OnStuckDma::Reset] {
            for insists in [false, true] {
                let mut world = World::new(policy, insists);
                world.tell(Event::RemoveRegion { caller: CALLER, region: RegionId(1) });
                world.settle();
                let goes = insists || policy == OnStuckDma::Reset;
                assert_eq!(world.regions(), usize::from(!goes), "{policy:?}, insists: {insists}");
                assert_eq!(world.fences.contains(&Step::Reset), goes, "{policy:?}, insists: {insists}");
            }
        }
    }

    #[test]
    fn what_it_leaves_behind_goes_too_and_then_it_is_forgotten() {
        for insists in [false, true] {
            let mut world = World::new(OnStuckDma::Refuse, insists);
            world.tell(Event::ClientGone { client: CALLER.client });
            world.settle();
            assert_eq!(world.regions(), usize::from(!insists));
            assert!(world.gate.insisting.is_empty());
        }
        let mut world = World::new(OnStuckDma::Refuse, true);
        let idle = ClientId(7);
        world.tell(Event::Insists { client: idle });
        world.tell(Event::ClientGone { client: idle });
        assert!(!world.gate.insisting.contains(&idle), "one that had nothing");
    }

    #[test]
    fn what_others_ask_stays_within_policy() {
        let mut world = World::new(OnStuckDma::Refuse, true);
        let (ranges, performer) = (PageRange::new(0, PAGE).unwrap().into(), Performer::Client);
        let caller = Caller { client: ClientId(2), ..CALLER };
        world.tell(Event::Begin { caller, ranges, to: PageState::Private, performer, deadline_ns: 1 << 40 });
        world.settle();
        assert_eq!(world.fences, [Step::Drain]);
    }
}
