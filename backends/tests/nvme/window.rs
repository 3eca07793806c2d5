//! What the gate takes away is not touched any more, and what it must not wait for it does not wait for.

use std::sync::mpsc::{self, Receiver};
use std::thread::Scope;

use passgate_backends::nvme::sim::{Does, When, opcode};
use passgate_backends::window::Entered;
use passgate_backends::{Device, FenceStep, Unmap};
use rustix::io::Errno;

use super::*;

/// Does it on a thread of its own.
fn aside<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    what: impl FnOnce() -> T + Send + 'scope,
) -> Receiver<T> {
    let (tell, told) = mpsc::channel();
    scope.spawn(move || tell.send(what()));
    told
}

/// Waits until a page is closed: whoever closes it may not have begun. No owner has this place in the window.
fn await_closed(bench: &Bench, nth: u64) {
    const PLACE: usize = 100;
    let (window, begun) = (bench.drive().window(), Instant::now());
    while window.enter(PLACE, &page(nth)) != Entered::Closed {
        window.leave(PLACE);
        assert!(begun.elapsed() < LONG, "page {nth} stays open");
        std::thread::yield_now();
    }
}

#[test]
fn a_closed_page_is_not_touched() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    bench.map(1, 4);
    for segments in [&page(0)[..], &[page(1), page(5)].concat()] {
        let blocks = segments.len() as u32 * 8;
        assert_eq!(owner.submit(1, read(0, blocks), segments), Submitted::Closed);
    }
    assert_eq!((bench.sim.taken(), bench.sim.dma_faults(), owner.queue.in_flight()), (0, 0, 0));
    assert!(bench.drive().window().idle());
    assert_eq!(owner.run(read(0, 8), &page(1)), Ok(()));
    bench.map(5, 1);
    assert_eq!(owner.run(read(0, 16), &[page(1), page(5)].concat()), Ok(()));
}

