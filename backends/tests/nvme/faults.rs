//! Faults of the controller: errors, timeouts, protocol violations, and removal.

use passgate_backends::{Device, Error, Step, Steps, Unmap};
use passgate_sim::nvme::{CommandFilter, FaultAction, ReadyChange, opcode};
use rustix::io::Errno;

use super::*;

/// Starts `count` writes of a page, eight blocks each.
fn start_writes(bench: &Bench, owner: &mut Owner, count: u32) {
    for tag in 0..count {
        bench.fill(&page(tag.into()), tag.into());
        owner.start(tag, write(u64::from(tag) * 8, 8), &page(tag.into()));
    }
}

/// Checks that each write has completed once and is on the medium.
fn check_writes(bench: &Bench, owner: &mut Owner, count: u32) {
    for tag in 0..count {
        assert_eq!(owner.result(tag), Ok(()), "write {tag}");
        let expected = pattern(tag.into(), PAGE as usize);
        assert!(bench.sim.medium().read(u64::from(tag) * 8, 8) == expected, "write {tag}");
    }
    assert_eq!(owner.queue.in_flight(), 0);
    assert!(bench.drive().window().idle());
    assert_eq!(bench.sim.dma_faults(), 0);
}

#[test]
fn error_status_is_returned_unchanged() {
    let bench = Bench::without_deadline(Options { mdts: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::io(opcode::WRITE).over(16..17), FaultAction::Status(0x281));
    // Three commands, of which the second fails.
    let long = [segment(0, 6 * PAGE as u32)];
    assert_eq!(owner.run(write(0, 48), &long), Err(Fault::Status(0x281)));
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (3, 1));
    assert_eq!(owner.run(write(0, 48), &long), Ok(()));
}

#[test]
fn interrupted_command_is_retried_a_limited_number_of_times() {
    const INTERRUPTED: u16 = 0x21;
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any().times(2), FaultAction::Status(INTERRUPTED));
    assert_eq!(owner.run(read(0, 8), &page(0)), Ok(()));
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (3, 1));
    bench.sim.fault(CommandFilter::any().always(), FaultAction::Status(INTERRUPTED));
    assert_eq!(owner.run(read(0, 8), &page(0)), Err(Fault::TimedOut));
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (6, 1));
}

#[test]
fn memory_unmapped_without_the_window_fails_only_that_request() {
    let bench = Bench::without_deadline(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    owner.start(1, read(0, 8), &page(0));
    owner.start(2, read(0, 8), &page(500));
    assert!(bench.sim.await_stalled(1, TIMEOUT));
    // Without the window, as nothing in the product does.
    assert_eq!(bench.domain.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    bench.sim.release();
    assert_eq!(owner.result(1), Err(Fault::Memory));
    owner.result(2).ok();
    assert!(bench.sim.dma_faults() > 0);
    bench.map(0, PAGES);
    assert_eq!(owner.run(read(0, 8), &page(0)), Ok(()));
    assert_eq!(bench.sim.enabled(), 1);
}

#[test]
fn slow_command_causes_no_recovery() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::DelayCompletion(LONG_DEADLINE / 8));
    start_writes(&bench, &mut owner, 4);
    check_writes(&bench, &mut owner, 4);
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (4, 1));
}

#[test]
fn command_that_never_completes_is_aborted_and_retried() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any().nth(2), FaultAction::StallData);
    start_writes(&bench, &mut owner, 4);
    check_writes(&bench, &mut owner, 4);
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (5, 1), "one command is repeated, without a reset");
}

#[test]
fn command_that_survives_its_abort_is_retried_after_a_reset() {
    for action in [FaultAction::StallData, FaultAction::StallCompletion] {
        let bench = Bench::with_deadline(Options::default(), 2, LONG_DEADLINE);
        let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
        bench.sim.obey_aborts(false);
        bench.sim.fault(CommandFilter::any().nth(2), action);
        start_writes(&bench, &mut owner, 4);
        check_writes(&bench, &mut owner, 4);
        assert_eq!(bench.sim.enabled(), 2);
        assert_eq!(other.run(read(0, 8), &page(9)), Ok(()), "the other queue works");
    }
}

