//! Fences that do not wait for anybody, and what becomes of what was under way.

use passgate_backends::iommu::sim::{Call, Fault as SimFault};
use passgate_backends::nvme::sim::{Does, Turn, When};
use passgate_backends::{Device, FenceStep, Unmap};
use rustix::io::Errno;

use super::interrupted::Interrupted;
use super::*;

pub(super) const STRONG: [FenceStep; 3] = [FenceStep::Master, FenceStep::Detach, FenceStep::Reset];

#[test]
fn what_was_under_way_is_done_again_where_its_pages_are_open_and_withheld_where_not() {
    for step in STRONG {
        let bench = Bench::patient(Options::default(), 1);
        let mut owner = bench.owner(0);
        assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
        bench.map(0, 2);
        bench.map(2, 2);
        bench.sim.fault(When::any().times(2), Does::HoldData);
        let expected = bench.fill(&page(0), 1);
        owner.start(1, write(0, 8), &page(0));
        owner.start(2, write(8, 8), &page(2));
        owner.start(3, Op::Flush, &[]);
        assert!(bench.sim.await_held(2, LONG));
        bench.drive().fence(step).unwrap();
        assert_eq!(bench.windowed.unmap(pages_at(2, 2)), Unmap::Gone { bytes: 2 * PAGE }, "{step:?}");
        assert_eq!(owner.submit(4, Op::Flush, &[]), Submitted::Closed);
        bench.drive().attach().unwrap();
        assert_eq!((owner.result(1), owner.result(3)), (Ok(()), Ok(())), "{step:?}");
        assert_eq!(owner.result(2), Err(Fault::Withheld), "{step:?}");
        assert_eq!(bench.sim.medium().read(0, 8), expected);
        assert_eq!(bench.sim.medium().read(8, 8), vec![0; PAGE as usize]);
        assert_eq!(owner.submit(2, write(8, 8), &page(2)), Submitted::Closed);
        bench.map(2, 2);
        assert_eq!(owner.run(write(8, 8), &page(2)), Ok(()));
        assert_eq!(bench.sim.dma_faults(), 0, "{step:?}");
    }
}

#[test]
fn no_number_of_fences_makes_a_request_fail() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    let bytes = bench.fill(&page(0), 7);
    bench.sim.fault(When::any().always(), Does::HoldData);
    owner.start(1, write(0, 8), &page(0));
    for (round, step) in STRONG.into_iter().cycle().take(7).enumerate() {
        assert!(bench.sim.await_taken(round as u64 + 1, LONG));
        bench.drive().fence(step).unwrap();
        owner.look(); // it parks
        bench.drive().attach().unwrap();
        if round == 6 {
            bench.sim.behave();
        }
        owner.look();
        assert!(round == 6 || owner.results.is_empty(), "after {} fences: {:?}", round + 1, owner.results);
    }
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(bench.sim.medium().read(0, 8), bytes);
}

/// How long something takes that waits for nobody: on a machine that is busy not every time, but in one of three.
fn is_at_once(step: FenceStep, limit: Duration, does: impl Fn(FenceStep) -> Duration) {
    let took = (0..3).map(|_| does(step)).find(|took| *took < limit);
    assert!(took.is_some(), "{step:?} takes longer than {limit:?} every time");
}

#[test]
fn a_fence_waits_for_no_owner() {
    let fence = |step| {
        let bench = Bench::patient(Options::default(), 2);
        let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
        bench.sim.fault(When::any().times(2), Does::HoldData);
        owner.start(1, read(0, 8), &page(0));
        other.start(1, read(0, 8), &page(9));
        assert!(bench.sim.await_held(2, LONG));
        // Nobody looks at either queue from here on.
        let begun = Instant::now();
        bench.drive().fence(step).unwrap();
        assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
        let took = begun.elapsed();
        // Nor does an owner begin who was about to when it came.
        assert!(bench.drive().window().is_paused(), "{step:?}");
        bench.sim.release();
        assert!(!bench.sim.await_taken(3, SHORT));
        assert_eq!(bench.seen(&page(0)), vec![0; PAGE as usize], "{step:?}");
        took
    };
    STRONG.into_iter().for_each(|step| is_at_once(step, Duration::from_secs(1), fence));
}

/// What was in flight counts no more once it is proved that the device does no DMA, and not before.
#[test]
fn fence_that_fails_leaves_what_is_in_flight_in_the_window() {
    for step in STRONG {
        let bench = Bench::patient(Options::default(), 1);
        let mut owner = bench.owner(0);
        bench.sim.fault(When::any(), Does::HoldData);
        owner.start(1, read(0, 8), &page(0));
        assert!(bench.sim.await_held(1, LONG));
        bench.domain.fail_next(Call::Fence, SimFault::Errno(Errno::IO));
        assert!(bench.drive().fence(step).is_err());
        let busy = Unmap::Failed { errno: Errno::BUSY, bytes: 0 };
        assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), busy, "{step:?} has proved nothing");
        bench.drive().fence(step).unwrap();
        assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    }
}

