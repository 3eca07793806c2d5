//! Continuous load under fences and faults: everything that was reported as written is on the medium.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use passgate_backends::{Device, Step, Unmap};
use passgate_sim::nvme::{CommandFilter, FaultAction, ReadyChange, opcode};

use super::fences::STRONGER_THAN_DRAIN;
use super::*;

/// The number of requests that each owner has in flight.
const QUEUE_DEPTH: u32 = 16;

/// The progress of an owner.
#[derive(Debug, Default)]
struct Work {
    done: AtomicU64,
    retried: AtomicU64,
    /// True if each request needs eight commands.
    in_pieces: bool,
}

/// Returns a page as one segment, or as segments no two of which fit into one command.
fn page_segments(in_pieces: bool, nth: u64) -> Vec<Segment> {
    match in_pieces {
        true => (0..8).rev().map(|piece| segment(nth * PAGE + piece * 512, 512)).collect(),
        false => page(nth).to_vec(),
    }
}

/// Writes a page, reads it back elsewhere and compares, continuously and several at a time. Requests that are
/// withheld, not admitted, or time out are repeated. Any other failure fails the test.
fn work(bench: &Bench, mut owner: Owner, nth: u64, stop: &AtomicBool, work: &Work) {
    #[derive(Clone, Copy)]
    struct Job {
        round: u64,
        reads: bool,
        under_way: bool,
    }
    let (base, first) = (nth * 64, nth * 10_000);
    let mut jobs = [Job { round: 0, reads: false, under_way: false }; QUEUE_DEPTH as usize];
    loop {
        for (tag, job) in (0u64..).zip(&mut jobs) {
            if job.under_way || stop.load(Ordering::Relaxed) {
                continue;
            }
            let (op, at) = if job.reads {
                (read(first + tag * 8, 8), page_segments(work.in_pieces, base + 32 + tag))
            } else {
                bench.fill(&page_segments(work.in_pieces, base + tag), seed(nth, tag, job.round));
                (write(first + tag * 8, 8), page_segments(work.in_pieces, base + tag))
            };
            match owner.submit(tag as u32, op, &at) {
                Submitted::Started => job.under_way = true,
                Submitted::Closed => {}
                Submitted::Full if work.in_pieces => {}
                other => panic!("{other:?}"),
            }
        }
        if owner.queue.in_flight() == 0 && stop.load(Ordering::Relaxed) {
            return;
        }
        owner.wait();
        for (tag, result) in std::mem::take(&mut owner.results) {
            let job = &mut jobs[tag as usize];
            assert!(job.under_way, "request {tag} completed but was not in flight");
            job.under_way = false;
            match result {
                Ok(()) if job.reads => {
                    let seen = bench.read_memory(&page_segments(work.in_pieces, base + 32 + u64::from(tag)));
                    let expected = pattern(seed(nth, tag.into(), job.round), PAGE as usize);
                    assert!(seen == expected, "owner {nth}, job {tag}, round {}: other bytes", job.round);
                    (job.reads, job.round) = (false, job.round + 1);
                    work.done.fetch_add(1, Ordering::Relaxed);
                }
                Ok(()) => job.reads = true,
                Err(Fault::Withheld | Fault::TimedOut) => _ = work.retried.fetch_add(1, Ordering::Relaxed),
                Err(fault) => panic!("owner {nth}, job {tag}: {fault:?}"),
            }
        }
    }
}

/// Ends the work when dropped, also if the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn seed(nth: u64, tag: u64, round: u64) -> u64 {
    nth * 1_000_000 + round * 1000 + tag
}

fn await_more(work: &Work, more: u64) {
    let (from, until) = (work.done.load(Ordering::Relaxed), Instant::now() + TIMEOUT);
    while work.done.load(Ordering::Relaxed) < from + more {
        assert!(Instant::now() < until, "the load makes no progress");
        std::thread::yield_now();
    }
}