#[test]
fn abort_that_hangs_leads_to_a_reset() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::admin(opcode::ABORT), FaultAction::StallData);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    start_writes(&bench, &mut owner, 2);
    check_writes(&bench, &mut owner, 2);
    assert_eq!(bench.sim.enabled(), 2);
}

#[test]
fn command_that_fails_every_attempt_times_out_alone() {
    for obey in [true, false] {
        let bench = Bench::new(Options::default(), 1);
        let mut owner = bench.owner(0);
        bench.sim.obey_aborts(obey);
        bench.sim.fault(CommandFilter::any().over(0..8).always(), FaultAction::StallData);
        owner.start(0, write(0, 8), &page(0));
        assert_eq!(owner.result(0), Err(Fault::TimedOut), "aborts are obeyed: {obey}");
        bench.sim.behave();
        start_writes(&bench, &mut owner, 4);
        check_writes(&bench, &mut owner, 4);
    }
}

/// If one of them were counted too often, the watchdog would wait for it and then reset the controller. The watchdog
/// handles events one after the other: when the last has completed, it has handled the one before.
#[test]
fn aborted_commands_are_no_longer_overdue() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE / 2);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any().over(0..8).always(), FaultAction::StallData);
    owner.start(0, write(0, 8), &page(0));
    assert_eq!(owner.result(0), Err(Fault::TimedOut), "given up after its last Abort");
    for first in [8, 16] {
        bench.sim.fault(CommandFilter::any().over(first..first + 8), FaultAction::StallData);
        assert_eq!(owner.run(write(first, 8), &page(1)), Ok(()), "repeated after its Abort");
    }
    let health = bench.drive().health();
    assert_eq!((health.resets, bench.sim.enabled()), (0, 1));
    assert!(health.aborts >= 5, "{health:?}");
}

/// The second command completes while the watchdog waits for the Abort of the first.
#[test]
fn overdue_command_that_has_completed_is_not_aborted() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE / 2);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::admin(opcode::ABORT), FaultAction::StallCompletion);
    bench.sim.fault(CommandFilter::any().times(2), FaultAction::StallData);
    start_writes(&bench, &mut owner, 2);
    assert!(bench.sim.await_stalled(2, TIMEOUT));
    // Both are overdue at the owner's next call.
    std::thread::sleep(LONG_DEADLINE / 2 + SETTLE_TIME);
    assert_eq!(owner.result(0), Ok(()), "repeated after its Abort");
    assert!(bench.sim.release_next());
    assert_eq!(owner.result(1), Ok(()));
    bench.sim.release();
    // The watchdog handles events one after the other: the second timeout before this protocol error.
    bench.sim.fault(CommandFilter::any(), FaultAction::CompleteWrongCid(9999));
    assert_eq!(owner.run(Op::Flush, &[]), Ok(()), "repeated after a reset");
    assert_eq!(bench.drive().health().aborts, 1);
}