#[test]
fn an_attach_that_fails_leaves_the_drive_fenced_and_the_next_one_brings_it_back() {
    let bench = Bench::new(Options { patience: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::HoldData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_held(1, LONG));
    bench.drive().fence(FenceStep::Detach).unwrap();
    owner.look();
    (0..3).for_each(|_| bench.sim.next_enable(Turn::Fatal));
    assert!(bench.drive().attach().is_err());
    assert_eq!(owner.submit(2, read(0, 8), &page(0)), Submitted::Closed);
    assert!(bench.drive().window().is_paused(), "an owner who was about to begin would be let in");
    assert!(owner.results.is_empty());
    bench.drive().attach().unwrap();
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(owner.run(read(0, 8), &page(0)), Ok(()));
}

#[test]
fn nothing_stays_for_ever_with_a_drive_that_is_not_attached_again() {
    let bench = Bench::new(Options { patience: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::HoldData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_held(1, LONG));
    bench.drive().fence(FenceStep::Detach).unwrap();
    owner.look();
    (0..3).for_each(|_| bench.sim.next_enable(Turn::Fatal));
    assert!(bench.drive().attach().is_err(), "not by this one either");
    let begun = Instant::now();
    while owner.results.is_empty() {
        assert!(begun.elapsed() < LONG, "it stays");
        owner.sleep();
    }
    assert_eq!(owner.result(1), Err(Fault::Withheld));
    assert_eq!(owner.queue.in_flight(), 0);
}

#[test]
fn a_drive_that_is_pulled_out_while_fenced_is_lost_at_the_attach() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::HoldData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_held(1, LONG));
    bench.drive().fence(FenceStep::Detach).unwrap();
    owner.look();
    bench.sim.vanish();
    assert!(bench.drive().attach().is_err());
    assert_eq!(owner.result(1), Err(Fault::Lost));
    assert_eq!(owner.submit(2, read(0, 8), &page(0)), Submitted::Lost);
}

#[test]
fn a_queue_that_is_given_back_with_something_in_it_keeps_the_pages_until_a_fence() {
    let bench = Bench::patient(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::HoldData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_held(1, LONG));
    drop(owner);
    // The next owner's requests would take the place of those in the window.
    assert!(bench.drive().take_queue(0).is_err(), "it is taken over with something in flight");
    assert!(matches!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Failed { .. }));
    bench.drive().fence(FenceStep::Master).unwrap();
    assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    bench.sim.release();
    assert_eq!(bench.seen(&page(0)), vec![0; PAGE as usize]);
}

#[test]
fn a_fence_in_the_middle_of_a_recovery_is_no_reason_to_give_the_drive_up() {
    let fence_and_attach = |step| {
        let bench = Bench::new(Options::default(), 1);
        let mut owner = bench.owner(0);
        bench.sim.fault(When::any(), Does::HoldData);
        let expected = bench.fill(&page(0), 1);
        owner.start(1, write(0, 8), &page(0));
        assert!(bench.sim.await_held(1, LONG));
        bench.sim.next_disable(Turn::After(SHORT));
        bench.sim.fail();
        // It is being reset once CC.EN is clear.
        while bench.sim.registers().get(0x14).unwrap() & 1 != 0 {
            owner.wait();
        }
        let begun = Instant::now();
        bench.drive().fence(step).unwrap();
        assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
        let fenced = begun.elapsed();
        bench.map(0, PAGES);
        let attached = std::thread::scope(|scope| {
            // It waits for the recovery to come to its end, which is soon.
            let attached = scope.spawn(|| bench.drive().attach().map(|()| begun.elapsed()));
            assert_eq!(owner.result(1), Ok(()), "{step:?}");
            attached.join().unwrap().unwrap()
        });
        assert_eq!(bench.sim.medium().read(0, 8), expected);
        // A fence has half of the time.
        attached.max(2 * fenced)
    };
    STRONG.into_iter().for_each(|step| is_at_once(step, Duration::from_secs(2), fence_and_attach));
}

/// The next owner's commands are the first of a queue that the controller has anew.
#[test]
fn queue_that_was_given_back_before_a_reset_begins_anew_after_it() {
    for step in STRONG {
        let bench = Bench::patient(Options::default(), 1);
        let mut first = bench.owner(0);
        for nth in 0..3 {
            assert_eq!(first.run(write(nth * 8, 8), &page(nth)), Ok(()));
        }
        drop(first);
        bench.drive().fence(step).unwrap();
        bench.drive().attach().unwrap();
        let mut second = bench.owner(0);
        let bytes = bench.fill(&page(0), 1);
        assert_eq!(second.run(write(0, 8), &page(0)), Ok(()));
        assert_eq!(bench.sim.medium().read(0, 8), bytes);
        assert_eq!((bench.sim.taken(), bench.sim.enabled()), (4, 2), "{step:?}: old commands again");
    }
}