#[test]
fn an_unmap_waits_for_what_touches_its_pages_and_for_nothing_else() {
    let bench = Bench::patient(Options::default(), 1);
    let windowed = patient(&bench);
    let mut owner = bench.owner(0);
    assert_eq!(windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    bench.map(0, 4);
    bench.map(4, 4);
    let expected = pattern(5, PAGE as usize);
    bench.sim.medium().write(0, &expected);
    bench.sim.fault(When::io(opcode::READ), Does::HoldData);
    owner.start(1, read(0, 8), &page(3));
    assert!(bench.sim.await_held(1, LONG));
    std::thread::scope(|scope| {
        assert_eq!(windowed.unmap(pages_at(4, 4)), Unmap::Gone { bytes: 4 * PAGE });
        assert!(windowed.may_wait(pages_at(0, 4)));
        let gone = aside(scope, || windowed.unmap(pages_at(0, 4)));
        await_closed(&bench, 3);
        assert!(gone.recv_timeout(SHORT).is_err(), "it did not wait for the read");
        assert_eq!(owner.submit(2, read(0, 8), &page(0)), Submitted::Closed);
        assert_eq!(bench.domain.mapping_count(), mappings(&bench, 1));
        assert_eq!(bench.sim.release(), 1);
        assert_eq!(owner.result(1), Ok(()));
        assert_eq!(gone.recv_timeout(LONG), Ok(Unmap::Gone { bytes: 4 * PAGE }));
    });
    assert_eq!(bench.seen(&page(3)), expected, "the read was late");
    assert_eq!(bench.sim.dma_faults(), 0);
}

/// The domain, whose unmaps wait as long as it takes.
fn patient(bench: &Bench) -> Windowed {
    let window = Arc::clone(bench.drive().window());
    Windowed::new(Arc::new(bench.domain.clone()), window).with_patience(LONG)
}

/// Mappings, beside those of the driver's own memory, which are two.
fn mappings(bench: &Bench, of_the_guest: u64) -> u64 {
    let own = bench.domain.mappings().iter().filter(|mapping| mapping.iova.start().0 >= 0xfec0_0000).count();
    assert_eq!(own, 2);
    own as u64 + of_the_guest
}

#[test]
fn an_unmap_that_waits_too_long_takes_nothing() {
    let bench = Bench::patient(Options::default(), 1);
    let mut owner = bench.owner(0);
    let expected = pattern(5, PAGE as usize);
    bench.sim.medium().write(0, &expected);
    bench.sim.fault(When::any(), Does::HoldData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_held(1, LONG));
    let all = pages_at(0, PAGES);
    assert_eq!(bench.windowed.unmap(all), Unmap::Failed { errno: Errno::BUSY, bytes: 0 });
    assert_eq!(owner.submit(2, read(0, 8), &page(9)), Submitted::Closed, "it stays closed");
    bench.sim.release();
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(bench.seen(&page(0)), expected);
    assert_eq!(bench.windowed.unmap(all), Unmap::Gone { bytes: PAGES * PAGE });
    assert_eq!(bench.sim.dma_faults(), 0);
}

#[test]
fn a_drain_ends_what_is_in_flight_and_nothing_starts_before_the_attach() {
    let bench = Bench::patient(Options::default(), 2);
    let (mut one, mut two) = (bench.owner(0), bench.owner(1));
    bench.sim.fault(When::any().times(2), Does::HoldCompletion);
    one.start(1, write(0, 8), &page(0));
    two.start(1, Op::Flush, &[]);
    assert!(bench.sim.await_held(2, LONG));
    std::thread::scope(|scope| {
        // A drain waits 300 ms at most, and is asked for again where this machine was slower.
        let drained = aside(scope, || while bench.drive().fence(FenceStep::Drain).is_err() {});
        let begun = Instant::now();
        while !bench.drive().window().is_paused() {
            assert!(begun.elapsed() < LONG, "nothing is drained");
            std::thread::yield_now();
        }
        assert!(drained.recv_timeout(SHORT / 3).is_err(), "it did not wait");
        assert_eq!(one.submit(2, write(0, 8), &page(0)), Submitted::Closed);
        bench.sim.release();
        assert_eq!(one.result(1), Ok(()));
        assert!(drained.recv_timeout(SHORT / 3).is_err(), "it did not wait for the other queue");
        assert_eq!(two.result(1), Ok(()));
        drained.recv_timeout(LONG).unwrap();
    });
    let taken = bench.sim.taken();
    for tag in 2..20 {
        assert_eq!(one.submit(tag, write(0, 8), &page(0)), Submitted::Closed);
        assert_eq!(two.submit(tag, Op::Flush, &[]), Submitted::Closed);
    }
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (taken, 1), "something started while drained");
    bench.drive().attach().unwrap();
    assert_eq!(one.run(write(0, 8), &page(0)), Ok(()));
    assert_eq!(two.run(Op::Flush, &[]), Ok(()));
    assert_eq!(bench.sim.enabled(), 1, "a drain needs no reset");
}

#[test]
fn a_request_of_several_commands_is_in_the_window_until_the_last_has_ended() {
    let bench = Bench::patient(Options { mdts: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any().over(24..25), Does::HoldData);
    owner.start(1, read(0, 48), &[segment(0, 6 * PAGE as u32)]);
    assert!(bench.sim.await_taken(3, LONG) && bench.sim.await_held(1, LONG));
    std::thread::scope(|scope| {
        let all = pages_at(0, PAGES);
        let patient = patient(&bench);
        let gone = aside(scope, move || patient.unmap(all));
        await_closed(&bench, 0);
        owner.look();
        assert!(gone.recv_timeout(SHORT).is_err(), "a part of it is in flight");
        owner.look();
        assert!(owner.results.is_empty(), "it is not over");
        bench.sim.release();
        assert_eq!(owner.result(1), Ok(()));
        assert_eq!(gone.recv_timeout(LONG), Ok(Unmap::Gone { bytes: PAGES * PAGE }));
    });
    assert_eq!(bench.sim.dma_faults(), 0);
}