/// The watchdog waits for an Abort while two owners report protocol errors in the same generation.
#[test]
fn reset_answers_all_faults_reported_before_it() {
    let bench = Bench::with_deadline(Options::default(), 3, LONG_DEADLINE / 2);
    let mut owners = [0, 1, 2].map(|nth| bench.owner(nth));
    let await_results = |owners: &mut [Owner], of: std::ops::Range<usize>| {
        let begun = Instant::now();
        while owners[of.clone()].iter().any(|owner| owner.results.is_empty()) {
            assert!(begun.elapsed() < TIMEOUT, "no reset");
            // Each owner parks its queue.
            owners.iter_mut().for_each(Owner::wait);
        }
        owners[of].iter_mut().for_each(|owner| assert_eq!(owner.result(1), Ok(())));
    };
    bench.sim.fault(CommandFilter::admin(opcode::ABORT), FaultAction::StallCompletion);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    assert_eq!(owners[0].run(read(0, 8), &page(0)), Ok(()), "repeated after its Abort");
    for nth in [1, 2] {
        bench.sim.fault(CommandFilter::any().on(nth + 1), FaultAction::CompleteWrongCid(9999));
        owners[usize::from(nth)].start(1, Op::Flush, &[]);
    }
    assert!(bench.sim.await_taken(4, TIMEOUT));
    // The controller posts its completions before it fetches another command.
    assert_eq!(owners[0].run(Op::Flush, &[]), Ok(()));
    owners[1..].iter_mut().for_each(Owner::reap);
    bench.sim.release();
    await_results(&mut owners, 1..3);
    // The watchdog has handled the earlier events before it handles this one.
    bench.sim.fault(CommandFilter::any().on(1), FaultAction::CompleteWrongCid(9999));
    owners[0].start(1, Op::Flush, &[]);
    await_results(&mut owners, 0..1);
    assert_eq!((bench.drive().health().resets, bench.sim.enabled()), (2, 3));
}

#[test]
fn completion_with_unknown_cid_resets_the_controller() {
    for action in
        [FaultAction::CompleteTwice, FaultAction::CompleteWrongCid(9999), FaultAction::CompleteWrongCid(100)]
    {
        let bench = Bench::new(Options::default(), 1);
        let mut owner = bench.owner(0);
        bench.sim.fault(CommandFilter::any().nth(3), action);
        start_writes(&bench, &mut owner, 8);
        check_writes(&bench, &mut owner, 8);
        let until = Instant::now() + TIMEOUT;
        while bench.sim.enabled() < 2 {
            assert!(Instant::now() < until, "{action:?}: no reset");
            owner.wait();
        }
        owner.await_open();
        start_writes(&bench, &mut owner, 8);
        check_writes(&bench, &mut owner, 8);
    }
}

#[test]
fn repeated_completion_completes_no_later_command() {
    let bench = Bench::without_deadline(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::CompleteAgainLate);
    start_writes(&bench, &mut owner, 1);
    check_writes(&bench, &mut owner, 1);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    owner.start(1, read(0, 8), &page(9));
    assert!(bench.sim.await_stalled(2, TIMEOUT));
    bench.sim.release_next();
    // The command ends by its own completion, and not before its data has arrived.
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(bench.read_memory(&page(9)), pattern(0, PAGE as usize));
}

/// If only one CID is free at a time, the next command would get that of the last one.
#[test]
fn late_duplicate_completion_completes_no_later_command() {
    let bench = Bench::without_deadline(Options { entries: 2, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::CompleteAgainLate);
    start_writes(&bench, &mut owner, 1);
    check_writes(&bench, &mut owner, 1);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    owner.start(1, read(0, 8), &page(9));
    assert!(bench.sim.await_stalled(2, TIMEOUT));
    assert!(bench.sim.release_next());
    assert_eq!(owner.result(1), Ok(()));
    assert!(bench.read_memory(&page(9)) == pattern(0, PAGE as usize), "success without its data");
    assert_eq!(bench.sim.enabled(), 2, "the controller is reset");
}

/// The CID that a completion frees is used for the request's next command before the duplicate behind it in the same
/// batch is processed.
#[test]
fn duplicate_completion_in_one_batch_completes_no_command_issued_in_that_batch() {
    let bench = Bench::without_deadline(Options { entries: 3, mdts: 1, ..Options::default() }, 2);
    let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
    [FaultAction::StallData, FaultAction::CompleteTwice]
        .into_iter()
        .for_each(|action| bench.sim.fault(CommandFilter::any().on(1), action));
    bench.sim.fault(CommandFilter::any().on(1), FaultAction::StallData);
    owner.start(1, read(1000, 8), &page(20));
    let long = [segment(0, 4 * PAGE as u32)];
    let bytes = bench.fill(&long, 3);
    owner.start(2, write(0, 32), &long);
    // The controller posts its completions before it fetches another command.
    assert!(bench.sim.await_taken(2, TIMEOUT));
    assert_eq!(other.run(Op::Flush, &[]), Ok(()));
    drop(other);
    owner.reap();
    assert_eq!(owner.result(2), Ok(()));
    assert!(bench.sim.medium().read(0, 32) == bytes, "success without its data");
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(bench.sim.enabled(), 2, "the controller is reset");
}

/// The second completion of one admin command must not be taken for that of the next.
#[test]
fn duplicate_admin_completion_resets_the_controller() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::admin(opcode::ABORT), FaultAction::CompleteTwice);
    for (first, resets) in [(0, 0), (8, 1)] {
        bench.sim.fault(CommandFilter::any().over(first..first + 8), FaultAction::StallData);
        let bytes = bench.fill(&page(0), first);
        owner.start(1, write(first, 8), &page(0));
        assert_eq!(owner.result(1), Ok(()));
        assert!(bench.sim.medium().read(first, 8) == bytes);
        // The command may have completed by its Abort before the watchdog resets the controller.
        let begun = Instant::now();
        while bench.sim.enabled() < 1 + resets {
            assert!(begun.elapsed() < TIMEOUT, "no reset");
            owner.wait();
        }
        assert_eq!(bench.sim.enabled(), 1 + resets);
    }
}