#[test]
fn load_survives_every_fence_without_loss() {
    let bench = Bench::new(Options::default(), 2);
    let (stop, works) = (AtomicBool::new(false), [Work::default(), Work::default()]);
    std::thread::scope(|scope| {
        for (nth, done) in (0..).zip(&works) {
            let (bench, stop, owner) = (&bench, &stop, bench.owner(nth));
            scope.spawn(move || work(bench, owner, nth.into(), stop, done));
        }
        let end = StopOnDrop(&stop);
        for step in STRONGER_THAN_DRAIN.into_iter().chain([Step::Drain]).cycle().take(12) {
            works.iter().for_each(|work| await_more(work, 20));
            bench.drive().fence(step).unwrap();
            let (taken, before) = (bench.sim.taken(), drive_written_pages(&bench));
            // Pages of requests in flight may be unmapped, because none of these does DMA any more.
            let all = pages_at(0, PAGES);
            assert_eq!(bench.windowed.unmap(all), Unmap::Gone { bytes: PAGES * PAGE }, "{step:?}");
            assert!(!bench.sim.await_taken(taken + 1, SETTLE_TIME / 4), "{step:?}: something started");
            assert!(drive_written_pages(&bench) == before, "{step:?}: something moved");
            bench.map(0, PAGES);
            bench.drive().attach().unwrap();
        }
        works.iter().for_each(|work| await_more(work, 20));
        drop(end);
    });
    assert!(bench.drive().window().idle());
}

/// Returns the content of the pages that only the drive writes.
fn drive_written_pages(bench: &Bench) -> Vec<u8> {
    bench.read_memory(&[segment(32 * PAGE, 32 * PAGE as u32), segment(96 * PAGE, 32 * PAGE as u32)])
}

/// Injects one of twelve faults from which the driver recovers.
fn inject_fault(bench: &Bench, nth: u64) {
    let sim = &bench.sim;
    match nth % 12 {
        0 => sim.fault(CommandFilter::io(opcode::WRITE).nth(3), FaultAction::StallData),
        1 => sim.fault(CommandFilter::any().times(5), FaultAction::DelayCompletion(DEADLINE / 8)),
        2 => sim.fault(CommandFilter::io(opcode::READ), FaultAction::StallCompletion),
        3 => sim.fault(CommandFilter::any().nth(7), FaultAction::CompleteTwice),
        4 => sim.fault(CommandFilter::any().nth(2), FaultAction::CompleteWrongCid(9999)),
        5 => sim.fault(CommandFilter::any().on(2), FaultAction::Fatal),
        6 => sim.obey_aborts(nth / 12 % 2 == 1),
        7 => sim.raise_interrupts(nth / 12 % 2 == 1),
        8 => sim.next_enable(ReadyChange::Fatal),
        9 => sim.next_disable(ReadyChange::After(DEADLINE / 8)),
        10 => sim.fail(),
        _ => bench.drive().fence(STRONGER_THAN_DRAIN[(nth / 12 % 3) as usize]).unwrap(),
    }
}

#[test]
fn load_survives_all_faults_without_loss() {
    load_under_all_faults(Options::default(), false);
}

/// Requests of more commands than a queue has entries.
#[test]
fn load_in_turns_survives_all_faults_without_loss() {
    load_under_all_faults(Options { entries: 8, ..Options::default() }, true);
}

fn load_under_all_faults(options: Options, in_pieces: bool) {
    let bench = Bench::new(options, 2);
    assert_eq!(bench.windowed.unmap(pages_at(0, PAGES)), Unmap::Gone { bytes: PAGES * PAGE });
    [(0, 16), (16, 32), (48, PAGES - 48)].into_iter().for_each(|(page, pages)| bench.map(page, pages));
    let (stop, works) = (AtomicBool::new(false), [(); 2].map(|()| Work { in_pieces, ..Work::default() }));
    std::thread::scope(|scope| {
        for (nth, done) in (0..).zip(&works) {
            let (bench, stop, owner) = (&bench, &stop, bench.owner(nth));
            scope.spawn(move || work(bench, owner, nth.into(), stop, done));
        }
        let end = StopOnDrop(&stop);
        // Steps of five, modulo twelve: each fault once per round, in an order without similar neighbours.
        for nth in 0..36 {
            inject_fault(&bench, nth / 12 * 12 + nth * 5 % 12);
            // As the gate does, unmap a part of the memory in use, and map it again.
            let part = pages_at(16, 32);
            let gone = bench.windowed.unmap(part);
            bench.drive().attach().unwrap();
            if gone == (Unmap::Gone { bytes: 32 * PAGE }) {
                bench.map(16, 32);
            } else {
                // As the gate does, use a stronger fence.
                bench.drive().fence(Step::Detach).unwrap();
                assert_eq!(bench.windowed.unmap(part), Unmap::Gone { bytes: 32 * PAGE });
                bench.map(16, 32);
                bench.drive().attach().unwrap();
            }
            works.iter().for_each(|work| await_more(work, 8));
        }
        drop(end);
    });
    assert!(bench.drive().window().idle());
    assert!(bench.sim.enabled() > 5);
}
