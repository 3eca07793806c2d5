use super::*;
use std::io::{Read, Write};

/// Runs `work` with the worker's end of a socket to a guardian on a thread, and a descriptor that is no device.
fn guarded(work: impl FnOnce(UnixStream, BorrowedFd<'_>)) -> Ended {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let guardian = std::thread::spawn(move || guard(theirs.as_fd()));
    work(ours, writer.as_fd());
    let ended = guardian.join().unwrap();
    drop(writer);
    // The pipe ends only once the guardian's copies of its writing end are closed.
    assert_eq!((&reader).read(&mut [0]).unwrap(), 0);
    ended
}

fn request(socket: &UnixStream, message: &str, fds: &[BorrowedFd<'_>]) -> u8 {
    frame::send(socket, format!("{message}\0").as_bytes(), fds).unwrap();
    let mut answer = [0];
    (&mut &*socket).read_exact(&mut answer).unwrap();
    answer[0]
}

#[test]
fn farewell_ends_the_guardian_without_stopping_a_device() {
    let ended = guarded(|socket, fd| {
        assert_eq!(request(&socket, "cdev 0000:00:04.0", &[fd]), ACCEPTED);
        assert_eq!(request(&socket, FAREWELL, &[]), ACCEPTED);
    });
    assert_eq!(ended, Ended::Dismissed);
}

#[test]
fn worker_death_stops_every_device_and_failures_are_named() {
    let ended = guarded(|socket, fd| {
        assert_eq!(request(&socket, "cdev a", &[fd]), ACCEPTED);
        assert_eq!(request(&socket, "type1 b", &[fd, fd]), ACCEPTED);
    });
    // A pipe is no device: both kernel calls fail for both, and neither stops the other from being tried.
    assert_eq!(ended, Ended::Loose(vec!["a".into(), "b".into()]));
}

#[test]
fn guardian_that_does_not_answer_is_neither_trusted_nor_waited_for() {
    let silent = |child| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        (Guardian { socket: ours.into(), child }, theirs)
    };
    let (guardian, _theirs) = silent(None);
    let error = guardian.request("cdev 0000:00:04.0", &[]).unwrap_err();
    assert!(error.to_string().contains("it does not answer"), "{error}");
    guardian.dismiss();
    // A guardian that was started here is killed: no device remains for it to stop.
    let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let (guardian, _theirs) = silent(Some(child));
    guardian.dismiss();
    assert_eq!(rustix::process::test_kill_process(pid), Err(Errno::SRCH));
}

#[test]
fn guardian_rejects_messages_that_name_no_device() {
    let ended = guarded(|socket, fd| {
        assert_eq!(request(&socket, "cdev a", &[]), REJECTED);
        assert_eq!(request(&socket, "type1 a", &[fd]), REJECTED);
        assert_eq!(request(&socket, "nonsense", &[fd]), REJECTED);
        // A message that is cut off.
        (&socket).write_all(b"half a mess").unwrap();
    });
    assert_eq!(ended, Ended::Blocked);
}