/// The next owner of a queue would take a duplicate of the last completion for that of its own command.
#[test]
fn duplicate_completion_of_an_earlier_owner_completes_no_command_of_the_next() {
    let bench = Bench::without_deadline(Options { entries: 2, ..Options::default() }, 1);
    let mut first = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::CompleteAgainLate);
    start_writes(&bench, &mut first, 1);
    check_writes(&bench, &mut first, 1);
    drop(first);
    let mut second = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    second.start(1, read(0, 8), &page(9));
    assert!(bench.sim.await_stalled(2, TIMEOUT));
    assert!(bench.sim.release_next());
    assert_eq!(second.result(1), Ok(()));
    assert!(bench.read_memory(&page(9)) == pattern(0, PAGE as usize), "success without its data");
}

#[test]
fn fatal_error_resets_the_controller() {
    let bench = Bench::new(Options::default(), 2);
    let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
    bench.sim.fault(CommandFilter::any().nth(5), FaultAction::Fatal);
    start_writes(&bench, &mut owner, 8);
    other.start(1, read(0, 8), &page(20));
    std::thread::scope(|scope| {
        // Each owner calls its own queue.
        let other = scope.spawn(move || other.result(1));
        for tag in 0..8 {
            assert_eq!(owner.result(tag), Ok(()));
        }
        assert_eq!(other.join().unwrap(), Ok(()));
    });
    let written = (0..8).flat_map(|tag| pattern(tag, PAGE as usize)).collect::<Vec<_>>();
    assert!(bench.sim.medium().read(0, 64) == written);
    assert_eq!(bench.sim.enabled(), 2);
}

#[test]
fn busy_owner_delays_recovery_without_losing_the_drive() {
    let bench = Bench::new(Options::default(), 2);
    let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
    assert_eq!(other.run(read(0, 8), &page(20)), Ok(()));
    bench.sim.fail();
    start_writes(&bench, &mut owner, 4);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(2500) {
        owner.wait();
    }
    assert_eq!((owner.results.len(), bench.sim.enabled()), (0, 1), "the other queue may be in use");
    other.reap();
    check_writes(&bench, &mut owner, 4);
    assert_eq!(other.run(read(0, 8), &page(20)), Ok(()));
}

#[test]
fn dma_fault_on_a_queue_resets_the_controller() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    // Without the driver's knowledge, as by a loose contact.
    let registers = bench.sim.registers();
    registers.device().fence(Step::Master).unwrap();
    let bytes = bench.fill(&page(0), 7);
    owner.start(1, write(0, 8), &page(0));
    while bench.sim.dma_faults() == 0 {
        std::thread::yield_now();
    }
    registers.device().attach().unwrap();
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!((bench.sim.medium().read(0, 8), bench.sim.enabled()), (bytes, 2));
}

