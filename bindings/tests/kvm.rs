//! VM types and memory slots on the running kernel.

#![allow(clippy::unwrap_used)] // a panic fails the test

#[path = "../../tests/common/skip.rs"]
mod skip;

use passgate_bindings::guest_memfd::{self, Flags};
use passgate_bindings::kvm::{VmType, attach};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Failed, PAGE, PageRange};
use rustix::io::Errno;
use skip::skip;

fn leaked(file: GuestFile) -> &'static GuestFile {
    Box::leak(Box::new(file))
}

#[test]
fn only_supported_vm_types_can_be_created() {
    for vm_type in [VmType::Default, VmType::SwProtected] {
        match vm_type.is_supported() {
            Ok(supported) => assert_eq!(vm_type.create().is_ok(), supported, "{vm_type:?}"),
            Err(why) => return skip(why),
        }
    }
}

#[test]
fn slot_refuses_files_shorter_than_itself() {
    let vm = match VmType::Default.create() {
        Ok(vm) => vm,
        Err(why) => return skip(why),
    };
    let pages = |count: u64| PageRange::new(0, count * PAGE).unwrap();
    let memfd = leaked(GuestFile::memfd("slot", 2 * PAGE).unwrap());
    let short = Err(Failed::new("KVM_SET_USER_MEMORY_REGION2", Errno::INVAL));
    assert_eq!(attach(&vm, 0, pages(3), memfd, None), short);
    assert_eq!(attach(&vm, 0, pages(2), memfd, None), Ok(()));

    let Ok(file) = guest_memfd::create(&vm, PAGE, Flags::MMAP | Flags::INIT_SHARED) else {
        return skip("no mappable guest_memfd here");
    };
    let file = leaked(file);
    let elsewhere = PageRange::new(16 * PAGE, 2 * PAGE).unwrap();
    assert_eq!(attach(&vm, 1, elsewhere, memfd, Some(file)), short);
    assert_eq!(attach(&vm, 1, PageRange::new(16 * PAGE, PAGE).unwrap(), file, Some(file)), Ok(()));
}
