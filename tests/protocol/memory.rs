//! `AddMemory` and `RemoveMemory`: which descriptors and ranges are taken, and which are not.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use passgate::Error;
use passgate::client::{AddMemory, Client, Outcome, PageState};
use passgate_bindings::PAGE;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Signal, WaitOptions, kill_process, waitpid};
use serde_json::{Value, json};

use crate::common::{Setup, alone, assert_refused, memory, open_files, pages, refused, substance};
use crate::daemon::{Daemon, LONG};

const INVAL: i32 = 22;
const ACCES: i32 = 13;
const EXIST: i32 = 17;
const NOENT: i32 = 2;

/// A memfd of `pages` pages with these seals.
fn memfd(pages: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, pages * PAGE).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

/// The same file, opened anew.
fn reopen(fd: &OwnedFd, flags: OFlags) -> OwnedFd {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

#[test]
fn files_that_cannot_be_guest_memory_are_refused_and_closed() {
    let setup = Setup::new();
    let (mut client, _channel, _file) = setup.client(4);
    let sealed = memfd(1, SealFlags::SHRINK);
    let (pipe, _inlet) = rustix::pipe::pipe().unwrap();
    let cases = [
        (memfd(1, SealFlags::empty()), INVAL, "F_SEAL_SHRINK"),
        (memfd_create("test", MemfdFlags::CLOEXEC).unwrap(), INVAL, "ftruncate"),
        (memfd(0, SealFlags::SHRINK), INVAL, "ftruncate"),
        (reopen(&sealed, OFlags::RDONLY), ACCES, "O_RDWR"),
        (reopen(&sealed, OFlags::WRONLY), ACCES, "cannot be read"),
        (reopen(&sealed, OFlags::PATH), ACCES, "cannot be read"),
        (memfd(1, SealFlags::SHRINK | SealFlags::WRITE), ACCES, "sealed against writing"),
        (memfd(1, SealFlags::SHRINK | SealFlags::FUTURE_WRITE), ACCES, "sealed against writing"),
        (pipe, INVAL, "pass a memfd"),
        (std::fs::File::open("/proc/self/status").unwrap().into(), INVAL, "pass a memfd"),
        (std::fs::File::open("/dev/null").unwrap().into(), INVAL, "pass a memfd"),
        (client.as_fd().try_clone_to_owned().unwrap(), INVAL, "pass a memfd"),
    ];
    let (before, known) = (open_files(), substance(&mut client));
    for (fd, errno, words) in &cases {
        let added = client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[fd]);
        assert_refused(added, *errno, words);
        assert_eq!(open_files(), before, "{words}");
        assert_eq!(substance(&mut client), known, "{words}");
    }
    assert!(setup.device.read_into(passgate_bindings::Iova(0), &mut [0; 8]).is_ok());
}

#[test]
fn memory_that_devices_only_read_may_be_read_only_and_sealed() {
    let setup = Setup::new();
    let mut client = setup.connect();
    let sealed = memfd(1, SealFlags::SHRINK | SealFlags::WRITE);
    let read_only = reopen(&memfd(1, SealFlags::SHRINK), OFlags::RDONLY);
    for (gpa, fd) in [(0, sealed), (PAGE, read_only)] {
        let memory = AddMemory { writable: false, ..AddMemory::shared(gpa, PAGE) };
        // The soft domain pins for writing or not at all; whatever it says, passgate's own border lets it by.
        if let Err(error) = client.add_memory(&memory, &[&fd]) {
            assert!(error.to_string().contains("could not be mapped"), "{error}");
        }
    }
}

#[test]
fn too_few_and_too_many_descriptors_are_refused_and_closed() {
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(1);
    let before = open_files();
    let one = AddMemory::shared(1 << 30, PAGE);
    let two = AddMemory { private: true, ..one.clone() };
    assert_refused(client.add_memory(&one, &[]), INVAL, "0 file descriptors came along, 1 belong");
    assert_refused(client.add_memory(&one, &[&*file, &*file]), INVAL, "2 file descriptors");
    assert_refused(client.add_memory(&two, &[&*file]), INVAL, "1 file descriptors came along, 2 belong");
    assert_refused(client.add_memory(&two, &[&*file, &*file, &*file]), INVAL, "3 file descriptors");
    assert_refused(client.add_memory(&two, &[&*file, &*file]), INVAL, "must be a guest_memfd");
    let unwanted = client.call::<Value>("Status", &json!({}), &[file.as_fd()]);
    assert_refused(unwanted, INVAL, "1 file descriptors came along, 0 belong");
    assert_eq!(open_files(), before);
    assert_eq!(client.status().unwrap().regions.len(), 1);
}

#[test]
fn ranges_that_are_none_are_refused() {
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(4);
    let (before, known) = (open_files(), substance(&mut client));
    let base = AddMemory::shared(1 << 30, PAGE);
    let cases = [
        (AddMemory { gpa: 1, ..base.clone() }, "page-aligned"),
        (AddMemory { length: 0, ..base.clone() }, "empty"),
        (AddMemory { length: PAGE + 1, ..base.clone() }, "page-aligned"),
        (AddMemory { gpa: u64::MAX - PAGE + 1, ..base.clone() }, "reaches beyond"),
        (AddMemory { gpa: 1 << 62, ..base.clone() }, "reaches beyond"),
        (AddMemory { offset: 7, ..base.clone() }, "whole pages"),
        (AddMemory { offset: 4 * PAGE, ..base.clone() }, "ends behind it"),
        (AddMemory { offset: u64::MAX - PAGE + 1, ..base.clone() }, "reaches beyond"),
        (AddMemory { length: 5 * PAGE, ..base.clone() }, "ends behind it"),
        (AddMemory { piece: 2048, ..base.clone() }, "power of two"),
        (AddMemory { piece: 3 * PAGE, ..base.clone() }, "power of two"),
    ];
    for (memory, words) in &cases {
        assert_refused(client.add_memory(memory, &[&*file]), INVAL, words);
        assert_eq!(open_files(), before, "{words}");
        assert_eq!(substance(&mut client), known, "{words}");
    }
}

