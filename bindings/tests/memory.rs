//! Guest memory where this process has no room for it: alone in its program, because it limits the whole process.

#![allow(clippy::unwrap_used)] // what is not as it should be fails the test

use passgate_bindings::memory::GuestFile;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Bytes of a file of which nothing is allocated; more than the limit, less than the address space.
const LEN: u64 = 1 << 40;
const LIMIT: u64 = 64 << 30;

#[test]
fn failed_mmap_is_tried_again_by_the_next_call() {
    let file = GuestFile::memfd("memory", LEN).unwrap();
    let before = getrlimit(Resource::As);
    setrlimit(Resource::As, Rlimit { current: Some(LIMIT), ..before }).unwrap();
    let failed = file.address(0).unwrap_err();
    setrlimit(Resource::As, before).unwrap();
    assert_eq!((failed.call, failed.errno), ("mmap", Errno::NOMEM));
    file.address(0).unwrap();
    file.store(0, 7).unwrap();
    assert_eq!(file.load(0).unwrap(), 7);
}
