//! The service manager returns other descriptors than it was given.

use std::os::fd::OwnedFd;
use std::time::Instant;

use passgate_bindings::PAGE;
use passgate_client::{AddMemory, Outcome, PageState};
use rustix::fs::MemfdFlags;

use super::service_manager::ServiceManager;
use super::{
    GPA, PAGES, Random, TIMEOUT, becomes_reachable, begin, client_with_memory, convert, memory, reaches,
    service, wait_for_mapped_pages,
};

/// Descriptors that were replaced, lost or added: the daemon starts without the stored state and logs the reason, or ignores the
/// descriptor; it never resumes another state. Each case: name, damage, expected log text, and true if the memory can still be
/// adopted.
#[test]
fn tampered_fd_store_is_rejected_or_reported() {
    let memfd = |bytes: &[u8]| {
        let fd =
            rustix::fs::memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::io::pwrite(&fd, bytes, 0).unwrap();
        fd
    };
    type Damage = fn(&ServiceManager, OwnedFd);
    let unreadable = ["another file as the ledger", "no ledger", "a pipe as the ledger"];
    let cases: &[(&str, Damage, &str, bool)] = &[
        (
            "another file as the ledger",
            |service, other| service.replace("passgate.ledger", other),
            "ledger",
            false,
        ),
        (
            "no ledger",
            |service, _| service.remove("passgate.ledger"),
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
            |service, _| service.remove("passgate.memory."),
            "its file did not come back",
            false,
        ),
        (
            "other memory",
            |service, other| {
                let name = service
                    .stored_names()
                    .into_iter()
                    .find(|name| name.starts_with("passgate.memory."))
                    .unwrap();
                service.replace(&name, other);
            },
            "is another file",
            false,
        ),
        (
            "other memory of the same shape",
            |service, _| {
                let name = service
                    .stored_names()
                    .into_iter()
                    .find(|name| name.starts_with("passgate.memory."))
                    .unwrap();
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
            "no name of passgate's",
            true,
        ),
        ("an iommufd too many", |service, other| service.replace("passgate.iommufd", other), "", true),
    ];
    for (case, damage, expected_log, is_adopted) in cases {
        let (mut service, memory) = (service(&[]), memory(PAGES));
        service.start();
        let (client, channel) = client_with_memory(&service, &memory);
        service.kill();
        drop((client, channel));
        damage(&service, memfd(&[7; 8192]));
        if *case == "another socket" {
            std::fs::remove_file(&service.path).unwrap();
        }
        service.start();
        if !expected_log.is_empty() {
            service.wait_for_log(expected_log);
        }
        let mut client = service.client();
        match client.adopt() {
            Ok(adopted) => assert!(*is_adopted && adopted.regions.len() == 1, "{case}: {adopted:?}"),
            Err(error) => assert!(!is_adopted, "{case}: {error}"),
        }
        if !is_adopted {
            let deadline = Instant::now() + TIMEOUT;
            while !client.status().unwrap().regions.is_empty() {
                assert!(Instant::now() < deadline, "{case}: {:?}", client.status());
                std::thread::yield_now();
            }
            // It serves as a daemon without a predecessor.
            client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory]).unwrap();
        }
        if unreadable.contains(case) {
            // The quarantine is unknown, so all memory is in quarantine, for the next daemon too.
            service.wait_for_log("what was in quarantine is unknown");
            assert!(!reaches(&mut client, 1), "{case}");
            service.kill();
            service.start();
            client = service.client();
            client.adopt().unwrap();
            wait_for_mapped_pages(&mut client, 0);
            assert!((0..PAGES).all(|at| !reaches(&mut client, at)), "{case}");
            let quarantined = client.status().unwrap().quarantine;
            assert_eq!(
                quarantined.iter().map(|range| range.length).sum::<u64>(),
                PAGES * PAGE,
                "{case}: {quarantined:?}"
            );
            let mut operator = service.client();
            for since in
                quarantined.iter().map(|range| range.invalidation).collect::<std::collections::BTreeSet<_>>()
            {
                operator.release(since, PageState::Shared).unwrap();
            }
        }
        wait_for_mapped_pages(&mut client, PAGES);
        assert!(becomes_reachable(&mut client, 1), "{case}");
    }
}