#[test]
fn parameters_of_another_shape_are_refused() {
    let setup = Setup::new();
    let mut client = setup.connect();
    let before = open_files();
    let file = memory(1);
    let cases = [
        json!({}),
        json!([]),
        json!({"gpa": 0}),
        json!({"gpa": -1, "length": 4096}),
        json!({"gpa": 0.5, "length": 4096}),
        json!({"gpa": "0", "length": 4096}),
        json!({"gpa": 0, "length": 4096, "initial": "open"}),
        json!({"gpa": 0, "length": 4096, "surprise": true}),
        json!({"gpa": 18446744073709551616.0, "length": 4096}),
    ];
    for parameters in cases {
        let added = client.call::<Value>("AddMemory", &parameters, &[file.as_fd()]);
        let (message, errno) = refused(added);
        assert!(errno == INVAL && message.contains("parameters"), "{parameters}: {message}");
    }
    drop(file);
    assert_eq!(open_files(), before);
}

#[test]
fn overlapping_regions_and_a_double_add_are_refused() {
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(4);
    let (before, known) = (open_files(), substance(&mut client));
    let twice = AddMemory::shared(0, 4 * PAGE);
    assert_refused(client.add_memory(&twice, &[&*file]), EXIST, "overlaps region 1 at 0x0");
    let into = AddMemory::shared(3 * PAGE, PAGE);
    assert_refused(client.add_memory(&into, &[&*file]), EXIST, "overlaps region 1 at 0x3000");
    // Memory of another file, and by another client: guest-physical addresses are the VM's, not the client's.
    let mut other = setup.connect();
    let foreign = memory(1);
    assert_refused(other.add_memory(&into, &[&*foreign]), EXIST, "overlaps");
    drop((other, foreign));
    crate::common::until(&mut client, |status| status.clients == 1);
    assert_eq!((open_files(), substance(&mut client)), (before, known));
    // The same pages at another address are no mistake but an alias.
    client.add_memory(&AddMemory::shared(1 << 30, 4 * PAGE), &[&*file]).unwrap();
}

#[test]
fn only_its_owner_removes_a_region_and_only_once() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(4);
    let mut other = setup.connect();
    assert_refused(client.remove_memory(2), NOENT, "region 2 is not one");
    assert_refused(other.remove_memory(1), NOENT, "region 1 is not one");
    let answer = channel.begin(pages(0, 1), PageState::Hole, None).unwrap();
    let passgate::client::Answer::Granted { invalidation } = answer else { panic!("{answer:?}") };
    assert_refused(client.remove_memory(1), 16, "end it first");
    channel.end(invalidation, Outcome::NotCommitted).unwrap();
    let before = open_files();
    client.remove_memory(1).unwrap();
    assert_eq!(open_files(), before - 1, "the server's copy of the file is closed");
    assert_refused(client.remove_memory(1), NOENT, "region 1 is not one");
    assert_eq!(setup.domain.mappings(), 0);
    client.add_memory(&AddMemory::shared(0, 4 * PAGE), &[&*file]).unwrap();
}

#[test]
fn a_client_that_comes_back_at_once_has_its_memory() {
    const PAGES: u64 = 1024;
    let setup = Setup::new();
    let file = memory(PAGES);
    for round in 0..20 {
        // The connection before is closed, and its memory may still be there: neither is in the way.
        let mut client = Client::connect(setup.server.path()).unwrap();
        let added = client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&*file]);
        let added = added.unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(added.mapped, PAGES * PAGE);
        let mut channel = client.open_channel().unwrap();
        let answer = channel.begin(pages(round, 1), PageState::Shared, Some(crate::common::PATIENT_MS));
        channel.end(crate::common::granted(answer), Outcome::Committed).unwrap();
    }
}

/// Two VMMs die one after the other while the daemon is stopped; it meets the memory of the second before either end.
#[test]
fn memory_of_a_client_that_died_before_it_was_added_is_not_added() {
    let _alone = alone();
    let daemon =
        Daemon::start(Path::new(env!("CARGO_BIN_EXE_passgate")), &["--device", "soft:0", "--no-guardian"]);
    let (mut first, mut second) = (daemon.client(), daemon.client());
    let memory = AddMemory::shared(0, 4 * PAGE);
    first.add_memory(&memory, &[&memfd(4, SealFlags::SHRINK)]).unwrap();
    second.status().unwrap();
    kill_process(daemon.pid(), Signal::STOP).unwrap();
    let (_, stopped) = waitpid(Some(daemon.pid()), WaitOptions::UNTRACED).unwrap().unwrap();
    assert!(stopped.stopped(), "{stopped:?}");
    second.set_timeout(Duration::from_millis(50));
    assert!(matches!(
        second.add_memory(&memory, &[&memfd(4, SealFlags::SHRINK)]),
        Err(Error::NoAnswer { .. })
    ));
    drop((second, first));
    kill_process(daemon.pid(), Signal::CONT).unwrap();
    let (mut third, begun) = (daemon.client(), Instant::now());
    while third.status().unwrap().clients > 1 {
        assert!(begun.elapsed() < LONG, "they are gone");
    }
    third.add_memory(&memory, &[&memfd(4, SealFlags::SHRINK)]).unwrap();
}
