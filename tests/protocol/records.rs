//! The notification channel: datagrams and records that make no sense, and requests out of order.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use passgate::client::{AddMemory, Channel, Client, Outcome, PageState};
use passgate::protocol::record::{Kind, MAX_DEADLINE_MS, MIN_DEADLINE_MS, Record};
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::{Iova, PAGE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use crate::common::fake::Hanging;
use crate::common::{
    LONG, PATIENT_MS, Setup, assert_faults, assert_refused, granted, memory, open_files, pages, substance,
    until,
};

const NOENT: i32 = 2;
const FAULT: i32 = 14;
const BUSY: i32 = 16;
const INVAL: i32 = 22;
const PROTO: i32 = 71;
const MSGSIZE: i32 = 90;

/// The errno of the answer to one datagram, which must be that it was wrong.
fn wrong(channel: &mut Channel, datagram: &[u8]) -> i32 {
    channel.send_bytes(datagram).unwrap();
    let reply = channel.recv().unwrap();
    assert_eq!(reply.kind(), Some(Kind::Wrong), "{reply:?}");
    reply.errno.get()
}

fn begin() -> Record {
    Record { length: U64::new(0x1000), ..Record::new(Kind::Begin, 7) }
}

#[test]
fn datagrams_that_are_no_records_are_answered_and_change_nothing() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(4);
    let (before, known) = (open_files(), substance(&mut client));
    for length in [1, 63, 65, 128, 4096] {
        assert_eq!(wrong(&mut channel, &vec![1; length]), MSGSIZE, "{length} bytes");
    }
    for (change, errno) in [
        ((|r| r.version = 0) as fn(&mut Record), PROTO),
        (|r| r.version = 2, PROTO),
        (|r| r.kind = U16::new(0), PROTO),
        (|r| r.kind = U16::new(7), PROTO),
        // A batch without its ranges.
        (|r| r.kind = U16::new(5), MSGSIZE),
        (|r| r.kind = U16::new(Kind::Verdict as u16), PROTO),
        (|r| r.kind = U16::new(0xffff), PROTO),
        (|r| r.flags = 1, INVAL),
        (|r| r.to = U32::new(3), INVAL),
        (|r| r.length = U64::new_zeroed(), INVAL),
        (|r| r.length = U64::new(1), INVAL),
        (|r| r.gpa = U64::new(1), INVAL),
        (|r| r.gpa = U64::new(u64::MAX - 0xfff), INVAL),
        (|r| r.deadline_or_device = U32::new(MAX_DEADLINE_MS + 1), INVAL),
        (|r| r.deadline_or_device = U32::new(MIN_DEADLINE_MS - 1), INVAL),
        (|r| r.invalidation = U64::new(1), INVAL),
        (|r| r.outcome = U32::new(1), INVAL),
        (|r| r.cause = U32::new(1), INVAL),
        (|r| r.offset = U64::new(1), INVAL),
    ] {
        let mut record = begin();
        change(&mut record);
        assert_eq!(wrong(&mut channel, record.as_bytes()), errno, "{record:?}");
    }
    let mut end = Record::new(Kind::End, 7);
    end.outcome = U32::new(3);
    assert_eq!(wrong(&mut channel, end.as_bytes()), INVAL);
    let mut echo = Record::new(Kind::Echo, 7);
    echo.gpa = U64::new(0x1000);
    assert_eq!(wrong(&mut channel, echo.as_bytes()), INVAL);
    assert_eq!((open_files(), substance(&mut client)), (before, known));
    channel.echo().unwrap();
    let invalidation = granted(channel.begin(pages(0, 4), PageState::Private, None));
    channel.end(invalidation, Outcome::Committed).unwrap();
}

#[test]
fn the_cookie_of_a_wrong_record_comes_back() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(1);
    channel.send(&Record { to: U32::new(9), ..begin() }).unwrap();
    assert_eq!(channel.recv().unwrap().cookie.get(), 7);
}

