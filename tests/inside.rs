//! What other threads of the daemon's process ask of a VM's loop.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod common;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use passgate::Error;
use passgate::client::{AddMemory, Client, Outcome, PageState, State};
use passgate::gate::{Admits, OnStuckDma, Policy};
use passgate::serve::{Handle, Inside, Options, Server};
use passgate_backends::iommu::sim::{Call, Fault, Memory, Sim};
use passgate_backends::{Nature, StopClass};
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

use common::{alone, granted, memory};

const SOON: Duration = Duration::from_secs(20);

fn range(page: u64, pages: u64) -> PageRange<Iova> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

fn page(page: u64) -> PageRange<Gpa> {
    PageRange::new(page * PAGE, PAGE).unwrap()
}

fn ask(inside: &Inside, pages: &[PageRange<Iova>], writes: bool) -> Receiver<Admits> {
    let (told, answer) = channel();
    inside.ask(pages.to_vec(), writes, Box::new(move |admits| _ = told.send(admits)));
    answer
}

/// The answer, where it comes at once.
fn says(inside: &Inside, page: u64) -> Admits {
    ask(inside, &[range(page, 1)], true).recv_timeout(SOON).unwrap()
}

/// A server without a socket over a simulated domain.
fn serve(sim: &Sim, policy: Policy) -> (Handle, Inside) {
    let device = sim.device("sim:0", StopClass::all(), Nature { ats: false, tdi: false });
    let options = Options { policy, ..Options::nowhere() };
    let server = Server::bind(options, Arc::new(sim.clone()), vec![Arc::new(device)]).unwrap();
    let inside = server.inside();
    (server.spawn().unwrap(), inside)
}

fn sim() -> Sim {
    Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap()
}

#[test]
fn a_server_without_a_socket_serves_its_own_process() {
    let _one = alone();
    let sim = sim();
    let (server, inside) = serve(&sim, Policy::default());
    assert_eq!(server.path(), std::path::Path::new(""));
    let (mut first, mut second) = (inside.connect().unwrap(), inside.connect().unwrap());
    let added = first.add_memory(&AddMemory::shared(0, 4 * PAGE), &[&*memory(4)]).unwrap();
    second.add_memory(&AddMemory::shared(16 * PAGE, 4 * PAGE), &[&*memory(4)]).unwrap();
    assert_eq!(second.status().unwrap().regions.len(), 2);
    assert!(second.remove_memory(added.region).is_err(), "it is the other's");
    // What a connection added goes with it.
    drop(first);
    common::until(&mut second, |status| status.regions.len() == 1);
    server.stop().unwrap();
    assert_eq!(sim.mapping_count(), 0);
    assert!(second.status().is_err());
    assert!(matches!(inside.connect(), Err(Error::Over)));
}

#[test]
fn own_connections_count_for_no_limit() {
    let _one = alone();
    let options = Options { max_clients: 0, ..Options::nowhere() };
    let server = Server::bind(options, Arc::new(sim()), vec![]).unwrap();
    let inside = server.inside();
    // Also before it runs.
    let early = inside.connect().unwrap();
    let _server = server.spawn().unwrap();
    for mut client in [early, inside.connect().unwrap()] {
        client.status().unwrap();
    }
}

#[test]
fn what_is_certain_is_answered_at_once() {
    let _one = alone();
    let (_server, inside) = serve(&sim(), Policy::default());
    let mut client = inside.connect().unwrap();
    assert_eq!(says(&inside, 0), Admits::Never);
    client.add_memory(&AddMemory::shared(0, 8 * PAGE), &[&*memory(8)]).unwrap();
    let hole = AddMemory { initial: State::Hole, ..AddMemory::shared(8 * PAGE, 8 * PAGE) };
    client.add_memory(&hole, &[&*memory(8)]).unwrap();
    assert_eq!((says(&inside, 0), says(&inside, 8)), (Admits::Open, Admits::Never));
    let over = |ranges: &[_]| ask(&inside, ranges, false).recv_timeout(SOON).unwrap();
    assert_eq!(over(&[range(0, 2), range(4, 4)]), Admits::Open);
    assert_eq!(over(&[range(0, 2), range(7, 2), range(4, 1)]), Admits::Never);
    assert_eq!(over(&[]), Admits::Open);
}

