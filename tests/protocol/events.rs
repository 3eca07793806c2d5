//! The event stream: a client that resubscribes receives the events that it missed, or a gap with the number of lost ones.

use std::os::fd::AsFd;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use passgate::serve::{Options, Server};
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;
use passgate_client::{AddMemory, Client, Event, Events, Outcome, PageState};
use rustix::net::{Shutdown, shutdown};

use crate::common::{Setup, exclusive, granted, memory, open_files, pages, wait_for_status};
use crate::daemon::TIMEOUT;

/// The number of events of each kind that a daemon stores for resubscribers.
const EVENT_HISTORY: u64 = 8192;

/// Causes one event: a region is added and removed.
fn add_and_remove_region(client: &mut Client, file: &GuestFile) {
    let region = client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[file]).unwrap().region;
    client.remove_memory(region).unwrap();
}

/// Returns the next event. The stream blocks until it comes, so a watchdog ends the program instead of letting it hang.
fn next(events: &mut Events) -> Event {
    let (done, is_done) = channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if is_done.recv_timeout(TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            eprintln!("an event never came");
            std::process::abort();
        }
    });
    let event = events.next();
    drop(done);
    watchdog.join().unwrap();
    event.expect("the stream has ended").unwrap()
}

#[test]
fn resubscriber_receives_missed_events_then_new_ones() {
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(1);
    let before = open_files();
    let mut events = setup.connect().subscribe().unwrap();
    add_and_remove_region(&mut client, &file);
    let last_received = next(&mut events).sequence;
    let instance = events.instance().to_owned();
    assert_eq!((&client.status().unwrap().instance, events.sequence()), (&instance, last_received));
    drop(events);
    for _ in 0..100 {
        add_and_remove_region(&mut client, &file);
    }
    let mut events = setup.connect().subscribe_after(last_received, Some(&instance)).unwrap();
    assert_eq!(events.sequence(), last_received);
    // A new event comes after the missed ones.
    add_and_remove_region(&mut client, &file);
    for missed in 1..=101 {
        assert_eq!(next(&mut events).sequence, last_received + missed);
    }
    for new in 102..=110 {
        add_and_remove_region(&mut client, &file);
        let event = next(&mut events);
        assert_eq!((event.sequence, event.event.as_str()), (last_received + new, "region.closed"));
    }
    assert_eq!(client.status().unwrap().sequence, last_received + 110);
    drop(events);
    wait_for_status(&mut client, |status| status.clients == 1);
    assert_eq!(open_files(), before);
}

#[test]
fn dropped_events_are_reported_as_gap_and_slow_listener_delays_nobody() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(1);
    let (lost, new) = (10, 6000);
    for _ in 0..EVENT_HISTORY + lost {
        add_and_remove_region(&mut client, &file);
    }
    let mut events = setup.connect().subscribe_after(0, None).unwrap();
    // The listener does not read yet. It has missed more than its socket can buffer, and there is no queue for it.
    for _ in 0..new {
        add_and_remove_region(&mut client, &file);
        channel.echo().unwrap();
    }
    let gap = next(&mut events);
    assert_eq!((gap.event.as_str(), gap.sequence), ("gap", lost));
    assert_eq!((&gap.details["lost"], &gap.details["restarted"]), (&lost.into(), &false.into()));
    let mut last = gap.sequence;
    let mut gaps = 0;
    while last < EVENT_HISTORY + lost + new {
        let event = next(&mut events);
        if event.event == "gap" {
            // Events that were dropped from the history before the listener has read them.
            let missing = event.details["lost"].as_u64().unwrap();
            assert!(missing > 0 && missing <= new, "{event:?}");
            (last, gaps) = (last + missing, gaps + 1);
            assert_eq!(event.sequence, last);
        } else {
            assert_eq!(event.sequence, last + 1, "an event is missing without a gap");
            last += 1;
        }
    }
    assert_eq!(gaps, 1);
    add_and_remove_region(&mut client, &file);
    assert_eq!(next(&mut events).sequence, last + 1);
}

