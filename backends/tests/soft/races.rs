//! Devices that do DMA all the time while another thread maps and unmaps.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use passgate_backends::device::soft::StuckDma;

use super::*;

/// The number of unmaps, each followed by a map of the same page.
const ROUNDS: u64 = 100_000;
const PAGES: u64 = 16;

#[test]
fn no_dma_reaches_an_unmapped_page_and_no_ticket_is_lost() {
    let bench = Bench::new(PAGES);
    let stop = AtomicBool::new(false);
    let (hits, faults, holds) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let mut waiting = HashMap::new();
    let (mut ended, mut tickets_seen, mut owned) = (Vec::new(), 0, 0);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let device = bench.domain.device(&format!("soft:{thread}")).unwrap();
            let (stop, hits, faults, holds) = (&stop, &hits, &faults, &holds);
            scope.spawn(move || {
                let mut state = thread;
                let mut late: Option<StuckDma> = None;
                while !stop.load(Ordering::Relaxed) {
                    let page = at(next(&mut state) % PAGES);
                    let result = match next(&mut state) % 64 {
                        // One in 64 stays in flight until the next such round.
                        0 => {
                            if let Some(held) = late.take() {
                                held.finish(&[0xff; 8]).unwrap();
                                assert_eq!(held.wait(EVENT_TIMEOUT), Some(Ok(8)));
                            }
                            device.hold_write(page, 8).map(|held| {
                                late = Some(held);
                                holds.fetch_add(1, Ordering::Relaxed);
                            })
                        }
                        n if n % 2 == 0 => device.read_into(page, &mut [0; 64]),
                        _ => device.write_from(page, &[0xff; 64]),
                    };
                    match result {
                        Ok(()) => hits.fetch_add(1, Ordering::Relaxed),
                        Err(Error::Fault { .. }) => faults.fetch_add(1, Ordering::Relaxed),
                        Err(other) => panic!("{other}"),
                    };
                }
            });
        }
        let mut state = 99;
        for round in 0..ROUNDS {
            let page = next(&mut state) % PAGES;
            match bench.unmap(page, 1) {
                // An operation over an earlier mapping of the page may be in flight; then its owner may not use it yet.
                Unmap::Gone { .. } if !waiting.values().any(|of| *of == page) => {
                    bench.store(page, round);
                    std::hint::spin_loop();
                    assert_eq!(bench.load(page), round, "written by a device after the unmap returned gone");
                    owned += 1;
                }
                Unmap::Gone { .. } => {}
                Unmap::InFlight { ticket, .. } => {
                    tickets_seen += 1;
                    assert_eq!(waiting.insert(ticket, page), None);
                }
                failed => panic!("{failed:?}"),
            }
            bench.map(page, 1);
            bench.domain.poll(&mut ended);
            ended.drain(..).for_each(|ticket| assert!(waiting.remove(&ticket).is_some()));
        }
        stop.store(true, Ordering::Relaxed);
    });
    for ticket in tickets(&bench.domain, waiting.len(), EVENT_TIMEOUT) {
        assert!(waiting.remove(&ticket).is_some());
    }
    assert_eq!(waiting.len(), 0, "a ticket was lost");
    println!(
        "{hits:?} hits, {faults:?} faults, {holds:?} held, {tickets_seen} tickets, {owned} pages checked"
    );
    assert!(hits.into_inner() > 1000 && owned > ROUNDS / 4 && tickets_seen > 0);
}

#[test]
fn busy_device_does_not_wake_the_owner_of_a_ticket() {
    const MIN_OPERATIONS: u64 = 50_000;
    let bench = Bench::new(2);
    bench.map(0, 2);
    let held = bench.device.hold_write(at(0), 8).unwrap();
    let ticket = ticket(bench.unmap(0, 1), 1);
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let wakes = std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Hits and faults alternate.
                let nth = done.fetch_add(1, Ordering::Relaxed);
                let _ = bench.device.read_into(at(nth % 2), &mut [0; 64]);
            }
        });
        let begin = Instant::now();
        let (mut wakes, mut ended) = (0_u64, Vec::new());
        while done.load(Ordering::Relaxed) < MIN_OPERATIONS {
            assert!(begin.elapsed() < EVENT_TIMEOUT, "the device is not busy");
            if readable(bench.domain.wake().unwrap(), QUIET_TIME) {
                wakes += 1;
                bench.domain.poll(&mut ended);
            }
        }
        assert_eq!(ended, []);
        held.finish(&[0; 8]).unwrap();
        assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [ticket], "also while the device is busy");
        stop.store(true, Ordering::Relaxed);
        busy.join().unwrap();
        wakes
    });
    let dma = done.into_inner();
    println!("{wakes} spurious wake-ups in {dma} operations");
    assert!(wakes * 1000 <= dma);
}
