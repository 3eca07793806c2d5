//! Metrics: the numbers are true, and whoever asks for them delays nobody.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use passgate::client::{AddMemory, Answer, Outcome, PageState};
use passgate::serve::{Options, Server};
use passgate_backends::device::soft::ClosedWindow;
use passgate_bindings::{Iova, PAGE};

use crate::common::watch::Watch;
use crate::common::{Setup, granted, open_files, pages, refused, until};

const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A server with a metrics socket in a directory of its own.
fn setup() -> (Setup, PathBuf) {
    let mut at = PathBuf::new();
    let setup = Setup::with(|options| {
        at = options.socket_path.as_ref().unwrap().with_file_name("metrics");
        options.metrics_path = Some(at.clone());
    });
    (setup, at)
}

/// What comes back when this is sent; read to the end.
fn ask(at: &Path, request: &[u8]) -> String {
    let mut socket = UnixStream::connect(at).unwrap();
    socket.write_all(request).unwrap();
    hear(socket)
}

fn hear(mut socket: UnixStream) -> String {
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text
}

/// The text of the answer to a GET, whose head is as it must be.
fn scrape(at: &Path) -> String {
    let answer = ask(at, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    let mut head = head.split("\r\n");
    assert_eq!(head.next(), Some("HTTP/1.1 200 OK"));
    let head: Vec<_> = head.collect();
    assert!(head.contains(&&*format!("Content-Type: {TYPE}")), "{head:?}");
    assert!(head.contains(&&*format!("Content-Length: {}", text.len())), "{head:?}");
    assert!(text.ends_with("\n# EOF\n"), "{text}");
    text.to_owned()
}

/// The value of one series, which must be there.
#[track_caller]
fn value(text: &str, series: &str) -> f64 {
    let found = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("{series} is not in\n{text}")).parse().unwrap()
}

#[track_caller]
fn assert_values(text: &str, wanted: &[(&str, u64)]) {
    for (series, number) in wanted {
        assert_eq!(value(text, series), *number as f64, "{series} in\n{text}");
    }
}

#[test]
fn the_numbers_are_those_of_what_happened() {
    let (setup, at) = setup();
    let (mut client, mut channel, file) = setup.client(8);
    let watch = Watch::new(setup.connect());
    assert_values(&scrape(&at), &[("passgate_verdict_seconds_count{performer=\"client\"}", 0)]);
    let start = Instant::now();
    for page in 0..2 {
        let begun = granted(channel.begin(pages(page, 1), PageState::Private, None));
        channel.end(begun, Outcome::Committed).unwrap();
    }
    let begun = granted(channel.begin(pages(2, 1), PageState::Hole, None));
    channel.end(begun, Outcome::NotCommitted).unwrap();
    refused(channel.begin(pages(100, 1), PageState::Hole, None));
    refused(client.remove_memory(77));
    refused(client.call::<serde_json::Value>("Convert", &serde_json::json!({}), &[]));
    let window = ClosedWindow::open().unwrap();
    let _held = setup.device.send_zc(Iova(3 * PAGE), PAGE as usize, window.near).unwrap();
    let answer = channel.begin(pages(3, 1), PageState::Private, Some(200)).unwrap();
    assert!(matches!(answer, Answer::Refused(_)), "{answer:?}");
    watch.wait("range.refused");
    let open = granted(channel.begin(pages(4, 1), PageState::Shared, None));

    let before = client.status().unwrap().sequence;
    let text = scrape(&at);
    // The tries to end the quarantine are events too, and come when they come.
    let events = value(&text, "passgate_events_total") as u64;
    assert!(
        (before..=client.status().unwrap().sequence).contains(&events),
        "{events} events, {before} before"
    );
    assert_values(
        &text,
        &[
            ("passgate_conversions_total{verdict=\"done\",to=\"private\"}", 2),
            ("passgate_conversions_total{verdict=\"done\",to=\"hole\"}", 1),
            ("passgate_conversions_total{verdict=\"done\",to=\"shared\"}", 1),
            ("passgate_conversions_total{verdict=\"refused\",to=\"private\"}", 1),
            ("passgate_conversions_total{verdict=\"unknown\",to=\"private\"}", 0),
            ("passgate_verdict_seconds_count{performer=\"client\"}", 5),
            ("passgate_verdict_seconds_bucket{le=\"+Inf\",performer=\"client\"}", 5),
            ("passgate_verdict_seconds_count{performer=\"passgate\"}", 0),
            ("passgate_refusals_total{cause=\"dma-in-flight\"}", 1),
            ("passgate_refusals_total{cause=\"unmap-failed\"}", 0),
            ("passgate_requests_wrong_total", 3),
            ("passgate_fences_total{step=\"drain\",result=\"done\"}", 1),
            // One unmap each of the three pages, and of the one that was refused.
            ("passgate_step_seconds_count{step=\"unmap\",backend=\"soft\"}", 4),
            ("passgate_step_seconds_count{step=\"drain\",backend=\"soft\"}", 1),
            ("passgate_mappings_forecast", 8),
            ("passgate_mappings_limit", client.status().unwrap().max_mappings),
            ("passgate_quarantined_bytes", PAGE),
            ("passgate_open_invalidations", 1),
            ("passgate_clients", 2),
            ("passgate_devices", 1),
            ("passgate_region_bytes{state=\"private\"}", 2 * PAGE),
            ("passgate_region_bytes{state=\"shared\"}", 6 * PAGE),
        ],
    );
    // In seconds: the refusal took most of its 200 ms, and no answer longer than all of them together.
    let answered = value(&text, "passgate_verdict_seconds_sum{performer=\"client\"}");
    assert!(answered > 0.1 && answered < start.elapsed().as_secs_f64(), "{answered} s");
    // Page 2 is back; 0 and 1 are private, 3 in quarantine (and in flight), 4 under way: all but those are mapped.
    let known = client.status().unwrap();
    assert_eq!(value(&text, "passgate_mappings"), known.mappings as f64);
    assert_eq!(value(&text, "passgate_pinned_bytes"), (5 * PAGE) as f64, "{text}");
    assert_eq!((known.totals.wrong, known.pinned, known.forecast), (3, 5 * PAGE, 8));
    channel.end(open, Outcome::Committed).unwrap();
    drop(window.far);
    until(&mut client, |status| status.quarantine.is_empty());
    let text = client.metrics().unwrap();
    assert_values(&text, &[("passgate_quarantined_bytes", 0), ("passgate_open_invalidations", 0)]);
    drop(file);
}

