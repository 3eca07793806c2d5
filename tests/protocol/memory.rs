//! `AddMemory` and `RemoveMemory`: accepted and refused descriptors and ranges.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use passgate_bindings::PAGE;
use passgate_client::{AddMemory, Client, Error, Outcome, PageState};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Signal, WaitOptions, kill_process, waitpid};
use serde_json::{Value, json};

use crate::common::{
    Setup, assert_refused, exclusive, memory, open_files, pages, refused, status_without_wrong_count,
};
use crate::daemon::{Daemon, TIMEOUT};

const INVAL: i32 = 22;
const ACCES: i32 = 13;
const EXIST: i32 = 17;
const NOENT: i32 = 2;

/// Returns a memfd of `pages` pages with these seals.
fn memfd(pages: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, pages * PAGE).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

/// Opens the file again, with other flags.
fn reopen(fd: &OwnedFd, flags: OFlags) -> OwnedFd {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

#[test]
fn unsuitable_files_are_refused_and_closed() {
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
    let (before, status_before) = (open_files(), status_without_wrong_count(&mut client));
    for (fd, errno, expected_text) in &cases {
        let added = client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[fd]);
        assert_refused(added, *errno, expected_text);
        assert_eq!(open_files(), before, "{expected_text}");
        assert_eq!(status_without_wrong_count(&mut client), status_before, "{expected_text}");
    }
    assert!(setup.device.read_into(passgate_bindings::Iova(0), &mut [0; 8]).is_ok());
}

#[test]
fn read_only_memory_may_be_sealed() {
    let setup = Setup::new();
    let mut client = setup.connect();
    let sealed = memfd(1, SealFlags::SHRINK | SealFlags::WRITE);
    let read_only = reopen(&memfd(1, SealFlags::SHRINK), OFlags::RDONLY);
    for (gpa, fd) in [(0, sealed), (PAGE, read_only)] {
        let memory = AddMemory { writable: false, ..AddMemory::shared(gpa, PAGE) };
        // The soft domain always pins for writing, so it may refuse; passgate's own checks must accept the file.
        if let Err(error) = client.add_memory(&memory, &[&fd]) {
            assert!(error.to_string().contains("could not be mapped"), "{error}");
        }
    }
}

#[test]
fn wrong_descriptor_count_is_refused_and_closed() {
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
fn invalid_ranges_are_refused() {
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(4);
    let (before, status_before) = (open_files(), status_without_wrong_count(&mut client));
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
    for (memory, expected_text) in &cases {
        assert_refused(client.add_memory(memory, &[&*file]), INVAL, expected_text);
        assert_eq!(open_files(), before, "{expected_text}");
        assert_eq!(status_without_wrong_count(&mut client), status_before, "{expected_text}");
    }
}

#[test]
fn malformed_parameters_are_refused() {
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
fn overlapping_or_repeated_regions_are_refused() {
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(4);
    let (before, status_before) = (open_files(), status_without_wrong_count(&mut client));
    let same_range = AddMemory::shared(0, 4 * PAGE);
    assert_refused(client.add_memory(&same_range, &[&*file]), EXIST, "overlaps region 1 at 0x0");
    let inside_range = AddMemory::shared(3 * PAGE, PAGE);
    assert_refused(client.add_memory(&inside_range, &[&*file]), EXIST, "overlaps region 1 at 0x3000");
    // Another file and another client overlap too: guest-physical addresses belong to the VM, not to a client.
    let mut other = setup.connect();
    let other_file = memory(1);
    assert_refused(other.add_memory(&inside_range, &[&*other_file]), EXIST, "overlaps");
    drop((other, other_file));
    crate::common::wait_for_status(&mut client, |status| status.clients == 1);
    assert_eq!((open_files(), status_without_wrong_count(&mut client)), (before, status_before));
    // The same pages at another address are an alias, which is allowed.
    client.add_memory(&AddMemory::shared(1 << 30, 4 * PAGE), &[&*file]).unwrap();
}

#[test]
fn region_is_removed_once_by_its_owner_only() {
    let setup = Setup::new();
    let (mut client, mut channel, file) = setup.client(4);
    let mut other = setup.connect();
    assert_refused(client.remove_memory(2), NOENT, "region 2 is not one");
    assert_refused(other.remove_memory(1), NOENT, "region 1 is not one");
    let answer = channel.begin(pages(0, 1), PageState::Hole, None).unwrap();
    let passgate_client::Answer::Granted { invalidation } = answer else { panic!("{answer:?}") };
    assert_refused(client.remove_memory(1), 16, "end it first");
    channel.end(invalidation, Outcome::NotCommitted).unwrap();
    let before = open_files();
    client.remove_memory(1).unwrap();
    assert_eq!(open_files(), before - 1, "the server's descriptor of the file must be closed");
    assert_refused(client.remove_memory(1), NOENT, "region 1 is not one");
    assert_eq!(setup.domain.mappings(), 0);
    client.add_memory(&AddMemory::shared(0, 4 * PAGE), &[&*file]).unwrap();
}

#[test]
fn reconnecting_client_readds_memory_at_once() {
    const PAGES: u64 = 1024;
    let setup = Setup::new();
    let file = memory(PAGES);
    for round in 0..20 {
        // The server may not have closed the connection before and its memory yet: neither may prevent this.
        let mut client = Client::connect(setup.server.path()).unwrap();
        let added = client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&*file]);
        let added = added.unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(added.mapped, PAGES * PAGE);
        let mut channel = client.open_channel().unwrap();
        let answer =
            channel.begin(pages(round, 1), PageState::Shared, Some(crate::common::GRANT_DEADLINE_MS));
        channel.end(crate::common::granted(answer), Outcome::Committed).unwrap();
    }
}

/// Two VMMs die while the daemon is stopped (SIGSTOP). When it continues, it reads the second one's AddMemory before it notices
/// the end of either connection.
#[test]
fn memory_of_client_that_died_before_add_is_not_added() {
    let _exclusive = exclusive();
    let daemon =
        Daemon::start(Path::new(env!("CARGO_BIN_EXE_passgate")), &["--device", "soft:0", "--no-guardian"]);
    let (mut first, mut second) = (daemon.client(), daemon.client());
    let memory = AddMemory::shared(0, 4 * PAGE);
    first.add_memory(&memory, &[&memfd(4, SealFlags::SHRINK)]).unwrap();
    second.status().unwrap();
    kill_process(daemon.pid(), Signal::STOP).unwrap();
    let (_, wait_status) = waitpid(Some(daemon.pid()), WaitOptions::UNTRACED).unwrap().unwrap();
    assert!(wait_status.stopped(), "{wait_status:?}");
    second.set_timeout(Duration::from_millis(50));
    assert!(matches!(
        second.add_memory(&memory, &[&memfd(4, SealFlags::SHRINK)]),
        Err(Error::NoAnswer { .. })
    ));
    drop((second, first));
    kill_process(daemon.pid(), Signal::CONT).unwrap();
    let (mut third, begun) = (daemon.client(), Instant::now());
    while third.status().unwrap().clients > 1 {
        assert!(begun.elapsed() < TIMEOUT, "the dead clients are still connected");
    }
    third.add_memory(&memory, &[&memfd(4, SealFlags::SHRINK)]).unwrap();
}
