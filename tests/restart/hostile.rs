//! What comes back from the manager is not what was kept.

use std::os::fd::OwnedFd;
use std::time::Instant;

use passgate::client::{AddMemory, Outcome, PageState, State};
use passgate_bindings::PAGE;
use rustix::fs::MemfdFlags;

use super::keeper::Keeper;
use super::{
    Dice, GPA, LONG, PAGES, begin, comes_to_reach, convert, join, memory, reaches, service, settled,
};

/// Whatever comes in place of what was kept: a clean start that says why, or a clear error; never another state.
#[test]
fn what_was_kept_is_not_believed_for_its_shape() {
    let memfd = |bytes: &[u8]| {
        let fd =
            rustix::fs::memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::io::pwrite(&fd, bytes, 0).unwrap();
        fd
    };
    type Spoil = fn(&Keeper, OwnedFd);
    let unreadable = ["another file as the ledger", "no ledger", "a pipe as the ledger"];
    let cases: &[(&str, Spoil, &str, bool)] = &[
        (
            "another file as the ledger",
            |service, other| service.replace("passgate.ledger", other),
            "ledger",
            false,
        ),
        (
            "no ledger",
            |service, _| service.forget("passgate.ledger"),
            "passgate.ledger` was not handed over",
            false,
        ),
        (
            "a pipe as the ledger",
            |service, _| {
                let (read, _write) = std::io::pipe().unwrap();
                service.replace("passgate.ledger", read);
            },
            "ledger that was kept cannot be opened",
            false,
        ),
        (
            "the memory is missing",
            |service, _| service.forget("passgate.memory."),
            "its file did not come back",
            false,
        ),
        (
            "other memory",
            |service, other| {
                let name =
                    service.names().into_iter().find(|name| name.starts_with("passgate.memory.")).unwrap();
                service.replace(&name, other);
            },
            "is another file",
            false,
        ),
        (
            "other memory of the same shape",
            |service, _| {
                let name =
                    service.names().into_iter().find(|name| name.starts_with("passgate.memory.")).unwrap();
                service.replace(&name, memory(PAGES));
            },
            "is another file",
            false,
        ),
        (
            "another socket",
            |service, other| service.replace("passgate.socket", other),
            "does not listen",
            true,
        ),
        (
            "unknown names",
            |service, other| service.replace("something.else", other),
            "none of passgate's",
            true,
        ),
        ("an iommufd too many", |service, other| service.replace("passgate.iommufd", other), "", true),
    ];
    for (what, spoil, says, whole) in cases {
        let (mut service, memory) = (service(&[]), memory(PAGES));
        service.start();
        let (client, channel) = join(&service, &memory);
        service.kill();
        drop((client, channel));
        spoil(&service, memfd(&[7; 8192]));
        if *what == "another socket" {
            std::fs::remove_file(&service.path).unwrap();
        }
        service.start();
        if !says.is_empty() {
            service.says(says);
        }
        let mut client = service.client();
        match client.adopt() {
            Ok(adopted) => assert!(*whole && adopted.regions.len() == 1, "{what}: {adopted:?}"),
            Err(error) => assert!(!whole, "{what}: {error}"),
        }
        if !whole {
            let until = Instant::now() + LONG;
            while !client.status().unwrap().regions.is_empty() {
                assert!(Instant::now() < until, "{what}: {:?}", client.status());
                std::thread::yield_now();
            }
            // It serves as one that has just begun.
            client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory]).unwrap();
        }
        if unreadable.contains(what) {
            // What was in quarantine is unknown: all of it is, for the next daemon too.
            service.says("what was in quarantine is unknown");
            assert!(!reaches(&mut client, 1), "{what}");
            service.kill();
            service.start();
            client = service.client();
            client.adopt().unwrap();
            settled(&mut client, 0);
            assert!((0..PAGES).all(|at| !reaches(&mut client, at)), "{what}");
            let held = client.status().unwrap().quarantine;
            assert_eq!(held.iter().map(|range| range.length).sum::<u64>(), PAGES * PAGE, "{what}: {held:?}");
            let mut person = service.client();
            for since in
                held.iter().map(|range| range.invalidation).collect::<std::collections::BTreeSet<_>>()
            {
                person.release(since, State::Shared).unwrap();
            }
        }
        settled(&mut client, PAGES);
        assert!(comes_to_reach(&mut client, 1), "{what}");
    }
}

