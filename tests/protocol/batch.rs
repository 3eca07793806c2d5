//! Batches over the notification channel: many ranges in one datagram, and many records in flight.

use std::collections::BTreeMap;

use passgate_backends::Device;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};
use passgate_client::protocol::batch::{MAX_DATAGRAM, MAX_RANGES, datagram};
use passgate_client::protocol::record::{Kind, Record};
use passgate_client::{Answer, Outcome, PageState};

use crate::common::{
    GRANT_DEADLINE_MS, Setup, assert_refused, granted, open_files, pages, status_without_wrong_count,
};

const TOO_BIG: i32 = 7;
const FAULT: i32 = 14;
const BUSY: i32 = 16;
const INVAL: i32 = 22;
const MSGSIZE: i32 = 90;

/// Returns `count` ranges of one page, every `step`th page from page 0 on.
fn every(step: u64, count: u64) -> Vec<PageRange<Gpa>> {
    (0..count).map(|n| pages(n * step, 1)).collect()
}

#[test]
fn batch_is_granted_and_ended_as_one() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(8192);
    let ranges = every(2, MAX_RANGES as u64);
    let reaches = |page: u64| setup.device.dma_read(Iova(page * PAGE), 8).is_ok();
    assert!(reaches(0) && reaches(1));
    let invalidation = granted(channel.begin_many(&ranges, PageState::Private, Some(GRANT_DEADLINE_MS)));
    assert!(!reaches(0) && reaches(1) && !reaches(8190) && reaches(8191));
    for range in &ranges {
        file.punch(range.start().0, PAGE).unwrap();
    }
    channel.end(invalidation, Outcome::Committed).unwrap();
    let status = client.status().unwrap();
    assert_eq!((status.regions[0].private, status.regions[0].shared), (4096 * PAGE, 4096 * PAGE));
    assert_eq!((status.totals.done, status.open), (1, 0));
    let receipt = client.explain(invalidation).unwrap();
    assert_eq!((&receipt["ranges"], &receipt["length"]), (&4096.into(), &(4096 * PAGE).into()));
    let invalidation = granted(channel.begin_many(&ranges, PageState::Shared, Some(GRANT_DEADLINE_MS)));
    channel.end(invalidation, Outcome::Committed).unwrap();
    assert!(reaches(0) && reaches(8190));
}

#[test]
fn bad_range_refuses_whole_batch() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(64);
    let open_invalidation = granted(channel.begin(pages(20, 1), PageState::Private, None));
    let status_before = status_without_wrong_count(&mut client);
    let mut ranges = every(2, 32);
    assert_refused(channel.begin_many(&ranges, PageState::Private, None), BUSY, "0x14000");
    ranges.push(pages(64, 1));
    ranges.remove(10);
    assert_refused(channel.begin_many(&ranges, PageState::Private, None), FAULT, "0x40000");
    assert_eq!(status_without_wrong_count(&mut client), status_before);
    channel.end(open_invalidation, Outcome::NotCommitted).unwrap();
    ranges.pop();
    let invalidation = granted(channel.begin_many(&ranges, PageState::Private, Some(GRANT_DEADLINE_MS)));
    channel.end(invalidation, Outcome::Unknown { errno: 5, offset: 3 * PAGE }).unwrap();
    assert_eq!(
        client.status().unwrap().quarantined,
        31 * PAGE,
        "an unknown outcome quarantines every range of the batch"
    );
}

#[test]
fn malformed_batches_are_answered_and_change_nothing() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(64);
    let (before, status_before) = (open_files(), status_without_wrong_count(&mut client));
    let valid = datagram(&Record::new(Kind::BeginMany, 9), &every(2, 8));
    let with = |at: usize, value: u64| {
        let mut bytes = valid.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    let batch_of = |n: u64| datagram(&Record::new(Kind::BeginMany, 9), &every(2, n));
    for (bytes, errno) in [
        (valid[..valid.len() - 1].to_vec(), MSGSIZE),
        (valid[..64].to_vec(), MSGSIZE),
        ([&valid[..], &[0; 16]].concat(), MSGSIZE),
        (batch_of(0), TOO_BIG),
        (with(24, u64::MAX), TOO_BIG),
        (with(24, 7), MSGSIZE),
        (batch_of(MAX_RANGES as u64 + 1), MSGSIZE),
        (vec![5; MAX_DATAGRAM + 4096], MSGSIZE),
        (with(16, PAGE), INVAL),
        (with(64 + 16, 1), INVAL),
        (with(64 + 24, 0), INVAL),
        (with(64 + 24, u64::MAX), INVAL),
        (with(64 + 32, 0), INVAL),
        (with(64 + 24, 4 * PAGE), INVAL),
    ] {
        channel.send_bytes(&bytes).unwrap();
        let reply = channel.recv().unwrap();
        assert_eq!((reply.kind(), reply.errno), (Some(Kind::Wrong), errno), "{} bytes", bytes.len());
    }
    assert_eq!((open_files(), status_without_wrong_count(&mut client)), (before, status_before));
    granted(channel.begin_many(&every(2, 8), PageState::Private, None));
}

#[test]
fn pipelined_records_are_answered_by_ticket() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(512);
    let mut pending = BTreeMap::new();
    let mut granted = Vec::new();
    for round in 0..8 {
        for page in round * 64..(round + 1) * 64 {
            pending.insert(
                channel.submit(pages(page, 1), PageState::Private, Some(GRANT_DEADLINE_MS)).unwrap(),
                page,
            );
        }
        for _ in 0..64 {
            let (ticket, answer) = channel.completed().unwrap();
            pending.remove(&ticket).expect("an answer without a request, or a second one");
            let Ok(Answer::Granted { invalidation }) = answer else { panic!("{answer:?}") };
            granted.push(invalidation);
        }
    }
    assert!(pending.is_empty());
    let ticket = channel.submit(pages(3, 1), PageState::Private, None).unwrap();
    let (other, answer) = channel.completed().unwrap();
    assert_eq!(ticket, other);
    assert_refused(answer, BUSY, "0x3000");
    for invalidation in granted {
        channel.end(invalidation, Outcome::Committed).unwrap();
    }
    assert_eq!(client.status().unwrap().regions[0].private, 512 * PAGE);
}
