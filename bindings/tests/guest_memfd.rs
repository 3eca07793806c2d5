//! guest_memfd on the running kernel.

#![allow(clippy::unwrap_used)] // a panic fails the test

#[path = "../../tests/common/skip.rs"]
mod skip;

use passgate_bindings::guest_memfd::{
    Conversion, Flags, Support, convert, create, set_attributes, shared, vm,
};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::PAGE;
use passgate_bindings::{Failed, PageRange};
use rustix::io::Errno;
use skip::skip;

/// Returns shared memory in a guest_memfd; none, with the reason printed, where that is not available.
fn memory(pages: u64) -> Option<GuestFile> {
    shared(pages * PAGE).map_err(skip).map(|(_, file)| file).ok()
}

#[test]
fn punched_page_of_guest_memfd_reads_as_zeroes() {
    let Some(memory) = memory(4) else { return };
    memory.store(PAGE, 7).unwrap();
    memory.store(3 * PAGE, 8).unwrap();
    memory.punch(PAGE, PAGE).unwrap();
    assert_eq!((memory.load(PAGE).unwrap(), memory.load(3 * PAGE).unwrap()), (0, 8));
}

#[test]
fn probed_guest_memfd_support_matches_the_calls() {
    let support = match Support::probe() {
        Ok(support) => support,
        Err(why) => return skip(why),
    };
    println!("{support:?}");
    let vm = vm().unwrap();
    for flags in [Flags::empty(), Flags::MMAP, Flags::MMAP | Flags::INIT_SHARED] {
        let made = create(&vm, PAGE, flags);
        assert_eq!(made.is_ok(), support.guest_memfd && support.flags.contains(flags), "{flags:?}: {made:?}");
    }
    if support.guest_memfd {
        let unknown = create(&vm, PAGE, Flags::from_bits_retain(1 << 40)).unwrap_err();
        assert_eq!(unknown, Failed::new("KVM_CREATE_GUEST_MEMFD", Errno::INVAL));
    }
    let page = PageRange::new(0, PAGE).unwrap();
    let set = set_attributes(&vm, page, Conversion::ToPrivate);
    assert_eq!(set.is_ok(), support.attributes != 0, "{set:?}");

    let Some(memory) = memory(1) else { return };
    let page = PageRange::new(0, PAGE).unwrap();
    memory.store(0, 5).unwrap();
    match convert(&memory, page, Conversion::ToShared) {
        Ok(()) => assert!(support.in_place),
        Err(failed) => {
            assert!(!support.in_place);
            assert_eq!((failed.errno, failed.partial), (Errno::NOTTY, 0));
        }
    }
    assert_eq!(memory.load(0).unwrap(), 5);
}
