//! The event stream: who was away hears what was told meanwhile, or how much of it is lost.

use std::os::fd::AsFd;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use passgate::client::{AddMemory, Client, Event, Events, Outcome, PageState};
use passgate::serve::{Options, Server};
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;
use rustix::net::{Shutdown, shutdown};

use crate::common::{Setup, alone, granted, memory, open_files, pages, until};
use crate::daemon::LONG;

/// Events that a daemon keeps.
const KEPT: u64 = 8192;

/// One event: a region comes and goes.
fn happens(client: &mut Client, file: &GuestFile) {
    let region = client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[file]).unwrap().region;
    client.remove_memory(region).unwrap();
}

/// The next event. A stream blocks for it, so a test that waits in vain ends its program instead of hanging.
fn next(events: &mut Events) -> Event {
    let (came, waits) = channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if waits.recv_timeout(LONG) == Err(RecvTimeoutError::Timeout) {
            eprintln!("an event never came");
            std::process::abort();
        }
    });
    let event = events.next();
    drop(came);
    watchdog.join().unwrap();
    event.expect("the stream goes on").unwrap()
}

#[test]
fn who_comes_back_hears_what_was_told_meanwhile_and_then_what_is_told() {
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(1);
    let before = open_files();
    let mut events = setup.connect().subscribe().unwrap();
    happens(&mut client, &file);
    let heard = next(&mut events).sequence;
    let instance = events.instance().to_owned();
    assert_eq!((&client.status().unwrap().instance, events.sequence()), (&instance, heard));
    drop(events);
    for _ in 0..100 {
        happens(&mut client, &file);
    }
    let mut events = setup.connect().subscribe_after(heard, Some(&instance)).unwrap();
    assert_eq!(events.sequence(), heard);
    // One that comes now comes behind them.
    happens(&mut client, &file);
    for missed in 1..=101 {
        assert_eq!(next(&mut events).sequence, heard + missed);
    }
    for new in 102..=110 {
        happens(&mut client, &file);
        let event = next(&mut events);
        assert_eq!((event.sequence, event.event.as_str()), (heard + new, "region.closed"));
    }
    assert_eq!(client.status().unwrap().sequence, heard + 110);
    drop(events);
    until(&mut client, |status| status.clients == 1);
    assert_eq!(open_files(), before);
}

#[test]
fn what_is_not_kept_any_more_is_told_as_a_gap_and_a_slow_listener_delays_nobody() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(1);
    let (lost, new) = (10, 6000);
    for _ in 0..KEPT + lost {
        happens(&mut client, &file);
    }
    let mut events = setup.connect().subscribe_after(0, None).unwrap();
    // It does not read yet: what it missed is more than its socket takes, and waits in no queue of its own.
    for _ in 0..new {
        happens(&mut client, &file);
        channel.echo().unwrap();
    }
    let gap = next(&mut events);
    assert_eq!((gap.event.as_str(), gap.sequence), ("gap", lost));
    assert_eq!((&gap.details["lost"], &gap.details["restarted"]), (&lost.into(), &false.into()));
    let mut last = gap.sequence;
    let mut gaps = 0;
    while last < KEPT + lost + new {
        let event = next(&mut events);
        if event.event == "gap" {
            // What it had not read when it was too old.
            let more = event.details["lost"].as_u64().unwrap();
            assert!(more > 0 && more <= new, "{event:?}");
            (last, gaps) = (last + more, gaps + 1);
            assert_eq!(event.sequence, last);
        } else {
            assert_eq!(event.sequence, last + 1, "nothing is left out unsaid");
            last += 1;
        }
    }
    assert_eq!(gaps, 1);
    happens(&mut client, &file);
    assert_eq!(next(&mut events).sequence, last + 1);
}

#[test]
fn routine_events_push_no_range_event_out_and_numbers_stay_one_sequence() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(2);
    let begun = granted(channel.begin(pages(0, 1), PageState::Private, None));
    channel.end(begun, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
    let quarantined = client.status().unwrap().sequence;
    for _ in 0..KEPT + 10 {
        happens(&mut client, &file);
    }
    let last = client.status().unwrap().sequence;
    let mut events = setup.connect().subscribe_after(0, None).unwrap();
    let (mut heard, mut lost, mut ranges, mut times) = (0, 0, Vec::new(), Vec::new());
    while heard < last {
        let event = next(&mut events);
        times.push(event.time_ms);
        if event.event == "gap" {
            let more = event.details["lost"].as_u64().unwrap();
            (heard, lost) = (heard + more, lost + more);
        } else {
            heard += 1;
            if event.event.starts_with("range.") {
                ranges.push((event.sequence, event.event));
            }
        }
        assert_eq!(event.sequence, heard, "nothing is left out unsaid");
    }
    assert_eq!(ranges, [(quarantined, "range.quarantined".to_owned())]);
    // What was told before it is no routine, or has gone.
    assert!((10..10 + quarantined).contains(&lost), "{lost} of {last}");
    assert!(times.iter().all(|time| *time > 1_700_000_000_000));
    happens(&mut client, &file);
    assert_eq!(next(&mut events).sequence, last + 1, "it listens on");
    drop(events);
    let mut events = setup.connect().subscribe_after(quarantined, None).unwrap();
    assert_eq!(next(&mut events).event, "gap");
}

#[test]
fn the_numbers_of_another_daemon_mean_nothing_here() {
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(1);
    for _ in 0..3 {
        happens(&mut client, &file);
    }
    for (after, instance) in [(2, Some("0123456789abcdef")), (1000, None)] {
        let mut events = setup.connect().subscribe_after(after, instance).unwrap();
        happens(&mut client, &file);
        let gap = next(&mut events);
        assert_eq!((gap.event.as_str(), &gap.details["restarted"]), ("gap", &true.into()));
        assert_eq!(gap.details["instance"], client.status().unwrap().instance);
        assert_eq!([(); 3].map(|()| next(&mut events).sequence), [1, 2, 3], "everything is new");
    }
}

#[test]
fn a_stream_that_is_to_resume_goes_on_where_it_broke_and_says_when_the_daemon_is_another() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let file = memory(1);
    let start = || Server::bind(Options::at(&path), SoftDomain::open().unwrap(), vec![]).unwrap();
    let server = start().spawn().unwrap();
    let mut client = Client::connect(&path).unwrap();
    let events = Client::connect(&path).unwrap().subscribe().unwrap();
    let mut events = events.resuming(&path, LONG);
    happens(&mut client, &file);
    assert_eq!(next(&mut events).sequence, 1);

    shutdown(events.as_fd(), Shutdown::Both).unwrap();
    happens(&mut client, &file);
    happens(&mut client, &file);
    assert_eq!(
        [(); 2].map(|()| next(&mut events).sequence),
        [2, 3],
        "the connection is another, nothing is lost"
    );

    let first = events.instance().to_owned();
    server.stop().unwrap();
    let server = start().spawn().unwrap();
    let mut client = Client::connect(&path).unwrap();
    for _ in 0..30 {
        happens(&mut client, &file);
    }
    // What was told while the first one went, then the second.
    let gap = (0..10).map(|_| next(&mut events)).find(|event| event.event == "gap").expect("a gap");
    assert_eq!((&gap.details["restarted"], gap.sequence), (&true.into(), 0));
    assert_eq!(next(&mut events).sequence, 1);
    assert_ne!(events.instance(), first);

    // Without a daemon it ends, once its patience has.
    let mut events = events.resuming(&path, Duration::from_millis(1));
    server.stop().unwrap();
    assert!(events.by_ref().all(|event| event.is_ok()));
    assert!(events.next().is_none());
}