#[test]
fn failed_initialization_is_retried() {
    for turn in [ReadyChange::Never, ReadyChange::Fatal, ReadyChange::After(Duration::from_millis(100))] {
        let bench = Bench::new(Options { ready_timeout: 1, ..Options::default() }, 1);
        let mut owner = bench.owner(0);
        bench.sim.next_enable(turn);
        bench.sim.next_disable(ReadyChange::After(Duration::from_millis(50)));
        bench.sim.fail();
        start_writes(&bench, &mut owner, 4);
        check_writes(&bench, &mut owner, 4);
    }
}

#[test]
fn controller_that_never_initializes_is_given_up() {
    let bench = Bench::new(Options { ready_timeout: 1, ..Options::default() }, 2);
    let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
    (0..20).for_each(|_| bench.sim.next_enable(ReadyChange::Fatal));
    bench.sim.fail();
    start_writes(&bench, &mut owner, 4);
    for tag in 0..4 {
        assert_eq!(owner.result(tag), Err(Fault::Lost));
    }
    for owner in [&mut owner, &mut other] {
        assert_eq!(owner.submit(9, read(0, 8), &page(0)), Submitted::Lost);
    }
    // It was stopped for certain, so the unmap does not wait.
    assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
}

#[test]
fn drive_given_up_without_a_stop_keeps_its_pages_in_the_window() {
    let stop_class = Steps::DETACH;
    let bench = Bench::new(Options { ready_timeout: 1, stop_class, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_stalled(1, TIMEOUT));
    (0..20).for_each(|_| bench.sim.next_disable(ReadyChange::Never));
    bench.sim.fail();
    assert_eq!(owner.result(1), Err(Fault::Lost));
    let all = pages_at(0, PAGES);
    assert_eq!(
        bench.windowed.unmap(all),
        Unmap::Failed { errno: Errno::BUSY, bytes: 0 },
        "the controller may still do DMA"
    );
    bench.drive().fence(Step::Detach).unwrap();
    assert_eq!(bench.windowed.unmap(all), Unmap::Gone { bytes: PAGES * PAGE });
}

#[test]
fn removed_drive_is_lost() {
    let bench = Bench::new(Options::default(), 2);
    let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
    bench.sim.fault(CommandFilter::any().nth(3), FaultAction::Unplug);
    start_writes(&bench, &mut owner, 8);
    for tag in 0..2 {
        assert_eq!(owner.result(tag), Ok(()));
    }
    for tag in 2..8 {
        assert_eq!(owner.result(tag), Err(Fault::Lost));
    }
    let until = Instant::now() + TIMEOUT;
    while other.submit(1, Op::Flush, &[]) != Submitted::Lost {
        assert!(Instant::now() < until);
        other.wait();
    }
    assert_eq!(other.queue.in_flight() + owner.queue.in_flight(), 0);
    assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    assert!(bench.drive().attach().is_err(), "the device is gone");
    assert_eq!(owner.submit(1, Op::Flush, &[]), Submitted::Lost);
}

#[test]
fn lost_interrupt_only_delays() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.raise_interrupts(false);
    start_writes(&bench, &mut owner, 8);
    check_writes(&bench, &mut owner, 8);
    assert_eq!(bench.sim.enabled(), 1);
}

#[test]
fn owner_waiting_for_interrupts_is_woken_for_overdue_commands() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::StallData);
    owner.start(0, write(0, 8), &page(0));
    while owner.results.is_empty() {
        owner.sleep();
    }
    assert_eq!(owner.results.get(&0), Some(&Ok(())));
}

