//! A daemon that does not answer: every call of the client library and every command times out with the reason.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use passgate_client::protocol::{Kind, Record, frame};
use passgate_client::{Channel, Client, Error, PageState};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Signal, WaitOptions, kill_process, waitpid};

use crate::common::{exclusive, pages};
use crate::daemon::{Daemon, TIMEOUT};

const PROGRAM: &str = env!("CARGO_BIN_EXE_passgate");

#[track_caller]
fn assert_times_out<T: std::fmt::Debug>(result: passgate_client::Result<T>) {
    assert!(matches!(result, Err(Error::NoAnswer { .. })), "{result:?}");
}

/// Receives the next call; empty at the end of the connection.
fn receive_call(stream: &mut UnixStream) -> String {
    let (mut bytes, mut byte) = (Vec::new(), [0]);
    while stream.read(&mut byte).unwrap() == 1 && byte != [0] {
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

fn answer(stream: &mut UnixStream, parameters: &str) {
    stream.write_all(format!("{{\"parameters\":{parameters}}}\0").as_bytes()).unwrap();
}

#[test]
fn commands_report_stopped_daemon_with_remedy() {
    let _exclusive = exclusive();
    let daemon = Daemon::start(Path::new(PROGRAM), &["--device", "soft:0", "--no-guardian"]);
    let convert = ["--gpa", "0", "--length", "4096", "--to", "hole", "--deadline-ms", "100"];
    let commands: [&[&str]; 8] = [
        &["status"],
        &["events"],
        &["metrics"],
        &["top"],
        &["top", "--once"],
        &["explain", "--invalidation", "1"],
        &["release", "--invalidation", "1", "--as", "hole"],
        &[&["convert"][..], &convert].concat(),
    ];
    kill_process(daemon.pid(), Signal::STOP).unwrap();
    // The threads stop one by one: until all are stopped, one may still answer.
    let (_, wait_status) = waitpid(Some(daemon.pid()), WaitOptions::UNTRACED).unwrap().unwrap();
    assert!(wait_status.stopped(), "{wait_status:?}");
    let run = |arguments: &&[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(*arguments).arg("--socket-path").arg(&daemon.path).args(["--timeout", "1"]);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let running = commands.each_ref().map(run);
    let expected =
        format!("{} (process {}): no answer within ", daemon.path.display(), daemon.pid().as_raw_nonzero());
    for (child, arguments) in running.into_iter().zip(commands) {
        let output = child.wait_with_output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(&expected) && error.contains("kill -CONT"), "{arguments:?}: {error}");
        assert_eq!((output.status.code(), error.lines().count()), (Some(1), 1), "{arguments:?}: {error}");
    }
    kill_process(daemon.pid(), Signal::CONT).unwrap();
    assert_eq!(daemon.client().status().unwrap().clients, 1);
}

#[test]
fn connecting_to_full_backlog_times_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let mut waiting = Vec::new();
    let last = loop {
        match Client::connect_within(&path, Duration::from_millis(50)) {
            Ok(client) => waiting.push(client),
            Err(error) => break error,
        }
        assert!(waiting.len() < 1000, "the backlog is never full");
    };
    assert!(matches!(last, Error::NoAnswer { .. }), "{last}");
    assert!(last.to_string().contains(path.to_str().unwrap()), "{last}");
}

#[test]
fn late_reply_is_not_taken_for_next_call() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut client = Client::from_fd(OwnedFd::from(ours));
    client.set_timeout(Duration::from_millis(50));
    assert_times_out(client.explain(1));
    assert_times_out(client.explain(2));
    let server = std::thread::spawn(move || {
        let mut theirs = theirs;
        for receipt in ["1", "2", "3"] {
            let call = receive_call(&mut theirs);
            assert!(call.contains(&format!("\"invalidation\":{receipt}")), "{call}");
            answer(&mut theirs, &format!("{{\"receipt\":{receipt}}}"));
        }
    });
    client.set_timeout(TIMEOUT);
    assert_eq!(client.explain(3).unwrap(), 3);
    server.join().unwrap();
}

