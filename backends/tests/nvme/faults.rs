//! The controller does what it must not, or nothing at all.

use passgate_backends::nvme::sim::{Does, Turn, When, opcode};
use passgate_backends::{Device, Error, FenceStep, StopClass, Unmap};
use rustix::io::Errno;

use super::*;

/// Writes that are under way together: a page and eight blocks each.
fn start_writes(bench: &Bench, owner: &mut Owner, count: u32) {
    for tag in 0..count {
        bench.fill(&page(tag.into()), tag.into());
        owner.start(tag, write(u64::from(tag) * 8, 8), &page(tag.into()));
    }
}

/// Each has come back once, and is on the medium.
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
fn a_status_comes_back_as_it_is() {
    let bench = Bench::patient(Options { mdts: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::io(opcode::WRITE).over(16..17), Does::Status(0x281));
    // Three commands, of which the second fails.
    let long = [segment(0, 6 * PAGE as u32)];
    assert_eq!(owner.run(write(0, 48), &long), Err(Fault::Status(0x281)));
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (3, 1));
    assert_eq!(owner.run(write(0, 48), &long), Ok(()));
}

#[test]
fn what_the_controller_has_interrupted_is_asked_for_again_and_not_for_ever() {
    const INTERRUPTED: u16 = 0x21;
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any().times(2), Does::Status(INTERRUPTED));
    assert_eq!(owner.run(read(0, 8), &page(0)), Ok(()));
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (3, 1));
    bench.sim.fault(When::any().always(), Does::Status(INTERRUPTED));
    assert_eq!(owner.run(read(0, 8), &page(0)), Err(Fault::TimedOut));
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (6, 1));
}

#[test]
fn memory_that_was_taken_by_force_is_a_fault_of_the_request_alone() {
    let bench = Bench::patient(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::HoldData);
    owner.start(1, read(0, 8), &page(0));
    owner.start(2, read(0, 8), &page(500));
    assert!(bench.sim.await_held(1, LONG));
    // Past the window, as nobody may.
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
fn a_command_that_is_slow_is_no_trouble() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::DelayCompletion(LONG_DEADLINE / 8));
    start_writes(&bench, &mut owner, 4);
    check_writes(&bench, &mut owner, 4);
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (4, 1));
}

#[test]
fn a_command_that_never_ends_is_aborted_and_done_again() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any().nth(2), Does::HoldData);
    start_writes(&bench, &mut owner, 4);
    check_writes(&bench, &mut owner, 4);
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (5, 1), "the one is done again, without a reset");
}

#[test]
fn a_command_that_ends_by_no_abort_is_done_again_after_a_reset() {
    for does in [Does::HoldData, Does::HoldCompletion] {
        let bench = Bench::with_deadline(Options::default(), 2, LONG_DEADLINE);
        let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
        bench.sim.obey_aborts(false);
        bench.sim.fault(When::any().nth(2), does);
        start_writes(&bench, &mut owner, 4);
        check_writes(&bench, &mut owner, 4);
        assert_eq!(bench.sim.enabled(), 2);
        assert_eq!(other.run(read(0, 8), &page(9)), Ok(()), "the other queue goes on");
    }
}

#[test]
fn an_abort_that_hangs_itself_is_no_end_either() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::admin(opcode::ABORT), Does::HoldData);
    bench.sim.fault(When::any(), Does::HoldData);
    start_writes(&bench, &mut owner, 2);
    check_writes(&bench, &mut owner, 2);
    assert_eq!(bench.sim.enabled(), 2);
}

#[test]
fn a_command_that_ends_at_no_try_fails_in_the_end_and_alone() {
    for obey in [true, false] {
        let bench = Bench::new(Options::default(), 1);
        let mut owner = bench.owner(0);
        bench.sim.obey_aborts(obey);
        bench.sim.fault(When::any().over(0..8).always(), Does::HoldData);
        owner.start(0, write(0, 8), &page(0));
        assert_eq!(owner.result(0), Err(Fault::TimedOut), "aborts are obeyed: {obey}");
        bench.sim.behave();
        start_writes(&bench, &mut owner, 4);
        check_writes(&bench, &mut owner, 4);
    }
}

