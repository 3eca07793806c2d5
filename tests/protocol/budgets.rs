//! What is bounded, and what a client hears that wants more.

use passgate::client::{AddMemory, Answer, Client, PageState};
use passgate::gate::Policy;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::PAGE;

use crate::common::{Setup, assert_refused, granted, memory, open_files, pages, substance, until};

const NOSPC: i32 = 28;
const USERS: i32 = 87;

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
fn connections_beyond_the_limit_may_make_an_operators_short_calls_and_hear_why_no_others() {
    let setup = Setup::with(|options| options.max_clients = 2);
    let (mut first, mut channel, file) = setup.client(1);
    let second = setup.connect();
    let before = open_files();
    let beyond = || Client::connect(setup.server.path()).unwrap();
    assert_eq!(beyond().status().unwrap().clients, 3);
    assert!(beyond().metrics().unwrap().contains("passgate_clients 3"));
    let (mut explains, mut releases) = (beyond(), beyond());
    assert_refused(explains.explain(99), 2, "not remembered");
    let begun = granted(channel.begin(pages(0, 1), PageState::Private, None));
    channel.end(begun, passgate::client::Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
    assert_eq!(releases.release(begun, passgate::client::State::Shared).unwrap(), PAGE);
    let region = AddMemory::shared(1 << 30, PAGE);
    let limit = "2 connections are open, and no more may be: close one";
    assert_refused(beyond().add_memory(&region, &[&*file]), USERS, limit);
    assert_refused(beyond().open_channel(), USERS, limit);
    assert_refused(beyond().subscribe(), USERS, limit);
    // It was let go, too: it was not what it came for.
    let mut refused = beyond();
    assert_refused(refused.open_channel(), USERS, limit);
    assert!(refused.status().is_err());

    // Idle ones never use the reserve up.
    let mut idle: Vec<Client> = (0..40).map(|_| beyond()).collect();
    assert_eq!(beyond().status().unwrap().clients, 2 + 8);
    idle.last_mut().unwrap().status().unwrap();
    assert!(idle[0].status().is_err(), "the oldest has gone");
    channel.echo().unwrap();
    // One of them becomes an ordinary one as soon as there is room.
    drop(second);
    let waiting = idle.last_mut().unwrap();
    until(&mut first, |status| status.clients == 1 + 7);
    waiting.add_memory(&region, &[&*file]).unwrap();
    waiting.open_channel().unwrap();
    drop((idle, explains, releases, refused));
    until(&mut first, |status| status.clients == 1 && open_files() <= before);
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
