//! The owner's side fails: KVM refuses to convert, the VMM cannot say what became of the page. Nobody gets it any more,
//! also not from the next daemon.

use std::path::Path;

use passgate::client::{AddMemory, Answer, Channel, Client, Outcome, PageState};
use passgate_bindings::PAGE;
use passgate_bindings::guest_memfd::{self, Flags};
use passgate_bindings::kvm::VmType;
use passgate_bindings::memory::GuestFile;

use super::rig::{Engine, GPA, PASSGATE, Rig, UNHURRIED, Vmm, memfd, range};
use crate::daemon::Daemon;

/// The page of which nobody knows, and one that is as any other.
const LOST: u64 = 1;
const FINE: u64 = 2;
const PAGES: u64 = 4;

/// Two backings, as a VM with private memory has them.
fn add(client: &mut Client, shared: &GuestFile, private: &GuestFile) -> Channel {
    let memory = AddMemory { private: true, ..AddMemory::shared(GPA, PAGES * PAGE) };
    client.add_memory(&memory, &[shared, private]).unwrap();
    client.open_channel().unwrap()
}

/// KVM_SET_MEMORY_ATTRIBUTES fails between begin and end, the VMM says that it does not know, the daemon is killed.
/// The next one, in the same state directory, keeps the page from devices and from conversions.
pub fn cannot_say(rig: &Rig) {
    let place = tempfile::tempdir().unwrap();
    let state = place.path().join("state");
    let more = ["--state-dir", state.to_str().unwrap()];
    let vm = VmType::SwProtected.create().unwrap();
    let private = guest_memfd::create(&vm, PAGES * PAGE, Flags::empty()).unwrap();
    let memory = memfd(PAGES);

    let mut daemon = rig.serve_with(&more);
    let mut client = daemon.client();
    let channel = add(&mut client, &memory, &private);
    let engine = Engine::of(&daemon, &rig.edu);
    let mut vmm = Vmm { client, channel, memory: memory.clone(), engine };
    assert!(vmm.reaches(LOST) && vmm.reaches(FINE));
    let invalidation = vmm.begin(LOST, PageState::Private);
    let errno = refused_by_kvm(&vm, LOST);
    vmm.channel.end(invalidation, Outcome::Unknown { errno, offset: 0 }).unwrap();
    vmm.is_out_of_reach(LOST);
    daemon.kill();
    daemon.silence(); // the guardian has let go of the device

    for _ in 0..2 {
        let mut next = Daemon::start_at(Path::new(PASSGATE), &daemon.path, &rig.arguments(&more));
        let mut client = next.client();
        let channel = add(&mut client, &memory, &private);
        let engine = Engine::of(&next, &rig.edu);
        let mut vmm = Vmm { client, channel, memory: memory.clone(), engine };
        assert!(vmm.reaches(FINE), "the page beside it is as any other");
        vmm.is_out_of_reach(LOST);
        for to in [PageState::Private, PageState::Shared] {
            match vmm.channel.begin(range(LOST), to, None) {
                Err(passgate::Error::Refused { errno: 5, .. }) => {}
                other => panic!("begun again: {other:?}"),
            }
        }
        let quarantine = vmm.client.status().unwrap().quarantine;
        let [kept] = &quarantine[..] else { panic!("{quarantine:?}") };
        assert_eq!((kept.gpa, kept.length), (Some(range(LOST).start().0), PAGE));
        assert_eq!((kept.cause.as_str(), kept.invalidation), ("owner-unknown", invalidation));
        let invalidation = vmm.begin(FINE, PageState::Hole);
        vmm.end(invalidation);
        assert!(matches!(
            vmm.channel.begin(range(FINE), PageState::Shared, UNHURRIED),
            Ok(Answer::Granted { .. })
        ));
        next.kill();
        next.silence();
    }
    let replay = std::process::Command::new(PASSGATE).arg("replay").arg(&state).output().unwrap();
    assert!(replay.status.success(), "{}", String::from_utf8_lossy(&replay.stdout));
}

/// The errno of the call that converts, with a length that KVM cannot but refuse.
fn refused_by_kvm(vm: &kvm_ioctls::VmFd, page: u64) -> i32 {
    let attributes = kvm_bindings::kvm_memory_attributes {
        address: range(page).start().0,
        size: PAGE - 1,
        attributes: kvm_bindings::KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
        flags: 0,
    };
    vm.set_memory_attributes(attributes).unwrap_err().errno()
}