/// Whoever counts one of them too many waits for what has come, and resets the controller. The keeper deals with one after
/// the other: what it does about the last but one it has done when the last has come.
#[test]
fn commands_that_were_aborted_are_overdue_no_more() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE / 2);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any().over(0..8).always(), Does::HoldData);
    owner.start(0, write(0, 8), &page(0));
    assert_eq!(owner.result(0), Err(Fault::TimedOut), "given up with its last abort");
    for first in [8, 16] {
        bench.sim.fault(When::any().over(first..first + 8), Does::HoldData);
        assert_eq!(owner.run(write(first, 8), &page(1)), Ok(()), "done again after its abort");
    }
    let health = bench.drive().health();
    assert_eq!((health.resets, bench.sim.enabled()), (0, 1));
    assert!(health.aborts >= 5, "{health:?}");
}

/// The second comes back while the keeper waits for the Abort of the first.
#[test]
fn command_that_came_back_after_all_is_not_aborted() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE / 2);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::admin(opcode::ABORT), Does::HoldCompletion);
    bench.sim.fault(When::any().times(2), Does::HoldData);
    start_writes(&bench, &mut owner, 2);
    assert!(bench.sim.await_held(2, LONG));
    // Both are overdue when their owner looks.
    std::thread::sleep(LONG_DEADLINE / 2 + SHORT);
    assert_eq!(owner.result(0), Ok(()), "done again after its abort");
    assert!(bench.sim.release_next());
    assert_eq!(owner.result(1), Ok(()));
    bench.sim.release();
    // The keeper deals with one after the other: with the second before with this.
    bench.sim.fault(When::any(), Does::Foreign(9999));
    assert_eq!(owner.run(Op::Flush, &[]), Ok(()), "done again after a reset");
    assert_eq!(bench.drive().health().aborts, 1);
}

/// The keeper waits for an Abort while two owners report what the controller has done in the same life.
#[test]
fn one_reset_answers_all_faults_of_before_it() {
    let bench = Bench::with_deadline(Options::default(), 3, LONG_DEADLINE / 2);
    let mut owners = [0, 1, 2].map(|nth| bench.owner(nth));
    let await_results = |owners: &mut [Owner], of: std::ops::Range<usize>| {
        let begun = Instant::now();
        while owners[of.clone()].iter().any(|owner| owner.results.is_empty()) {
            assert!(begun.elapsed() < LONG, "no reset");
            // Each parks his queue.
            owners.iter_mut().for_each(Owner::wait);
        }
        owners[of].iter_mut().for_each(|owner| assert_eq!(owner.result(1), Ok(())));
    };
    bench.sim.fault(When::admin(opcode::ABORT), Does::HoldCompletion);
    bench.sim.fault(When::any(), Does::HoldData);
    assert_eq!(owners[0].run(read(0, 8), &page(0)), Ok(()), "done again after its abort");
    for nth in [1, 2] {
        bench.sim.fault(When::any().on(nth + 1), Does::Foreign(9999));
        owners[usize::from(nth)].start(1, Op::Flush, &[]);
    }
    assert!(bench.sim.await_taken(4, LONG));
    // The controller posts what it has completed before it takes another command.
    assert_eq!(owners[0].run(Op::Flush, &[]), Ok(()));
    owners[1..].iter_mut().for_each(Owner::look);
    bench.sim.release();
    await_results(&mut owners, 1..3);
    // What was reported before it the keeper has dealt with before it deals with this.
    bench.sim.fault(When::any().on(1), Does::Foreign(9999));
    owners[0].start(1, Op::Flush, &[]);
    await_results(&mut owners, 0..1);
    assert_eq!((bench.drive().health().resets, bench.sim.enabled()), (2, 3));
}

#[test]
fn a_completion_that_belongs_to_nobody_is_answered_by_a_reset() {
    for does in [Does::Twice, Does::Foreign(9999), Does::Foreign(100)] {
        let bench = Bench::new(Options::default(), 1);
        let mut owner = bench.owner(0);
        bench.sim.fault(When::any().nth(3), does);
        start_writes(&bench, &mut owner, 8);
        check_writes(&bench, &mut owner, 8);
        let until = Instant::now() + LONG;
        while bench.sim.enabled() < 2 {
            assert!(Instant::now() < until, "{does:?}: no reset");
            owner.wait();
        }
        owner.await_open();
        start_writes(&bench, &mut owner, 8);
        check_writes(&bench, &mut owner, 8);
    }
}

