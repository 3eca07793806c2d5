//! Fences, which wait for no owner, and the requests that were in flight.

use passgate_backends::{Device, Step, Unmap};
use passgate_sim::iommu::{Call, Fault as SimFault};
use passgate_sim::nvme::{CommandFilter, FaultAction, ReadyChange};
use rustix::io::Errno;

use super::fencing_registers::FencingRegisters;
use super::*;

pub(super) const STRONGER_THAN_DRAIN: [Step; 3] = [Step::Master, Step::Detach, Step::Reset];

#[test]
fn requests_in_flight_are_resubmitted_after_a_fence_if_their_pages_are_open() {
    for step in STRONGER_THAN_DRAIN {
        let bench = Bench::without_deadline(Options::default(), 1);
        let mut owner = bench.owner(0);
        assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
        bench.map(0, 2);
        bench.map(2, 2);
        bench.sim.fault(CommandFilter::any().times(2), FaultAction::StallData);
        let expected = bench.fill(&page(0), 1);
        owner.start(1, write(0, 8), &page(0));
        owner.start(2, write(8, 8), &page(2));
        owner.start(3, Op::Flush, &[]);
        assert!(bench.sim.await_stalled(2, TIMEOUT));
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
    bench.sim.fault(CommandFilter::any().always(), FaultAction::StallData);
    owner.start(1, write(0, 8), &page(0));
    for (round, step) in STRONGER_THAN_DRAIN.into_iter().cycle().take(7).enumerate() {
        assert!(bench.sim.await_taken(round as u64 + 1, TIMEOUT));
        bench.drive().fence(step).unwrap();
        owner.reap(); // parks
        bench.drive().attach().unwrap();
        if round == 6 {
            bench.sim.behave();
        }
        owner.reap();
        assert!(round == 6 || owner.results.is_empty(), "after {} fences: {:?}", round + 1, owner.results);
    }
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(bench.sim.medium().read(0, 8), bytes);
}

/// Asserts that `action`, which waits for nothing, takes less than `limit` in one of three runs; on a busy machine not
/// all do.
fn assert_fast(step: Step, limit: Duration, action: impl Fn(Step) -> Duration) {
    let took = (0..3).map(|_| action(step)).find(|took| *took < limit);
    assert!(took.is_some(), "{step:?} takes longer than {limit:?} every time");
}

#[test]
fn fence_waits_for_no_owner() {
    let fence = |step| {
        let bench = Bench::without_deadline(Options::default(), 2);
        let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
        bench.sim.fault(CommandFilter::any().times(2), FaultAction::StallData);
        owner.start(1, read(0, 8), &page(0));
        other.start(1, read(0, 8), &page(9));
        assert!(bench.sim.await_stalled(2, TIMEOUT));
        // No owner calls its queue from here on.
        let begun = Instant::now();
        bench.drive().fence(step).unwrap();
        assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
        let took = begun.elapsed();
        // A request that an owner was about to submit is not admitted either.
        assert!(bench.drive().window().is_paused(), "{step:?}");
        bench.sim.release();
        assert!(!bench.sim.await_taken(3, SETTLE_TIME));
        assert_eq!(bench.read_memory(&page(0)), vec![0; PAGE as usize], "{step:?}");
        took
    };
    STRONGER_THAN_DRAIN.into_iter().for_each(|step| assert_fast(step, Duration::from_secs(1), fence));
}

/// Requests in flight no longer count once the device is proved to do no DMA, and not before.
#[test]
fn failed_fence_leaves_requests_in_the_window() {
    for step in STRONGER_THAN_DRAIN {
        let bench = Bench::without_deadline(Options::default(), 1);
        let mut owner = bench.owner(0);
        bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
        owner.start(1, read(0, 8), &page(0));
        assert!(bench.sim.await_stalled(1, TIMEOUT));
        bench.domain.fail_next(Call::Fence, SimFault::Errno(Errno::IO));
        assert!(bench.drive().fence(step).is_err());
        let busy = Unmap::Failed { errno: Errno::BUSY, bytes: 0 };
        assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), busy, "{step:?} has proved nothing");
        bench.drive().fence(step).unwrap();
        assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    }
}

