//! Limits, and the refusals of what exceeds them.

use passgate::gate::Policy;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::PAGE;
use passgate_client::{AddMemory, Answer, Client, PageState};

use crate::common::{
    Setup, assert_refused, granted, memory, open_files, pages, status_without_wrong_count, wait_for_status,
};

const NOSPC: i32 = 28;
const USERS: i32 = 87;

#[test]
fn region_limit_is_enforced_until_one_is_removed() {
    let setup = Setup::with_policy(Policy { max_regions: 3, ..Policy::default() });
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
fn status_with_max_regions_is_read_whole() {
    let setup = Setup::new();
    let mut client = setup.connect();
    let file = memory(1);
    let max_regions = Policy::default().max_regions;
    for at in 0..u64::from(max_regions) {
        client.add_memory(&AddMemory::shared(at << 30, PAGE), &[&*file]).unwrap();
    }
    let status = client.status().unwrap();
    assert_eq!(status.regions.len(), max_regions as usize);
    assert!(serde_json::to_vec(&status).unwrap().len() > passgate_client::protocol::MAX_FRAME_BYTES);
}

#[test]
fn mappings_beyond_domain_limit_are_refused_with_remedy() {
    let setup = Setup::over_soft_domain(|| SoftDomain::with_slots(8).unwrap(), |_| {});
    let mut client = setup.connect();
    let file = memory(64);
    let status_before = status_without_wrong_count(&mut client);
    let before = open_files();
    let small_pieces = AddMemory::shared(0, 64 * PAGE);
    // An explicit piece, because passgate would choose larger mappings by itself: the software device can be paused.
    let small_pieces = AddMemory { piece: PAGE, ..small_pieces };
    assert_refused(
        client.add_memory(&small_pieces, &[&*file]),
        NOSPC,
        "use larger mappings (leave `piece` out",
    );
    assert_eq!((open_files(), status_without_wrong_count(&mut client)), (before, status_before));
    assert_eq!(setup.domain.mappings(), 0);
    let large_pieces = AddMemory { piece: 16 * PAGE, ..small_pieces };
    assert_eq!(client.add_memory(&large_pieces, &[&*file]).unwrap().mapped, 64 * PAGE);
}

#[test]
fn memory_beyond_limit_is_refused() {
    let setup = Setup::with_policy(Policy { max_memory: 4 * PAGE, ..Policy::default() });
    let (mut client, _channel, _file) = setup.client(3);
    let second_file = memory(2);
    let two_pages = AddMemory::shared(1 << 30, 2 * PAGE);
    assert_refused(client.add_memory(&two_pages, &[&*second_file]), NOSPC, "bytes of guest memory");
    client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*second_file]).unwrap();
}

#[test]
fn open_invalidation_limit_is_enforced_until_one_ends() {
    let setup = Setup::with_policy(Policy { max_open: 2, ..Policy::default() });
    let (_client, mut channel, _file) = setup.client(4);
    let mut begun = Vec::new();
    for page in 0..2 {
        match channel.begin(pages(page, 1), PageState::Private, None).unwrap() {
            Answer::Granted { invalidation } => begun.push(invalidation),
            other => panic!("{other:?}"),
        }
    }
    assert_refused(channel.begin(pages(2, 1), PageState::Private, None), NOSPC, "refused");
    channel.end(begun[0], passgate_client::Outcome::Committed).unwrap();
    let answer = channel.begin(pages(2, 1), PageState::Private, None).unwrap();
    assert!(matches!(answer, Answer::Granted { .. }), "{answer:?}");
}

#[test]
fn connections_beyond_limit_may_make_operator_calls_only() {
    let setup = Setup::with(|options| options.max_clients = 2);
    let (mut first, mut channel, file) = setup.client(1);
    let second = setup.connect();
    let before = open_files();
    let extra_client = || Client::connect(setup.server.path()).unwrap();
    assert_eq!(extra_client().status().unwrap().clients, 3);
    assert!(extra_client().metrics().unwrap().contains("passgate_clients 3"));
    let (mut explain_client, mut release_client) = (extra_client(), extra_client());
    assert_refused(explain_client.explain(99), 2, "not remembered");
    let invalidation = granted(channel.begin(pages(0, 1), PageState::Private, None));
    channel.end(invalidation, passgate_client::Outcome::Unknown { errno: 14, offset: 0 }).unwrap();
    assert_eq!(release_client.release(invalidation, passgate_client::PageState::Shared).unwrap(), PAGE);
    let region = AddMemory::shared(1 << 30, PAGE);
    let limit = "2 connections are open, and no more may be: close one";
    assert_refused(extra_client().add_memory(&region, &[&*file]), USERS, limit);
    assert_refused(extra_client().open_channel(), USERS, limit);
    assert_refused(extra_client().subscribe(), USERS, limit);
    // The server has closed the refused connection.
    let mut refused = extra_client();
    assert_refused(refused.open_channel(), USERS, limit);
    assert!(refused.status().is_err());

    // Idle connections do not exhaust the reserve: the oldest is closed.
    let mut idle: Vec<Client> = (0..40).map(|_| extra_client()).collect();
    assert_eq!(extra_client().status().unwrap().clients, 2 + 8);
    idle.last_mut().unwrap().status().unwrap();
    assert!(idle[0].status().is_err(), "the oldest idle connection must be closed");
    channel.echo().unwrap();
    // A connection of the reserve becomes an ordinary one as soon as there is room.
    drop(second);
    let waiting = idle.last_mut().unwrap();
    wait_for_status(&mut first, |status| status.clients == 1 + 7);
    waiting.add_memory(&region, &[&*file]).unwrap();
    waiting.open_channel().unwrap();
    drop((idle, explain_client, release_client, refused));
    wait_for_status(&mut first, |status| status.clients == 1 && open_files() <= before);
}

#[test]
fn connection_has_at_most_one_channel() {
    let setup = Setup::new();
    let (mut client, mut channel, _file) = setup.client(1);
    let before = open_files();
    assert_refused(client.open_channel(), 16, "has a channel already");
    assert_eq!(open_files(), before);
    channel.echo().unwrap();
}
