//! Metrics, status and top of the disk: the numbers of requests and their results.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use passgate_backends::{Device, Step};
use passgate_bindings::PageRange;
use passgate_client::{Answer, Client, Outcome, PageState};
use passgate_sim::nvme::{CommandFilter, FaultAction, opcode};

use crate::guest::{DATA_GPA, DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES};
use crate::world::{Setup, World};

const TIMEOUT: Duration = Duration::from_secs(20);

/// Returns the value of a series `passgate_disk_…`, if it exists.
fn find(text: &str, series: &str) -> Option<u64> {
    let value = |line: &str| {
        line.strip_prefix("passgate_disk_")?.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned)
    };
    text.lines().find_map(value).map(|value| value.parse().unwrap())
}

#[track_caller]
fn assert_values(client: &mut Client, expected: &[(&str, u64)]) {
    let text = client.metrics().unwrap();
    for (series, number) in expected {
        assert_eq!(find(&text, series), Some(*number), "{series} in\n{text}");
    }
}

/// Waits until a series has this value.
#[track_caller]
fn wait_for_value(client: &mut Client, series: &str, number: u64) {
    let end = Instant::now() + TIMEOUT;
    loop {
        let text = client.metrics().unwrap();
        if find(&text, series) == Some(number) {
            return;
        }
        assert!(Instant::now() < end, "{series} does not become {number}:\n{text}");
        std::thread::yield_now();
    }
}

#[test]
fn requests_are_counted_by_kind_and_status() {
    let world = World::new();
    let (mut guest, mut client) = (world.guest(), world.control());
    assert_values(
        &mut client,
        &[("requests_total{kind=\"read\",status=\"ok\"}", 0), ("read_bytes_total", 0)],
    );
    // On both queues, which have two workers.
    for ring in 0..2 {
        assert_eq!(guest.run_request(ring, OUT, 0, &[(DATA_GPA, 4096), (DATA_GPA + 8192, 512)]), OK);
        assert_eq!(guest.run_request(ring, IN, 0, &[(DATA_GPA, 8192)]), OK);
        assert_eq!(guest.run_request(ring, IN, 0, &[(DATA_GPA, 512), (DATA_GPA, 512)]), OK);
    }
    let mut range = 8u64.to_le_bytes().to_vec();
    range.extend([8, 0, 0, 0, 0, 0, 0, 0]);
    guest.memory.write(DATA_GPA, &range).unwrap();
    for (kind, sector, len, status) in [
        (FLUSH, 0, 0, OK),
        (DISCARD, 0, 16, OK),
        (WRITE_ZEROES, 0, 16, OK),
        (GET_ID, 0, 20, OK),
        // Invalid requests.
        (IN, 65_536, 512, IOERR),
        (OUT, 65_536, 512, IOERR),
        (DISCARD, 0, 17, IOERR),
        (WRITE_ZEROES, 0, 17, IOERR),
        (GET_ID, 0, 19, IOERR),
        (99, 0, 0, UNSUPP),
    ] {
        let data = if len > 0 { vec![(DATA_GPA, len)] } else { vec![] };
        assert_eq!(guest.run_request(0, kind, sector, &data), status, "{kind}");
    }
    // Requests that the drive fails.
    world.sim.fault(CommandFilter::io(opcode::READ), FaultAction::Status(0x281));
    assert_eq!(guest.run_request(1, IN, 0, &[(DATA_GPA, 4096)]), IOERR);
    world.sim.fault(CommandFilter::io(opcode::FLUSH), FaultAction::Status(0x6));
    assert_eq!(guest.run_request(1, FLUSH, 0, &[]), IOERR);
    guest.memory.write(DATA_GPA + 12, &2u32.to_le_bytes()).unwrap();
    assert_eq!(guest.run_request(1, DISCARD, 0, &[(DATA_GPA, 16)]), UNSUPP);
    // Each request is counted before it is used, so no wait is needed here.
    assert_values(
        &mut client,
        &[
            ("requests_total{kind=\"read\",status=\"ok\"}", 4),
            ("requests_total{kind=\"read\",status=\"ioerr\"}", 2),
            ("requests_total{kind=\"read\",status=\"unsupported\"}", 0),
            ("requests_total{kind=\"write\",status=\"ok\"}", 2),
            ("requests_total{kind=\"write\",status=\"ioerr\"}", 1),
            ("requests_total{kind=\"flush\",status=\"ok\"}", 1),
            ("requests_total{kind=\"flush\",status=\"ioerr\"}", 1),
            ("requests_total{kind=\"discard\",status=\"ok\"}", 1),
            ("requests_total{kind=\"discard\",status=\"ioerr\"}", 1),
            ("requests_total{kind=\"discard\",status=\"unsupported\"}", 1),
            ("requests_total{kind=\"write_zeroes\",status=\"ok\"}", 1),
            ("requests_total{kind=\"write_zeroes\",status=\"ioerr\"}", 1),
            ("requests_total{kind=\"other\",status=\"ok\"}", 1),
            ("requests_total{kind=\"other\",status=\"ioerr\"}", 1),
            ("requests_total{kind=\"other\",status=\"unsupported\"}", 1),
            ("read_bytes_total", 2 * (8192 + 1024)),
            ("written_bytes_total", 2 * 4608),
            ("holds_total", 0),
            ("requests_refused_total{cause=\"not-shared\"}", 0),
        ],
    );
}

