//! The order of steps (to private: unmap, proof, convert; to shared: convert, map), and the outcomes of an end.

use passgate_bindings::PAGE;
use passgate_client::{AddMemory, Outcome, PageState};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::common::event_watch::EventWatch;
use crate::common::{
    Setup, assert_faults, assert_quarantined, dma_read, dma_write, granted, guest_memory, pages,
};

#[test]
fn punched_page_is_unreachable_and_neighbours_keep_dma() {
    let setup = Setup::new();
    let (file, _vm) = guest_memory(3);
    let mut client = setup.connect();
    client.add_memory(&AddMemory::shared(0, 3 * PAGE), &[&*file]).unwrap();
    let mut channel = client.open_channel().unwrap();
    for round in 1..=100 {
        for page in 0..3 {
            file.store(page * PAGE, round * 10 + page).unwrap();
        }
        assert_eq!(dma_read(&setup.device, 1).unwrap(), round * 10 + 1);

        let to_hole = granted(channel.begin(pages(1, 1), PageState::Hole, None));
        assert_faults(&setup.device, 1);
        file.punch(PAGE, PAGE).unwrap();
        channel.end(to_hole, Outcome::Committed).unwrap();
        assert_faults(&setup.device, 1);
        for page in [0, 2] {
            assert_eq!(dma_read(&setup.device, page).unwrap(), round * 10 + page);
        }

        let to_shared = granted(channel.begin(pages(1, 1), PageState::Shared, None));
        file.store(PAGE, round).unwrap();
        assert_faults(&setup.device, 1);
        channel.end(to_shared, Outcome::Committed).unwrap();
        assert_eq!(dma_read(&setup.device, 1).unwrap(), round, "the new page");
        dma_write(&setup.device, 1, 7).unwrap();
        assert_eq!(file.load(PAGE).unwrap(), 7, "in both directions");
    }
}

#[test]
fn not_committed_conversion_restores_mapping() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(2);
    file.store(0, 42).unwrap();
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, None));
    assert_faults(&setup.device, 0);
    channel.end(invalidation, Outcome::NotCommitted).unwrap();
    assert_eq!(dma_read(&setup.device, 0).unwrap(), 42);
    let region = client.status().unwrap().regions[0].clone();
    assert_eq!((region.shared, region.private), (2 * PAGE, 0));
}

#[test]
fn unknown_outcome_quarantines_range() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(4);
    let watch = EventWatch::new(setup.connect());
    let invalidation = granted(channel.begin(pages(1, 2), PageState::Private, None));
    channel.end(invalidation, Outcome::Unknown { errno: 14, offset: PAGE }).unwrap();
    let event = watch.wait("range.quarantined").details;
    assert_eq!((&event["gpa"], &event["length"]), (&PAGE.into(), &(2 * PAGE).into()));
    assert_eq!((&event["cause"], &event["errno"]), (&"owner-unknown".into(), &14.into()));
    assert_quarantined(channel.begin(pages(2, 1), PageState::Shared, None), 2 * PAGE);
    assert_faults(&setup.device, 1);
    assert_faults(&setup.device, 2);
    assert!(dma_read(&setup.device, 0).is_ok() && dma_read(&setup.device, 3).is_ok());
    let status = client.status().unwrap();
    assert_eq!(status.quarantine[0].cause, "owner-unknown");
    assert_eq!(status.regions[0].unknown, 2 * PAGE);
    let receipt = client.explain(invalidation).unwrap();
    assert_eq!(receipt["outcome"]["unknown"]["offset"], PAGE);
}

#[test]
fn passgate_converts_sole_mapper_memory() {
    let setup = Setup::new();
    let (file, _vm) = guest_memory(2);
    let mut client = setup.connect();
    let memory = AddMemory { sole_mapper: true, ..AddMemory::shared(0, 2 * PAGE) };
    client.add_memory(&memory, &[&*file]).unwrap();
    let mut channel = client.open_channel().unwrap();
    dma_write(&setup.device, 0, 42).unwrap();
    dma_write(&setup.device, 1, 43).unwrap();
    granted(channel.convert(pages(0, 1), PageState::Hole, None));
    assert_faults(&setup.device, 0);
    assert_eq!(file.load(0).unwrap(), 0, "a fresh page");
    granted(channel.convert(pages(0, 1), PageState::Shared, None));
    assert_eq!((dma_read(&setup.device, 0).unwrap(), dma_read(&setup.device, 1).unwrap()), (0, 43));
    assert_eq!(client.status().unwrap().open, 0, "there is nothing to end");
}