#[test]
fn a_begin_inside_a_begin_is_refused_and_harms_neither() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(8);
    let first = granted(channel.begin(pages(2, 4), PageState::Private, None));
    for (range, gpa) in [(pages(2, 4), "0x2000"), (pages(3, 1), "0x3000"), (pages(0, 8), "0x2000")] {
        assert_refused(channel.begin(range, PageState::Private, None), BUSY, gpa);
    }
    let beside = granted(channel.begin(pages(6, 2), PageState::Private, None));
    channel.end(first, Outcome::Committed).unwrap();
    channel.end(beside, Outcome::Committed).unwrap();
}

#[test]
fn an_end_counts_once_and_only_from_the_connection_that_began() {
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
fn addresses_without_a_region_cannot_be_begun() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(4);
    assert_refused(channel.begin(pages(4, 1), PageState::Hole, None), FAULT, "0x4000");
    assert_refused(channel.begin(pages(2, 4), PageState::Hole, None), FAULT, "0x4000");
}

#[test]
fn passgate_converts_only_what_was_given_to_it_alone() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(4);
    assert_refused(channel.convert(pages(0, 1), PageState::Hole, None), 1, "refused");
}

#[test]
fn passgate_converts_a_batch_only_where_every_range_was_given_to_it_alone() {
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
fn many_requests_in_flight_are_each_answered_once() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(64);
    for cookie in 0..64 {
        let gpa = U64::new(cookie * 0x1000);
        channel.send(&Record { gpa, cookie: U64::new(cookie), ..begin() }).unwrap();
    }
    let mut seen = [false; 64];
    for _ in 0..64 {
        let reply = channel.recv().unwrap();
        assert_eq!(reply.kind(), Some(Kind::Verdict));
        let cookie = reply.cookie.get() as usize;
        assert!(!std::mem::replace(&mut seen[cookie], true), "{cookie} answered twice");
    }
}

