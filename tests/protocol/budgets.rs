//! What is bounded, and what a client hears that wants more.

use passgate::client::{AddMemory, Answer, Client, PageState};
use passgate::gate::Policy;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::PAGE;

use crate::common::{Setup, assert_refused, memory, open_files, pages, substance};

const NOSPC: i32 = 28;

#[test]
fn more_regions_than_allowed_are_refused_until_one_goes() {
    let setup = Setup::policy(Policy { max_regions: 3, ..Policy::default() });
    let mut client = setup.connect();
    let file = memory(1);
    let region = |at: u64| AddMemory::shared(at << 30, PAGE);
    for at in 0..3 {
        client.add_memory(&region(at), &[&*file]).unwrap();
    }
    let before = open_files();
    assert_refused(client.add_memory(&region(3), &[&*file]), NOSPC, "4 regions, the limit is 3");
    assert_eq!(open_files(), before);
    client.remove_memory(2).unwrap();
    client.add_memory(&region(3), &[&*file]).unwrap();
}

#[test]
fn a_status_of_as_many_regions_as_there_may_be_is_read_whole() {
    let setup = Setup::new();
    let mut client = setup.connect();
    let file = memory(1);
    let most = Policy::default().max_regions;
    for at in 0..u64::from(most) {
        client.add_memory(&AddMemory::shared(at << 30, PAGE), &[&*file]).unwrap();
    }
    let status = client.status().unwrap();
    assert_eq!(status.regions.len(), most as usize);
    assert!(serde_json::to_vec(&status).unwrap().len() > passgate::protocol::MAX_FRAME);
}

#[test]
fn more_mappings_than_the_domain_holds_are_refused_with_the_mend() {
    let setup = Setup::over(|| SoftDomain::with_slots(8).unwrap(), |_| {});
    let mut client = setup.connect();
    let file = memory(64);
    let known = substance(&mut client);
    let before = open_files();
    let fine = AddMemory::shared(0, 64 * PAGE);
    // The software device can be paused, so passgate would take larger ones by itself.
    let fine = AddMemory { piece: PAGE, ..fine };
    assert_refused(client.add_memory(&fine, &[&*file]), NOSPC, "use larger mappings (leave `piece` out");
    assert_eq!((open_files(), substance(&mut client)), (before, known));
    assert_eq!(setup.domain.mappings(), 0);
    let coarse = AddMemory { piece: 16 * PAGE, ..fine };
    assert_eq!(client.add_memory(&coarse, &[&*file]).unwrap().mapped, 64 * PAGE);
}

#[test]
fn more_memory_than_allowed_is_refused() {
    let setup = Setup::policy(Policy { max_memory: 4 * PAGE, ..Policy::default() });
    let (mut client, _channel, _file) = setup.client(3);
    let more = memory(2);
    let two = AddMemory::shared(1 << 30, 2 * PAGE);
    assert_refused(client.add_memory(&two, &[&*more]), NOSPC, "bytes of guest memory");
    client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*more]).unwrap();
}

#[test]
fn more_open_invalidations_than_allowed_are_refused_until_one_ends() {
    let setup = Setup::policy(Policy { max_open: 2, ..Policy::default() });
    let (_client, mut channel, _file) = setup.client(4);
    let mut begun = Vec::new();
    for page in 0..2 {
        match channel.begin(pages(page, 1), PageState::Private, None).unwrap() {
            Answer::Granted { invalidation } => begun.push(invalidation),
            other => panic!("{other:?}"),
        }
    }
    assert_refused(channel.begin(pages(2, 1), PageState::Private, None), NOSPC, "refused");
    channel.end(begun[0], passgate::client::Outcome::Committed).unwrap();
    let answer = channel.begin(pages(2, 1), PageState::Private, None).unwrap();
    assert!(matches!(answer, Answer::Granted { .. }), "{answer:?}");
}

#[test]
fn more_connections_than_allowed_are_closed_and_the_others_go_on() {
    let setup = Setup::with(|options| options.max_clients = 2);
    let mut first = setup.connect();
    let second = setup.connect();
    first.status().unwrap();
    let mut third = Client::connect(setup.server.path()).unwrap();
    assert!(third.status().is_err());
    assert_eq!(first.status().unwrap().clients, 2);
    drop(second);
    crate::common::until(&mut first, |status| status.clients == 1);
    setup.connect().status().unwrap();
}

#[test]
fn one_connection_has_one_channel() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(1);
    let before = open_files();
    assert_refused(client.open_channel(), 16, "has a channel already");
    assert_eq!(open_files(), before);
    channel.echo().unwrap();
}
