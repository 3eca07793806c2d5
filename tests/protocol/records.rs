//! The notification channel: malformed datagrams and records, requests out of order, and clients that do not read.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::{Iova, PAGE};
use passgate_client::protocol::record::{Kind, MAX_DEADLINE_MS, MIN_DEADLINE_MS, Record};
use passgate_client::{AddMemory, Channel, Client, Outcome, PageState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::common::hanging::HangingDomain;
use crate::common::{
    GRANT_DEADLINE_MS, Setup, TIMEOUT, assert_faults, assert_quarantined, assert_refused, granted, memory,
    open_files, pages, status_without_wrong_count, wait_for_status,
};

const NOENT: i32 = 2;
const FAULT: i32 = 14;
const BUSY: i32 = 16;
const INVAL: i32 = 22;
const PROTO: i32 = 71;
const MSGSIZE: i32 = 90;

/// Sends a datagram that must be answered as wrong; returns the errno of the answer.
fn wrong_errno(channel: &mut Channel, datagram: &[u8]) -> i32 {
    channel.send_bytes(datagram).unwrap();
    let reply = channel.recv().unwrap();
    assert_eq!(reply.kind(), Some(Kind::Wrong), "{reply:?}");
    reply.errno
}

/// Returns a valid begin of the first page.
fn begin() -> Record {
    Record { length: 0x1000, ..Record::new(Kind::Begin, 7) }
}

#[test]
fn malformed_records_are_answered_and_change_nothing() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(4);
    let (before, status_before) = (open_files(), status_without_wrong_count(&mut client));
    for length in [1, 63, 65, 128, 4096] {
        assert_eq!(wrong_errno(&mut channel, &vec![1; length]), MSGSIZE, "{length} bytes");
    }
    for (change, errno) in [
        ((|r| r.version = 0) as fn(&mut Record), PROTO),
        (|r| r.version = 2, PROTO),
        (|r| r.kind = 0, PROTO),
        (|r| r.kind = 7, PROTO),
        // BeginMany without its ranges.
        (|r| r.kind = 5, MSGSIZE),
        (|r| r.kind = Kind::Verdict as u16, PROTO),
        (|r| r.kind = 0xffff, PROTO),
        (|r| r.flags = 1, INVAL),
        (|r| r.to = 3, INVAL),
        (|r| r.length = 0, INVAL),
        (|r| r.length = 1, INVAL),
        (|r| r.gpa = 1, INVAL),
        (|r| r.gpa = u64::MAX - 0xfff, INVAL),
        (|r| r.deadline_or_device = MAX_DEADLINE_MS + 1, INVAL),
        (|r| r.deadline_or_device = MIN_DEADLINE_MS - 1, INVAL),
        (|r| r.invalidation = 1, INVAL),
        (|r| r.outcome = 1, INVAL),
        (|r| r.cause = 1, INVAL),
        (|r| r.offset = 1, INVAL),
    ] {
        let mut record = begin();
        change(&mut record);
        assert_eq!(wrong_errno(&mut channel, &record.to_bytes()), errno, "{record:?}");
    }
    let mut end = Record::new(Kind::End, 7);
    end.outcome = 3;
    assert_eq!(wrong_errno(&mut channel, &end.to_bytes()), INVAL);
    let mut echo = Record::new(Kind::Echo, 7);
    echo.gpa = 0x1000;
    assert_eq!(wrong_errno(&mut channel, &echo.to_bytes()), INVAL);
    assert_eq!((open_files(), status_without_wrong_count(&mut client)), (before, status_before));
    channel.echo().unwrap();
    let invalidation = granted(channel.begin(pages(0, 4), PageState::Private, None));
    channel.end(invalidation, Outcome::Committed).unwrap();
}

#[test]
fn cookie_of_wrong_record_is_returned() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(1);
    channel.send(&Record { to: 9, ..begin() }).unwrap();
    assert_eq!(channel.recv().unwrap().cookie, 7);
}

#[test]
fn overlapping_begin_is_refused() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(8);
    let first = granted(channel.begin(pages(2, 4), PageState::Private, None));
    for (range, gpa) in [(pages(2, 4), "0x2000"), (pages(3, 1), "0x3000"), (pages(0, 8), "0x2000")] {
        assert_refused(channel.begin(range, PageState::Private, None), BUSY, gpa);
    }
    let neighbour = granted(channel.begin(pages(6, 2), PageState::Private, None));
    channel.end(first, Outcome::Committed).unwrap();
    channel.end(neighbour, Outcome::Committed).unwrap();
}

#[test]
fn end_counts_once_and_only_from_its_connection() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(2);
    assert_refused(channel.end(1, Outcome::Committed), NOENT, "refused");
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, None));
    let mut other = setup.connect();
    let mut their_channel = other.open_channel().unwrap();
    assert_refused(their_channel.end(invalidation, Outcome::Committed), NOENT, "refused");
    assert_eq!(client.status().unwrap().open, 1);
    channel.end(invalidation, Outcome::Committed).unwrap();
    assert_refused(channel.end(invalidation, Outcome::Committed), NOENT, "refused");
    assert_eq!(client.status().unwrap().open, 0);
}

