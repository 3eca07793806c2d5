//! The owner fails between begin and end: KVM refuses to convert, and the VMM reports an unknown outcome. The page stays in
//! quarantine, also after a restart of the daemon.

use std::path::Path;

use passgate_bindings::PAGE;
use passgate_bindings::guest_memfd::{self, Flags};
use passgate_bindings::kvm::VmType;
use passgate_bindings::memory::GuestFile;
use passgate_client::{AddMemory, Answer, Channel, Client, Outcome, PageState};

use super::rig::{Engine, GPA, PASSGATE, Rig, UNHURRIED, Vmm, memfd, range};
use crate::daemon::Daemon;

/// The page whose conversion has an unknown outcome, and its neighbour.
const LOST_PAGE: u64 = 1;
const INTACT_PAGE: u64 = 2;
const PAGES: u64 = 4;

/// Adds memory with a shared and a private backing, as a VM with private memory has it; returns a channel.
fn add_memory(client: &mut Client, shared: &GuestFile, private: &GuestFile) -> Channel {
    let memory = AddMemory { private: true, ..AddMemory::shared(GPA, PAGES * PAGE) };
    client.add_memory(&memory, &[shared, private]).unwrap();
    client.open_channel().unwrap()
}

/// KVM_SET_MEMORY_ATTRIBUTES fails between begin and end, the VMM reports an unknown outcome, and the daemon is killed. The
/// next daemon, with the same state directory, neither maps the page for devices nor lets it be converted.
pub fn unknown_outcome(rig: &Rig) {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let options = ["--state-dir", state.to_str().unwrap()];
    let vm = VmType::SwProtected.create().unwrap();
    let private = guest_memfd::create(&vm, PAGES * PAGE, Flags::empty()).unwrap();
    let memory = memfd(PAGES);

    let mut daemon = rig.serve_with(&options);
    let mut client = daemon.client();
    let channel = add_memory(&mut client, &memory, &private);
    let engine = Engine::connect(&daemon, &rig.edu);
    let mut vmm = Vmm { client, channel, memory: memory.clone(), engine };
    assert!(vmm.reaches(LOST_PAGE) && vmm.reaches(INTACT_PAGE));
    let invalidation = vmm.begin(LOST_PAGE, PageState::Private);
    let errno = refused_by_kvm(&vm, LOST_PAGE);
    vmm.channel.end(invalidation, Outcome::Unknown { errno, offset: 0 }).unwrap();
    vmm.assert_unreachable(LOST_PAGE);
    daemon.kill();
    daemon.wait_stderr_closed(); // the guardian has closed the device

    for _ in 0..2 {
        let mut next = Daemon::start_at(Path::new(PASSGATE), &daemon.path, &rig.arguments(&options));
        let mut client = next.client();
        let channel = add_memory(&mut client, &memory, &private);
        let engine = Engine::connect(&next, &rig.edu);
        let mut vmm = Vmm { client, channel, memory: memory.clone(), engine };
        assert!(vmm.reaches(INTACT_PAGE), "the neighbour must not be affected");
        vmm.assert_unreachable(LOST_PAGE);
        for to in [PageState::Private, PageState::Shared] {
            match vmm.channel.begin(range(LOST_PAGE), to, None) {
                Ok(Answer::Quarantined { gpa }) => assert_eq!(gpa, range(LOST_PAGE).start()),
                other => panic!("begun again: {other:?}"),
            }
        }
        let quarantine = vmm.client.status().unwrap().quarantine;
        let [quarantined] = &quarantine[..] else { panic!("{quarantine:?}") };
        assert_eq!((quarantined.gpa, quarantined.length), (Some(range(LOST_PAGE).start().0), PAGE));
        assert_eq!((quarantined.cause.as_str(), quarantined.invalidation), ("owner-unknown", invalidation));
        let invalidation = vmm.begin(INTACT_PAGE, PageState::Hole);
        vmm.end(invalidation);
        assert!(matches!(
            vmm.channel.begin(range(INTACT_PAGE), PageState::Shared, UNHURRIED),
            Ok(Answer::Granted { .. })
        ));
        next.kill();
        next.wait_stderr_closed();
    }
    let replay = std::process::Command::new(PASSGATE).arg("replay").arg(&state).output().unwrap();
    assert!(replay.status.success(), "{}", String::from_utf8_lossy(&replay.stdout));
}

/// Returns the errno of KVM_SET_MEMORY_ATTRIBUTES with a length that is not a multiple of the page size.
fn refused_by_kvm(vm: &kvm_ioctls::VmFd, page: u64) -> i32 {
    let attributes = kvm_bindings::kvm_memory_attributes {
        address: range(page).start().0,
        size: PAGE - 1,
        attributes: kvm_bindings::KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
        flags: 0,
    };
    vm.set_memory_attributes(attributes).unwrap_err().errno()
}