#[test]
fn a_channel_that_is_not_read_delays_nobody_else() {
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(1);
    let mut deaf = setup.connect();
    let theirs = deaf.open_channel().unwrap();
    let flags = rustix::fs::fcntl_getfl(&theirs).unwrap();
    rustix::fs::fcntl_setfl(&theirs, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    // Until both directions are full: the server reads no more of it.
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

/// Conversions whose verdicts are several times what the socket of a channel takes.
const MANY: u64 = 1024;

/// The next record, which must come.
#[track_caller]
fn next(channel: &mut Channel) -> Record {
    let limit = Timespec::try_from(LONG).unwrap();
    let ready = poll(&mut [PollFd::new(&*channel, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ready, 1, "no answer comes");
    channel.recv().unwrap()
}

/// A client whose [`MANY`] conversions, each with its page as its cookie, have all been granted, and which has read no
/// verdict. The client of another connection comes with it.
fn with_many_verdicts_unread() -> (Setup, Client, Client, Channel) {
    let mut hanging = None;
    let setup = Setup::behind(
        || SoftDomain::open().unwrap(),
        |soft| hanging.insert(Hanging::new(soft, Iova(0))).clone(),
        |_| {},
    );
    let hanging = hanging.unwrap();
    let (mut client, mut other) = (setup.connect(), setup.connect());
    let channel = client.open_channel().unwrap();
    // What is begun over memory that is being mapped waits for that.
    hanging.hang_maps();
    std::thread::scope(|scope| {
        let adding = scope.spawn(|| client.add_memory(&AddMemory::shared(0, MANY * PAGE), &[&*memory(MANY)]));
        hanging.wait_inside(1);
        for page in 0..MANY {
            let (gpa, length) = (U64::new(page * PAGE), U64::new(PAGE));
            let deadline_or_device = U32::new(MAX_DEADLINE_MS);
            let record = Record::new(Kind::Begin, page);
            channel.send(&Record { gpa, length, deadline_or_device, ..record }).unwrap();
        }
        until(&mut other, |status| status.open == MANY);
        hanging.release();
        adding.join().unwrap().unwrap();
    });
    until(&mut other, |status| status.totals.done == MANY);
    (setup, client, other, channel)
}

#[test]
fn answers_that_a_socket_has_no_room_for_come_as_it_is_read() {
    let (_setup, _client, _other, mut channel) = with_many_verdicts_unread();
    let mut seen = [false; MANY as usize];
    for _ in 0..MANY {
        let reply = next(&mut channel);
        assert_eq!((reply.kind(), reply.outcome.get()), (Some(Kind::Verdict), 0), "{reply:?}");
        assert!(!std::mem::replace(&mut seen[reply.cookie.get() as usize], true), "{reply:?} came twice");
    }
}

/// What waits for a client is bounded by its requests under way.
#[test]
fn client_that_has_read_a_part_of_its_answers_is_not_read_before_it_has_read_the_rest() {
    let (_setup, _client, mut other, mut channel) = with_many_verdicts_unread();
    // Enough that the socket has room again, and is full again with others that wait.
    for _ in 0..MANY / 3 {
        next(&mut channel);
    }
    let flags = fcntl_getfl(channel.as_fd()).unwrap();
    fcntl_setfl(channel.as_fd(), flags | OFlags::NONBLOCK).unwrap();
    let (mut sent, mut stuck) = (0, 0);
    while stuck < 1000 && sent < 10_000 {
        match channel.send(&Record::new(Kind::Echo, MANY)) {
            Ok(()) => (sent, stuck) = (sent + 1, 0),
            Err(_) => stuck += 1,
        }
        other.status().unwrap();
    }
    assert_eq!(stuck, 1000, "the server took {sent} requests of a client that does not read");
    fcntl_setfl(channel.as_fd(), flags).unwrap();
    // Nothing is lost.
    for _ in 0..MANY - MANY / 3 {
        assert_eq!(next(&mut channel).kind(), Some(Kind::Verdict));
    }
    for _ in 0..sent {
        assert_eq!(next(&mut channel).kind(), Some(Kind::Echoed));
    }
}

#[test]
fn a_client_that_never_pauses_delays_nobody() {
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
        scope.spawn(|| while theirs.recv().unwrap().cookie.get() == 0 {});
        let start = std::time::Instant::now();
        for _ in 0..20 {
            let invalidation = granted(channel.begin(pages(0, 1), PageState::Hole, Some(PATIENT_MS)));
            channel.end(invalidation, Outcome::Committed).unwrap();
        }
        let took = start.elapsed();
        stop.store(true, Ordering::Release);
        // One of them would take that long if it had to wait for a pause.
        assert!(took < LONG, "{took:?} for twenty conversions");
    });
}

#[test]
fn an_end_that_contradicts_itself_quarantines_its_range() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(16);
    let end = |invalidation, (outcome, errno, offset)| Record {
        invalidation: U64::new(invalidation),
        outcome: U32::new(outcome),
        errno: I32::new(errno),
        offset: U64::new(offset),
        ..Record::new(Kind::End, 7)
    };
    // Committed, and a call that failed; part of it; not committed, and part of it; numbers that are none.
    let contradictions = [
        (0, 5, 0),
        (0, 0, PAGE),
        (1, 0, PAGE),
        (1, 5, 2 * PAGE),
        (1, -5, 0),
        (0, 0, u64::MAX),
        (2, 1 << 20, 0),
    ];
    for (count, said) in (1..).zip(contradictions) {
        let page = 2 * (count - 1);
        let invalidation = granted(channel.begin(pages(page, 2), PageState::Private, Some(PATIENT_MS)));
        channel.send(&end(invalidation, said)).unwrap();
        assert_eq!(channel.recv().unwrap().kind(), Some(Kind::Ended), "{said:?}");
        assert_eq!(client.status().unwrap().quarantined, count * 2 * PAGE, "{said:?}");
        assert_refused(channel.begin(pages(page, 2), PageState::Shared, None), 5, "at");
        assert_faults(&setup.device, page);
        let receipt = client.explain(invalidation).unwrap();
        assert!(receipt["outcome"]["unknown"].is_object(), "{receipt}");
    }
    // What a call says that failed and changed nothing, or that got to the end.
    for said in [(1, 5, 0), (0, 0, 2 * PAGE)] {
        let invalidation = granted(channel.begin(pages(14, 2), PageState::Private, Some(PATIENT_MS)));
        channel.send(&end(invalidation, said)).unwrap();
        assert_eq!(channel.recv().unwrap().kind(), Some(Kind::Ended), "{said:?}");
    }
    let status = client.status().unwrap();
    assert_eq!((status.quarantined, status.regions[0].private), (14 * PAGE, 2 * PAGE));
}