#[test]
fn failed_attach_leaves_the_drive_fenced_and_the_next_succeeds() {
    let bench = Bench::new(Options { ready_timeout: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_stalled(1, TIMEOUT));
    bench.drive().fence(Step::Detach).unwrap();
    owner.reap();
    (0..3).for_each(|_| bench.sim.next_enable(ReadyChange::Fatal));
    assert!(bench.drive().attach().is_err());
    assert_eq!(owner.submit(2, read(0, 8), &page(0)), Submitted::Closed);
    assert!(bench.drive().window().is_paused(), "a request would be admitted");
    assert!(owner.results.is_empty());
    bench.drive().attach().unwrap();
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(owner.run(read(0, 8), &page(0)), Ok(()));
}

#[test]
fn requests_of_a_drive_not_attached_again_are_returned_in_time() {
    let bench = Bench::new(Options { ready_timeout: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_stalled(1, TIMEOUT));
    bench.drive().fence(Step::Detach).unwrap();
    owner.reap();
    (0..3).for_each(|_| bench.sim.next_enable(ReadyChange::Fatal));
    assert!(bench.drive().attach().is_err(), "the attach must fail");
    let begun = Instant::now();
    while owner.results.is_empty() {
        assert!(begun.elapsed() < TIMEOUT, "the request is not returned");
        owner.sleep();
    }
    assert_eq!(owner.result(1), Err(Fault::Withheld));
    assert_eq!(owner.queue.in_flight(), 0);
}

#[test]
fn drive_removed_while_fenced_is_lost_at_attach() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_stalled(1, TIMEOUT));
    bench.drive().fence(Step::Detach).unwrap();
    owner.reap();
    bench.sim.vanish();
    assert!(bench.drive().attach().is_err());
    assert_eq!(owner.result(1), Err(Fault::Lost));
    assert_eq!(owner.submit(2, read(0, 8), &page(0)), Submitted::Lost);
}

#[test]
fn queue_dropped_in_flight_keeps_its_pages_until_a_fence() {
    let bench = Bench::without_deadline(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_stalled(1, TIMEOUT));
    drop(owner);
    // Another owner's requests would use the same window slots.
    assert!(bench.drive().take_queue(0).is_err(), "a queue with requests in flight was taken");
    assert!(matches!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Failed { .. }));
    bench.drive().fence(Step::Master).unwrap();
    assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    bench.sim.release();
    assert_eq!(bench.read_memory(&page(0)), vec![0; PAGE as usize]);
}

#[test]
fn fence_during_recovery_does_not_lose_the_drive() {
    let fence_and_attach = |step| {
        let bench = Bench::new(Options::default(), 1);
        let mut owner = bench.owner(0);
        bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
        let expected = bench.fill(&page(0), 1);
        owner.start(1, write(0, 8), &page(0));
        assert!(bench.sim.await_stalled(1, TIMEOUT));
        bench.sim.next_disable(ReadyChange::After(SETTLE_TIME));
        bench.sim.fail();
        // Once CC.EN is clear, the reset is in progress.
        while bench.sim.registers().get(0x14).unwrap() & 1 != 0 {
            owner.wait();
        }
        let begun = Instant::now();
        bench.drive().fence(step).unwrap();
        assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
        let fenced = begun.elapsed();
        bench.map(0, PAGES);
        let attached = std::thread::scope(|scope| {
            // The attach waits for the recovery to end, which is soon.
            let attached = scope.spawn(|| bench.drive().attach().map(|()| begun.elapsed()));
            assert_eq!(owner.result(1), Ok(()), "{step:?}");
            attached.join().unwrap().unwrap()
        });
        assert_eq!(bench.sim.medium().read(0, 8), expected);
        // The fence has half of the limit.
        attached.max(2 * fenced)
    };
    STRONGER_THAN_DRAIN
        .into_iter()
        .for_each(|step| assert_fast(step, Duration::from_secs(2), fence_and_attach));
}