#[test]
fn a_question_about_a_conversion_is_answered_by_its_end() {
    let _one = alone();
    let (_server, inside) = serve(&sim(), Policy::default());
    let mut client = inside.connect().unwrap();
    client.add_memory(&AddMemory::shared(0, 8 * PAGE), &[&*memory(8)]).unwrap();
    let mut channel = client.open_channel().unwrap();
    for (outcome, wanted) in [(Outcome::NotCommitted, Admits::Open), (Outcome::Committed, Admits::Never)] {
        let id = granted(channel.begin(page(3), PageState::Private, None));
        let waiting = [ask(&inside, &[range(2, 2)], true), ask(&inside, &[range(3, 1)], false)];
        assert_eq!(says(&inside, 2), Admits::Open, "the loop has seen the two");
        for answer in &waiting {
            assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
        }
        channel.end(id, outcome).unwrap();
        for answer in waiting {
            assert_eq!(answer.recv_timeout(SOON).unwrap(), wanted, "{outcome:?}");
        }
    }
}

#[test]
fn a_question_is_answered_when_a_map_that_takes_its_time_is_made() {
    let _one = alone();
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
        // The loop itself is in that call, and is taken over.
        let answer = ask(&inside, &[range(0, 8)], true);
        while says(&inside, 100) != Admits::Never {}
        assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
        sim.release();
        assert_eq!(answer.recv_timeout(SOON).unwrap(), Admits::Open);
        adding.join().unwrap().unwrap();
    });
}

#[test]
fn more_questions_than_are_remembered_are_answered_later() {
    let _one = alone();
    let (_server, inside) = serve(&sim(), Policy::default());
    let mut client = inside.connect().unwrap();
    client.add_memory(&AddMemory::shared(0, 8 * PAGE), &[&*memory(8)]).unwrap();
    let mut channel = client.open_channel().unwrap();
    let id = granted(channel.begin(page(3), PageState::Private, None));
    let waiting: Vec<_> = (0..4096).map(|_| ask(&inside, &[range(3, 1)], true)).collect();
    assert_eq!(says(&inside, 3), Admits::Later);
    assert_eq!(says(&inside, 2), Admits::Open);
    channel.end(id, Outcome::NotCommitted).unwrap();
    for answer in waiting {
        assert_eq!(answer.recv_timeout(SOON).unwrap(), Admits::Open);
    }
    let id = granted(channel.begin(page(3), PageState::Private, None));
    let again = ask(&inside, &[range(3, 1)], true);
    channel.end(id, Outcome::NotCommitted).unwrap();
    assert_eq!(again.recv_timeout(SOON).unwrap(), Admits::Open, "there is room again");
}

#[test]
fn every_question_is_answered_also_by_the_end() {
    let _one = alone();
    let (server, inside) = serve(&sim(), Policy::default());
    let mut client = inside.connect().unwrap();
    client.add_memory(&AddMemory::shared(0, 8 * PAGE), &[&*memory(8)]).unwrap();
    let mut channel = client.open_channel().unwrap();
    let _id = granted(channel.begin(page(3), PageState::Private, None));
    let waiting = ask(&inside, &[range(3, 1)], true);
    assert_eq!(says(&inside, 2), Admits::Open);
    server.stop().unwrap();
    assert_eq!(waiting.recv_timeout(SOON).unwrap(), Admits::Never);
    assert_eq!(says(&inside, 3), Admits::Never, "after the end");
    // And one that never ran.
    let server = Server::bind(Options::nowhere(), Arc::new(self::sim()), vec![]).unwrap();
    let inside = server.inside();
    let waiting = ask(&inside, &[range(3, 1)], true);
    drop(server);
    assert_eq!(waiting.recv_timeout(SOON).unwrap(), Admits::Never);
    assert!(matches!(inside.connect(), Err(Error::Over)));
}

/// The same, of a client that hears a no: it hears one.
#[test]
fn a_removal_that_is_not_proved_is_an_error() {
    let _one = alone();
    let sim = sim();
    let device = Arc::new(sim.device("sim:0", StopClass::all(), Nature { ats: false, tdi: false }));
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
    // It goes with the proof, whenever that comes.
    sim.unstick();
    common::until(&mut client, |status| status.regions.is_empty() && status.quarantine.is_empty());
}

/// What only a reset ends, and a policy that never resets.
#[test]
fn what_an_own_connection_removes_goes_whatever_it_takes() {
    let _one = alone();
    let sim = sim();
    let ends = StopClass::all() - StopClass::DETACH;
    let device = Arc::new(sim.device("sim:0", ends, Nature { ats: false, tdi: false }));
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