/// Words of the ledger are overwritten. What cannot be is refused, and what could be is served: no daemon falls over it.
#[test]
fn no_damage_to_the_ledger_keeps_a_daemon_from_serving() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (client, mut channel) = join(&service, &memory);
    convert(&mut channel, 3, PageState::Private);
    begin(&mut channel, 5, PageState::Private);
    service.kill();
    drop((client, channel));
    let whole = service.copy("passgate.ledger");
    let mut before = vec![0; 1 << 20];
    let len = rustix::io::pread(&whole, &mut before, 0).unwrap();
    let words: Vec<usize> = (0..len / 8).filter(|at| before[at * 8..at * 8 + 8] != [0; 8]).collect();
    assert!(words.len() > 20);
    let mut dice = Dice(42);
    for _ in 0..40 {
        let at = words[dice.roll(words.len() as u64) as usize] * 8;
        let bad = (dice.roll(u64::MAX) >> dice.roll(63)).to_le_bytes();
        rustix::io::pwrite(&whole, &bad, at as u64).unwrap();
        service.start();
        let mut client = service.client();
        if let Ok(adopted) = client.adopt() {
            assert!(adopted.regions.len() <= 1, "{adopted:?}");
        }
        assert!(client.status().is_ok());
        service.kill();
        // As it was: the file that the test holds is the one that was kept at first.
        for (nth, chunk) in before.chunks(1 << 16).enumerate() {
            rustix::io::pwrite(&whole, chunk, (nth << 16) as u64).unwrap();
        }
        service.replace("passgate.ledger", &whole);
        if !service.names().iter().any(|name| name.starts_with("passgate.memory.")) {
            let stat = rustix::fs::fstat(&memory).unwrap();
            service.replace(&format!("passgate.memory.{:x}.{:x}", stat.st_dev, stat.st_ino), &memory);
        }
    }
}

/// Without its ledger nobody knows what was in quarantine: all of it is, and so it is for who comes after.
#[test]
fn quarantine_outlives_a_start_without_the_ledger_and_the_restarts_after_it() {
    let place = tempfile::tempdir().unwrap();
    for with_state in [false, true] {
        let state = place.path().join("state");
        let more: &[&str] = if with_state { &["--state-dir", state.to_str().unwrap()] } else { &[] };
        let (mut service, memory) = (service(more), memory(PAGES));
        service.start();
        let (client, mut channel) = join(&service, &memory);
        let lost = begin(&mut channel, 5, PageState::Private);
        channel.end(lost, Outcome::Unknown { errno: 5, offset: 0 }).unwrap();
        service.kill();
        drop((client, channel));
        service.forget("passgate.ledger");
        service.start();
        let mut client = service.client();
        client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory]).unwrap();
        assert!(!reaches(&mut client, 5));
        drop(client);
        for _ in 0..2 {
            service.kill();
            service.start();
            let mut client = service.client();
            let quarantine = client.status().unwrap().quarantine;
            assert!(quarantine.iter().map(|range| range.length).sum::<u64>() >= PAGE, "{quarantine:?}");
            _ = client.adopt();
            assert!(!reaches(&mut client, 5));
        }
    }
}

/// A quarantine that came from the state directory is in the ledger, and so is the next daemon's.
#[test]
fn quarantine_of_the_state_directory_is_in_the_ledger() {
    let place = tempfile::tempdir().unwrap();
    let state = place.path().join("state");
    let (mut service, memory) = (service(&["--state-dir", state.to_str().unwrap()]), memory(PAGES));
    service.start();
    let (client, mut channel) = join(&service, &memory);
    let lost = begin(&mut channel, 5, PageState::Private);
    channel.end(lost, Outcome::Unknown { errno: 5, offset: 0 }).unwrap();
    service.kill();
    drop((client, channel));
    // The manager has lost everything: the directory is what is left.
    for name in service.names() {
        service.forget(&name);
    }
    std::fs::remove_file(&service.path).unwrap();
    service.start();
    let mut client = service.client();
    client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory]).unwrap();
    drop(client);
    for round in 0..3 {
        service.kill();
        if round == 1 {
            // The ledger has it, so that a directory that has lost it keeps nobody from going on.
            std::fs::remove_file(state.join("quarantine.json")).unwrap();
        }
        service.start();
        let quarantine = service.client().status().unwrap().quarantine;
        let [held] = &quarantine[..] else { panic!("{quarantine:?}") };
        assert_eq!((held.length, held.cause.as_str()), (PAGE, "owner-unknown"));
    }
}
