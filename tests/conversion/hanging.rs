//! Kernel calls that do not return: they delay nobody's answer, and are believed when they come back at last.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use passgate::client::{AddMemory, Answer, Outcome, PageState};
use passgate::serve::Options;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::{Iova, PAGE};

use crate::common::fake::Hanging;
use crate::common::watch::Watch;
use crate::common::{PATIENT_MS, Setup, assert_refused, dma_read, granted, memory, open_files, pages, until};

/// An answer is given with a seventh of this left, in which it travels: enough of it where much else runs, too.
const DEADLINE_MS: u32 = 3000;
/// A deadline of which the first seventh alone is longer than that.
const FAR_MS: u32 = 60_000;
/// How long a call may keep the loop.
const CALL_LIMIT: Duration = Duration::from_millis(100);
/// What a call may keep the loop is a small part of this.
const SOON: Duration = Duration::from_secs(2);

/// A server whose calls over page 0 hang when told so.
fn setup() -> (Setup, Arc<Hanging>) {
    setup_with(|_| {})
}

fn setup_with(change: impl FnOnce(&mut Options)) -> (Setup, Arc<Hanging>) {
    let mut hanging = None;
    let setup = Setup::behind(
        || SoftDomain::open().unwrap(),
        |soft| hanging.insert(Hanging::new(soft, Iova(0))).clone(),
        change,
    );
    (setup, hanging.unwrap())
}

#[test]
fn an_unmap_that_never_returns_is_answered_in_time_as_unknown() {
    let (setup, hanging) = setup();
    let (mut client, mut channel, file) = setup.client(4);
    let mut other = setup.connect();
    let mut their_channel = other.open_channel().unwrap();
    let watch = Watch::new(setup.connect());
    file.store(0, 42).unwrap();
    for round in 0..3 {
        hanging.hang_unmaps();
        let served = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                hanging.wait_inside(1);
                // While the call hangs, everybody else is served: first within the time that a call may keep the
                // loop, then as ever.
                their_channel.echo().unwrap();
                let begun = granted(their_channel.begin(pages(2, 1), PageState::Private, Some(PATIENT_MS)));
                their_channel.end(begun, Outcome::NotCommitted).unwrap();
                other.status().unwrap();
                served.store(true, Ordering::Release);
            });
            let start = Instant::now();
            let answer = channel.begin(pages(0, 1), PageState::Private, Some(DEADLINE_MS)).unwrap();
            assert!(start.elapsed() < Duration::from_millis(DEADLINE_MS.into()), "{:?}", start.elapsed());
            let Answer::Unknown(failure) = answer else { panic!("{answer:?}") };
            assert_eq!((failure.range, failure.word()), (pages(0, 1), "call-hangs"));
            assert!(served.load(Ordering::Acquire), "round {round}: others waited as long as the call hung");
        });
        assert_eq!(watch.wait("range.quarantined").details["cause"], "call-hangs");
        assert_refused(channel.begin(pages(0, 1), PageState::Private, None), 5, "0x0");
        // It comes back: what was in doubt is so no more.
        hanging.release();
        watch.wait("range.freed");
        assert_eq!(client.status().unwrap().quarantine, []);
        assert_eq!(dma_read(&setup.device, 0).unwrap(), 42);
        let begun = granted(channel.begin(pages(0, 1), PageState::Private, None));
        channel.end(begun, Outcome::NotCommitted).unwrap();
    }
}

#[test]
fn a_deadline_is_kept_beside_a_later_one() {
    let (setup, hanging) = setup();
    let (mut client, mut channel, _file) = setup.client(4);
    let mut other = setup.connect();
    let mut their_channel = other.open_channel().unwrap();
    // A conversion that waits for a DMA, with a deadline that is far away.
    let held = setup.device.hold_write(Iova(2 * PAGE), 8).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| their_channel.begin(pages(2, 1), PageState::Private, Some(FAR_MS)));
        until(&mut client, |status| status.open == 1);
        // The alarm that guarded its call has gone off: what is set is that of its deadline.
        std::thread::sleep(3 * CALL_LIMIT);
        hanging.hang_unmaps();
        let start = Instant::now();
        let answer = channel.begin(pages(0, 1), PageState::Private, Some(DEADLINE_MS)).unwrap();
        assert!(start.elapsed() < Duration::from_millis(DEADLINE_MS.into()), "{:?}", start.elapsed());
        assert!(matches!(answer, Answer::Unknown(_)), "{answer:?}");
        hanging.release();
        // A drain for the second one may have ended it.
        let _ = held.finish(&[0; 8]);
        granted(waits.join().unwrap());
    });
}

#[test]
fn a_map_that_never_returns_delays_only_who_asked_for_it() {
    let (setup, hanging) = setup();
    let mut other = setup.connect();
    let mut their_channel = other.open_channel().unwrap();
    let far = AddMemory::shared(1 << 30, PAGE);
    other.add_memory(&far, &[&*memory(1)]).unwrap();
    hanging.hang_maps();
    let mut client = setup.connect();
    let file = memory(1);
    std::thread::scope(|scope| {
        let adding = scope.spawn(|| client.add_memory(&AddMemory::shared(0, PAGE), &[&*file]));
        hanging.wait_inside(1);
        let start = Instant::now();
        let begun =
            granted(their_channel.begin(pages((1 << 30) / PAGE, 1), PageState::Hole, Some(PATIENT_MS)));
        their_channel.end(begun, Outcome::Committed).unwrap();
        assert!(start.elapsed() < SOON, "others waited {:?}", start.elapsed());
        // A begin over what is being mapped is answered in time too.
        let answer = their_channel.begin(pages(0, 1), PageState::Hole, Some(DEADLINE_MS)).unwrap();
        let Answer::Unknown(failure) = answer else { panic!("{answer:?}") };
        assert_eq!(failure.word(), "map-in-flight");
        hanging.release();
        adding.join().unwrap().unwrap();
    });
    until(&mut other, |status| status.quarantine.is_empty());
    dma_read(&setup.device, 0).unwrap();
}

#[test]
fn while_an_unmap_hangs_no_file_is_let_go_of_and_no_session_is_closed() {
    let (setup, hanging) = setup();
    let mut other = setup.connect();
    let watch = Watch::new(setup.connect());
    let file = memory(2);
    let before = open_files();
    let mut client = setup.connect();
    client.add_memory(&AddMemory::shared(0, 2 * PAGE), &[&*file]).unwrap();
    hanging.hang_unmaps();
    drop(client);
    hanging.wait_inside(1);
    until(&mut other, |status| status.clients == 2);
    // Past the time that the gate gives a region to close: in doubt, it stays.
    assert!(!watch.comes("session.closed", Duration::from_secs(3)));
    assert_eq!(open_files(), before + 1, "the file is held as long as a device may see it");
    assert!(other.status().unwrap().regions[0].closing);
    hanging.release();
    watch.wait("session.closed");
    assert_eq!(open_files(), before);
    assert_eq!(setup.domain.mappings(), 0);
}

#[test]
fn a_server_that_is_stopped_while_a_call_hangs_ends_all_the_same_and_says_what_is_open() {
    let (setup, hanging) = setup_with(|options| options.farewell = Duration::from_secs(1));
    let mut client = setup.connect();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap();
    hanging.hang_unmaps();
    let error = setup.stop().unwrap_err();
    assert!(error.to_string().contains("1 regions could not be closed"), "{error}");
    hanging.release();
}
