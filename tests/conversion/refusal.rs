//! DMA that does not stop: the conversion is refused in time, both notices are sent, the range is quarantined, and freed by
//! proof.

use std::time::{Duration, Instant};

use passgate::gate::{OnStuckDma, Policy};
use passgate_backends::device::soft::ClosedWindow;
use passgate_bindings::{Iova, PAGE};
use passgate_client::{Answer, Outcome, PageState, Status};

use crate::common::event_watch::EventWatch;
use crate::common::{
    GRANT_DEADLINE_MS, Setup, assert_faults, assert_quarantined, dma_read, dma_write, granted, pages,
    wait_for_status,
};

/// The deadline of a conversion that times out. The answer is sent when a seventh of it remains, which must be long enough
/// for the answer to arrive on a busy machine.
const DEADLINE_MS: u32 = 4000;

#[test]
fn unstoppable_dma_is_refused_quarantined_and_freed_when_it_ends() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(4);
    let watch = EventWatch::new(setup.connect());
    file.store(PAGE, 42).unwrap();
    let connection = ClosedWindow::open().unwrap();
    let send = setup.device.send_zc(Iova(PAGE), PAGE as usize, connection.near).unwrap();

    let start = Instant::now();
    let answer = channel.begin(pages(1, 1), PageState::Private, Some(DEADLINE_MS)).unwrap();
    assert!(start.elapsed() < Duration::from_millis(DEADLINE_MS.into()), "{:?}", start.elapsed());
    let Answer::Refused(failure) = answer else { panic!("{answer:?}") };
    assert_eq!((failure.range, failure.word()), (pages(1, 1), "dma-in-flight"));
    assert_eq!(failure.device, Some(0));

    let event = watch.wait("range.quarantined").details;
    assert_eq!((&event["gpa"], &event["length"]), (&PAGE.into(), &PAGE.into()));
    assert_eq!((&event["cause"], &event["device"]), (&"dma-in-flight".into(), &"soft:0".into()));
    let event = watch.wait("range.refused").details;
    assert_eq!(event["invalidation"], failure.invalidation);
    assert_eq!((&event["gpa"], &event["length"]), (&PAGE.into(), &PAGE.into()));
    assert_eq!((&event["cause"], &event["device"]), (&"dma-in-flight".into(), &"soft:0".into()));
    let receipt = client.explain(failure.invalidation).unwrap();
    assert_eq!(receipt["verdict"], "refused");
    let cancelled = receipt["steps"].as_array().unwrap().iter().any(|step| step["step"] == "drain");
    assert!(cancelled, "{receipt}");

    assert!(send.outcome().is_none(), "the kernel has unpinned the page, so the refusal was wrong");
    assert_quarantined(channel.begin(pages(1, 1), PageState::Private, None), PAGE);
    assert_faults(&setup.device, 1);
    for page in [0, 2, 3] {
        dma_write(&setup.device, page, 1).unwrap();
    }
    let status = client.status().unwrap();
    assert_eq!((status.quarantine.len(), status.quarantined), (1, PAGE));
    assert_eq!(status.refused.len(), 1, "status lists the refusal for clients that missed the event");

    // When the peer closes, the send ends and the kernel unpins the page: that is the proof.
    drop(connection.far);
    let freed = watch.wait("range.freed").details;
    assert_eq!((&freed["gpa"], &freed["length"]), (&PAGE.into(), &PAGE.into()));
    wait_for_status(&mut client, |status| status.quarantine.is_empty());
    assert_eq!(dma_read(&setup.device, 1).unwrap(), 42, "as it was before");
    let invalidation = granted(channel.begin(pages(0, 4), PageState::Private, None));
    channel.end(invalidation, Outcome::Committed).unwrap();
    let Status { totals, refused, quarantined, .. } = client.status().unwrap();
    let [refused] = &refused[..] else { panic!("{refused:?}") };
    assert_eq!((refused.invalidation, refused.gpa, refused.length), (failure.invalidation, PAGE, PAGE));
    assert_eq!((refused.cause.as_str(), refused.device.as_deref()), ("dma-in-flight", Some("soft:0")));
    assert_eq!(quarantined, 0);
    assert_eq!((totals.refused, totals.done), (1, 1));
}

