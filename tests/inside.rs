//! Queries and connections of other threads of the daemon's process to a VM's loop (`passgate::serve::Inside`).

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod common;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use passgate::Error;
use passgate::gate::{DmaAccess, OnStuckDma, Policy};
use passgate::serve::{Handle, Inside, Options, Server};
use passgate_backends::{DeviceTraits, Steps};
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};
use passgate_client::{AddMemory, Client, Outcome, PageState};
use passgate_sim::iommu::{Call, Fault, Memory, Sim};

use common::{exclusive, granted, memory};

const TIMEOUT: Duration = Duration::from_secs(20);

fn range(page: u64, pages: u64) -> PageRange<Iova> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

fn page(page: u64) -> PageRange<Gpa> {
    PageRange::new(page * PAGE, PAGE).unwrap()
}

/// Asks whether devices may access these pages; the receiver gets the answer.
fn query(inside: &Inside, pages: &[PageRange<Iova>], writes: bool) -> Receiver<DmaAccess> {
    let (sender, answer) = channel();
    inside.ask(pages.to_vec(), writes, Box::new(move |admits| _ = sender.send(admits)));
    answer
}

/// Returns the answer for one page, which must come at once.
fn access_to_page(inside: &Inside, page: u64) -> DmaAccess {
    query(inside, &[range(page, 1)], true).recv_timeout(TIMEOUT).unwrap()
}

/// Starts a server without a socket over a simulated domain.
fn serve(sim: &Sim, policy: Policy) -> (Handle, Inside) {
    let device = sim.device("sim:0", Steps::all(), DeviceTraits { ats: false, tdi: false, tolerant: false });
    let options = Options { policy, ..Options::nowhere() };
    let server = Server::bind(options, Arc::new(sim.clone()), vec![Arc::new(device)]).unwrap();
    let inside = server.inside();
    (server.spawn().unwrap(), inside)
}

fn sim() -> Sim {
    Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap()
}

#[test]
fn server_without_socket_serves_its_own_process() {
    let _exclusive = exclusive();
    let sim = sim();
    let (server, inside) = serve(&sim, Policy::default());
    assert_eq!(server.path(), std::path::Path::new(""));
    let (mut first, mut second) = (inside.connect().unwrap(), inside.connect().unwrap());
    let added = first.add_memory(&AddMemory::shared(0, 4 * PAGE), &[&*memory(4)]).unwrap();
    second.add_memory(&AddMemory::shared(16 * PAGE, 4 * PAGE), &[&*memory(4)]).unwrap();
    assert_eq!(second.status().unwrap().regions.len(), 2);
    assert!(second.remove_memory(added.region).is_err(), "the region belongs to the other connection");
    // Memory is removed with the connection that added it.
    drop(first);
    common::wait_for_status(&mut second, |status| status.regions.len() == 1);
    server.stop().unwrap();
    assert_eq!(sim.mapping_count(), 0);
    assert!(second.status().is_err());
    assert!(matches!(inside.connect(), Err(Error::Over)));
}

#[test]
fn in_process_connections_are_exempt_from_client_limit() {
    let _exclusive = exclusive();
    let options = Options { max_clients: 0, ..Options::nowhere() };
    let server = Server::bind(options, Arc::new(sim()), vec![]).unwrap();
    let inside = server.inside();
    // A connection may be made before the server runs, too.
    let connected_before = inside.connect().unwrap();
    let _server = server.spawn().unwrap();
    for mut client in [connected_before, inside.connect().unwrap()] {
        client.status().unwrap();
    }
}

#[test]
fn decided_access_is_answered_immediately() {
    let _exclusive = exclusive();
    let (_server, inside) = serve(&sim(), Policy::default());
    let mut client = inside.connect().unwrap();
    assert_eq!(access_to_page(&inside, 0), DmaAccess::Never);
    client.add_memory(&AddMemory::shared(0, 8 * PAGE), &[&*memory(8)]).unwrap();
    let hole = AddMemory { initial: PageState::Hole, ..AddMemory::shared(8 * PAGE, 8 * PAGE) };
    client.add_memory(&hole, &[&*memory(8)]).unwrap();
    assert_eq!((access_to_page(&inside, 0), access_to_page(&inside, 8)), (DmaAccess::Open, DmaAccess::Never));
    let access_to = |ranges: &[_]| query(&inside, ranges, false).recv_timeout(TIMEOUT).unwrap();
    assert_eq!(access_to(&[range(0, 2), range(4, 4)]), DmaAccess::Open);
    assert_eq!(access_to(&[range(0, 2), range(7, 2), range(4, 1)]), DmaAccess::Never);
    assert_eq!(access_to(&[]), DmaAccess::Open);
}