#[test]
fn begin_outside_regions_is_refused() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(4);
    assert_refused(channel.begin(pages(4, 1), PageState::Hole, None), FAULT, "0x4000");
    assert_refused(channel.begin(pages(2, 4), PageState::Hole, None), FAULT, "0x4000");
}

#[test]
fn passgate_converts_only_sole_mapper_ranges() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(4);
    assert_refused(channel.convert(pages(0, 1), PageState::Hole, None), 1, "refused");
}

#[test]
fn passgate_converts_batch_only_if_all_ranges_are_sole_mapper() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(4);
    let own = AddMemory { sole_mapper: true, ..AddMemory::shared(4 * PAGE, 4 * PAGE) };
    client.add_memory(&own, &[&*memory(4)]).unwrap();
    client.add_memory(&AddMemory::shared(8 * PAGE, 4 * PAGE), &[&*memory(4)]).unwrap();
    granted(channel.convert_many(&[pages(4, 1), pages(6, 1)], PageState::Hole, None));
    assert_refused(channel.convert_many(&[pages(5, 1), pages(9, 1)], PageState::Hole, None), 1, "refused");
    assert_refused(channel.convert(pages(7, 2), PageState::Hole, None), 1, "refused");
    assert_refused(channel.convert(pages(3, 2), PageState::Hole, None), 1, "refused");
}

#[test]
fn pipelined_requests_are_each_answered_once() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(64);
    for cookie in 0..64 {
        let gpa = cookie * 0x1000;
        channel.send(&Record { gpa, cookie, ..begin() }).unwrap();
    }
    let mut seen = [false; 64];
    for _ in 0..64 {
        let reply = channel.recv().unwrap();
        assert_eq!(reply.kind(), Some(Kind::Verdict));
        let cookie = reply.cookie as usize;
        assert!(!std::mem::replace(&mut seen[cookie], true), "{cookie} answered twice");
    }
}

#[test]
fn unread_channel_delays_nobody_else() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(1);
    let mut unread = setup.connect();
    let theirs = unread.open_channel().unwrap();
    let flags = rustix::fs::fcntl_getfl(&theirs).unwrap();
    rustix::fs::fcntl_setfl(&theirs, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    // Until both directions of the socket are full: the server reads no more of this channel.
    let mut stuck = 0;
    while stuck < 1000 {
        match theirs.send(&Record::new(Kind::Echo, 0)) {
            Ok(()) => stuck = 0,
            Err(_) => stuck += 1,
        }
        channel.echo().unwrap();
    }
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Hole, None));
    channel.end(invalidation, Outcome::Committed).unwrap();
}

/// The number of conversions: their verdicts are several times as large as the socket buffer of a channel.
const CONVERSIONS: u64 = 1024;

