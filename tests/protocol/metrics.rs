//! Metrics: the values match the events, and a scraper delays no other client.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use passgate::serve::{Options, Server};
use passgate_backends::device::soft::ClosedWindow;
use passgate_bindings::{Iova, PAGE};
use passgate_client::{AddMemory, Answer, Outcome, PageState};

use crate::common::event_watch::EventWatch;
use crate::common::{Setup, granted, open_files, pages, refused, wait_for_status};

/// The content type of OpenMetrics 1.0.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Starts a server with a metrics socket; returns the path of the socket.
fn setup() -> (Setup, PathBuf) {
    let mut at = PathBuf::new();
    let setup = Setup::with(|options| {
        at = options.socket_path.as_ref().unwrap().with_file_name("metrics");
        options.metrics_path = Some(at.clone());
    });
    (setup, at)
}

/// Sends a request, and returns everything received until the end.
fn send_request(at: &Path, request: &[u8]) -> String {
    let mut socket = UnixStream::connect(at).unwrap();
    socket.write_all(request).unwrap();
    read_all(socket)
}

fn read_all(mut socket: UnixStream) -> String {
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text
}

/// Sends a GET request, checks the response headers, and returns the body.
fn scrape(at: &Path) -> String {
    let answer = send_request(at, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    let mut head = head.split("\r\n");
    assert_eq!(head.next(), Some("HTTP/1.1 200 OK"));
    let head: Vec<_> = head.collect();
    assert!(head.contains(&&*format!("Content-Type: {CONTENT_TYPE}")), "{head:?}");
    assert!(head.contains(&&*format!("Content-Length: {}", text.len())), "{head:?}");
    assert!(text.ends_with("\n# EOF\n"), "{text}");
    text.to_owned()
}

/// Returns the value of one series, which must exist.
#[track_caller]
fn value(text: &str, series: &str) -> f64 {
    let found = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("{series} is not in\n{text}")).parse().unwrap()
}

#[track_caller]
fn assert_values(text: &str, expected: &[(&str, u64)]) {
    for (series, number) in expected {
        assert_eq!(value(text, series), *number as f64, "{series} in\n{text}");
    }
}

#[test]
fn metrics_match_events() {
    let (setup, at) = setup();
    let (mut client, mut channel, file) = setup.client(8);
    let watch = EventWatch::new(setup.connect());
    assert_values(&scrape(&at), &[("passgate_verdict_seconds_count{performer=\"client\"}", 0)]);
    let start = Instant::now();
    for page in 0..2 {
        let invalidation = granted(channel.begin(pages(page, 1), PageState::Private, None));
        channel.end(invalidation, Outcome::Committed).unwrap();
    }
    let invalidation = granted(channel.begin(pages(2, 1), PageState::Hole, None));
    channel.end(invalidation, Outcome::NotCommitted).unwrap();
    refused(channel.begin(pages(100, 1), PageState::Hole, None));
    refused(client.remove_memory(77));
    refused(client.call::<serde_json::Value>("Convert", &serde_json::json!({}), &[]));
    let connection = ClosedWindow::open().unwrap();
    let _send = setup.device.send_zc(Iova(3 * PAGE), PAGE as usize, connection.near).unwrap();
    let answer = channel.begin(pages(3, 1), PageState::Private, Some(200)).unwrap();
    assert!(matches!(answer, Answer::Refused(_)), "{answer:?}");
    watch.wait("range.refused");
    let open = granted(channel.begin(pages(4, 1), PageState::Shared, None));

    let before = client.status().unwrap().sequence;
    let text = scrape(&at);
    // The retries that would end the quarantine cause events too, at any time.
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
            // One unmap for each of the three converted pages, and one for the refused one.
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
    // In seconds: the refusal took most of its 200 ms, and the sum cannot exceed the duration of the test.
    let verdict_seconds = value(&text, "passgate_verdict_seconds_sum{performer=\"client\"}");
    assert!(verdict_seconds > 0.1 && verdict_seconds < start.elapsed().as_secs_f64(), "{verdict_seconds} s");
    // Page 2 is mapped again; 0 and 1 are private, 3 is in quarantine and still pinned (in flight), 4 is between begin and
    // end: five pages are pinned.
    let current_status = client.status().unwrap();
    assert_eq!(value(&text, "passgate_mappings"), current_status.mappings as f64);
    assert_eq!(value(&text, "passgate_pinned_bytes"), (5 * PAGE) as f64, "{text}");
    assert_eq!(
        (current_status.totals.wrong, current_status.pinned, current_status.forecast),
        (3, 5 * PAGE, 8)
    );
    channel.end(open, Outcome::Committed).unwrap();
    drop(connection.far);
    wait_for_status(&mut client, |status| status.quarantine.is_empty());
    let text = client.metrics().unwrap();
    assert_values(&text, &[("passgate_quarantined_bytes", 0), ("passgate_open_invalidations", 0)]);
    drop(file);
}

