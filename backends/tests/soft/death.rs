//! A process that is killed during a DMA that does not end by itself: the kernel ends the DMA and unpins the pages.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};

use passgate_backends::device::soft::ClosedWindow;
use rustix::fs::{Mode, OFlags, SealFlags};

use super::*;

/// The environment variable with the path of the memory, for the process to be killed: the test `victim` of this
/// binary.
const MEMORY: &str = "PASSGATE_TEST_MEMORY";

#[test]
fn process_killed_during_a_send_leaves_no_pinned_page() {
    let memory = GuestFile::memfd("death", PAGE).unwrap();
    memory.write(0, &[b'A'; PAGE as usize]).unwrap();
    let witness: OwnedFd = memory.as_fd().try_clone_to_owned().unwrap();
    drop(memory);
    let ClosedWindow { near, mut far, .. } = ClosedWindow::open().unwrap();
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["death::victim", "--exact", "--ignored", "--nocapture"])
        .env(MEMORY, format!("/proc/{}/fd/{}", std::process::id(), witness.as_raw_fd()))
        .stdin(Stdio::from(near))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_ready(&mut victim);
    let seal = || rustix::fs::fcntl_add_seals(&witness, SealFlags::WRITE);
    assert_eq!(seal(), Err(Errno::BUSY));
    victim.kill().unwrap();
    victim.wait().unwrap();
    // The kernel resets the connection first and unpins the last page some time later.
    far.set_read_timeout(Some(EVENT_TIMEOUT)).unwrap();
    let end = far.read_to_end(&mut Vec::new());
    assert!(end.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    let begin = Instant::now();
    while seal() == Err(Errno::BUSY) {
        // Each attempt waits in the kernel for pins to be released.
        assert!(begin.elapsed() < EVENT_TIMEOUT, "still pinned");
    }
}

fn wait_for_ready(victim: &mut Child) {
    let mut lines = BufReader::new(victim.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("ready")));
}

/// Maps the memory, sends it over standard input, and waits to be killed.
#[test]
#[ignore = "is started by the test that kills it"]
fn victim() {
    let Ok(path) = std::env::var(MEMORY) else { return };
    let fd = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let memory = Arc::new(GuestFile::new(fd, passgate_bindings::memory::FileKind::Memfd, PAGE, true));
    let domain = SoftDomain::open().unwrap();
    let device = domain.device("soft:0").unwrap();
    domain.map(iova(0, 1), PAGE, &memory, Offset(0), true).unwrap();
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let held = device.send_zc(at(0), PAGE as usize, socket).unwrap();
    let _ticket = ticket(domain.unmap(iova(0, 1)), 1);
    drop(memory);
    println!("ready");
    held.wait(EVENT_TIMEOUT);
}
