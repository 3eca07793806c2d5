//! Kernel mappings are counted: what may yet be needed is reserved, no more, and not for longer.

use super::*;

fn policy() -> Policy {
    Policy { hitless: Hitless::Off, ..Policy::default() }
}

/// Mappings in use and reserved, by domain.
fn mappings(world: &World) -> Vec<(u64, u64)> {
    world.gate.snapshot().mappings.iter().map(|status| (status.used, status.reserved)).collect()
}

#[test]
fn room_of_a_conversion_is_given_back_in_every_domain() {
    let cuts = DomainCaps { cut: true, ..SPLITS };
    for outcome in [Outcome::Committed, Outcome::NotCommitted, Outcome::Unknown { errno: 5, offset: 0 }] {
        let mut world = World::new(policy(), &[cuts; 3]);
        world.add(0, 8, 0, 8);
        world.settle();
        let id = world.begin(&[(2, 1)], PageState::Private);
        world.settle();
        assert!(mappings(&world).iter().all(|(_, reserved)| *reserved > 0), "{:?}", mappings(&world));
        world.end(id, outcome);
        world.settle();
        let used = if outcome == Outcome::NotCommitted { 3 } else { 2 };
        assert_eq!(mappings(&world), [(used, 0); 3], "{outcome:?}");
    }
}

#[test]
fn memory_that_comes_during_a_conversion_has_room_for_what_waits_for_its_end() {
    let mut world = World::new(policy(), &[DomainCaps { max_mappings: 20, ..SPLITS }]);
    world.add(0, 8, 0, 1);
    world.settle();
    let id = world.begin(&[(0, 4)], PageState::Private);
    world.settle();
    // Four pages at each of the two places come back at the end. What is left is not enough for seven more.
    for (page, count, offset) in [(64, 8, 0), (128, 7, 16)] {
        world.add(page, count, offset, 1);
        world.settle();
    }
    world.end(id, Outcome::NotCommitted);
    world.settle();
    assert_eq!(world.map_failures(), Vec::<&Effect>::new());
    assert_eq!(world.live(0), [(0, 8), (64, 8)]);
}

#[test]
fn region_cut_by_a_conversion_while_it_is_added_keeps_room_for_the_parts_beside_it() {
    let mut world = World::new(policy(), &[DomainCaps { max_mappings: 5, ..SPLITS }]);
    world.gate.set_call_limits(CallLimits { call_bytes: 8 * PAGE, close_calls: 2 });
    world.add(0, 16, 0, 8);
    // The first eight pages are being mapped. Of the others one is mapped by itself now, and two parts wait for their turn.
    let id = world.begin(&[(11, 1)], PageState::Shared);
    world.end(id, Outcome::Committed);
    assert_eq!(mappings(&world), [(2, 2)], "in use and reserved");
    world.settle();
    assert_eq!(world.map_failures(), Vec::<&Effect>::new());
    assert_eq!(world.live(0), [(0, 16)]);
    assert_eq!(mappings(&world), [(4, 0)]);
}

#[test]
fn mapping_split_often_is_mapped_by_page_only_where_there_is_room() {
    for (max_mappings, by_page) in [(10_000, true), (400, false), (64, false)] {
        let mut world = World::new(policy(), &[DomainCaps { max_mappings, ..SPLITS }]);
        world.add(0, 512, 0, 512);
        world.settle();
        let mut live = vec![(0, 512)];
        for page in (100..200).step_by(20) {
            world.convert(page, PageState::Private);
            let (first, count) = live.pop().unwrap();
            live.extend([(first, page - first), (page + 1, first + count - page - 1)]);
            assert_eq!(world.live(0), live, "of {max_mappings}");
        }
        assert_eq!(world.map_failures(), Vec::<&Effect>::new());
        assert_eq!(mappings(&world)[0].0 > 64, by_page, "{:?} of {max_mappings}", mappings(&world));
    }
}

#[test]
fn nothing_is_merged_while_a_conversion_waits_for_another_domain() {
    let mut world = World::new(policy(), &[SPLITS; 2]);
    world.add(0, 8, 0, 8);
    world.add(64, 8, 64, 1);
    world.settle();
    for to in [PageState::Private, PageState::Shared] {
        world.convert(2, to);
    }
    assert_eq!(mappings(&world), [(3 + 8, 0); 2]);
    world.begin(&[(66, 1)], PageState::Private);
    for domain in [0, 1] {
        let of = |call: &Effect| matches!(call, Effect::Unmap { domain: at, .. } if at.0 == domain);
        let unmap = world.take(of).unwrap();
        world.succeeds(&unmap);
        if domain == 0 {
            (0..4).for_each(|_| world.tell(Event::Quiet));
            assert_eq!(world.calls.len(), 1, "{:?}", world.calls);
        }
    }
    for _ in 0..4 {
        world.tell(Event::Quiet);
        world.settle();
    }
    assert!(mappings(&world).iter().all(|(used, _)| *used == 1 + 7), "{:?}", mappings(&world));
}
