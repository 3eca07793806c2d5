//! DMA that does not stop: refused in time, told twice, quarantined, and freed by proof.

use std::time::{Duration, Instant};

use passgate::client::{Answer, Outcome, PageState, Status};
use passgate::gate::{OnStuckDma, Policy};
use passgate_backends::device::soft::ClosedWindow;
use passgate_bindings::{Iova, PAGE};

use crate::common::watch::Watch;
use crate::common::{
    PATIENT_MS, Setup, assert_faults, assert_refused, dma_read, dma_write, granted, pages, until,
};

const IO: i32 = 5;
/// An answer is given with a seventh of this left, in which it travels: enough of it where much else runs, too.
const DEADLINE_MS: u32 = 4000;

#[test]
fn dma_that_cannot_be_stopped_is_refused_told_quarantined_and_freed_when_it_ends() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(4);
    let watch = Watch::new(setup.connect());
    file.store(PAGE, 42).unwrap();
    let window = ClosedWindow::open().unwrap();
    let held = setup.device.send_zc(Iova(PAGE), PAGE as usize, window.near).unwrap();

    let start = Instant::now();
    let answer = channel.begin(pages(1, 1), PageState::Private, Some(DEADLINE_MS)).unwrap();
    assert!(start.elapsed() < Duration::from_millis(DEADLINE_MS.into()), "{:?}", start.elapsed());
    let Answer::Refused(failure) = answer else { panic!("{answer:?}") };
    assert_eq!((failure.range, failure.word()), (pages(1, 1), "dma-in-flight"));
    assert_eq!(failure.device, Some(0));

    let told = watch.wait("range.quarantined").details;
    assert_eq!((&told["gpa"], &told["length"]), (&PAGE.into(), &PAGE.into()));
    assert_eq!((&told["cause"], &told["device"]), (&"dma-in-flight".into(), &"soft:0".into()));
    let told = watch.wait("range.refused").details;
    assert_eq!(told["invalidation"], failure.invalidation);
    assert_eq!((&told["gpa"], &told["length"]), (&PAGE.into(), &PAGE.into()));
    assert_eq!((&told["cause"], &told["device"]), (&"dma-in-flight".into(), &"soft:0".into()));
    let receipt = client.explain(failure.invalidation).unwrap();
    assert_eq!(receipt["verdict"], "refused");
    let cancelled = receipt["steps"].as_array().unwrap().iter().any(|step| step["step"] == "drain");
    assert!(cancelled, "{receipt}");

    assert!(held.outcome().is_none(), "the kernel still holds the page: the refusal is no caution");
    assert_refused(channel.begin(pages(1, 1), PageState::Private, None), IO, "0x1000");
    assert_faults(&setup.device, 1);
    for page in [0, 2, 3] {
        dma_write(&setup.device, page, 1).unwrap();
    }
    let status = client.status().unwrap();
    assert_eq!((status.quarantine.len(), status.quarantined), (1, PAGE));
    assert_eq!(status.refused.len(), 1, "for whoever has not heard the event");

    // The peer's end is closed: the kernel lets go of the page, and that is the proof.
    drop(window.far);
    let freed = watch.wait("range.freed").details;
    assert_eq!((&freed["gpa"], &freed["length"]), (&PAGE.into(), &PAGE.into()));
    until(&mut client, |status| status.quarantine.is_empty());
    assert_eq!(dma_read(&setup.device, 1).unwrap(), 42, "as it was before");
    let begun = granted(channel.begin(pages(0, 4), PageState::Private, None));
    channel.end(begun, Outcome::Committed).unwrap();
    let Status { totals, refused, quarantined, .. } = client.status().unwrap();
    let [refused] = &refused[..] else { panic!("{refused:?}") };
    assert_eq!((refused.invalidation, refused.gpa, refused.length), (failure.invalidation, PAGE, PAGE));
    assert_eq!((refused.cause.as_str(), refused.device.as_deref()), ("dma-in-flight", Some("soft:0")));
    assert_eq!(quarantined, 0);
    assert_eq!((totals.refused, totals.done), (1, 1));
}

