//! A person's word against a quarantine.

use passgate::client::{AddMemory, Outcome, PageState, State};
use passgate_bindings::PAGE;

use crate::common::watch::Watch;
use crate::common::{Setup, assert_faults, assert_refused, dma_read, dma_write, granted, pages, until};

const PERM: i32 = 1;
const NOENT: i32 = 2;
const IO: i32 = 5;
const INVAL: i32 = 22;

#[test]
fn a_person_releases_what_the_owner_could_not_tell_and_the_vm_itself_may_not() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(4);
    let watch = Watch::new(setup.connect());
    let mut person = setup.connect();
    let begun = granted(channel.begin(pages(1, 2), PageState::Private, None));
    channel.end(begun, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
    watch.wait("range.quarantined");
    assert_faults(&setup.device, 1);
    assert_refused(channel.begin(pages(1, 1), PageState::Shared, None), IO, "0x1000");

    assert_refused(client.release(begun, State::Shared), PERM, "may not release its own quarantine");
    assert_refused(person.release(begun + 1, State::Shared), NOENT, "nothing is in quarantine since");
    let wrong = person.call::<serde_json::Value>("Release", &serde_json::json!({"invalidation": begun}), &[]);
    assert_refused(wrong, INVAL, "parameters");
    assert_eq!(client.status().unwrap().quarantined, 2 * PAGE, "nothing of that changed anything");
    assert_faults(&setup.device, 1);

    assert_eq!(person.release(begun, State::Shared).unwrap(), 2 * PAGE);
    let told = watch.wait("range.released").details;
    assert_eq!((&told["gpa"], &told["length"]), (&PAGE.into(), &(2 * PAGE).into()));
    assert_eq!((&told["invalidation"], &told["to"]), (&begun.into(), &"shared".into()));
    assert_refused(person.release(begun, State::Shared), NOENT, "nothing is in quarantine since");
    until(&mut client, |status| status.quarantine.is_empty() && status.regions[0].shared == 4 * PAGE);
    file.store(PAGE, 42).unwrap();
    assert_eq!(dma_read(&setup.device, 1).unwrap(), 42, "devices have it again");
    dma_write(&setup.device, 2, 7).unwrap();
    let again = granted(channel.begin(pages(1, 2), PageState::Private, None));
    channel.end(again, Outcome::Committed).unwrap();
}

#[test]
fn what_is_released_as_private_or_as_a_hole_stays_out_of_the_devices_reach() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(2);
    let mut person = setup.connect();
    for (page, to) in [(0, State::Private), (1, State::Hole)] {
        let begun = granted(channel.begin(pages(page, 1), PageState::Private, None));
        channel.end(begun, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
        assert_eq!(person.release(begun, to).unwrap(), PAGE);
        assert_faults(&setup.device, page);
    }
    let region = client.status().unwrap().regions[0].clone();
    assert_eq!((region.private, region.hole, region.unknown), (PAGE, PAGE, 0));
    let back = granted(channel.begin(pages(0, 2), PageState::Shared, None));
    channel.end(back, Outcome::Committed).unwrap();
    dma_read(&setup.device, 0).unwrap();
}

#[test]
fn who_has_ever_spoken_for_a_vm_may_not_release_and_with_no_release_nobody() {
    let setup = Setup::new();
    let (_client, mut channel, file) = setup.client(1);
    let begun = granted(channel.begin(pages(0, 1), PageState::Private, None));
    channel.end(begun, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
    let mut other = setup.connect();
    let region = other.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*file]).unwrap().region;
    other.remove_memory(region).unwrap();
    assert_refused(other.release(begun, State::Hole), PERM, "speaks for a VM");
    let mut third = setup.connect();
    let _channel = third.open_channel().unwrap();
    assert_refused(third.release(begun, State::Hole), PERM, "speaks for a VM");
    drop((channel, other, third, setup));

    let strict = Setup::with(|options| options.allow_release = false);
    let (mut client, mut channel, _file) = strict.client(1);
    let begun = granted(channel.begin(pages(0, 1), PageState::Private, None));
    channel.end(begun, Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
    assert_refused(strict.connect().release(begun, State::Shared), PERM, "--no-release");
    assert_eq!(client.status().unwrap().quarantined, PAGE);
    assert_faults(&strict.device, 0);
}
