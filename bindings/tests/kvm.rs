//! VMs as the running kernel makes them.

#![allow(clippy::unwrap_used)] // what is not as it should be fails the test

#[path = "../../tests/common/skip.rs"]
mod skip;

use passgate_bindings::guest_memfd::{self, Flags};
use passgate_bindings::kvm::{VmType, attach};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Failed, PAGE, PageRange};
use rustix::io::Errno;
use skip::skip;

fn for_good(file: GuestFile) -> &'static GuestFile {
    Box::leak(Box::new(file))
}

#[test]
fn a_type_that_is_offered_can_be_made_and_no_other() {
    for vm_type in [VmType::Default, VmType::SwProtected] {
        match vm_type.is_offered() {
            Ok(offered) => assert_eq!(vm_type.create().is_ok(), offered, "{vm_type:?}"),
            Err(why) => return skip(why),
        }
    }
}

#[test]
fn a_slot_takes_files_that_are_long_enough() {
    let vm = match VmType::Default.create() {
        Ok(vm) => vm,
        Err(why) => return skip(why),
    };
    let pages = |count: u64| PageRange::new(0, count * PAGE).unwrap();
    let memfd = for_good(GuestFile::memfd("slot", 2 * PAGE).unwrap());
    let short = Err(Failed::new("KVM_SET_USER_MEMORY_REGION2", Errno::INVAL));
    assert_eq!(attach(&vm, 0, pages(3), memfd, None), short);
    assert_eq!(attach(&vm, 0, pages(2), memfd, None), Ok(()));

    let Ok(file) = guest_memfd::create(&vm, PAGE, Flags::MMAP | Flags::INIT_SHARED) else {
        return skip("no mappable guest_memfd here");
    };
    let file = for_good(file);
    let elsewhere = PageRange::new(16 * PAGE, 2 * PAGE).unwrap();
    assert_eq!(attach(&vm, 1, elsewhere, memfd, Some(file)), short);
    assert_eq!(attach(&vm, 1, PageRange::new(16 * PAGE, PAGE).unwrap(), file, Some(file)), Ok(()));
}
