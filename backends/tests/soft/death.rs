//! A process that is killed in the middle of a DMA that does not end: the kernel stops it, nobody else is needed.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};

use passgate_backends::device::soft::ClosedWindow;
use rustix::fs::{Mode, OFlags, SealFlags};

use super::*;

/// Where the killed process finds its memory; it is the test `victim` of this binary, started once more.
const MEMORY: &str = "PASSGATE_TEST_MEMORY";

#[test]
fn killed_in_mid_send_a_process_leaves_no_pin_behind() {
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
    // The reset is the event; letting go of the last page follows it, in the kernel's own time.
    far.set_read_timeout(Some(LONG)).unwrap();
    let end = far.read_to_end(&mut Vec::new());
    assert!(end.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    let begin = Instant::now();
    while seal() == Err(Errno::BUSY) {
        // Each try waits in the kernel for the pins to go.
        assert!(begin.elapsed() < LONG, "still pinned");
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
    held.wait(LONG);
}
