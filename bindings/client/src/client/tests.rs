//! The limits of calls on an inherited connection, and the answer about a range in quarantine, against a daemon that this
//! process plays.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;

use super::*;

/// The time in which a daemon that does not answer is given up.
const SHORT_TIMEOUT: Duration = Duration::from_millis(50);
/// A time that no test reaches, also on a busy machine.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Receives the next call; empty at the end of the connection.
fn receive_call(stream: &mut UnixStream) -> String {
    let (mut bytes, mut byte) = (Vec::new(), [0]);
    while stream.read(&mut byte).unwrap() == 1 && byte != [0] {
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

fn answer(stream: &mut UnixStream, reply: &str) {
    stream.write_all(format!("{reply}\0").as_bytes()).unwrap();
}

/// A socket path that no other process uses. The file is removed when this is dropped.
struct SocketPath(PathBuf);

impl SocketPath {
    fn new(name: &str) -> Self {
        let name = format!("passgate-client-{}-{name}", rustix::process::getpid().as_raw_nonzero());
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn inherited_connection_waits_only_while_daemon_answers_others() {
    let path = SocketPath::new("probed");
    let listener = UnixListener::bind(&path.0).unwrap();
    // The connection as another process opens and passes it.
    let inherited = UnixStream::connect(&path.0).unwrap();
    let (probed, was_probed) = channel();
    let server = thread::spawn(move || {
        let (mut first, _) = listener.accept().unwrap();
        assert!(receive_call(&mut first).contains("RemoveMemory"));
        let (mut other, _) = listener.accept().unwrap();
        assert!(receive_call(&mut other).contains("org.varlink.service.GetInfo"));
        answer(&mut other, "{\"parameters\":{}}");
        probed.send(()).unwrap();
        answer(&mut first, "{\"parameters\":{}}");
        assert!(receive_call(&mut first).contains("RemoveMemory"));
        // From here on neither the call nor a probe is answered.
        (listener, first, other)
    });
    let mut client = Client::from_fd(inherited.into());
    // Long enough for an answer of the thread above on a busy machine.
    client.set_timeout(Duration::from_secs(3));
    client.remove_memory(1).unwrap();
    was_probed.recv_timeout(TEST_TIMEOUT).unwrap();
    client.set_timeout(SHORT_TIMEOUT);
    let error = client.remove_memory(2).unwrap_err();
    assert!(matches!(error, Error::NoAnswer { .. }), "{error}");
    assert!(error.to_string().starts_with(path.0.to_str().unwrap()), "{error}");
    server.join().unwrap();
}

#[test]
fn inherited_connection_whose_daemon_cannot_be_probed_times_out() {
    let path = SocketPath::new("unlinked");
    let listener = UnixListener::bind(&path.0).unwrap();
    let inherited = UnixStream::connect(&path.0).unwrap();
    std::fs::remove_file(&path.0).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    for connection in [inherited, ours] {
        let mut client = Client::from_fd(connection.into());
        client.set_timeout(SHORT_TIMEOUT);
        let error = client.remove_memory(1).unwrap_err();
        assert!(matches!(error, Error::NoAnswer { .. }), "{error}");
    }
    drop((listener, theirs));
}

#[test]
fn in_process_connection_waits_until_it_is_answered_or_ends() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut client = Client::in_process(ours.into());
    client.set_timeout(SHORT_TIMEOUT);
    let (done, is_done) = channel();
    let calls = thread::spawn(move || {
        done.send(client.remove_memory(1)).unwrap();
        done.send(client.remove_memory(2)).unwrap();
    });
    assert!(receive_call(&mut theirs).contains("RemoveMemory"));
    let early = is_done.recv_timeout(4 * SHORT_TIMEOUT);
    assert!(matches!(early, Err(RecvTimeoutError::Timeout)), "{early:?}");
    answer(&mut theirs, "{\"parameters\":{}}");
    is_done.recv_timeout(TEST_TIMEOUT).unwrap().unwrap();
    assert!(receive_call(&mut theirs).contains("RemoveMemory"));
    drop(theirs);
    let ended = is_done.recv_timeout(TEST_TIMEOUT).unwrap();
    assert!(matches!(ended, Err(Error::Frame(frame::FrameError::Closed))), "{ended:?}");
    calls.join().unwrap();
}

#[test]
fn convert_of_quarantined_range_has_an_error_of_its_own() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut client = Client::from_fd(ours.into());
    let server = thread::spawn(move || {
        for errno in [5, 16] {
            assert!(receive_call(&mut theirs).contains("Convert"));
            let parameters = format!("{{\"message\":\"0x1000 is in quarantine\",\"errno\":{errno}}}");
            let error = format!("\"io.passgate.Control.Refused\",\"parameters\":{parameters}");
            answer(&mut theirs, &format!("{{\"error\":{error}}}"));
        }
    });
    let convert = Convert { gpa: 0x1000, length: 0x1000, to: PageState::Hole, deadline_ms: 0 };
    let error = client.convert(&convert).unwrap_err();
    assert!(matches!(error, Error::Quarantined { .. }), "{error:?}");
    assert_eq!(error.to_string(), "0x1000 is in quarantine");
    assert!(matches!(client.convert(&convert), Err(Error::Refused { errno: 16, .. })));
    server.join().unwrap();
}
