//! Operations that do not end by themselves, and the effect of each fence on them.

use std::io::Read;

use passgate_backends::Step;
use passgate_backends::device::soft::{ClosedWindow, StuckDma};

use super::*;

#[test]
fn operation_in_flight_is_reported_and_ends_by_a_drain() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    bench.store(0, 1);
    let held = bench.device.hold_write(at(0), 8).unwrap();
    let ticket = ticket(bench.unmap(0, 1), 1);
    assert_eq!(tickets(&bench.domain, 1, QUIET_TIME), []);
    assert_eq!(held.outcome(), None);
    bench.device.fence(Step::Drain).unwrap();
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [ticket]);
    assert_eq!(held.outcome(), Some(Err(Errno::CANCELED)));
    assert_eq!(bench.load(0), 1);
    assert!(!readable(bench.domain.wake().unwrap(), Duration::ZERO), "reported once");
    // After the attach the device does DMA again.
    bench.map(0, 1);
    bench.device.attach().unwrap();
    bench.dma_store(0, 2).unwrap();
    assert_eq!(bench.unmap(0, 1), gone(1));
}

#[test]
fn dma_on_a_drained_device_waits_for_the_attach() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    bench.store(0, 1);
    bench.device.fence(Step::Drain).unwrap();
    assert_eq!(bench.unmap(0, 1), gone(1), "nothing is in flight after a drain");
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| bench.dma_store(0, 2));
        assert!(
            !readable(bench.domain.wake().unwrap(), QUIET_TIME),
            "a gap in DMA to a page that stays shared"
        );
        assert_eq!(bench.load(0), 1);
        bench.map(0, 1);
        bench.device.attach().unwrap();
        asked.join().unwrap().unwrap();
    });
    assert_eq!(bench.load(0), 2, "not failed, not lost");
    bench.device.fence(Step::Drain).unwrap();
    bench.device.fence(Step::Reset).unwrap();
    assert!(bench.dma_store(0, 3).is_err(), "after a reset it fails at once");
    bench.device.attach().unwrap();
    bench.dma_store(0, 3).unwrap();
}

#[test]
fn late_write_completes_after_the_unmap_and_ends_its_ticket() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    let held = bench.device.hold_write(at(0), 8).unwrap();
    let ticket = ticket(bench.unmap(0, 1), 1);
    is_fault(bench.dma_load(0), 0);
    held.finish(&0x1a7e_u64.to_ne_bytes()).unwrap();
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [ticket]);
    assert_eq!(held.wait(EVENT_TIMEOUT), Some(Ok(8)));
    assert_eq!(bench.load(0), 0x1a7e, "the unmap alone proved nothing");
    assert_eq!(held.finish(&[0; 8]).unwrap_err().errno, Errno::PIPE);
}

#[test]
fn each_unmap_of_a_page_has_its_own_ticket() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    let first = bench.device.hold_write(at(0), 8).unwrap();
    let one = ticket(bench.unmap(0, 1), 1);
    bench.map(0, 1);
    let second = bench.device.hold_write(at(0), 8).unwrap();
    let two = ticket(bench.unmap(0, 1), 1);
    bench.map(0, 1);
    assert_eq!(bench.unmap(0, 1), gone(1), "this time nothing was in flight");
    // They end in another order than they began.
    second.finish(&[2; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [two]);
    first.finish(&[1; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [one]);
}

#[test]
fn ticket_ends_with_the_last_operation_over_its_range() {
    let bench = Bench::new(4);
    bench.map(0, 4);
    let held: Vec<StuckDma> = [0, 2, 2].map(|page| bench.device.hold_write(at(page), 8).unwrap()).into();
    let ticket = ticket(bench.unmap(0, 4), 4);
    held[1].finish(&[0; 8]).unwrap();
    held[0].finish(&[0; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, QUIET_TIME), []);
    held[2].finish(&[0; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [ticket]);
}

#[test]
fn ticket_covers_exactly_the_operations_in_flight_in_any_slot_order() {
    let bench = Bench::new(8);
    // The slots are filled in another order than they are emptied.
    for page in [6, 2, 7, 0, 5, 1, 4, 3] {
        bench.map(page, 1);
    }
    let held = bench.device.hold_write(at(4), 8).unwrap();
    let first = ticket(bench.unmap(0, 8), 8);
    held.finish(&[0; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [first]);
    // The tags of that unmap must not count for the next one.
    bench.map(0, 8);
    let held = [bench.device.hold_write(at(1), 8).unwrap(), bench.device.hold_write(at(6), 8).unwrap()];
    let second = ticket(bench.unmap(0, 8), 8);
    held[1].finish(&[0; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, QUIET_TIME), []);
    held[0].finish(&[0; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [second]);
}

#[test]
fn tags_of_one_unmap_do_not_count_for_the_next() {
    let bench = Bench::new(2);
    let unmapped = [(); 3].map(|()| {
        bench.map(0, 2);
        let held = bench.device.hold_write(at(0), 8).unwrap();
        (held, ticket(bench.unmap(0, 2), 2))
    });
    for (held, ticket) in unmapped {
        held.finish(&[0; 8]).unwrap();
        assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [ticket]);
    }
}

#[test]
fn ticket_reaped_by_the_device_wakes_the_owner() {
    let bench = Bench::new(2);
    bench.map(0, 2);
    let held = bench.device.hold_write(at(0), 8).unwrap();
    let ticket = ticket(bench.unmap(0, 1), 1);
    held.finish(&[0; 8]).unwrap();
    assert_eq!(held.wait(EVENT_TIMEOUT), Some(Ok(8)));
    bench.dma_store(1, 1).unwrap();
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [ticket]);
}

#[test]
fn thread_that_began_an_operation_may_exit() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    let device = Arc::clone(&bench.device);
    let held = std::thread::spawn(move || device.hold_write(at(0), 8).unwrap()).join().unwrap();
    let ticket = match bench.unmap(0, 1) {
        Unmap::Gone { .. } => return,
        other => ticket(other, 1),
    };
    bench.device.fence(Step::Drain).unwrap();
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [ticket]);
    assert!(held.outcome().is_some());
}

