//! Registered buffers on the running kernel: every result and every completion is reported.

#![allow(clippy::unwrap_used)] // a panic fails the test

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use passgate_bindings::Failed;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::PAGE;
use passgate_bindings::uring::{Completion, Completions, Op, Ring, RingError, Slot, Span, Submissions};
use rustix::fs::SealFlags;
use rustix::io::Errno;

fn ring() -> (Arc<Ring>, Submissions, Completions) {
    Ring::open(8, 16).unwrap()
}

fn all_completions(completions: &mut Completions) -> Vec<Completion> {
    let mut all = Vec::new();
    completions.reap(|completion| all.push(completion));
    all
}

#[test]
fn replaced_or_cleared_slot_reports_its_tag_once() {
    let (ring, _submissions, mut completions) = ring();
    let memory = GuestFile::memfd("uring", 2 * PAGE).unwrap();
    let first = ring.fill(Slot(3), &memory, 0, PAGE).unwrap();
    assert_eq!(all_completions(&mut completions), []);
    let second = ring.fill(Slot(3), &memory, PAGE, PAGE).unwrap();
    assert_ne!(first, second);
    assert_eq!(all_completions(&mut completions), [Completion::Released(first)], "replaced");
    ring.clear(Slot(0), 16).unwrap();
    assert_eq!(all_completions(&mut completions), [Completion::Released(second)]);
    ring.clear(Slot(0), 16).unwrap();
    assert_eq!(all_completions(&mut completions), []);
}

#[test]
fn tags_beyond_the_queue_size_are_all_reported() {
    let (ring, _submissions, mut completions) = Ring::open(8, 16_384).unwrap();
    let memory = GuestFile::memfd("uring", PAGE).unwrap();
    let mut tags = Vec::new();
    for slot in 0..16_384 {
        match ring.fill(Slot(slot), &memory, 0, PAGE) {
            Ok(tag) => tags.push(Completion::Released(tag)),
            Err(failed) if failed.errno == Errno::NOMEM => break,
            Err(failed) => panic!("{failed}"),
        }
    }
    ring.clear(Slot(0), 16_384).unwrap();
    assert_eq!(all_completions(&mut completions), tags);
}

#[test]
fn failed_fill_and_clear_report_errno() {
    let (ring, _submissions, mut completions) = ring();
    let memory = GuestFile::memfd("uring", 2 * PAGE).unwrap();
    let call = "IORING_REGISTER_BUFFERS_UPDATE";
    assert_eq!(ring.fill(Slot(16), &memory, 0, PAGE), Err(Failed::new(call, Errno::INVAL)));
    assert_eq!(ring.fill(Slot(0), &memory, 2 * PAGE, PAGE), Err(Failed::new("address", Errno::INVAL)));
    assert_eq!(ring.fill(Slot(0), &memory, 0, 2 << 30).unwrap_err().errno, Errno::FAULT);
    let failed = ring.clear(Slot(10), 7).unwrap_err();
    assert_eq!((failed.errno, failed.partial), (Errno::INVAL, 0));
    assert_eq!(all_completions(&mut completions), []);
}

#[test]
fn operation_outside_its_slot_faults() {
    let (ring, mut submissions, mut completions) = ring();
    let memory = GuestFile::memfd("uring", 4 * PAGE).unwrap();
    let (outlet, inlet) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&inlet, &[1; 16]).unwrap();
    ring.fill(Slot(0), &memory, PAGE, PAGE).unwrap();
    let page = memory.address(PAGE).unwrap();
    let cases = [
        (0, page - 8, 16),
        (0, page + PAGE - 8, 16),
        (0, 0, 8),
        (0, page + PAGE, 8),
        (1, page, 8),
        (99, page, 8),
    ];
    for (slot, address, len) in cases {
        let id = ring.name_op();
        let op = Op::Fill(outlet.as_fd(), Span { slot: Slot(slot), address, len });
        submissions.submit(op, id).unwrap();
        let fault = Completion::Op { id, result: Err(Errno::FAULT), more: false };
        assert_eq!(all_completions(&mut completions), [fault]);
    }
    let id = ring.name_op();
    let op = Op::Fill(outlet.as_fd(), Span { slot: Slot(0), address: page + PAGE - 8, len: 8 });
    submissions.submit(op, id).unwrap();
    assert_eq!(all_completions(&mut completions), [Completion::Op { id, result: Ok(8), more: false }]);
    assert_eq!(memory.load(2 * PAGE - 8).unwrap(), 0x0101_0101_0101_0101);
    assert_eq!((memory.load(PAGE - 8).unwrap(), memory.load(2 * PAGE).unwrap()), (0, 0));
}

#[test]
fn cancel_reports_whether_the_operation_was_in_flight() {
    let (ring, mut submissions, mut completions) = ring();
    let memory = GuestFile::memfd("uring", PAGE).unwrap();
    let (outlet, _inlet) = rustix::pipe::pipe().unwrap();
    let tag = ring.fill(Slot(0), &memory, 0, PAGE).unwrap();
    let id = ring.name_op();
    let span = Span { slot: Slot(0), address: memory.address(0).unwrap(), len: 8 };
    submissions.submit(Op::Fill(outlet.as_fd(), span), id).unwrap();
    ring.clear(Slot(0), 1).unwrap();
    assert_eq!(all_completions(&mut completions), [], "cleared, and still in flight");
    assert_eq!(ring.cancel(ring.name_op()), Ok(false));
    assert_eq!(ring.cancel(id), Ok(true));
    let mut all = all_completions(&mut completions);
    all.sort_by_key(|completion| matches!(completion, Completion::Released(_)));
    let cancelled = Completion::Op { id, result: Err(Errno::CANCELED), more: false };
    assert_eq!(all, [cancelled, Completion::Released(tag)]);
    assert_eq!(ring.cancel(id), Ok(false));
}

#[test]
fn filled_slot_alone_pins_the_file() {
    let (ring, _submissions, _completions) = ring();
    let memory = GuestFile::memfd("uring", PAGE).unwrap();
    let file: OwnedFd = memory.as_fd().try_clone_to_owned().unwrap();
    ring.fill(Slot(0), &memory, 0, PAGE).unwrap();
    // The file is mapped nowhere any more, so only the pin prevents the seal.
    drop(memory);
    assert_eq!(rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE), Err(Errno::BUSY));
    ring.clear(Slot(0), 1).unwrap();
    assert_eq!(rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE), Ok(()));
}

/// Installs a seccomp filter on the calling thread that makes io_uring_setup fail with EPERM, as a container's profile does
/// for all its threads.
fn forbid_io_uring() {
    let op = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: takes no pointer.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: `program` and its filter outlive the call, and the length is the filter's.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    assert_eq!(set, 0);
}

#[test]
fn forbidden_io_uring_error_names_the_remedy() {
    let error = std::thread::spawn(|| {
        forbid_io_uring();
        Ring::open(8, 16).unwrap_err()
    })
    .join()
    .unwrap();
    assert_eq!(error, RingError::Disabled { errno: Errno::PERM });
    let text = error.to_string();
    assert!(text.contains("kernel.io_uring_disabled") && text.contains("seccomp"), "{text}");
}