/// Words of the ledger are overwritten: an impossible ledger is refused, a possible one is used, and no daemon crashes.
#[test]
fn damaged_ledger_does_not_prevent_serving() {
    let (mut service, memory) = (service(&[]), memory(PAGES));
    service.start();
    let (client, mut channel) = client_with_memory(&service, &memory);
    convert(&mut channel, 3, PageState::Private);
    begin(&mut channel, 5, PageState::Private);
    service.kill();
    drop((client, channel));
    let ledger = service.stored_fd("passgate.ledger");
    let mut original = vec![0; 1 << 20];
    let len = rustix::io::pread(&ledger, &mut original, 0).unwrap();
    let words: Vec<usize> = (0..len / 8).filter(|at| original[at * 8..at * 8 + 8] != [0; 8]).collect();
    assert!(words.len() > 20);
    let mut random = Random(42);
    for _ in 0..40 {
        let at = words[random.next_below(words.len() as u64) as usize] * 8;
        let bad_word = (random.next_below(u64::MAX) >> random.next_below(63)).to_le_bytes();
        rustix::io::pwrite(&ledger, &bad_word, at as u64).unwrap();
        service.start();
        let mut client = service.client();
        if let Ok(adopted) = client.adopt() {
            assert!(adopted.regions.len() <= 1, "{adopted:?}");
        }
        assert!(client.status().is_ok());
        service.kill();
        // Restore the ledger by the descriptor that was stored at first.
        for (nth, chunk) in original.chunks(1 << 16).enumerate() {
            rustix::io::pwrite(&ledger, chunk, (nth << 16) as u64).unwrap();
        }
        service.replace("passgate.ledger", &ledger);
        if !service.stored_names().iter().any(|name| name.starts_with("passgate.memory.")) {
            let stat = rustix::fs::fstat(&memory).unwrap();
            service.replace(&format!("passgate.memory.{:x}.{:x}", stat.st_dev, stat.st_ino), &memory);
        }
    }
}

/// Without the ledger the quarantine is unknown: all memory is in quarantine, also after further restarts.
#[test]
fn quarantine_survives_start_without_ledger_and_later_restarts() {
    let dir = tempfile::tempdir().unwrap();
    for with_state in [false, true] {
        let state = dir.path().join("state");
        let options: &[&str] = if with_state { &["--state-dir", state.to_str().unwrap()] } else { &[] };
        let (mut service, memory) = (service(options), memory(PAGES));
        service.start();
        let (client, mut channel) = client_with_memory(&service, &memory);
        let invalidation = begin(&mut channel, 5, PageState::Private);
        channel.end(invalidation, Outcome::Unknown { errno: 5, offset: 0 }).unwrap();
        service.kill();
        drop((client, channel));
        service.remove("passgate.ledger");
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

/// A quarantine that was restored from the state directory enters the ledger, so later daemons have it from either.
#[test]
fn quarantine_from_state_directory_enters_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let (mut service, memory) = (service(&["--state-dir", state.to_str().unwrap()]), memory(PAGES));
    service.start();
    let (client, mut channel) = client_with_memory(&service, &memory);
    let invalidation = begin(&mut channel, 5, PageState::Private);
    channel.end(invalidation, Outcome::Unknown { errno: 5, offset: 0 }).unwrap();
    service.kill();
    drop((client, channel));
    // The manager has lost every descriptor; only the state directory remains.
    for name in service.stored_names() {
        service.remove(&name);
    }
    std::fs::remove_file(&service.path).unwrap();
    service.start();
    let mut client = service.client();
    client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory]).unwrap();
    drop(client);
    for round in 0..3 {
        service.kill();
        if round == 1 {
            // The ledger has the quarantine, so the loss of the file must not prevent the start.
            std::fs::remove_file(state.join("quarantine.json")).unwrap();
        }
        service.start();
        let quarantine = service.client().status().unwrap().quarantine;
        let [range] = &quarantine[..] else { panic!("{quarantine:?}") };
        assert_eq!((range.length, range.cause.as_str()), (PAGE, "owner-unknown"));
    }
}