#[test]
fn controller_reset_from_outside_is_reinitialized() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.power_cut();
    // No command is in flight that could time out.
    let begun = Instant::now();
    while bench.sim.enabled() < 2 {
        assert!(begun.elapsed() < TIMEOUT, "the reset was not noticed");
        owner.wait();
    }
    owner.await_open();
    bench.sim.fault(CommandFilter::any().always(), FaultAction::StallData);
    start_writes(&bench, &mut owner, 4);
    assert!(bench.sim.await_stalled(4, TIMEOUT));
    bench.sim.behave();
    bench.sim.power_cut();
    check_writes(&bench, &mut owner, 4);
    assert_eq!(bench.sim.enabled(), 3);
}

#[test]
fn completions_after_an_unknown_cid_are_ignored() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.fault(CommandFilter::any(), FaultAction::CompleteWrongCid(9999));
    bench.sim.fault(CommandFilter::any().over(8..16), FaultAction::Status(0x281));
    start_writes(&bench, &mut owner, 2);
    check_writes(&bench, &mut owner, 2);
    assert_eq!(bench.sim.enabled(), 2);
}

#[test]
fn removal_request_is_signalled_and_the_drive_continues() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    let removal = bench.drive().removal().unwrap();
    let asked = |wait: Duration| {
        let wait = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
        poll(&mut [PollFd::new(&removal, PollFlags::IN)], Some(&wait)).unwrap() > 0
    };
    assert!(!asked(Duration::ZERO));
    bench.sim.request_removal();
    assert!(asked(SETTLE_TIME));
    assert_eq!(owner.run(write(0, 8), &page(0)), Ok(()));
    assert!(asked(Duration::ZERO), "the eventfd stays readable");
}

/// A zoned namespace has blocks, but they must be written sequentially.
#[test]
fn namespace_of_another_command_set_is_refused_with_the_cause_and_the_remedy() {
    let _driver_memory = DRIVER_MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let domain = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
    let shared = Arc::new(domain.clone()) as Arc<dyn Domain>;
    let open = |options| {
        let sim = Simulated::new(&domain, options).unwrap();
        Drive::open(sim.registers(), &shared, DriveOptions::default()).map(|_| ())
    };
    let plain = Options::default();
    for (command_set, cause) in [(2, "zones"), (1, "keys"), (9, "0x9")] {
        for several_command_sets in [false, true] {
            let found = open(Options { command_set, several_command_sets, ..plain.clone() });
            let Err(Error::Host { what, remedy }) = found else { panic!("{command_set}: {found:?}") };
            assert!(what.contains("namespace 1") && what.contains(cause), "{what}");
            assert!(remedy.contains("--namespace"), "{remedy}");
        }
    }
    assert!(open(Options { several_command_sets: true, ..plain.clone() }).is_ok());
    // Without the descriptor the NVM command set is assumed only if there is no other.
    assert!(open(Options { descriptors: false, ..plain.clone() }).is_ok());
    assert!(open(Options { descriptors: false, several_command_sets: true, ..plain.clone() }).is_err());
    assert_eq!(domain.mapping_count(), 0);
}

#[test]
fn unusable_drive_is_not_opened() {
    let _driver_memory = DRIVER_MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let domain = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
    let shared = Arc::new(domain.clone()) as Arc<dyn Domain>;
    let open = |sim: &Simulated, options| Drive::open(sim.registers(), &shared, options).map(|_| ());
    let pulled = Simulated::new(&domain, Options::default()).unwrap();
    pulled.vanish();
    assert!(matches!(open(&pulled, DriveOptions::default()), Err(Error::Device { .. })));
    let broken = Simulated::new(&domain, Options { ready_timeout: 1, ..Options::default() }).unwrap();
    broken.next_enable(ReadyChange::Fatal);
    assert!(matches!(open(&broken, DriveOptions::default()), Err(Error::Device { .. })));
    let sound = Simulated::new(&domain, Options::default()).unwrap();
    let second = DriveOptions { namespace: 2, ..DriveOptions::default() };
    assert!(matches!(open(&sound, second), Err(Error::Host { .. })));
    assert!(open(&sound, DriveOptions::default()).is_ok(), "a failed open must not prevent the next");
    assert_eq!(domain.mapping_count(), 0);
}