/// Starts a zero-copy send of page 0, filled with 'A', to a peer whose receive window is zero.
fn stuck_send(bench: &Bench) -> (StuckDma, ClosedWindow) {
    bench.map(0, 1);
    bench.memory.write(0, &[b'A'; PAGE as usize]).unwrap();
    let connection = ClosedWindow::open().unwrap();
    let near = connection.near.try_clone().unwrap();
    let held = bench.device.send_zc(at(0), PAGE as usize, near).unwrap();
    (held, connection)
}

#[test]
fn stalled_send_survives_a_drain_and_sends_later_content() {
    let bench = Bench::new(1);
    let (held, mut connection) = stuck_send(&bench);
    let ticket = ticket(bench.unmap(0, 1), 1);
    is_fault(bench.dma_load(0), 0);
    bench.device.fence(Step::Drain).unwrap();
    assert_eq!(tickets(&bench.domain, 1, QUIET_TIME), []);
    assert_eq!(held.outcome(), None);
    bench.memory.write(0, &[b'B'; PAGE as usize]).unwrap();

    let mut filler = vec![0; connection.filler as usize];
    connection.far.read_exact(&mut filler).unwrap();
    let mut sent = vec![0; PAGE as usize];
    connection.far.read_exact(&mut sent).unwrap();
    assert!(sent.iter().all(|byte| *byte == b'B'), "the peer reads what was written after the unmap");
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [ticket]);
    assert_eq!(held.outcome(), Some(Ok(PAGE as u32)));
}

#[test]
fn stalled_send_ends_by_a_reset() {
    let bench = Bench::new(2);
    let (held, mut connection) = stuck_send(&bench);
    let ticket = ticket(bench.unmap(0, 1), 1);
    bench.device.fence(Step::Reset).unwrap();
    assert_eq!(tickets(&bench.domain, 1, EVENT_TIMEOUT), [ticket]);
    assert_eq!(held.outcome(), Some(Ok(PAGE as u32)), "queued in the socket, and discarded there");
    let mut sent = Vec::new();
    let end = connection.far.read_to_end(&mut sent);
    assert!(end.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    assert!(!sent.contains(&b'A'));

    // It does no DMA until it is attached again.
    bench.map(1, 1);
    let refused = bench.dma_store(1, 1).unwrap_err();
    assert!(refused.to_string().contains("attach"), "{refused}");
    assert!(bench.device.hold_write(at(1), 8).is_err());
    assert_eq!(bench.load(1), 0);
    bench.device.attach().unwrap();
    bench.dma_store(1, 1).unwrap();
    assert_eq!(bench.load(1), 1);
}

#[test]
fn dropped_device_ends_its_held_operations() {
    let bench = Bench::new(2);
    let (_, _connection) = stuck_send(&bench);
    bench.map(1, 1);
    bench.device.hold_write(at(1), 8).unwrap();
    let ticket = ticket(bench.unmap(0, 2), 2);
    let Bench { domain, device, .. } = bench;
    drop(device);
    assert_eq!(tickets(&domain, 1, EVENT_TIMEOUT), [ticket]);
}
