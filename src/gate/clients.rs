//! Clients that are treated apart: those that are gone and still have regions to close, and those that cannot be refused.
//!
//! A vhost-user front-end that takes memory away waits for the reply and then does with the pages what it likes: its
//! protocol has no words for "not yet" or "never". So whatever such a client removes, or leaves behind, is unmapped by every
//! means, a reset of its devices too, however far policy goes otherwise. For what others ask, policy stays as it is.

use std::collections::BTreeSet;

use passgate_backends::Steps;

use super::ids::ClientId;
use super::invalidations::{CloseCause, Invalidation, Purpose};
use super::policy::OnStuckDma;

/// The clients that are treated apart.
#[derive(Debug, Default)]
pub(super) struct Clients {
    /// Those that are gone and still have regions to close, in the order in which they went.
    leaving: Vec<ClientId>,
    /// Those whose memory must be unmapped when they remove it.
    must_unmap: BTreeSet<ClientId>,
}

impl Clients {
    pub(super) fn is_leaving(&self, client: ClientId) -> bool {
        self.leaving.contains(&client)
    }

    /// The client is gone and has regions to close.
    pub(super) fn leaves(&mut self, client: ClientId) {
        self.leaving.push(client);
    }

    /// The client is gone, and so are all of its regions.
    pub(super) fn client_closed(&mut self, client: ClientId) {
        self.leaving.retain(|other| *other != client);
        self.must_unmap.remove(&client);
    }

    /// This client cannot be refused from now on.
    pub(super) fn set_must_unmap(&mut self, client: ClientId) {
        self.must_unmap.insert(client);
    }

    /// Returns the fences that an invalidation may ask for, where policy says `policy`.
    pub(super) fn allowed_fences(&self, inv: &Invalidation, policy: OnStuckDma) -> Steps {
        let Purpose::Close(_, cause) = inv.purpose() else { return policy.allows() };
        if self.must_unmap.contains(&inv.receipt.caller.client) {
            return OnStuckDma::Reset.allows();
        }
        match cause {
            CloseCause::OwnerGone => policy.allows() | Steps::ALL_BUT_RESET,
            CloseCause::Removed(_) | CloseCause::AddFailed(..) => policy.allows(),
        }
    }
}

#[cfg(test)]
mod tests {
    use passgate_bindings::units::Offset;
    use passgate_bindings::words;
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
            let gate = Gate::new(Policy { on_stuck_dma: policy, ..Policy::default() }, words::private);
            let mut world = Self { gate, effects: Vec::new(), fences: Vec::new() };
            let (domain, device) = (DomainId(0), DeviceId(0));
            let caps = DomainCaps::new(1000, 1 << 30);
            let traits = DeviceTraits { ats: false, tdi: false, tolerant: false };
            world.tell(Event::DomainAdded { domain, caps });
            world.tell(Event::DeviceAdded { device, domain, steps: Steps::all(), traits });
            if insists {
                world.tell(Event::MustUnmap { client: CALLER.client });
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
    fn must_unmap_removal_climbs_to_reset_beyond_policy() {
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
    fn must_unmap_client_that_is_gone_is_unmapped_and_forgotten() {
        for insists in [false, true] {
            let mut world = World::new(OnStuckDma::Refuse, insists);
            world.tell(Event::ClientGone { client: CALLER.client });
            world.settle();
            assert_eq!(world.regions(), usize::from(!insists));
            assert!(world.gate.clients.must_unmap.is_empty());
        }
        let mut world = World::new(OnStuckDma::Refuse, true);
        let idle = ClientId(7);
        world.tell(Event::MustUnmap { client: idle });
        world.tell(Event::ClientGone { client: idle });
        assert!(!world.gate.clients.must_unmap.contains(&idle), "one that had nothing");
    }

    #[test]
    fn must_unmap_client_leaves_policy_of_other_clients_alone() {
        let mut world = World::new(OnStuckDma::Refuse, true);
        let (ranges, performer) = (PageRange::new(0, PAGE).unwrap().into(), Performer::Client);
        let caller = Caller { client: ClientId(2), ..CALLER };
        world.tell(Event::Begin { caller, ranges, to: PageState::Private, performer, deadline_ns: 1 << 40 });
        world.settle();
        assert_eq!(world.fences, [Step::Drain]);
    }
}