#[test]
fn a_completion_that_comes_again_ends_no_later_command() {
    let bench = Bench::patient(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::Again);
    start_writes(&bench, &mut owner, 1);
    check_writes(&bench, &mut owner, 1);
    bench.sim.fault(When::any(), Does::HoldData);
    owner.start(1, read(0, 8), &page(9));
    assert!(bench.sim.await_held(2, LONG));
    bench.sim.release_next();
    // It ends by a completion of its own, and not before its data is there.
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(bench.seen(&page(9)), pattern(0, PAGE as usize));
}

/// Where only one command identifier is free at a time, the next command would have that of the last.
#[test]
fn late_duplicate_completion_completes_no_later_command() {
    let bench = Bench::patient(Options { entries: 2, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::Again);
    start_writes(&bench, &mut owner, 1);
    check_writes(&bench, &mut owner, 1);
    bench.sim.fault(When::any(), Does::HoldData);
    owner.start(1, read(0, 8), &page(9));
    assert!(bench.sim.await_held(2, LONG));
    assert!(bench.sim.release_next());
    assert_eq!(owner.result(1), Ok(()));
    assert!(bench.seen(&page(9)) == pattern(0, PAGE as usize), "success without its data");
    assert_eq!(bench.sim.enabled(), 2, "the controller is reset");
}

/// The identifier that a completion frees is used for the request's next command before its duplicate, which lies behind
/// it in the same batch, is seen.
#[test]
fn duplicate_completion_in_one_batch_completes_no_command_issued_in_that_batch() {
    let bench = Bench::patient(Options { entries: 3, mdts: 1, ..Options::default() }, 2);
    let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
    [Does::HoldData, Does::Twice].into_iter().for_each(|does| bench.sim.fault(When::any().on(1), does));
    bench.sim.fault(When::any().on(1), Does::HoldData);
    owner.start(1, read(1000, 8), &page(20));
    let long = [segment(0, 4 * PAGE as u32)];
    let bytes = bench.fill(&long, 3);
    owner.start(2, write(0, 32), &long);
    // The controller posts what it has completed before it takes another command.
    assert!(bench.sim.await_taken(2, LONG));
    assert_eq!(other.run(Op::Flush, &[]), Ok(()));
    drop(other);
    owner.look();
    assert_eq!(owner.result(2), Ok(()));
    assert!(bench.sim.medium().read(0, 32) == bytes, "success without its data");
    assert_eq!(owner.result(1), Ok(()));
    assert_eq!(bench.sim.enabled(), 2, "the controller is reset");
}

/// What is left over of one admin command must not be taken for a part of the next one.
#[test]
fn duplicate_admin_completion_resets_the_controller() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::admin(opcode::ABORT), Does::Twice);
    for (first, resets) in [(0, 0), (8, 1)] {
        bench.sim.fault(When::any().over(first..first + 8), Does::HoldData);
        let bytes = bench.fill(&page(0), first);
        owner.start(1, write(first, 8), &page(0));
        assert_eq!(owner.result(1), Ok(()));
        assert!(bench.sim.medium().read(first, 8) == bytes);
        // The command may have ended by its abort before the keeper has come to reset the controller.
        let begun = Instant::now();
        while bench.sim.enabled() < 1 + resets {
            assert!(begun.elapsed() < LONG, "no reset");
            owner.wait();
        }
        assert_eq!(bench.sim.enabled(), 1 + resets);
    }
}

/// The next owner of a queue would take a duplicate of the last one's completion for that of its own command.
#[test]
fn duplicate_completion_of_an_earlier_owner_completes_no_command_of_the_next() {
    let bench = Bench::patient(Options { entries: 2, ..Options::default() }, 1);
    let mut first = bench.owner(0);
    bench.sim.fault(When::any(), Does::Again);
    start_writes(&bench, &mut first, 1);
    check_writes(&bench, &mut first, 1);
    drop(first);
    let mut second = bench.owner(0);
    bench.sim.fault(When::any(), Does::HoldData);
    second.start(1, read(0, 8), &page(9));
    assert!(bench.sim.await_held(2, LONG));
    assert!(bench.sim.release_next());
    assert_eq!(second.result(1), Ok(()));
    assert!(bench.seen(&page(9)) == pattern(0, PAGE as usize), "success without its data");
}

