//! A daemon that does not answer: every call of the library and every command ends, and says why.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use passgate::Error;
use passgate::client::{Channel, Client, PageState};
use passgate::protocol::{Kind, Record, frame};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Signal, WaitOptions, kill_process, waitpid};

use crate::common::{alone, pages};
use crate::daemon::{Daemon, LONG};

const PROGRAM: &str = env!("CARGO_BIN_EXE_passgate");

#[track_caller]
fn assert_silent<T: std::fmt::Debug>(result: passgate::Result<T>) {
    assert!(matches!(result, Err(Error::NoAnswer { .. })), "{result:?}");
}

/// The next call that comes.
fn call(stream: &mut UnixStream) -> String {
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
fn commands_end_with_socket_process_and_remedy_where_the_daemon_is_stopped() {
    let _alone = alone();
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
    // It stops thread by thread: before all have, one may still answer.
    let (_, stopped) = waitpid(Some(daemon.pid()), WaitOptions::UNTRACED).unwrap().unwrap();
    assert!(stopped.stopped(), "{stopped:?}");
    let run = |arguments: &&[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(*arguments).arg("--socket-path").arg(&daemon.path).args(["--timeout", "1"]);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let running = commands.each_ref().map(run);
    let wanted =
        format!("{} (process {}): no answer within ", daemon.path.display(), daemon.pid().as_raw_nonzero());
    for (child, arguments) in running.into_iter().zip(commands) {
        let said = child.wait_with_output().unwrap();
        let error = String::from_utf8(said.stderr).unwrap();
        assert!(error.contains(&wanted) && error.contains("kill -CONT"), "{arguments:?}: {error}");
        assert_eq!((said.status.code(), error.lines().count()), (Some(1), 1), "{arguments:?}: {error}");
    }
    kill_process(daemon.pid(), Signal::CONT).unwrap();
    assert_eq!(daemon.client().status().unwrap().clients, 1);
}

#[test]
fn connecting_to_a_full_queue_ends_in_time() {
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
        assert!(waiting.len() < 1000, "the queue is never full");
    };
    assert!(matches!(last, Error::NoAnswer { .. }), "{last}");
    assert!(last.to_string().contains(path.to_str().unwrap()), "{last}");
}

#[test]
fn reply_to_a_call_that_was_given_up_is_not_taken_for_that_of_the_next() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut client = Client::from_fd(OwnedFd::from(ours));
    client.set_timeout(Duration::from_millis(50));
    assert_silent(client.explain(1));
    assert_silent(client.explain(2));
    let server = std::thread::spawn(move || {
        let mut theirs = theirs;
        for receipt in ["1", "2", "3"] {
            let call = call(&mut theirs);
            assert!(call.contains(&format!("\"invalidation\":{receipt}")), "{call}");
            answer(&mut theirs, &format!("{{\"receipt\":{receipt}}}"));
        }
    });
    client.set_timeout(LONG);
    assert_eq!(client.explain(3).unwrap(), 3);
    server.join().unwrap();
}

/// The daemon opens one channel for a connection, and has opened it for the call that was given up.
#[test]
fn channel_whose_open_was_given_up_is_there_at_the_next_open() {
    for other_call_between in [false, true] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut client = Client::from_fd(OwnedFd::from(ours));
        client.set_timeout(Duration::from_millis(50));
        assert_silent(client.open_channel());
        let server = std::thread::spawn(move || {
            let mut theirs = theirs;
            let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
            let (channel, given) = pair.unwrap();
            let mut open = false;
            loop {
                let call = call(&mut theirs);
                if !call.contains("OpenChannel") {
                    if call.is_empty() {
                        return channel;
                    }
                    answer(&mut theirs, "{\"receipt\":1}");
                } else if std::mem::replace(&mut open, true) {
                    let refusal = "{\"error\":\"io.passgate.Control.Refused\",\"parameters\":{\"message\":\"\",\"errno\":16}}\0";
                    theirs.write_all(refusal.as_bytes()).unwrap();
                } else {
                    let sent = frame::send(&theirs, b"{\"parameters\":{}}\0", &[given.as_fd()]);
                    assert!(sent.is_ok());
                }
            }
        });
        client.set_timeout(LONG);
        if other_call_between {
            assert_eq!(client.explain(1).unwrap(), 1);
        }
        let mut channel = client.open_channel().unwrap();
        channel.submit(pages(0, 1), PageState::Private, Some(10)).unwrap();
        // There is only one.
        let again = client.open_channel();
        assert!(matches!(again, Err(Error::Refused { errno: 16, .. })), "{again:?}");
        drop(client);
        let theirs = server.join().unwrap();
        assert!(rustix::io::read(theirs, &mut [0; 4096]).unwrap() > 0, "it is the channel that was opened");
    }
}

#[test]
fn call_that_takes_long_goes_on_while_the_daemon_answers_others_and_no_longer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let (probed, was_probed) = channel();
    let server = std::thread::spawn(move || {
        let (mut first, _) = listener.accept().unwrap();
        assert!(call(&mut first).contains("RemoveMemory"));
        // It takes so long that the client asks whether anybody is there.
        let (mut other, _) = listener.accept().unwrap();
        assert!(call(&mut other).contains("org.varlink.service.GetInfo"));
        answer(&mut other, "{}");
        probed.send(()).unwrap();
        answer(&mut first, "{}");
        assert!(call(&mut first).contains("RemoveMemory"));
        // From now on nobody is answered.
        (listener, first, other)
    });
    // Long enough for an answer of the thread above, whatever else runs.
    let mut client = Client::connect_within(&path, Duration::from_secs(3)).unwrap();
    client.remove_memory(1).unwrap();
    was_probed.recv_timeout(LONG).unwrap();
    client.set_timeout(Duration::from_millis(50));
    assert_silent(client.remove_memory(2));
    server.join().unwrap();
}

#[test]
fn channel_gives_up_what_is_not_answered_and_takes_no_late_grant() {
    let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (ours, _theirs) = pair();
            let mut channel = Channel::from_fd(ours);
            assert_silent(channel.begin(pages(0, 1), PageState::Private, Some(10)));
            assert!(channel.echo().is_err(), "it is closed");
        });
        scope.spawn(|| {
            let (ours, _theirs) = pair();
            let mut channel = Channel::from_fd(ours);
            channel.submit(pages(0, 1), PageState::Private, Some(10)).unwrap();
            assert_silent(channel.completed());
            assert!(channel.echo().is_err(), "it is closed");
        });
        scope.spawn(|| {
            let (ours, _theirs) = pair();
            let channel = Channel::from_fd(ours);
            set_socket_timeout(&channel, Timeout::Send, Some(Duration::from_millis(50))).unwrap();
            let sent = (0..1_000_000).map(|_| channel.send(&Record::new(Kind::Echo, 0)));
            assert!(sent.into_iter().any(|sent| sent.is_err()), "nobody reads, and it never is full");
        });
    });
    assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
}