#[test]
fn access_query_during_conversion_is_answered_at_its_end() {
    let _exclusive = exclusive();
    let (_server, inside) = serve(&sim(), Policy::default());
    let mut client = inside.connect().unwrap();
    client.add_memory(&AddMemory::shared(0, 8 * PAGE), &[&*memory(8)]).unwrap();
    let mut channel = client.open_channel().unwrap();
    for (outcome, expected) in
        [(Outcome::NotCommitted, DmaAccess::Open), (Outcome::Committed, DmaAccess::Never)]
    {
        let id = granted(channel.begin(page(3), PageState::Private, None));
        let waiting = [query(&inside, &[range(2, 2)], true), query(&inside, &[range(3, 1)], false)];
        assert_eq!(
            access_to_page(&inside, 2),
            DmaAccess::Open,
            "the loop has handled the two queries before"
        );
        for answer in &waiting {
            assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
        }
        channel.end(id, outcome).unwrap();
        for answer in waiting {
            assert_eq!(answer.recv_timeout(TIMEOUT).unwrap(), expected, "{outcome:?}");
        }
    }
}

#[test]
fn access_query_is_answered_when_slow_map_completes() {
    let _exclusive = exclusive();
    let sim = sim();
    let (_server, inside) = serve(&sim, Policy::default());
    let mut client = inside.connect().unwrap();
    sim.fail_next(Call::Map, Fault::Hang);
    let file = memory(8);
    std::thread::scope(|scope| {
        let adding = scope.spawn(|| client.add_memory(&AddMemory::shared(0, 8 * PAGE), &[&*file]));
        while sim.hanging() == 0 {
            std::thread::yield_now();
        }
        // The thread of the loop is in the hanging call: the supervisor takes the loop over.
        let answer = query(&inside, &[range(0, 8)], true);
        while access_to_page(&inside, 100) != DmaAccess::Never {}
        assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
        sim.release();
        assert_eq!(answer.recv_timeout(TIMEOUT).unwrap(), DmaAccess::Open);
        adding.join().unwrap().unwrap();
    });
}

#[test]
fn queries_beyond_limit_are_answered_later() {
    let _exclusive = exclusive();
    let (_server, inside) = serve(&sim(), Policy::default());
    let mut client = inside.connect().unwrap();
    client.add_memory(&AddMemory::shared(0, 8 * PAGE), &[&*memory(8)]).unwrap();
    let mut channel = client.open_channel().unwrap();
    let id = granted(channel.begin(page(3), PageState::Private, None));
    let waiting: Vec<_> = (0..4096).map(|_| query(&inside, &[range(3, 1)], true)).collect();
    assert_eq!(access_to_page(&inside, 3), DmaAccess::Later);
    assert_eq!(access_to_page(&inside, 2), DmaAccess::Open);
    channel.end(id, Outcome::NotCommitted).unwrap();
    for answer in waiting {
        assert_eq!(answer.recv_timeout(TIMEOUT).unwrap(), DmaAccess::Open);
    }
    let id = granted(channel.begin(page(3), PageState::Private, None));
    let later_answer = query(&inside, &[range(3, 1)], true);
    channel.end(id, Outcome::NotCommitted).unwrap();
    assert_eq!(
        later_answer.recv_timeout(TIMEOUT).unwrap(),
        DmaAccess::Open,
        "answered queries make room for new ones"
    );
}