#[test]
fn a_fatal_error_is_answered_by_a_reset() {
    let bench = Bench::new(Options::default(), 2);
    let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
    bench.sim.fault(When::any().nth(5), Does::Fatal);
    start_writes(&bench, &mut owner, 8);
    other.start(1, read(0, 8), &page(20));
    std::thread::scope(|scope| {
        // Each owner looks after his own queue.
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
fn an_owner_who_is_held_up_elsewhere_costs_nobody_the_drive() {
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
    other.look();
    check_writes(&bench, &mut owner, 4);
    assert_eq!(other.run(read(0, 8), &page(20)), Ok(()));
}

#[test]
fn a_fault_on_a_queue_is_fatal_and_is_answered_so() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    // Behind the driver's back, as a cable that is loose for a moment.
    let registers = bench.sim.registers();
    registers.device().fence(FenceStep::Master).unwrap();
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
fn a_controller_that_does_not_come_up_at_once_is_tried_again() {
    for turn in [Turn::Never, Turn::Fatal, Turn::After(Duration::from_millis(100))] {
        let bench = Bench::new(Options { patience: 1, ..Options::default() }, 1);
        let mut owner = bench.owner(0);
        bench.sim.next_enable(turn);
        bench.sim.next_disable(Turn::After(Duration::from_millis(50)));
        bench.sim.fail();
        start_writes(&bench, &mut owner, 4);
        check_writes(&bench, &mut owner, 4);
    }
}

#[test]
fn a_controller_that_never_comes_up_is_given_up() {
    let bench = Bench::new(Options { patience: 1, ..Options::default() }, 2);
    let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
    (0..20).for_each(|_| bench.sim.next_enable(Turn::Fatal));
    bench.sim.fail();
    start_writes(&bench, &mut owner, 4);
    for tag in 0..4 {
        assert_eq!(owner.result(tag), Err(Fault::Lost));
    }
    for owner in [&mut owner, &mut other] {
        assert_eq!(owner.submit(9, read(0, 8), &page(0)), Submitted::Lost);
    }
    // It was stopped for certain: nobody waits for it.
    assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
}

#[test]
fn what_was_given_up_and_is_not_stopped_keeps_its_pages() {
    let stop_class = StopClass::DETACH;
    let bench = Bench::new(Options { patience: 1, stop_class, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::HoldData);
    owner.start(1, read(0, 8), &page(0));
    assert!(bench.sim.await_held(1, LONG));
    (0..20).for_each(|_| bench.sim.next_disable(Turn::Never));
    bench.sim.fail();
    assert_eq!(owner.result(1), Err(Fault::Lost));
    let all = pages_at(0, PAGES);
    assert_eq!(bench.windowed.unmap(all), Unmap::Failed { errno: Errno::BUSY, bytes: 0 }, "it may do DMA");
    bench.drive().fence(FenceStep::Detach).unwrap();
    assert_eq!(bench.windowed.unmap(all), Unmap::Gone { bytes: PAGES * PAGE });
}

#[test]
fn a_drive_that_is_pulled_out_is_lost() {
    let bench = Bench::new(Options::default(), 2);
    let (mut owner, mut other) = (bench.owner(0), bench.owner(1));
    bench.sim.fault(When::any().nth(3), Does::Vanish);
    start_writes(&bench, &mut owner, 8);
    for tag in 0..2 {
        assert_eq!(owner.result(tag), Ok(()));
    }
    for tag in 2..8 {
        assert_eq!(owner.result(tag), Err(Fault::Lost));
    }
    let until = Instant::now() + LONG;
    while other.submit(1, Op::Flush, &[]) != Submitted::Lost {
        assert!(Instant::now() < until);
        other.wait();
    }
    assert_eq!(other.queue.in_flight() + owner.queue.in_flight(), 0);
    assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    assert!(bench.drive().attach().is_err(), "there is nothing to attach");
    assert_eq!(owner.submit(1, Op::Flush, &[]), Submitted::Lost);
}

#[test]
fn a_lost_interrupt_delays_and_no_more() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.raise_interrupts(false);
    start_writes(&bench, &mut owner, 8);
    check_writes(&bench, &mut owner, 8);
    assert_eq!(bench.sim.enabled(), 1);
}

#[test]
fn an_owner_who_waits_for_nothing_but_interrupts_learns_of_what_never_ends() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::HoldData);
    owner.start(0, write(0, 8), &page(0));
    while owner.results.is_empty() {
        owner.sleep();
    }
    assert_eq!(owner.results.get(&0), Some(&Ok(())));
}

#[test]
fn a_controller_that_somebody_else_has_reset_is_brought_up_again() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    bench.sim.power_cut();
    // Nothing is under way that could take too long.
    let begun = Instant::now();
    while bench.sim.enabled() < 2 {
        assert!(begun.elapsed() < LONG, "nobody has noticed");
        owner.wait();
    }
    owner.await_open();
    bench.sim.fault(When::any().always(), Does::HoldData);
    start_writes(&bench, &mut owner, 4);
    assert!(bench.sim.await_held(4, LONG));
    bench.sim.behave();
    bench.sim.power_cut();
    check_writes(&bench, &mut owner, 4);
    assert_eq!(bench.sim.enabled(), 3);
}