#[test]
fn invalidation_covers_every_alias() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(2);
    // The second page of the file is also mapped at page 16, in a region of another client.
    let mut other = setup.connect();
    let alias = AddMemory { offset: PAGE, ..AddMemory::shared(16 * PAGE, PAGE) };
    other.add_memory(&alias, &[&*file]).unwrap();
    dma_write(&setup.device, 16, 42).unwrap();
    assert_eq!(dma_read(&setup.device, 1).unwrap(), 42);
    let invalidation = granted(channel.begin(pages(1, 1), PageState::Private, None));
    assert_faults(&setup.device, 1);
    assert_faults(&setup.device, 16);
    channel.end(invalidation, Outcome::Committed).unwrap();
    assert_faults(&setup.device, 16);
    let mut their_channel = other.open_channel().unwrap();
    let invalidation = granted(their_channel.begin(pages(16, 1), PageState::Shared, None));
    their_channel.end(invalidation, Outcome::Committed).unwrap();
    assert_eq!(dma_read(&setup.device, 1).unwrap(), 42);
    client.remove_memory(1).unwrap();
    assert_eq!(dma_read(&setup.device, 16).unwrap(), 42, "the other region stays");
}

#[test]
fn invalidation_spans_regions_and_large_pieces() {
    let setup = Setup::new();
    let mut client = setup.connect();
    let (low, high) = (crate::common::memory(16), crate::common::memory(16));
    let piece = 4 * PAGE;
    for (gpa, file) in [(0, &low), (16 * PAGE, &high)] {
        let memory = AddMemory { piece, ..AddMemory::shared(gpa, 16 * PAGE) };
        client.add_memory(&memory, &[&**file]).unwrap();
    }
    let mut channel = client.open_channel().unwrap();
    let invalidation = granted(channel.begin(pages(14, 4), PageState::Hole, None));
    channel.end(invalidation, Outcome::Committed).unwrap();
    for page in 14..18 {
        assert_faults(&setup.device, page);
    }
    // The remainders of the pieces that were cut are mapped again.
    for page in [12, 13, 18, 19, 0, 31] {
        dma_read(&setup.device, page).unwrap();
    }
}

#[test]
fn memory_added_during_conversion_is_mapped_after_its_end() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(2);
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Shared, None));
    // This call must not wait for the end of the conversion: the same thread sends the end.
    let alias = client.add_memory(&AddMemory::shared(1 << 30, 2 * PAGE), &[&*file]).unwrap();
    assert_eq!(alias.mapped, PAGE);
    assert_faults(&setup.device, (1 << 30) / PAGE);
    channel.end(invalidation, Outcome::Committed).unwrap();
    dma_read(&setup.device, (1 << 30) / PAGE).unwrap();
}

#[test]
fn sealing_proves_no_pin_after_session() {
    let setup = Setup::new();
    // Not a GuestFile: its own mapping is writable and would make F_SEAL_WRITE fail.
    let fd = memfd_create("witness", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, 8 * PAGE).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    let mut client = setup.connect();
    let added = client.add_memory(&AddMemory::shared(0, 8 * PAGE), &[&fd]).unwrap();
    let mut channel = client.open_channel().unwrap();
    for page in 0..8 {
        dma_write(&setup.device, page, page).unwrap();
        let invalidation = granted(channel.begin(pages(page, 1), PageState::Private, None));
        channel.end(invalidation, Outcome::Committed).unwrap();
        let invalidation = granted(channel.begin(pages(page, 1), PageState::Shared, None));
        channel.end(invalidation, Outcome::Committed).unwrap();
    }
    assert!(fcntl_add_seals(&fd, SealFlags::WRITE).is_err(), "pinned and mapped by the session");
    client.remove_memory(added.region).unwrap();
    fcntl_add_seals(&fd, SealFlags::WRITE).expect("the pages are still mapped or pinned");
}
