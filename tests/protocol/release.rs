//! Release of a quarantine by an operator (`Release`).

use passgate_bindings::PAGE;
use passgate_client::{AddMemory, Outcome, PageState};

use crate::common::event_watch::EventWatch;
use crate::common::{
    Setup, assert_faults, assert_quarantined, assert_refused, dma_read, dma_write, granted, pages,
    wait_for_status,
};

const PERM: i32 = 1;
const NOENT: i32 = 2;
const INVAL: i32 = 22;

#[test]
fn operator_may_release_quarantine_and_owner_may_not() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(4);
    let watch = EventWatch::new(setup.connect());
    let mut operator = setup.connect();
    let invalidation = granted(channel.begin(pages(1, 2), PageState::Private, None));
    channel.end(invalidation, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
    watch.wait("range.quarantined");
    assert_faults(&setup.device, 1);
    assert_quarantined(channel.begin(pages(1, 1), PageState::Shared, None), PAGE);

    assert_refused(
        client.release(invalidation, PageState::Shared),
        PERM,
        "may not release its own quarantine",
    );
    assert_refused(
        operator.release(invalidation + 1, PageState::Shared),
        NOENT,
        "nothing is in quarantine since",
    );
    let wrong = operator.call::<serde_json::Value>(
        "Release",
        &serde_json::json!({"invalidation": invalidation}),
        &[],
    );
    assert_refused(wrong, INVAL, "parameters");
    assert_eq!(client.status().unwrap().quarantined, 2 * PAGE, "a refused release must change nothing");
    assert_faults(&setup.device, 1);

    assert_eq!(operator.release(invalidation, PageState::Shared).unwrap(), 2 * PAGE);
    let event = watch.wait("range.released").details;
    assert_eq!((&event["gpa"], &event["length"]), (&PAGE.into(), &(2 * PAGE).into()));
    assert_eq!((&event["invalidation"], &event["to"]), (&invalidation.into(), &"shared".into()));
    assert_refused(
        operator.release(invalidation, PageState::Shared),
        NOENT,
        "nothing is in quarantine since",
    );
    wait_for_status(&mut client, |status| {
        status.quarantine.is_empty() && status.regions[0].shared == 4 * PAGE
    });
    file.store(PAGE, 42).unwrap();
    assert_eq!(dma_read(&setup.device, 1).unwrap(), 42, "the released page must be mapped again");
    dma_write(&setup.device, 2, 7).unwrap();
    let again = granted(channel.begin(pages(1, 2), PageState::Private, None));
    channel.end(again, Outcome::Committed).unwrap();
}

#[test]
fn range_released_as_private_or_hole_stays_unmapped() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(2);
    let mut operator = setup.connect();
    for (page, to) in [(0, PageState::Private), (1, PageState::Hole)] {
        let invalidation = granted(channel.begin(pages(page, 1), PageState::Private, None));
        channel.end(invalidation, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
        assert_eq!(operator.release(invalidation, to).unwrap(), PAGE);
        assert_faults(&setup.device, page);
    }
    let region = client.status().unwrap().regions[0].clone();
    assert_eq!((region.private, region.hole, region.unknown), (PAGE, PAGE, 0));
    let back = granted(channel.begin(pages(0, 2), PageState::Shared, None));
    channel.end(back, Outcome::Committed).unwrap();
    dma_read(&setup.device, 0).unwrap();
}

#[test]
fn vm_connections_may_not_release_and_no_release_forbids_all() {
    let setup = Setup::new();
    let (_client, mut channel, file) = setup.client(1);
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, None));
    channel.end(invalidation, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
    let mut other = setup.connect();
    let region = other.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*file]).unwrap().region;
    other.remove_memory(region).unwrap();
    assert_refused(other.release(invalidation, PageState::Hole), PERM, "speaks for a VM");
    let mut third = setup.connect();
    let _channel = third.open_channel().unwrap();
    assert_refused(third.release(invalidation, PageState::Hole), PERM, "speaks for a VM");
    drop((channel, other, third, setup));

    let strict = Setup::with(|options| options.allow_release = false);
    let (mut client, mut channel, _file) = strict.client(1);
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, None));
    channel.end(invalidation, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
    assert_refused(strict.connect().release(invalidation, PageState::Shared), PERM, "--no-release");
    assert_eq!(client.status().unwrap().quarantined, PAGE);
    assert_faults(&strict.device, 0);
}