#[test]
fn held_requests_are_visible_and_refused_ones_counted() {
    let mut world = World::new();
    let (mut guest, mut channel, mut client) = (world.guest(), world.channel(), world.control());
    let page = PageRange::new(DATA_GPA, 4096).unwrap();
    for (round, outcome) in [Outcome::NotCommitted, Outcome::Committed].into_iter().enumerate() {
        let before = round as u64;
        let Answer::Granted { invalidation } = channel.begin(page, PageState::Private, None).unwrap() else {
            panic!("not granted")
        };
        for ring in 0..2 {
            guest.request(ring, 0, IN, 0, &[(DATA_GPA, 4096)]);
            guest.kick(ring);
        }
        wait_for_value(&mut client, "requests_held", 2);
        assert_values(
            &mut client,
            &[
                ("holds_total", 2 * (before + 1)),
                ("requests_in_flight", 0),
                ("requests_refused_total{cause=\"not-shared\"}", 0),
            ],
        );
        assert_eq!(client.status().unwrap().disk.map(|disk| (disk.held, disk.connected)), Some((2, true)));
        channel.end(invalidation, outcome).unwrap();
        (0..2).for_each(|ring| _ = guest.await_used(ring, 1));
        wait_for_value(&mut client, "requests_held", 0);
    }
    // In the second round the page is private.
    let refused = "requests_refused_total{cause=\"not-shared\"}";
    let failed = "requests_total{kind=\"read\",status=\"ioerr\"}";
    assert_values(&mut client, &[(refused, 2), (failed, 2), ("read_bytes_total", 2 * 4096)]);
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA - 512, 1024)]), IOERR);
    assert_eq!(guest.run_request(1, OUT, 0, &[(1 << 40, 512)]), IOERR, "memory outside every region");
    assert_values(
        &mut client,
        &[
            (refused, 4),
            ("holds_total", 6),
            ("requests_refused_total{cause=\"held-too-long\"}", 0),
            (failed, 3),
            ("requests_total{kind=\"write\",status=\"ioerr\"}", 1),
        ],
    );
    let disk = client.status().unwrap().disk.unwrap();
    assert_eq!((disk.done, disk.failed, disk.refused, disk.held), (2, 4, 4, 0));
}

/// Its pages are accessible, so the request is retried repeatedly while the drive is stopped.
#[test]
fn retried_request_counts_as_one_hold() {
    let world = World::new();
    let (mut guest, mut client) = (world.guest(), world.control());
    world.drive.fence(Step::Drain).unwrap();
    guest.request(0, 0, IN, 0, &[(DATA_GPA, 4096)]);
    guest.kick(0);
    wait_for_value(&mut client, "requests_held", 1);
    assert_eq!(
        guest.used_within(0, 1, Duration::from_millis(50)),
        [],
        "a stopped drive must serve no request"
    );
    assert_values(&mut client, &[("requests_held", 1), ("requests_in_flight", 0), ("holds_total", 1)]);
    world.drive.attach().unwrap();
    guest.await_used(0, 1);
    assert_eq!(guest.status(0, 0), OK);
    wait_for_value(&mut client, "requests_held", 0);
    assert_values(&mut client, &[("holds_total", 1)]);
}

#[test]
fn in_flight_requests_are_visible() {
    let world = World::with(Setup { deadline: Duration::from_secs(60), ..Setup::default() });
    let (mut guest, mut client) = (world.guest(), world.control());
    world.sim.fault(CommandFilter::io(opcode::READ).times(3), FaultAction::StallData);
    for (ring, head) in [(0, 0), (0, 4), (1, 0)] {
        guest.request(ring, head, IN, 0, &[(DATA_GPA, 512)]);
        guest.kick(ring);
    }
    assert!(world.sim.await_stalled(3, TIMEOUT));
    wait_for_value(&mut client, "requests_in_flight", 3);
    assert!(world.sim.release_next());
    wait_for_value(&mut client, "requests_in_flight", 2);
    assert_eq!(client.status().unwrap().disk.unwrap().in_flight, 2);
    world.sim.release();
    wait_for_value(&mut client, "requests_in_flight", 0);
    assert_values(&mut client, &[("requests_total{kind=\"read\",status=\"ok\"}", 3)]);
}