/// The next owner starts with an empty queue, because the controller has created it anew.
#[test]
fn queue_returned_before_a_reset_starts_empty_after_it() {
    for step in STRONGER_THAN_DRAIN {
        let bench = Bench::without_deadline(Options::default(), 1);
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
        assert_eq!((bench.sim.taken(), bench.sim.enabled()), (4, 2), "{step:?}: stale commands were fetched");
    }
}

/// A drain of a fenced drive changes nothing. After the last register write of a recovery, the driver only starts the
/// next generation.
#[test]
fn drive_fenced_at_any_write_of_a_recovery_stays_stopped_until_the_attach() {
    for steps in [&[Step::Master][..], &[Step::Detach, Step::Drain]] {
        let writes = (1..).take_while(|writes| recovery_fenced_after(*writes, steps)).count();
        assert!(writes > 0, "{steps:?}: no recovery was fenced");
    }
}

/// Fences a drive by `steps` after the `writes`th register write of a recovery. False if it has fewer.
fn recovery_fenced_after(writes: u64, steps: &[Step]) -> bool {
    let mut wrapped = None;
    let bench = Bench::with_registers(Options::default(), 1, TIMEOUT, |registers| {
        let fencing = FencingRegisters::new(registers);
        wrapped = Some(Arc::clone(&fencing));
        fencing
    });
    let (fencing, mut owner) = (wrapped.unwrap(), bench.owner(0));
    let bytes = bench.fill(&page(0), writes);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    bench.sim.fault(CommandFilter::any(), FaultAction::CompleteWrongCid(9999));
    fencing.fence_after(writes, bench.drive(), steps);
    owner.start(1, write(0, 8), &page(0));
    owner.start(2, Op::Flush, &[]);
    let begun = Instant::now();
    let fenced = loop {
        assert!(begun.elapsed() < TIMEOUT, "the controller is not reset");
        owner.wait();
        match fencing.outcome() {
            Some(outcome) => break outcome,
            None if owner.results.len() == 2 => return false,
            None => {}
        }
    };
    fenced.unwrap();
    let begun = Instant::now();
    while begun.elapsed() < SETTLE_TIME {
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

/// Detaches the device without notice to its driver, as a failed replace does.
fn detach_unnoticed(bench: &Bench) {
    bench.sim.registers().device().fence(Step::Detach).unwrap();
}

#[test]
fn attach_recovers_a_device_that_a_failed_replace_left_detached() {
    for drained in [false, true] {
        let bench = Bench::without_deadline(Options::default(), 1);
        let mut owner = bench.owner(0);
        let expected = bench.fill(&page(0), 1);
        if drained {
            bench.drive().fence(Step::Drain).unwrap();
            bench.drive().attach().unwrap();
            assert_eq!(bench.domain.calls(Call::Attach), 0, "a drain does not detach");
            bench.drive().fence(Step::Drain).unwrap();
        } else {
            bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
            owner.start(1, write(0, 8), &page(0));
            assert!(bench.sim.await_stalled(1, TIMEOUT));
        }
        detach_unnoticed(&bench);
        owner.reap();
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
    let bench = Bench::new(Options { ready_timeout: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    let expected = bench.fill(&page(0), 1);
    detach_unnoticed(&bench);
    owner.start(1, write(0, 8), &page(0));
    // The watchdog cannot abort the command either, and fences the drive.
    while !bench.drive().window().is_paused() {
        owner.wait();
    }
    bench.drive().attach().unwrap();
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(bench.sim.medium().read(0, 8), expected);
    assert!(!bench.drive().health().lost);
}

#[test]
fn requests_of_a_device_left_detached_are_returned_in_time() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    detach_unnoticed(&bench);
    owner.start(1, write(0, 8), &page(0));
    while owner.results.is_empty() {
        owner.sleep();
    }
    assert_eq!(owner.result(1), Err(Fault::Withheld));
    assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
}