#[test]
fn reset_policy_resets_device_and_grants() {
    let setup = Setup::with_policy(Policy { on_stuck_dma: OnStuckDma::Reset, ..Policy::default() });
    let (mut client, mut channel, file) = setup.client(2);
    let watch = EventWatch::new(setup.connect());
    file.store(PAGE, 42).unwrap();
    let connection = ClosedWindow::open().unwrap();
    let send = setup.device.send_zc(Iova(0), PAGE as usize, connection.near).unwrap();
    let start = Instant::now();
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, Some(DEADLINE_MS)));
    assert!(start.elapsed() < Duration::from_millis(DEADLINE_MS.into()), "{:?}", start.elapsed());
    assert!(send.outcome().is_some(), "the kernel still pins the page");
    assert_eq!(watch.wait("device.fenced").details["step"], "drain");
    assert_eq!(watch.wait("device.fenced").details["step"], "reset");
    channel.end(invalidation, Outcome::Committed).unwrap();
    assert_eq!(watch.wait("device.attached").details["device"], "soft:0");
    assert_faults(&setup.device, 0);
    assert_eq!(dma_read(&setup.device, 1).unwrap(), 42, "the device works again");
    assert_eq!(client.status().unwrap().totals.late_dma_waited, 1);
}

#[test]
fn cancellable_dma_is_cancelled_and_granted() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(1);
    file.store(0, 42).unwrap();
    let write = setup.device.hold_write(Iova(0), 64).unwrap();
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, Some(DEADLINE_MS)));
    assert!(write.outcome().is_some_and(|outcome| outcome.is_err()), "the write must have been cancelled");
    channel.end(invalidation, Outcome::Committed).unwrap();
    assert_eq!(file.load(0).unwrap(), 42, "nothing was written late");
    assert_eq!(client.status().unwrap().totals.late_dma_waited, 1);
}

#[test]
fn dma_that_ends_in_time_is_waited_for() {
    let setup = Setup::new();
    let (_client, mut channel, file) = setup.client(1);
    let connection = ClosedWindow::open().unwrap();
    let send = setup.device.send_zc(Iova(0), PAGE as usize, connection.near).unwrap();
    let reader = std::thread::spawn(move || {
        // The reader takes all data a little later, which ends the DMA.
        std::io::copy(&mut { connection.far }, &mut std::io::sink())
    });
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, Some(GRANT_DEADLINE_MS)));
    assert!(send.outcome().is_some());
    file.punch(0, PAGE).unwrap();
    channel.end(invalidation, Outcome::Committed).unwrap();
    drop((send, setup));
    // The connection may end with a reset when the device is dropped.
    let _ = reader.join().unwrap();
}

#[test]
fn short_deadline_is_met_beside_long_one() {
    const LONG_DEADLINE_MS: u32 = 60_000;
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(2);
    let mut other = setup.connect();
    let (long, short) = (ClosedWindow::open().unwrap(), ClosedWindow::open().unwrap());
    let in_flight = [(0, &long), (1, &short)].map(|(page, connection)| {
        let near = connection.near.try_clone().unwrap();
        setup.device.send_zc(Iova(page * PAGE), PAGE as usize, near).unwrap()
    });
    let ticket = channel.submit(pages(0, 1), PageState::Private, Some(LONG_DEADLINE_MS)).unwrap();
    // Its alarm is armed once the server has answered the next request.
    wait_for_status(&mut other, |status| status.open == 1);
    let start = Instant::now();
    let answer = channel.begin(pages(1, 1), PageState::Private, Some(DEADLINE_MS)).unwrap();
    assert!(start.elapsed() < Duration::from_millis(DEADLINE_MS.into()), "{:?}", start.elapsed());
    let Answer::Refused(failure) = answer else { panic!("{answer:?}") };
    assert_eq!(failure.word(), "dma-in-flight");
    drop((long, short));
    let (first, answer) = channel.completed().unwrap();
    assert_eq!(first, ticket);
    assert!(matches!(answer, Ok(Answer::Granted { .. })), "{answer:?}");
    drop(in_flight);
}