#[test]
fn aborts_resets_and_drive_loss_are_counted() {
    let world = World::with(Setup { deadline: Duration::from_secs(1), ..Setup::default() });
    let (mut guest, mut client) = (world.guest(), world.control());
    assert_values(&mut client, &[("aborts_total", 0), ("resets_total", 0), ("lost", 0)]);
    world.sim.fault(CommandFilter::io(opcode::READ), FaultAction::StallData);
    assert_eq!(
        guest.run_request(0, IN, 0, &[(DATA_GPA, 512)]),
        OK,
        "the command must be aborted and resubmitted"
    );
    assert_values(&mut client, &[("aborts_total", 1), ("resets_total", 0)]);
    world.sim.obey_aborts(false);
    world.sim.fault(CommandFilter::io(opcode::READ), FaultAction::StallData);
    assert_eq!(
        guest.run_request(0, IN, 0, &[(DATA_GPA, 512)]),
        OK,
        "the controller must be reset and the command resubmitted"
    );
    assert_values(&mut client, &[("aborts_total", 2), ("resets_total", 1), ("lost", 0)]);
    world.sim.vanish();
    wait_for_value(&mut client, "lost", 1);
    assert!(client.status().unwrap().disk.unwrap().lost);
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA, 512)]), IOERR);
}

#[test]
fn front_ends_are_counted_and_disk_metrics_need_back_end() {
    let mut world = World::new();
    let mut client = world.control();
    wait_for_value(&mut client, "front_end_connected", 0);
    for round in 1..=3 {
        let guest = world.guest();
        assert_values(&mut client, &[("front_end_connected", 1), ("front_ends_total", round)]);
        drop(guest);
        wait_for_value(&mut client, "front_end_connected", 0);
        assert!(
            client.status().unwrap().regions.is_empty(),
            "the memory must be removed before the front-end counts as disconnected"
        );
    }
    assert_eq!(client.status().unwrap().disk.map(|disk| disk.connected), Some(false));
    world.stop_back_end();
    let text = client.metrics().unwrap();
    assert!(!text.contains("passgate_disk") && text.ends_with("\n# EOF\n"), "{text}");
    assert_eq!(client.status().unwrap().disk, None);
    world.restart_back_end();
    let _guest = world.guest();
    assert_values(&mut client, &[("front_end_connected", 1), ("front_ends_total", 1)]);
}

/// OpenMetrics 1.0: the lines of a family are contiguous, counters end in `_total`, and the name ends in the unit.
#[test]
fn metrics_text_is_valid_openmetrics() {
    let world = World::new();
    let _guest = world.guest();
    let text = world.control().metrics().unwrap();
    let (mut families, mut family, mut kind) = (BTreeSet::new(), "", "");
    for line in text.lines() {
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["#", "HELP", name, ..] => {
                assert!(families.insert(name), "family {name} twice");
                (family, kind) = (name, "");
                assert!(line.ends_with('.'), "{line}");
            }
            ["#", "TYPE", name, type_name] => {
                assert_eq!(name, family);
                kind = type_name;
            }
            ["#", "UNIT", name, unit] => assert!(name == family && name.ends_with(&format!("_{unit}"))),
            ["#", "EOF"] => family = "",
            [series, value] => {
                let name = series.split('{').next().unwrap();
                let suffix = name.strip_prefix(family).unwrap();
                let valid_suffix = match kind {
                    "counter" => suffix == "_total",
                    "gauge" => suffix.is_empty(),
                    _ => !suffix.is_empty(),
                };
                assert!(valid_suffix && value.parse::<f64>().is_ok(), "{line}");
                assert!(!families.contains(name) || suffix.is_empty(), "{name} is a family as well");
            }
            _ => panic!("{line}"),
        }
    }
    assert!(families.iter().filter(|name| name.starts_with("passgate_disk_")).count() == 12, "{families:?}");
}

#[test]
fn status_and_top_show_disk_line() {
    let mut world = World::new();
    let (mut guest, mut channel, mut client) = (world.guest(), world.channel(), world.control());
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA, 4096)]), OK);
    assert_eq!(guest.run_request(0, IN, 65_536, &[(DATA_GPA, 4096)]), IOERR);
    let page = PageRange::new(DATA_GPA, 4096).unwrap();
    let Answer::Granted { .. } = channel.begin(page, PageState::Private, None).unwrap() else { panic!() };
    guest.request(0, 0, IN, 0, &[(DATA_GPA, 4096)]);
    guest.kick(0);
    wait_for_value(&mut client, "requests_held", 1);
    let socket = world.dir.path().join("control");
    let command_output = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_passgate"));
        let output = command.args(args).arg("--socket-path").arg(&socket).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let disk_line = "\ndisk: a front-end; requests: 0 in flight, 1 held";
    let text = command_output(&["status"]);
    assert!(text.contains(&format!("{disk_line}; 1 done, 1 failed, 0 of them for their memory\n")), "{text}");
    let json: serde_json::Value = serde_json::from_str(&command_output(&["status", "--json"])).unwrap();
    assert_eq!((&json["disk"]["held"], &json["disk"]["connected"]), (&1.into(), &true.into()));
    let text = command_output(&["top", "--once", "--interval", "0.1"]);
    assert!(text.contains(&format!("{disk_line}, 0/s answered\n")), "{text}");
}