#[test]
fn pending_queries_are_answered_at_shutdown() {
    let _exclusive = exclusive();
    let (server, inside) = serve(&sim(), Policy::default());
    let mut client = inside.connect().unwrap();
    client.add_memory(&AddMemory::shared(0, 8 * PAGE), &[&*memory(8)]).unwrap();
    let mut channel = client.open_channel().unwrap();
    let _id = granted(channel.begin(page(3), PageState::Private, None));
    let waiting = query(&inside, &[range(3, 1)], true);
    assert_eq!(access_to_page(&inside, 2), DmaAccess::Open);
    server.stop().unwrap();
    assert_eq!(waiting.recv_timeout(TIMEOUT).unwrap(), DmaAccess::Never);
    assert_eq!(access_to_page(&inside, 3), DmaAccess::Never, "after the end");
    // The same for a server that never ran.
    let server = Server::bind(Options::nowhere(), Arc::new(self::sim()), vec![]).unwrap();
    let inside = server.inside();
    let waiting = query(&inside, &[range(3, 1)], true);
    drop(server);
    assert_eq!(waiting.recv_timeout(TIMEOUT).unwrap(), DmaAccess::Never);
    assert!(matches!(inside.connect(), Err(Error::Over)));
}

/// An ordinary client can be refused: a removal whose unmap is not proved is answered with an error.
#[test]
fn unproven_removal_is_an_error() {
    let _exclusive = exclusive();
    let sim = sim();
    let device =
        Arc::new(sim.device("sim:0", Steps::all(), DeviceTraits { ats: false, tdi: false, tolerant: false }));
    let dir = tempfile::tempdir().unwrap();
    let policy = Policy { on_stuck_dma: OnStuckDma::Refuse, ..Policy::default() };
    let options = Options { policy, ..Options::at(dir.path().join("socket")) };
    let server = Server::bind(options, Arc::new(sim.clone()), vec![device]).unwrap().spawn().unwrap();
    let mut client = Client::connect(server.path()).unwrap();
    let region = client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap().region;
    sim.fail_next(Call::Unmap, Fault::Stuck);
    common::assert_refused(client.remove_memory(region), 16, "could not be removed");
    let status = client.status().unwrap();
    assert!(status.regions[0].closing && status.quarantine.len() == 1);
    // The region is removed once the unmap is proved.
    sim.unstick();
    common::wait_for_status(&mut client, |status| status.regions.is_empty() && status.quarantine.is_empty());
}

/// The removal by an in-process connection cannot be refused: the device is reset although the policy is `refuse`, which never
/// resets.
#[test]
fn in_process_removal_forces_unmap() {
    let _exclusive = exclusive();
    let sim = sim();
    let stop_classes = Steps::all() - Steps::DETACH;
    let device =
        Arc::new(sim.device("sim:0", stop_classes, DeviceTraits { ats: false, tdi: false, tolerant: false }));
    let policy = Policy { on_stuck_dma: OnStuckDma::Refuse, ..Policy::default() };
    let options = Options { policy, ..Options::nowhere() };
    let server = Server::bind(options, Arc::new(sim.clone()), vec![device]).unwrap();
    let inside = server.inside();
    let _server = server.spawn().unwrap();
    let mut client = inside.connect().unwrap();
    let region = client.add_memory(&AddMemory::shared(0, PAGE), &[&*memory(1)]).unwrap().region;
    sim.fail_next(Call::Unmap, Fault::Stuck);
    client.remove_memory(region).unwrap();
    assert!(client.status().unwrap().regions.is_empty() && sim.dma(Iova(0)).is_none());
}

/// The end waits for a close as long as it progresses, and no longer.
#[test]
fn stopped_server_waits_for_closes_that_progress() {
    const PAGES: u64 = 4096;
    let _exclusive = exclusive();
    for hangs in [false, true] {
        let sim = sim();
        let options = Options { farewell: Duration::ZERO, ..Options::nowhere() };
        let server = Server::bind(options, Arc::new(sim.clone()), vec![]).unwrap();
        let inside = server.inside();
        let server = server.spawn().unwrap();
        let mut client = inside.connect().unwrap();
        client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&*memory(PAGES)]).unwrap();
        if hangs {
            sim.fail_next(Call::Unmap, Fault::Hang);
        }
        let ended = server.stop();
        assert_eq!(ended.is_err(), hangs, "{ended:?}");
        assert_eq!(sim.mapping_count() > 0, hangs);
        sim.release();
    }
}