/// Returns the next record; panics if none arrives.
#[track_caller]
fn next(channel: &mut Channel) -> Record {
    let limit = Timespec::try_from(TIMEOUT).unwrap();
    let ready = poll(&mut [PollFd::new(&*channel, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ready, 1, "no answer arrives");
    channel.recv().unwrap()
}

/// Returns a client whose [`CONVERSIONS`] conversions, each with its page number as its cookie, have all been granted, and which
/// has read no verdict; and the client of another connection.
fn client_with_unread_verdicts() -> (Setup, Client, Client, Channel) {
    let mut hanging = None;
    let setup = Setup::around_soft_domain(
        || SoftDomain::open().unwrap(),
        |soft| hanging.insert(HangingDomain::new(soft, Iova(0))).clone(),
        |_| {},
    );
    let hanging = hanging.unwrap();
    let (mut client, mut other) = (setup.connect(), setup.connect());
    let channel = client.open_channel().unwrap();
    // A begin over memory that is being mapped waits for the map: so all begins are pending at the same time.
    hanging.hang_maps();
    std::thread::scope(|scope| {
        let adding = scope
            .spawn(|| client.add_memory(&AddMemory::shared(0, CONVERSIONS * PAGE), &[&*memory(CONVERSIONS)]));
        hanging.wait_hanging(1);
        for page in 0..CONVERSIONS {
            let (gpa, length) = (page * PAGE, PAGE);
            let deadline_or_device = MAX_DEADLINE_MS;
            let record = Record::new(Kind::Begin, page);
            channel.send(&Record { gpa, length, deadline_or_device, ..record }).unwrap();
        }
        wait_for_status(&mut other, |status| status.open == CONVERSIONS);
        hanging.resume_calls();
        adding.join().unwrap().unwrap();
    });
    wait_for_status(&mut other, |status| status.totals.done == CONVERSIONS);
    (setup, client, other, channel)
}

#[test]
fn answers_beyond_socket_buffer_arrive_as_it_is_read() {
    let (_setup, _client, _other, mut channel) = client_with_unread_verdicts();
    let mut seen = [false; CONVERSIONS as usize];
    for _ in 0..CONVERSIONS {
        let reply = next(&mut channel);
        assert_eq!((reply.kind(), reply.outcome), (Some(Kind::Verdict), 0), "{reply:?}");
        assert!(!std::mem::replace(&mut seen[reply.cookie as usize], true), "{reply:?} came twice");
    }
}

/// The answers that are queued for a client are bounded by its requests in progress.
#[test]
fn client_with_unread_answers_is_not_read() {
    let (_setup, _client, mut other, mut channel) = client_with_unread_verdicts();
    // Enough that the server writes queued answers to the socket until it is full again.
    for _ in 0..CONVERSIONS / 3 {
        next(&mut channel);
    }
    let flags = fcntl_getfl(channel.as_fd()).unwrap();
    fcntl_setfl(channel.as_fd(), flags | OFlags::NONBLOCK).unwrap();
    let (mut sent, mut stuck) = (0, 0);
    while stuck < 1000 && sent < 10_000 {
        match channel.send(&Record::new(Kind::Echo, CONVERSIONS)) {
            Ok(()) => (sent, stuck) = (sent + 1, 0),
            Err(_) => stuck += 1,
        }
        other.status().unwrap();
    }
    assert_eq!(stuck, 1000, "the server has read {sent} requests of a client that does not read");
    fcntl_setfl(channel.as_fd(), flags).unwrap();
    // No answer is lost.
    for _ in 0..CONVERSIONS - CONVERSIONS / 3 {
        assert_eq!(next(&mut channel).kind(), Some(Kind::Verdict));
    }
    for _ in 0..sent {
        assert_eq!(next(&mut channel).kind(), Some(Kind::Echoed));
    }
}

#[test]
fn continuously_sending_client_delays_nobody() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(1);
    let mut busy = setup.connect();
    let mut theirs = busy.open_channel().unwrap();
    let sending = std::os::fd::AsFd::as_fd(&theirs).try_clone_to_owned().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let sending = Channel::from_fd(sending);
            while !stop.load(Ordering::Acquire) {
                sending.send(&Record::new(Kind::Echo, 0)).unwrap();
            }
            sending.send(&Record::new(Kind::Echo, 1)).unwrap();
        });
        scope.spawn(|| while theirs.recv().unwrap().cookie == 0 {});
        let start = std::time::Instant::now();
        for _ in 0..20 {
            let invalidation = granted(channel.begin(pages(0, 1), PageState::Hole, Some(GRANT_DEADLINE_MS)));
            channel.end(invalidation, Outcome::Committed).unwrap();
        }
        let took = start.elapsed();
        stop.store(true, Ordering::Release);
        // A single conversion would exceed this limit if it had to wait for a pause of the busy client.
        assert!(took < TIMEOUT, "{took:?} for twenty conversions");
    });
}

#[test]
fn contradictory_end_quarantines_its_range() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(16);
    let end = |invalidation, (outcome, errno, offset)| Record {
        invalidation,
        outcome,
        errno,
        offset,
        ..Record::new(Kind::End, 7)
    };
    // (outcome, errno, offset): committed with an errno; committed in part; not committed but in part; invalid numbers.
    let contradictions = [
        (0, 5, 0),
        (0, 0, PAGE),
        (1, 0, PAGE),
        (1, 5, 2 * PAGE),
        (1, -5, 0),
        (0, 0, u64::MAX),
        (2, 1 << 20, 0),
    ];
    for (count, end_fields) in (1..).zip(contradictions) {
        let page = 2 * (count - 1);
        let invalidation =
            granted(channel.begin(pages(page, 2), PageState::Private, Some(GRANT_DEADLINE_MS)));
        channel.send(&end(invalidation, end_fields)).unwrap();
        assert_eq!(channel.recv().unwrap().kind(), Some(Kind::Ended), "{end_fields:?}");
        assert_eq!(client.status().unwrap().quarantined, count * 2 * PAGE, "{end_fields:?}");
        assert_quarantined(channel.begin(pages(page, 2), PageState::Shared, None), page * PAGE);
        assert_faults(&setup.device, page);
        let receipt = client.explain(invalidation).unwrap();
        assert!(receipt["outcome"]["unknown"].is_object(), "{receipt}");
    }
    // Consistent ends: a call that failed and changed nothing, and one that changed the whole range.
    for end_fields in [(1, 5, 0), (0, 0, 2 * PAGE)] {
        let invalidation = granted(channel.begin(pages(14, 2), PageState::Private, Some(GRANT_DEADLINE_MS)));
        channel.send(&end(invalidation, end_fields)).unwrap();
        assert_eq!(channel.recv().unwrap().kind(), Some(Kind::Ended), "{end_fields:?}");
    }
    let status = client.status().unwrap();
    assert_eq!((status.quarantined, status.regions[0].private), (14 * PAGE, 2 * PAGE));
}