#[test]
fn a_controller_that_makes_things_up_is_believed_nothing_more() {
    let bench = Bench::with_deadline(Options::default(), 1, LONG_DEADLINE);
    let mut owner = bench.owner(0);
    bench.sim.fault(When::any(), Does::Foreign(9999));
    bench.sim.fault(When::any().over(8..16), Does::Status(0x281));
    start_writes(&bench, &mut owner, 2);
    check_writes(&bench, &mut owner, 2);
    assert_eq!(bench.sim.enabled(), 2);
}

#[test]
fn a_drive_that_is_wanted_back_says_so_and_goes_on() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    let removal = bench.drive().removal().unwrap();
    let asked = |wait: Duration| {
        let wait = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
        poll(&mut [PollFd::new(&removal, PollFlags::IN)], Some(&wait)).unwrap() > 0
    };
    assert!(!asked(Duration::ZERO));
    bench.sim.ask_back();
    assert!(asked(SHORT));
    assert_eq!(owner.run(write(0, 8), &page(0)), Ok(()));
    assert!(asked(Duration::ZERO), "it stays so");
}

/// A zoned namespace has blocks like any other, and takes writes of them in its own order only.
#[test]
fn namespace_of_another_command_set_is_refused_with_the_cause_and_the_remedy() {
    let _budget = BUDGET.lock().unwrap_or_else(PoisonError::into_inner);
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
            let Err(Error::Host { what, mend }) = found else { panic!("{command_set}: {found:?}") };
            assert!(what.contains("namespace 1") && what.contains(cause), "{what}");
            assert!(mend.contains("--namespace"), "{mend}");
        }
    }
    assert!(open(Options { several_command_sets: true, ..plain.clone() }).is_ok());
    // Who does not say has the NVM command set only where there is no other.
    assert!(open(Options { descriptors: false, ..plain.clone() }).is_ok());
    assert!(open(Options { descriptors: false, several_command_sets: true, ..plain.clone() }).is_err());
    assert_eq!(domain.mapping_count(), 0);
}

#[test]
fn what_is_no_drive_is_not_opened() {
    let _budget = BUDGET.lock().unwrap_or_else(PoisonError::into_inner);
    let domain = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
    let shared = Arc::new(domain.clone()) as Arc<dyn Domain>;
    let open = |sim: &Simulated, options| Drive::open(sim.registers(), &shared, options).map(|_| ());
    let pulled = Simulated::new(&domain, Options::default()).unwrap();
    pulled.vanish();
    assert!(matches!(open(&pulled, DriveOptions::default()), Err(Error::Device { .. })));
    let broken = Simulated::new(&domain, Options { patience: 1, ..Options::default() }).unwrap();
    broken.next_enable(Turn::Fatal);
    assert!(matches!(open(&broken, DriveOptions::default()), Err(Error::Device { .. })));
    let sound = Simulated::new(&domain, Options::default()).unwrap();
    let second = DriveOptions { namespace: 2, ..DriveOptions::default() };
    assert!(matches!(open(&sound, second), Err(Error::Host { .. })));
    assert!(open(&sound, DriveOptions::default()).is_ok(), "it can be opened after that");
    assert_eq!(domain.mapping_count(), 0);
}