#[test]
fn what_passgate_converts_itself_is_timed_by_itself() {
    let (setup, at) = setup();
    let mut client = setup.connect();
    let file = crate::common::memory(2);
    client.add_memory(&AddMemory { sole_mapper: true, ..AddMemory::shared(0, 2 * PAGE) }, &[&*file]).unwrap();
    let mut channel = client.open_channel().unwrap();
    granted(channel.convert(pages(0, 1), PageState::Hole, None));
    assert_values(
        &scrape(&at),
        &[
            ("passgate_verdict_seconds_count{performer=\"passgate\"}", 1),
            ("passgate_verdict_seconds_count{performer=\"client\"}", 0),
            ("passgate_conversions_total{verdict=\"done\",to=\"hole\"}", 1),
        ],
    );
}

#[test]
fn who_says_nothing_and_closes_its_side_gets_the_plain_text() {
    let (setup, at) = setup();
    setup.connect();
    let socket = UnixStream::connect(&at).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    let text = hear(socket);
    assert!(text.starts_with("# HELP passgate_") && text.ends_with("\n# EOF\n"), "{text}");
}

#[test]
fn requests_that_are_none_are_told_so() {
    let (setup, at) = setup();
    let before = open_files();
    for (request, status) in [
        (&b"POST / HTTP/1.1\r\n\r\n"[..], "405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", "400 Bad Request"),
        (b"\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/2\r\n\r\n", "400 Bad Request"),
        (&[b'x'; 8193], "431 Request Header Fields Too Large"),
    ] {
        let answer = ask(&at, request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{answer}");
        assert!(!answer.contains("passgate_"), "{answer}");
    }
    let mut half = UnixStream::connect(&at).unwrap();
    half.write_all(b"GET / HT").unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    assert!(hear(half).starts_with("HTTP/1.1 400 "));
    // A request that comes in pieces is one.
    let mut slow = UnixStream::connect(&at).unwrap();
    for piece in ["GET / HT", "TP/1.0\r\nA: b\r", "\n\r", "\n"] {
        slow.write_all(piece.as_bytes()).unwrap();
        setup.connect();
    }
    assert!(hear(slow).starts_with("HTTP/1.1 200 "));
    scrape(&at);
    until(&mut setup.connect(), |status| status.clients == 1 && open_files() == before + 2);
}

#[test]
fn visitors_that_say_nothing_or_read_nothing_keep_nobody_out() {
    let (setup, at) = setup();
    let (mut client, mut channel, _file) = setup.client(1);
    let before = open_files();
    let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(&at).unwrap()).collect();
    let deaf: Vec<_> = (0..40)
        .map(|_| {
            let mut socket = UnixStream::connect(&at).unwrap();
            socket.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            socket
        })
        .collect();
    for _ in 0..20 {
        scrape(&at);
        channel.echo().unwrap();
    }
    // At most eight are there at a time, whoever they are.
    until(&mut client, |_| open_files() <= before + 80 + 8);
    drop((silent, deaf));
    until(&mut client, |_| open_files() == before);
    scrape(&at);
}

#[test]
fn the_socket_is_private_and_goes_with_the_daemon() {
    let (setup, at) = setup();
    let elsewhere = at.with_file_name("other");
    let options = Options { metrics_path: Some(at.clone()), ..Options::at(&elsewhere) };
    let error = Server::bind(options, setup.domain.clone(), vec![]).map(drop).unwrap_err().to_string();
    assert!(error.contains("another daemon serves there; choose another --metrics-path"), "{error}");
    assert!(!elsewhere.exists(), "what could not be made whole is not left behind");
    scrape(&at);
    assert_eq!(std::fs::metadata(&at).unwrap().permissions().mode() & 0o777, 0o600);
    setup.stop().unwrap();
    assert!(!at.exists());
}

#[test]
fn a_listener_that_does_not_read_is_counted_when_it_is_dropped() {
    let (setup, at) = setup();
    let (mut client, _channel, file) = setup.client(1);
    let deaf = setup.connect().subscribe().unwrap();
    while client.status().unwrap().clients == 2 {
        let region = client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*file]).unwrap().region;
        client.remove_memory(region).unwrap();
    }
    assert_values(&scrape(&at), &[("passgate_listeners_dropped_total", 1)]);
    drop(deaf);
}
