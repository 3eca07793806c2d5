//! Operations that do not end by themselves, and what each fence does to them.

use std::io::Read;

use passgate_backends::FenceStep;
use passgate_backends::device::soft::{ClosedWindow, Held};

use super::*;

#[test]
fn what_an_unmap_finds_in_flight_is_said_and_ends_by_cancelling() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    bench.store(0, 1);
    let held = bench.device.hold_write(at(0), 8).unwrap();
    let ticket = ticket(bench.unmap(0, 1), 1);
    assert_eq!(tickets(&bench.domain, 1, SHORT), []);
    assert_eq!(held.outcome(), None);
    bench.device.fence(FenceStep::Drain).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [ticket]);
    assert_eq!(held.outcome(), Some(Err(Errno::CANCELED)));
    assert_eq!(bench.load(0), 1);
    assert!(!readable(bench.domain.wake().unwrap(), Duration::ZERO), "said once");
    // The attach lets it go on.
    bench.map(0, 1);
    bench.device.attach().unwrap();
    bench.dma_store(0, 2).unwrap();
    assert_eq!(bench.unmap(0, 1), gone(1));
}

#[test]
fn what_is_asked_of_a_drained_device_waits_for_the_attach() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    bench.store(0, 1);
    bench.device.fence(FenceStep::Drain).unwrap();
    assert_eq!(bench.unmap(0, 1), gone(1), "nothing is in flight behind a drain");
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| bench.dma_store(0, 2));
        assert!(!readable(bench.domain.wake().unwrap(), SHORT), "a window over a page that stays shared");
        assert_eq!(bench.load(0), 1);
        bench.map(0, 1);
        bench.device.attach().unwrap();
        asked.join().unwrap().unwrap();
    });
    assert_eq!(bench.load(0), 2, "not failed, not lost");
    bench.device.fence(FenceStep::Drain).unwrap();
    bench.device.fence(FenceStep::Reset).unwrap();
    assert!(bench.dma_store(0, 3).is_err(), "behind a reset it fails at once");
    bench.device.attach().unwrap();
    bench.dma_store(0, 3).unwrap();
}

#[test]
fn a_late_write_lands_after_the_unmap_and_only_then_the_ticket_ends() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    let held = bench.device.hold_write(at(0), 8).unwrap();
    let ticket = ticket(bench.unmap(0, 1), 1);
    is_fault(bench.dma_load(0), 0);
    held.finish(&0x1a7e_u64.to_ne_bytes()).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [ticket]);
    assert_eq!(held.wait(LONG), Some(Ok(8)));
    assert_eq!(bench.load(0), 0x1a7e, "the unmap alone proved nothing");
    assert_eq!(held.finish(&[0; 8]).unwrap_err().errno, Errno::PIPE);
}