#[test]
fn passgate_conversions_are_timed_separately() {
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
fn half_closed_connection_gets_plain_text() {
    let (setup, at) = setup();
    setup.connect();
    let socket = UnixStream::connect(&at).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    let text = read_all(socket);
    assert!(text.starts_with("# HELP passgate_") && text.ends_with("\n# EOF\n"), "{text}");
}

#[test]
fn malformed_http_requests_are_refused() {
    let (setup, at) = setup();
    let before = open_files();
    for (request, status) in [
        (&b"POST / HTTP/1.1\r\n\r\n"[..], "405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", "400 Bad Request"),
        (b"\r\n\r\n", "400 Bad Request"),
        (b"GET / HTTP/2\r\n\r\n", "400 Bad Request"),
        (&[b'x'; 8193], "431 Request Header Fields Too Large"),
    ] {
        let answer = send_request(&at, request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{answer}");
        assert!(!answer.contains("passgate_"), "{answer}");
    }
    let mut partial = UnixStream::connect(&at).unwrap();
    partial.write_all(b"GET / HT").unwrap();
    partial.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(partial).starts_with("HTTP/1.1 400 "));
    // A request may arrive in pieces.
    let mut in_pieces = UnixStream::connect(&at).unwrap();
    for piece in ["GET / HT", "TP/1.0\r\nA: b\r", "\n\r", "\n"] {
        in_pieces.write_all(piece.as_bytes()).unwrap();
        setup.connect();
    }
    assert!(read_all(in_pieces).starts_with("HTTP/1.1 200 "));
    scrape(&at);
    wait_for_status(&mut setup.connect(), |status| status.clients == 1 && open_files() == before + 2);
}

#[test]
fn idle_scrapers_block_nobody() {
    let (setup, at) = setup();
    let (mut client, mut channel, _file) = setup.client(1);
    let before = open_files();
    let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(&at).unwrap()).collect();
    let unread: Vec<_> = (0..40)
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
    // The server serves at most eight connections at a time.
    wait_for_status(&mut client, |_| open_files() <= before + 80 + 8);
    drop((silent, unread));
    wait_for_status(&mut client, |_| open_files() == before);
    scrape(&at);
}

#[test]
fn metrics_socket_is_private_and_removed_with_daemon() {
    let (setup, at) = setup();
    let elsewhere = at.with_file_name("other");
    let options = Options { metrics_path: Some(at.clone()), ..Options::at(&elsewhere) };
    let error = Server::bind(options, setup.domain.clone(), vec![]).map(drop).unwrap_err().to_string();
    assert!(error.contains("another daemon serves there; choose another --metrics-path"), "{error}");
    assert!(!elsewhere.exists(), "a failed start must remove the control socket");
    scrape(&at);
    assert_eq!(std::fs::metadata(&at).unwrap().permissions().mode() & 0o777, 0o600);
    setup.stop().unwrap();
    assert!(!at.exists());
}

#[test]
fn dropped_listener_is_counted() {
    let (setup, at) = setup();
    let (mut client, _channel, file) = setup.client(1);
    let listener = setup.connect().subscribe().unwrap();
    while client.status().unwrap().clients == 2 {
        let region = client.add_memory(&AddMemory::shared(1 << 30, PAGE), &[&*file]).unwrap().region;
        client.remove_memory(region).unwrap();
    }
    assert_values(&scrape(&at), &[("passgate_listeners_dropped_total", 1)]);
    drop(listener);
}
