//! Kernel calls that do not return: they delay no answer, and their result counts when they return at last.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use passgate::serve::Options;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::{Iova, PAGE};
use passgate_client::{AddMemory, Answer, Outcome, PageState};

use crate::common::event_watch::EventWatch;
use crate::common::hanging::HangingDomain;
use crate::common::{
    GRANT_DEADLINE_MS, Setup, assert_quarantined, dma_read, granted, memory, open_files, pages,
    wait_for_status,
};

/// The deadline of a conversion that times out. The answer is sent when a seventh of it remains, which must be long enough
/// for the answer to arrive on a busy machine.
const DEADLINE_MS: u32 = 3000;
/// A deadline whose first seventh is longer than [`DEADLINE_MS`].
const LATE_DEADLINE_MS: u32 = 60_000;
/// The longest time that a kernel call may occupy the loop before another thread takes the loop over.
const LOOP_CALL_LIMIT: Duration = Duration::from_millis(100);
/// The longest time that an answer to another client may take: a multiple of [`LOOP_CALL_LIMIT`].
const PROMPT_LIMIT: Duration = Duration::from_secs(2);

/// Starts a server whose map and unmap calls over page 0 hang on request.
fn setup() -> (Setup, Arc<HangingDomain>) {
    setup_with(|_| {})
}

fn setup_with(change: impl FnOnce(&mut Options)) -> (Setup, Arc<HangingDomain>) {
    let mut hanging = None;
    let setup = Setup::around_soft_domain(
        || SoftDomain::open().unwrap(),
        |soft| hanging.insert(HangingDomain::new(soft, Iova(0))).clone(),
        change,
    );
    (setup, hanging.unwrap())
}

#[test]
fn hanging_unmap_is_answered_unknown_before_deadline() {
    let (setup, hanging) = setup();
    let (mut client, mut channel, file) = setup.client(4);
    let mut other = setup.connect();
    let mut their_channel = other.open_channel().unwrap();
    let watch = EventWatch::new(setup.connect());
    file.store(0, 42).unwrap();
    for round in 0..3 {
        hanging.hang_unmaps();
        let served = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                hanging.wait_hanging(1);
                // While the call hangs, other clients are served: the first request once the loop was taken over, the
                // others without delay.
                their_channel.echo().unwrap();
                let invalidation =
                    granted(their_channel.begin(pages(2, 1), PageState::Private, Some(GRANT_DEADLINE_MS)));
                their_channel.end(invalidation, Outcome::NotCommitted).unwrap();
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
        assert_quarantined(channel.begin(pages(0, 1), PageState::Private, None), 0);
        // The call returns, and so disproves the cause of the quarantine.
        hanging.resume_calls();
        watch.wait("range.freed");
        assert_eq!(client.status().unwrap().quarantine, []);
        assert_eq!(dma_read(&setup.device, 0).unwrap(), 42);
        let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, None));
        channel.end(invalidation, Outcome::NotCommitted).unwrap();
    }
}

#[test]
fn earlier_deadline_is_met_beside_later_one() {
    let (setup, hanging) = setup();
    let (mut client, mut channel, _file) = setup.client(4);
    let mut other = setup.connect();
    let mut their_channel = other.open_channel().unwrap();
    // A conversion that waits for DMA, with a later deadline.
    let write_in_flight = setup.device.hold_write(Iova(2 * PAGE), 8).unwrap();
    std::thread::scope(|scope| {
        let waits =
            scope.spawn(|| their_channel.begin(pages(2, 1), PageState::Private, Some(LATE_DEADLINE_MS)));
        wait_for_status(&mut client, |status| status.open == 1);
        // The alarm of its unmap call has expired by now: the one that is armed is that of its deadline.
        std::thread::sleep(3 * LOOP_CALL_LIMIT);
        hanging.hang_unmaps();
        let start = Instant::now();
        let answer = channel.begin(pages(0, 1), PageState::Private, Some(DEADLINE_MS)).unwrap();
        assert!(start.elapsed() < Duration::from_millis(DEADLINE_MS.into()), "{:?}", start.elapsed());
        assert!(matches!(answer, Answer::Unknown(_)), "{answer:?}");
        hanging.resume_calls();
        // A drain for the second conversion may have ended it.
        let _ = write_in_flight.finish(&[0; 8]);
        granted(waits.join().unwrap());
    });
}

#[test]
fn hanging_map_delays_only_its_caller() {
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
        hanging.wait_hanging(1);
        let start = Instant::now();
        let invalidation = granted(their_channel.begin(
            pages((1 << 30) / PAGE, 1),
            PageState::Hole,
            Some(GRANT_DEADLINE_MS),
        ));
        their_channel.end(invalidation, Outcome::Committed).unwrap();
        assert!(start.elapsed() < PROMPT_LIMIT, "others waited {:?}", start.elapsed());
        // A begin over a range that is being mapped is answered in time too.
        let answer = their_channel.begin(pages(0, 1), PageState::Hole, Some(DEADLINE_MS)).unwrap();
        let Answer::Unknown(failure) = answer else { panic!("{answer:?}") };
        assert_eq!(failure.word(), "map-in-flight");
        hanging.resume_calls();
        adding.join().unwrap().unwrap();
    });
    wait_for_status(&mut other, |status| status.quarantine.is_empty());
    dma_read(&setup.device, 0).unwrap();
}

#[test]
fn hanging_unmap_leaves_file_open_and_session_unclosed() {
    let (setup, hanging) = setup();
    let mut other = setup.connect();
    let watch = EventWatch::new(setup.connect());
    let file = memory(2);
    let before = open_files();
    let mut client = setup.connect();
    client.add_memory(&AddMemory::shared(0, 2 * PAGE), &[&*file]).unwrap();
    hanging.hang_unmaps();
    drop(client);
    hanging.wait_hanging(1);
    wait_for_status(&mut other, |status| status.clients == 2);
    // Longer than the deadline for closing a region: while its unmap is in doubt, the region stays.
    assert!(!watch.arrives_within("session.closed", Duration::from_secs(3)));
    assert_eq!(open_files(), before + 1, "the file must stay open as long as a device may reach it");
    assert!(other.status().unwrap().regions[0].closing);
    hanging.resume_calls();
    watch.wait("session.closed");
    assert_eq!(open_files(), before);
    assert_eq!(setup.domain.mappings(), 0);
}

#[test]
fn stopping_server_with_hanging_call_ends_and_reports_open_regions() {
    let (setup, hanging) = setup_with(|options| options.farewell = Duration::from_secs(1));
    let mut client = setup.connect();
    client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap();
    hanging.hang_unmaps();
    let error = setup.stop().unwrap_err();
    assert!(error.to_string().contains("1 regions could not be closed"), "{error}");
    hanging.resume_calls();
}