#[test]
fn a_page_mapped_again_has_a_ticket_for_each_time() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    let first = bench.device.hold_write(at(0), 8).unwrap();
    let one = ticket(bench.unmap(0, 1), 1);
    bench.map(0, 1);
    let second = bench.device.hold_write(at(0), 8).unwrap();
    let two = ticket(bench.unmap(0, 1), 1);
    bench.map(0, 1);
    assert_eq!(bench.unmap(0, 1), gone(1), "this time nothing was in flight");
    // Not in the order in which they began.
    second.finish(&[2; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [two]);
    first.finish(&[1; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [one]);
}

#[test]
fn a_ticket_waits_for_the_last_operation_over_its_range() {
    let bench = Bench::new(4);
    bench.map(0, 4);
    let held: Vec<Held> = [0, 2, 2].map(|page| bench.device.hold_write(at(page), 8).unwrap()).into();
    let ticket = ticket(bench.unmap(0, 4), 4);
    held[1].finish(&[0; 8]).unwrap();
    held[0].finish(&[0; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, SHORT), []);
    held[2].finish(&[0; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [ticket]);
}

#[test]
fn a_ticket_waits_only_for_what_is_in_flight_in_whatever_order_pages_were_mapped() {
    let bench = Bench::new(8);
    // Filled in another order than they are emptied in.
    for page in [6, 2, 7, 0, 5, 1, 4, 3] {
        bench.map(page, 1);
    }
    let held = bench.device.hold_write(at(4), 8).unwrap();
    let first = ticket(bench.unmap(0, 8), 8);
    held.finish(&[0; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [first]);
    // What came with that unmap is not taken for the next one's.
    bench.map(0, 8);
    let held = [bench.device.hold_write(at(1), 8).unwrap(), bench.device.hold_write(at(6), 8).unwrap()];
    let second = ticket(bench.unmap(0, 8), 8);
    held[1].finish(&[0; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, SHORT), []);
    held[0].finish(&[0; 8]).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [second]);
}

#[test]
fn what_has_ended_with_one_unmap_does_not_count_for_the_next() {
    let bench = Bench::new(2);
    let unmapped = [(); 3].map(|()| {
        bench.map(0, 2);
        let held = bench.device.hold_write(at(0), 8).unwrap();
        (held, ticket(bench.unmap(0, 2), 2))
    });
    for (held, ticket) in unmapped {
        held.finish(&[0; 8]).unwrap();
        assert_eq!(tickets(&bench.domain, 1, LONG), [ticket]);
    }
}

#[test]
fn a_ticket_taken_off_the_queue_by_the_device_still_wakes_its_owner() {
    let bench = Bench::new(2);
    bench.map(0, 2);
    let held = bench.device.hold_write(at(0), 8).unwrap();
    let ticket = ticket(bench.unmap(0, 1), 1);
    held.finish(&[0; 8]).unwrap();
    assert_eq!(held.wait(LONG), Some(Ok(8)));
    bench.dma_store(1, 1).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [ticket]);
}

#[test]
fn the_thread_that_began_an_operation_may_end() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    let device = Arc::clone(&bench.device);
    let held = std::thread::spawn(move || device.hold_write(at(0), 8).unwrap()).join().unwrap();
    let ticket = match bench.unmap(0, 1) {
        Unmap::Gone { .. } => return,
        other => ticket(other, 1),
    };
    bench.device.fence(FenceStep::Drain).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [ticket]);
    assert!(held.outcome().is_some());
}

/// A zero-copy send of page 0, which was all 'A', into a closed window.
fn stuck(bench: &Bench) -> (Held, ClosedWindow) {
    bench.map(0, 1);
    bench.memory.write(0, &[b'A'; PAGE as usize]).unwrap();
    let window = ClosedWindow::open().unwrap();
    let near = window.near.try_clone().unwrap();
    let held = bench.device.send_zc(at(0), PAGE as usize, near).unwrap();
    (held, window)
}

#[test]
fn a_send_into_a_closed_window_is_not_ended_by_cancelling_and_sends_what_is_written_later() {
    let bench = Bench::new(1);
    let (held, mut window) = stuck(&bench);
    let ticket = ticket(bench.unmap(0, 1), 1);
    is_fault(bench.dma_load(0), 0);
    bench.device.fence(FenceStep::Drain).unwrap();
    assert_eq!(tickets(&bench.domain, 1, SHORT), []);
    assert_eq!(held.outcome(), None);
    bench.memory.write(0, &[b'B'; PAGE as usize]).unwrap();

    let mut filler = vec![0; window.filler as usize];
    window.far.read_exact(&mut filler).unwrap();
    let mut sent = vec![0; PAGE as usize];
    window.far.read_exact(&mut sent).unwrap();
    assert!(sent.iter().all(|byte| *byte == b'B'), "the peer reads what was written after the unmap");
    assert_eq!(tickets(&bench.domain, 1, LONG), [ticket]);
    assert_eq!(held.outcome(), Some(Ok(PAGE as u32)));
}

#[test]
fn a_send_into_a_closed_window_is_ended_by_a_reset() {
    let bench = Bench::new(2);
    let (held, mut window) = stuck(&bench);
    let ticket = ticket(bench.unmap(0, 1), 1);
    bench.device.fence(FenceStep::Reset).unwrap();
    assert_eq!(tickets(&bench.domain, 1, LONG), [ticket]);
    assert_eq!(held.outcome(), Some(Ok(PAGE as u32)), "taken by the socket, and thrown away there");
    let mut sent = Vec::new();
    let end = window.far.read_to_end(&mut sent);
    assert!(end.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    assert!(!sent.contains(&b'A'));

    // Until it is attached again it does nothing.
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
fn a_device_that_goes_lets_go_of_what_it_held() {
    let bench = Bench::new(2);
    let (_, _window) = stuck(&bench);
    bench.map(1, 1);
    bench.device.hold_write(at(1), 8).unwrap();
    let ticket = ticket(bench.unmap(0, 2), 2);
    let Bench { domain, device, .. } = bench;
    drop(device);
    assert_eq!(tickets(&domain, 1, LONG), [ticket]);
}
