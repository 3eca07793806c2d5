//! Guest memory at the address space limit. The only test of its program, because the limit applies to the whole process.

#![allow(clippy::unwrap_used)] // a panic fails the test

use passgate_bindings::memory::GuestFile;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The size in bytes of a file without allocated pages: more than the limit, less than the address space.
const FILE_BYTES: u64 = 1 << 40;
/// The address space limit in bytes.
const LIMIT_BYTES: u64 = 64 << 30;

#[test]
fn failed_mmap_is_retried_by_the_next_call() {
    let file = GuestFile::memfd("memory", FILE_BYTES).unwrap();
    let before = getrlimit(Resource::As);
    setrlimit(Resource::As, Rlimit { current: Some(LIMIT_BYTES), ..before }).unwrap();
    let failed = file.address(0).unwrap_err();
    setrlimit(Resource::As, before).unwrap();
    assert_eq!((failed.call, failed.errno), ("mmap", Errno::NOMEM));
    file.address(0).unwrap();
    file.store(0, 7).unwrap();
    assert_eq!(file.load(0).unwrap(), 7);
}
