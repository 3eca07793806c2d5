//! The control socket: malformed frames, unknown methods, clients that do not read.

use std::io::{BufRead, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use passgate_bindings::PAGE;
use passgate_client::protocol::verbs::DESCRIPTION;
use passgate_client::protocol::{MAX_FRAME_BYTES, frame};
use passgate_client::{AddMemory, Client};
use serde_json::{Value, json};
use std::os::fd::AsFd;

use crate::common::{
    Setup, TIMEOUT, assert_refused, exclusive, memory, open_files, refused, wait_for_status,
};

/// Sends one frame and receives one, without the client module.
fn call_raw(socket: &mut UnixStream, frame: &[u8]) -> Value {
    socket.write_all(frame).unwrap();
    socket.write_all(&[0]).unwrap();
    receive(socket).expect("an answer")
}

/// Receives one frame; none at the end of the connection.
fn receive(socket: &mut UnixStream) -> Option<Value> {
    let mut bytes = Vec::new();
    loop {
        let mut byte = [0];
        if socket.read(&mut byte).unwrap() == 0 {
            return None;
        }
        if byte == [0] {
            return Some(serde_json::from_slice(&bytes).unwrap());
        }
        bytes.push(byte[0]);
    }
}

#[test]
fn varlink_introspection_is_served() {
    let setup = Setup::new();
    let mut socket = UnixStream::connect(setup.server.path()).unwrap();
    let info = call_raw(&mut socket, br#"{"method":"org.varlink.service.GetInfo"}"#);
    assert_eq!(info["parameters"]["interfaces"][1], "io.passgate.Control");
    let call = br#"{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"io.passgate.Control"}}"#;
    assert_eq!(call_raw(&mut socket, call)["parameters"]["description"], DESCRIPTION);
    let call =
        br#"{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"no.such"}}"#;
    assert_eq!(call_raw(&mut socket, call)["error"], "org.varlink.service.InterfaceNotFound");
}

#[test]
fn unknown_method_is_named_in_error() {
    let setup = Setup::new();
    let mut socket = UnixStream::connect(setup.server.path()).unwrap();
    let unknown = call_raw(&mut socket, br#"{"method":"io.passgate.Control.Nope","parameters":{}}"#);
    assert_eq!(unknown["error"], "org.varlink.service.MethodNotFound");
    assert_eq!(unknown["parameters"]["method"], "io.passgate.Control.Nope");
    let unknown = call_raw(&mut socket, br#"{"method":"no.such.Verb"}"#);
    assert_eq!(unknown["error"], "org.varlink.service.InterfaceNotFound");
    assert_eq!(unknown["parameters"]["interface"], "no.such");
    assert!(call_raw(&mut socket, br#"{"method":"io.passgate.Control.Status"}"#)["error"].is_null());
}

#[test]
fn malformed_frames_are_refused_and_connection_survives() {
    let setup = Setup::new();
    let mut socket = UnixStream::connect(setup.server.path()).unwrap();
    for frame in [
        &b""[..],
        b"{",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"{}",
        br#"{"method":7}"#,
        br#"{"method":"a","surprise":1}"#,
    ] {
        let answer = call_raw(&mut socket, frame);
        assert_eq!(answer["error"], "io.passgate.Control.Refused", "{frame:?}");
        assert!(answer["parameters"]["message"].as_str().unwrap().contains("varlink"), "{answer}");
    }
    let deep = [vec![b'['; 60_000], vec![b']'; 60_000]].concat();
    assert_eq!(call_raw(&mut socket, &deep[..65_000])["error"], "io.passgate.Control.Refused");
    for flag in ["oneway", "upgrade"] {
        let call = format!(r#"{{"method":"io.passgate.Control.Status","{flag}":true}}"#);
        assert_eq!(call_raw(&mut socket, call.as_bytes())["error"], "io.passgate.Control.Refused");
    }
    let reply = call_raw(&mut socket, br#"{"method":"io.passgate.Control.Subscribe"}"#);
    assert!(reply["parameters"]["message"].as_str().unwrap().contains("more"), "{reply}");
    assert!(call_raw(&mut socket, br#"{"method":"io.passgate.Control.Status"}"#)["error"].is_null());
}

#[test]
fn oversized_frame_closes_only_its_connection() {
    let setup = Setup::new();
    let mut client = setup.connect();
    client.status().unwrap();
    let before = open_files();
    let mut socket = UnixStream::connect(setup.server.path()).unwrap();
    // The server may close the connection before it has received everything.
    let _ = socket.write_all(&vec![b' '; MAX_FRAME_BYTES + 1]);
    let answer = receive(&mut socket);
    if let Some(answer) = answer {
        assert!(answer["parameters"]["message"].as_str().unwrap().contains("longer than"), "{answer}");
        assert_eq!(receive(&mut socket), None, "the connection must be closed");
    }
    drop(socket);
    wait_for_status(&mut client, |status| status.clients == 1);
    assert_eq!(open_files(), before);
}

#[test]
fn excess_descriptors_close_their_connection_without_leak() {
    let setup = Setup::new();
    let mut client = setup.connect();
    client.status().unwrap();
    let file = memory(1);
    let before = open_files();
    let socket = UnixStream::connect(setup.server.path()).unwrap();
    // Two messages of an unfinished frame, each with 16 descriptors, the most that one message may have.
    for _ in 0..2 {
        frame::send(&socket, b"{", &[file.as_fd(); 16]).unwrap();
    }
    wait_for_status(&mut client, |status| status.clients == 1);
    drop(socket);
    assert_eq!(open_files(), before);
}

#[test]
fn client_hanging_up_mid_call_leaks_nothing() {
    let setup = Setup::new();
    let mut client = setup.connect();
    client.status().unwrap();
    let before = open_files();
    for partial_input in [&b""[..], b"{\"method\":\"io.pass", b"{}\0{}\0{}"] {
        let mut socket = UnixStream::connect(setup.server.path()).unwrap();
        socket.write_all(partial_input).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
    }
    let file = memory(1);
    let mut other = setup.connect();
    other.add_memory(&AddMemory::shared(0, PAGE), &[&*file]).unwrap();
    let channel = other.open_channel().unwrap();
    drop((other, channel, file));
    wait_for_status(&mut client, |status| status.clients == 1 && status.regions.is_empty());
    assert_eq!(open_files(), before);
}

#[test]
fn pipelined_calls_keep_their_descriptors() {
    let setup = Setup::new();
    let mut socket = UnixStream::connect(setup.server.path()).unwrap();
    let status = b"{\"method\":\"io.passgate.Control.Status\"}\0";
    let add = b"{\"method\":\"io.passgate.Control.AddMemory\",\"parameters\":{\"gpa\":0,\"length\":4096}}\0";
    let file = memory(1);
    frame::send(&socket, status, &[]).unwrap();
    frame::send(&socket, add, &[file.as_fd()]).unwrap();
    frame::send(&socket, status, &[]).unwrap();
    assert_eq!(receive(&mut socket).unwrap()["parameters"]["regions"], json!([]));
    assert_eq!(receive(&mut socket).unwrap()["parameters"]["region"], 1);
    assert_eq!(receive(&mut socket).unwrap()["parameters"]["regions"][0]["length"], 4096);
}

#[test]
fn slow_event_listener_is_dropped_and_delays_nobody() {
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(1);
    let files = open_files();
    let mut slow = UnixStream::connect(setup.server.path()).unwrap();
    let first = call_raw(&mut slow, br#"{"method":"io.passgate.Control.Subscribe","more":true}"#);
    assert_eq!(first["continues"], true);
    let sequence = first["parameters"]["sequence"].as_u64().unwrap();
    let mut reader = setup.connect().subscribe().unwrap();
    let mut events = 0;
    while client.status().unwrap().clients == 3 {
        assert!(events < 100_000, "the slow listener was never dropped");
        let region = client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*file]).unwrap().region;
        client.remove_memory(region).unwrap();
        events += 1;
        assert_eq!(reader.next().unwrap().unwrap().sequence, sequence + events, "an event is missing");
    }
    drop(reader);
    // When it reads at last it receives a first part of the events without gaps, and then the end.
    let mut received = 0;
    while let Some(event) = receive_or_end(&mut slow) {
        received += 1;
        assert_eq!(event["parameters"]["sequence"], sequence + received);
    }
    assert!(received < events);
    drop(slow);
    wait_for_status(&mut client, |status| status.clients == 1);
    assert_eq!(open_files(), files);
}

/// Like [`receive`], but the last frame may be incomplete.
fn receive_or_end(socket: &mut UnixStream) -> Option<Value> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while socket.read(&mut byte).unwrap_or(0) == 1 {
        if byte == [0] {
            return Some(serde_json::from_slice(&bytes).unwrap());
        }
        bytes.push(byte[0]);
    }
    None
}

#[test]
fn client_not_reading_answers_is_not_read() {
    let setup = Setup::new();
    let mut client = setup.connect();
    let mut unread = UnixStream::connect(setup.server.path()).unwrap();
    unread.set_nonblocking(true).unwrap();
    let call = b"{\"method\":\"io.passgate.Control.Status\"}\0";
    let (mut sent, mut stuck) = (0, 0);
    while stuck < 1000 && sent < 64 << 20 {
        match unread.write(call) {
            Ok(n) => (sent, stuck) = (sent + n, 0),
            Err(_) => stuck += 1,
        }
        client.status().unwrap();
    }
    assert_eq!(stuck, 1000, "the server has read {sent} bytes of calls whose answers are not read");
    // The client is not dropped: once it reads, every call that it has sent is answered.
    unread.set_nonblocking(false).unwrap();
    unread.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut answers = std::io::BufReader::new(unread);
    for nth in 1..=sent / call.len() {
        let mut answer = Vec::new();
        answers.read_until(0, &mut answer).unwrap();
        assert_eq!(answer.pop(), Some(0), "answer {nth} of {}", sent / call.len());
        assert_eq!(serde_json::from_slice::<Value>(&answer).unwrap()["parameters"]["clients"], 2);
    }
}

/// The busy client's last call is Status: it shows whether the server has handled the other client, which has disconnected,
/// before that. Both clients have sent everything before the server starts.
#[test]
fn client_with_many_calls_yields_to_next_client() {
    use passgate::serve::{Options, Server};
    use passgate_backends::iommu::soft::SoftDomain;
    const CALLS: usize = 100;
    let _exclusive = exclusive();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let server = Server::bind(Options::at(&path), SoftDomain::open().unwrap(), vec![]).unwrap();
    let mut busy = UnixStream::connect(&path).unwrap();
    busy.set_read_timeout(Some(TIMEOUT)).unwrap();
    // Long enough that a read returns few of them, short enough that all of them, and their answers, fit into the sockets.
    let mut call = br#"{"method":"no.such.Verb"}"#.to_vec();
    call.resize(499, b' ');
    call.push(0);
    let status = &b"{\"method\":\"io.passgate.Control.Status\"}\0"[..];
    busy.write_all(&[&call.repeat(CALLS)[..], status].concat()).unwrap();
    drop(UnixStream::connect(&path).unwrap());
    let server = server.spawn().unwrap();
    for _ in 0..CALLS {
        assert_eq!(receive(&mut busy).unwrap()["error"], "org.varlink.service.InterfaceNotFound");
    }
    let clients = receive(&mut busy).unwrap()["parameters"]["clients"].clone();
    assert_eq!(clients, 1, "the disconnected client was not handled");
    server.stop().unwrap();
}

#[test]
fn stale_socket_is_replaced_and_live_one_is_not() {
    use passgate::serve::{Options, Server};
    let setup = Setup::new();
    let bind = |path: &std::path::Path| Server::bind(Options::at(path), setup.domain.clone(), vec![]);
    let error = bind(setup.server.path()).map(drop).unwrap_err().to_string();
    assert!(error.contains("another daemon serves there"), "{error}");
    setup.connect().status().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let stale = dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    let server = bind(&stale).unwrap().spawn().unwrap();
    Client::connect(&stale).unwrap().status().unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&stale).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    server.stop().unwrap();
    assert!(!stale.exists(), "the socket must be removed at the end");
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(bind(&file).is_err());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn dma_method_is_disabled_by_default() {
    let off = Setup::with(|options| options.allow_dma = false);
    let mut client = off.connect();
    assert_refused(client.dma_read("soft:0", 0, 8), 1, "--allow-dma");
    drop((client, off));
    let setup = Setup::new();
    let (mut client, _channel, file) = setup.client(1);
    client.dma_write("soft:0", 8, b"by a device").unwrap();
    assert_eq!(client.dma_read("soft:0", 8, 11).unwrap(), b"by a device");
    let mut seen = [0; 11];
    file.read(8, &mut seen).unwrap();
    assert_eq!(&seen, b"by a device");
    assert_refused(client.dma_read("soft:1", 0, 8), 19, "no device soft:1");
    assert_refused(client.dma_read("soft:0", 1 << 30, 8), 14, "DMA fault at IOVA 0x40000000");
    assert_refused(client.dma_read("soft:0", 0, 0), 22, "1 to 4096");
    assert_refused(client.dma_read("soft:0", 0, 1 << 20), 22, "1 to 4096");
    let both = json!({"device": "soft:0", "iova": 0, "read": 8, "write": "00"});
    refused(client.call::<Value>("Dma", &both, &[]));
    let invalid = json!({"device": "soft:0", "iova": 0, "write": "0"});
    refused(client.call::<Value>("Dma", &invalid, &[]));
}