/// A daemon opens one channel for a connection, and the call that timed out has opened it.
#[test]
fn channel_of_timed_out_open_is_returned_by_next_open() {
    for other_call_between in [false, true] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut client = Client::from_fd(OwnedFd::from(ours));
        client.set_timeout(Duration::from_millis(50));
        assert_times_out(client.open_channel());
        let server = std::thread::spawn(move || {
            let mut theirs = theirs;
            let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
            let (channel, client_end) = pair.unwrap();
            let mut is_open = false;
            loop {
                let call = receive_call(&mut theirs);
                if !call.contains("OpenChannel") {
                    if call.is_empty() {
                        return channel;
                    }
                    answer(&mut theirs, "{\"receipt\":1}");
                } else if std::mem::replace(&mut is_open, true) {
                    let refusal = "{\"error\":\"io.passgate.Control.Refused\",\"parameters\":{\"message\":\"\",\"errno\":16}}\0";
                    theirs.write_all(refusal.as_bytes()).unwrap();
                } else {
                    let sent = frame::send(&theirs, b"{\"parameters\":{}}\0", &[client_end.as_fd()]);
                    assert!(sent.is_ok());
                }
            }
        });
        client.set_timeout(TIMEOUT);
        if other_call_between {
            assert_eq!(client.explain(1).unwrap(), 1);
        }
        let mut channel = client.open_channel().unwrap();
        channel.submit(pages(0, 1), PageState::Private, Some(10)).unwrap();
        // A connection has only one channel.
        let again = client.open_channel();
        assert!(matches!(again, Err(Error::Refused { errno: 16, .. })), "{again:?}");
        drop(client);
        let theirs = server.join().unwrap();
        assert!(
            rustix::io::read(theirs, &mut [0; 4096]).unwrap() > 0,
            "the request must arrive in the channel that was opened"
        );
    }
}

#[test]
fn long_call_waits_only_while_daemon_answers_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let (probed, was_probed) = channel();
    let server = std::thread::spawn(move || {
        let (mut first, _) = listener.accept().unwrap();
        assert!(receive_call(&mut first).contains("RemoveMemory"));
        // The call takes so long that the client probes the daemon by a second connection.
        let (mut other, _) = listener.accept().unwrap();
        assert!(receive_call(&mut other).contains("org.varlink.service.GetInfo"));
        answer(&mut other, "{}");
        probed.send(()).unwrap();
        answer(&mut first, "{}");
        assert!(receive_call(&mut first).contains("RemoveMemory"));
        // From here on neither the call nor a probe is answered.
        (listener, first, other)
    });
    // Long enough for an answer of the thread above on a busy machine.
    let mut client = Client::connect_within(&path, Duration::from_secs(3)).unwrap();
    client.remove_memory(1).unwrap();
    was_probed.recv_timeout(TIMEOUT).unwrap();
    client.set_timeout(Duration::from_millis(50));
    assert_times_out(client.remove_memory(2));
    server.join().unwrap();
}

#[test]
fn channel_times_out_and_accepts_no_late_grant() {
    let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (ours, _theirs) = pair();
            let mut channel = Channel::from_fd(ours);
            assert_times_out(channel.begin(pages(0, 1), PageState::Private, Some(10)));
            assert!(channel.echo().is_err(), "the channel must be closed");
        });
        scope.spawn(|| {
            let (ours, _theirs) = pair();
            let mut channel = Channel::from_fd(ours);
            channel.submit(pages(0, 1), PageState::Private, Some(10)).unwrap();
            assert_times_out(channel.completed());
            assert!(channel.echo().is_err(), "the channel must be closed");
        });
        scope.spawn(|| {
            let (ours, _theirs) = pair();
            let channel = Channel::from_fd(ours);
            set_socket_timeout(&channel, Timeout::Send, Some(Duration::from_millis(50))).unwrap();
            let sent = (0..1_000_000).map(|_| channel.send(&Record::new(Kind::Echo, 0)));
            assert!(sent.into_iter().any(|sent| sent.is_err()), "a send to a full socket must time out");
        });
    });
    assert!(begun.elapsed() < TIMEOUT, "{:?}", begun.elapsed());
}
