//! The admission window in front of the driver: no DMA to closed pages, and an unmap waits for requests on its pages
//! only.

use std::sync::mpsc::{self, Receiver};
use std::thread::Scope;

use passgate_backends::window::Entered;
use passgate_backends::{Device, Step, Unmap};
use passgate_sim::nvme::{CommandFilter, FaultAction, opcode};
use rustix::io::Errno;

use super::*;

/// Calls `what` on a thread of its own; the result is sent to the receiver.
fn spawn_in<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    what: impl FnOnce() -> T + Send + 'scope,
) -> Receiver<T> {
    let (sender, receiver) = mpsc::channel();
    scope.spawn(move || sender.send(what()));
    receiver
}

/// Waits until a page is closed, which an unmap on another thread does at its beginning. Uses a window slot that no
/// owner has.
fn await_closed(bench: &Bench, nth: u64) {
    const UNUSED_SLOT: usize = 100;
    let (window, begun) = (bench.drive().window(), Instant::now());
    while window.enter(UNUSED_SLOT, &page(nth)) != Entered::Closed {
        window.leave(UNUSED_SLOT);
        assert!(begun.elapsed() < TIMEOUT, "page {nth} stays open");
        std::thread::yield_now();
    }
}

#[test]
fn closed_page_is_not_accessed() {
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
fn unmap_waits_only_for_requests_on_its_pages() {
    let bench = Bench::without_deadline(Options::default(), 1);
    let windowed = waiting_domain(&bench);
    let mut owner = bench.owner(0);
    assert_eq!(windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    bench.map(0, 4);
    bench.map(4, 4);
    let expected = pattern(5, PAGE as usize);
    bench.sim.medium().write(0, &expected);
    bench.sim.fault(CommandFilter::io(opcode::READ), FaultAction::StallData);
    owner.start(1, read(0, 8), &page(3));
    assert!(bench.sim.await_stalled(1, TIMEOUT));
    std::thread::scope(|scope| {
        assert_eq!(windowed.unmap(pages_at(4, 4)), Unmap::Gone { bytes: 4 * PAGE });
        assert!(windowed.may_wait(pages_at(0, 4)));
        let gone = spawn_in(scope, || windowed.unmap(pages_at(0, 4)));
        await_closed(&bench, 3);
        assert!(gone.recv_timeout(SETTLE_TIME).is_err(), "the unmap did not wait for the read");
        assert_eq!(owner.submit(2, read(0, 8), &page(0)), Submitted::Closed);
        assert_eq!(bench.domain.mapping_count(), mappings(&bench, 1));
        assert_eq!(bench.sim.release(), 1);
        assert_eq!(owner.result(1), Ok(()));
        assert_eq!(gone.recv_timeout(TIMEOUT), Ok(Unmap::Gone { bytes: 4 * PAGE }));
    });
    assert_eq!(bench.read_memory(&page(3)), expected, "the data of the read has not arrived");
    assert_eq!(bench.sim.dma_faults(), 0);
}

/// Returns the domain behind the window, with unmaps that wait as long as it takes.
fn waiting_domain(bench: &Bench) -> Windowed {
    let window = Arc::clone(bench.drive().window());
    Windowed::new(Arc::new(bench.domain.clone()), window).with_timeout(TIMEOUT)
}

/// Returns the expected number of mappings: those of the guest, and two for the driver's own memory.
fn mappings(bench: &Bench, of_the_guest: u64) -> u64 {
    let own = bench.domain.mappings().iter().filter(|mapping| mapping.iova.start().0 >= 0xfec0_0000).count();
    assert_eq!(own, 2);
    own as u64 + of_the_guest
}

#[test]
fn unmap_that_times_out_unmaps_nothing() {
    let bench = Bench::without_deadline(Options::default(), 1);
    let mut owner = bench.owner(0);
    let expected = pattern(5, PAGE as usize);
    bench.sim.medium().write(0, &expected);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_stalled(1, TIMEOUT));
    let all = pages_at(0, PAGES);
    assert_eq!(bench.windowed.unmap(all), Unmap::Failed { errno: Errno::BUSY, bytes: 0 });
    assert_eq!(owner.submit(2, read(0, 8), &page(9)), Submitted::Closed, "the page stays closed");
    bench.sim.release();
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(bench.read_memory(&page(0)), expected);
    assert_eq!(bench.windowed.unmap(all), Unmap::Gone { bytes: PAGES * PAGE });
    assert_eq!(bench.sim.dma_faults(), 0);
}

#[test]
fn drain_waits_for_requests_in_flight_and_admits_none_before_attach() {
    let bench = Bench::without_deadline(Options::default(), 2);
    let (mut one, mut two) = (bench.owner(0), bench.owner(1));
    bench.sim.fault(CommandFilter::any().times(2), FaultAction::StallCompletion);
    one.start(1, write(0, 8), &page(0));
    two.start(1, Op::Flush, &[]);
    assert!(bench.sim.await_stalled(2, TIMEOUT));
    std::thread::scope(|scope| {
        // A drain waits 300 ms at most; it is repeated on a slow machine.
        let drained = spawn_in(scope, || while bench.drive().fence(Step::Drain).is_err() {});
        let begun = Instant::now();
        while !bench.drive().window().is_paused() {
            assert!(begun.elapsed() < TIMEOUT, "no drain has begun");
            std::thread::yield_now();
        }
        assert!(drained.recv_timeout(SETTLE_TIME / 3).is_err(), "the drain did not wait");
        assert_eq!(one.submit(2, write(0, 8), &page(0)), Submitted::Closed);
        bench.sim.release();
        assert_eq!(one.result(1), Ok(()));
        assert!(drained.recv_timeout(SETTLE_TIME / 3).is_err(), "the drain did not wait for the other queue");
        assert_eq!(two.result(1), Ok(()));
        drained.recv_timeout(TIMEOUT).unwrap();
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
fn request_stays_in_the_window_until_its_last_command_completes() {
    let bench = Bench::without_deadline(Options { mdts: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any().over(24..25), FaultAction::StallData);
    owner.start(1, read(0, 48), &[segment(0, 6 * PAGE as u32)]);
    assert!(bench.sim.await_taken(3, TIMEOUT) && bench.sim.await_stalled(1, TIMEOUT));
    std::thread::scope(|scope| {
        let all = pages_at(0, PAGES);
        let waiting_domain = waiting_domain(&bench);
        let gone = spawn_in(scope, move || waiting_domain.unmap(all));
        await_closed(&bench, 0);
        owner.reap();
        assert!(gone.recv_timeout(SETTLE_TIME).is_err(), "the unmap did not wait for the last command");
        owner.reap();
        assert!(owner.results.is_empty(), "the request has not ended");
        bench.sim.release();
        assert_eq!(owner.result(1), Ok(()));
        assert_eq!(gone.recv_timeout(TIMEOUT), Ok(Unmap::Gone { bytes: PAGES * PAGE }));
    });
    assert_eq!(bench.sim.dma_faults(), 0);
}