#[test]
fn routine_events_do_not_evict_range_events() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(2);
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, None));
    channel.end(invalidation, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
    let quarantined = client.status().unwrap().sequence;
    for _ in 0..EVENT_HISTORY + 10 {
        add_and_remove_region(&mut client, &file);
    }
    let last = client.status().unwrap().sequence;
    let mut events = setup.connect().subscribe_after(0, None).unwrap();
    let (mut received, mut lost, mut ranges, mut times) = (0, 0, Vec::new(), Vec::new());
    while received < last {
        let event = next(&mut events);
        times.push(event.time_ms);
        if event.event == "gap" {
            let missing = event.details["lost"].as_u64().unwrap();
            (received, lost) = (received + missing, lost + missing);
        } else {
            received += 1;
            if event.event.starts_with("range.") {
                ranges.push((event.sequence, event.event));
            }
        }
        assert_eq!(event.sequence, received, "an event is missing without a gap");
    }
    assert_eq!(ranges, [(quarantined, "range.quarantined".to_owned())]);
    // The events before it are either not routine, and stored, or were dropped.
    assert!((10..10 + quarantined).contains(&lost), "{lost} of {last}");
    assert!(times.iter().all(|time| *time > 1_700_000_000_000));
    add_and_remove_region(&mut client, &file);
    assert_eq!(next(&mut events).sequence, last + 1, "the stream must continue");
    drop(events);
    let mut events = setup.connect().subscribe_after(quarantined, None).unwrap();
    assert_eq!(next(&mut events).event, "gap");
}

#[test]
fn sequence_of_another_instance_is_reported_as_restart() {
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(1);
    for _ in 0..3 {
        add_and_remove_region(&mut client, &file);
    }
    for (after, instance) in [(2, Some("0123456789abcdef")), (1000, None)] {
        let mut events = setup.connect().subscribe_after(after, instance).unwrap();
        add_and_remove_region(&mut client, &file);
        let gap = next(&mut events);
        assert_eq!((gap.event.as_str(), &gap.details["restarted"]), ("gap", &true.into()));
        assert_eq!(gap.details["instance"], client.status().unwrap().instance);
        assert_eq!(
            [(); 3].map(|()| next(&mut events).sequence),
            [1, 2, 3],
            "every event of this instance must be sent"
        );
    }
}

#[test]
fn resuming_stream_continues_after_break_and_reports_new_instance() {
    let _exclusive = exclusive();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let file = memory(1);
    let start = || Server::bind(Options::at(&path), SoftDomain::open().unwrap(), vec![]).unwrap();
    let server = start().spawn().unwrap();
    let mut client = Client::connect(&path).unwrap();
    let events = Client::connect(&path).unwrap().subscribe().unwrap();
    let mut events = events.resuming(&path, TIMEOUT);
    add_and_remove_region(&mut client, &file);
    assert_eq!(next(&mut events).sequence, 1);

    shutdown(events.as_fd(), Shutdown::Both).unwrap();
    add_and_remove_region(&mut client, &file);
    add_and_remove_region(&mut client, &file);
    assert_eq!([(); 2].map(|()| next(&mut events).sequence), [2, 3], "a new connection must lose no event");

    let first = events.instance().to_owned();
    server.stop().unwrap();
    let server = start().spawn().unwrap();
    let mut client = Client::connect(&path).unwrap();
    for _ in 0..30 {
        add_and_remove_region(&mut client, &file);
    }
    // First the events of the ending daemon, then the gap, then those of the new daemon.
    let gap = (0..10).map(|_| next(&mut events)).find(|event| event.event == "gap").expect("a gap");
    assert_eq!((&gap.details["restarted"], gap.sequence), (&true.into(), 0));
    assert_eq!(next(&mut events).sequence, 1);
    assert_ne!(events.instance(), first);

    // Without a daemon the stream ends after its timeout.
    let mut events = events.resuming(&path, Duration::from_millis(1));
    server.stop().unwrap();
    assert!(events.by_ref().all(|event| event.is_ok()));
    assert!(events.next().is_none());
}