/// A drain of a drive that is fenced changes nothing about it. The last write of a recovery is the one after which nothing
/// is left but to let the drive go on.
#[test]
fn drive_fenced_at_any_write_of_a_recovery_stays_stopped_until_the_attach() {
    for steps in [&[FenceStep::Master][..], &[FenceStep::Detach, FenceStep::Drain]] {
        let writes = (1..).take_while(|writes| recovery_fenced_after(*writes, steps)).count();
        assert!(writes > 0, "{steps:?}: no recovery was fenced");
    }
}

/// Fences a drive by `steps` after so many register writes of a recovery; false where it has fewer.
fn recovery_fenced_after(writes: u64, steps: &[FenceStep]) -> bool {
    let mut wrapped = None;
    let bench = Bench::behind(Options::default(), 1, LONG, |registers| {
        let interrupted = Interrupted::new(registers);
        wrapped = Some(Arc::clone(&interrupted));
        interrupted
    });
    let (interrupted, mut owner) = (wrapped.unwrap(), bench.owner(0));
    let bytes = bench.fill(&page(0), writes);
    bench.sim.fault(When::any(), Does::HoldData);
    bench.sim.fault(When::any(), Does::Foreign(9999));
    interrupted.fence_after(writes, bench.drive(), steps);
    owner.start(1, write(0, 8), &page(0));
    owner.start(2, Op::Flush, &[]);
    let begun = Instant::now();
    let fenced = loop {
        assert!(begun.elapsed() < LONG, "the controller is not reset");
        owner.wait();
        match interrupted.outcome() {
            Some(outcome) => break outcome,
            None if owner.results.len() == 2 => return false,
            None => {}
        }
    };
    fenced.unwrap();
    let begun = Instant::now();
    while begun.elapsed() < SHORT {
        owner.wait();
    }
    assert!(owner.results.is_empty(), "{steps:?} after {writes} writes: {:?}", owner.results);
    std::thread::scope(|scope| {
        let attached = scope.spawn(|| bench.drive().attach());
        assert_eq!((owner.result(1), owner.result(2)), (Ok(()), Ok(())), "{steps:?} after {writes} writes");
        attached.join().unwrap().unwrap();
    });
    assert_eq!(bench.sim.medium().read(0, 8), bytes);
    true
}

/// Takes the device out of its domain as a replace that failed does: its driver is not told.
fn strand(bench: &Bench) {
    bench.sim.registers().device().fence(FenceStep::Detach).unwrap();
}

#[test]
fn attach_brings_back_a_device_that_a_failed_replace_has_left_detached() {
    for drained in [false, true] {
        let bench = Bench::patient(Options::default(), 1);
        let mut owner = bench.owner(0);
        let expected = bench.fill(&page(0), 1);
        if drained {
            bench.drive().fence(FenceStep::Drain).unwrap();
            bench.drive().attach().unwrap();
            assert_eq!(bench.domain.calls(Call::Attach), 0, "a drain leaves it in its domain");
            bench.drive().fence(FenceStep::Drain).unwrap();
        } else {
            bench.sim.fault(When::any(), Does::HoldData);
            owner.start(1, write(0, 8), &page(0));
            assert!(bench.sim.await_held(1, LONG));
        }
        strand(&bench);
        owner.look();
        std::thread::scope(|scope| {
            let attached = scope.spawn(|| bench.drive().attach());
            if drained {
                owner.await_open();
                owner.start(1, write(0, 8), &page(0));
            }
            assert_eq!(owner.result(1), Ok(()));
            attached.join().unwrap().unwrap();
        });
        assert_eq!(bench.domain.calls(Call::Attach), 1, "drained: {drained}");
        assert_eq!(bench.sim.medium().read(0, 8), expected);
    }
}

#[test]
fn command_timeout_on_a_device_left_detached_does_not_lose_the_drive() {
    let bench = Bench::new(Options { patience: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    let expected = bench.fill(&page(0), 1);
    strand(&bench);
    owner.start(1, write(0, 8), &page(0));
    // The keeper cannot abort the command either, and stops the drive.
    while !bench.drive().window().is_paused() {
        owner.wait();
    }
    bench.drive().attach().unwrap();
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(bench.sim.medium().read(0, 8), expected);
    assert!(!bench.drive().health().lost);
}

#[test]
fn nothing_stays_for_ever_with_a_drive_whose_device_is_left_detached() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    strand(&bench);
    owner.start(1, write(0, 8), &page(0));
    while owner.results.is_empty() {
        owner.sleep();
    }
    assert_eq!(owner.result(1), Err(Fault::Withheld));
    assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
}