#[test]
fn where_policy_allows_it_the_device_is_reset_and_the_answer_is_done() {
    let setup = Setup::policy(Policy { on_stuck_dma: OnStuckDma::Reset, ..Policy::default() });
    let (mut client, mut channel, file) = setup.client(2);
    let watch = Watch::new(setup.connect());
    file.store(PAGE, 42).unwrap();
    let window = ClosedWindow::open().unwrap();
    let held = setup.device.send_zc(Iova(0), PAGE as usize, window.near).unwrap();
    let start = Instant::now();
    let begun = granted(channel.begin(pages(0, 1), PageState::Private, Some(DEADLINE_MS)));
    assert!(start.elapsed() < Duration::from_millis(DEADLINE_MS.into()), "{:?}", start.elapsed());
    assert!(held.outcome().is_some(), "the kernel holds nothing any more");
    assert_eq!(watch.wait("device.fenced").details["step"], "drain");
    assert_eq!(watch.wait("device.fenced").details["step"], "reset");
    channel.end(begun, Outcome::Committed).unwrap();
    assert_eq!(watch.wait("device.attached").details["device"], "soft:0");
    assert_faults(&setup.device, 0);
    assert_eq!(dma_read(&setup.device, 1).unwrap(), 42, "the device works again");
    assert_eq!(client.status().unwrap().totals.late_dma_waited, 1);
}

#[test]
fn dma_that_can_be_cancelled_is_and_the_answer_is_done() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(1);
    file.store(0, 42).unwrap();
    let held = setup.device.hold_write(Iova(0), 64).unwrap();
    let begun = granted(channel.begin(pages(0, 1), PageState::Private, Some(DEADLINE_MS)));
    assert!(held.outcome().is_some_and(|outcome| outcome.is_err()), "it was ended, not finished");
    channel.end(begun, Outcome::Committed).unwrap();
    assert_eq!(file.load(0).unwrap(), 42, "nothing was written late");
    assert_eq!(client.status().unwrap().totals.late_dma_waited, 1);
}

#[test]
fn dma_that_ends_by_itself_in_time_is_waited_for() {
    let setup = Setup::new();
    let (_client, mut channel, file) = setup.client(1);
    let window = ClosedWindow::open().unwrap();
    let held = setup.device.send_zc(Iova(0), PAGE as usize, window.near).unwrap();
    let reader = std::thread::spawn(move || {
        // It reads everything a little later, and so ends the DMA.
        std::io::copy(&mut { window.far }, &mut std::io::sink())
    });
    let begun = granted(channel.begin(pages(0, 1), PageState::Private, Some(PATIENT_MS)));
    assert!(held.outcome().is_some());
    file.punch(0, PAGE).unwrap();
    channel.end(begun, Outcome::Committed).unwrap();
    drop((held, setup));
    // With a reset at the end, when the device goes.
    let _ = reader.join().unwrap();
}

#[test]
fn a_short_deadline_is_kept_beside_a_long_one() {
    const LONG_MS: u32 = 60_000;
    let setup = Setup::new();
    let (_client, mut channel, _file) = setup.client(2);
    let mut other = setup.connect();
    let (long, short) = (ClosedWindow::open().unwrap(), ClosedWindow::open().unwrap());
    let in_flight = [(0, &long), (1, &short)].map(|(page, window)| {
        let near = window.near.try_clone().unwrap();
        setup.device.send_zc(Iova(page * PAGE), PAGE as usize, near).unwrap()
    });
    let ticket = channel.submit(pages(0, 1), PageState::Private, Some(LONG_MS)).unwrap();
    // Its alarm is set once the next request is answered.
    until(&mut other, |status| status.open == 1);
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
