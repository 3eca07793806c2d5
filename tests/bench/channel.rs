//! What passgate adds to a conversion: `begin` of one 4 KiB page against `echo` and the unmap that it cannot avoid.
//!
//! The three alternate, so that whatever else the machine does falls on all: an echo, a begin (and its end) over the
//! notification channel of a real server, and a raw unmap of one page in the same domain.
//!
//! `cargo bench --bench channel [-- --iommu soft|type1|iommufd] [--device BDF]… [--rounds N] [--check]`
//!
//! `--check` exits with 1 where median(begin) is more than 1.25 × (median(echo) + median(raw unmap)).
#![allow(clippy::unwrap_used, clippy::expect_used)] // a benchmark that cannot go on stops

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use passgate::client::{AddMemory, Answer, Client, Outcome, PageState};
use passgate::serve::{Options, Server};
use passgate_backends::assign::{Accept, Assignment, Kind, assign};
use passgate_backends::{Tables, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

/// Pages of the session's memory; the begun page goes round.
const PAGES: u64 = 64;
/// Where the raw unmap happens, out of the session's way.
const RAW: u64 = 1 << 30;
/// What passgate may add.
const LIMIT: f64 = 1.25;

struct Asked {
    kind: Kind,
    devices: Vec<String>,
    rounds: usize,
    check: bool,
}

fn asked() -> Asked {
    let mut asked = Asked { kind: Kind::Soft, devices: Vec::new(), rounds: 20_000, check: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--iommu" => {
                asked.kind = match args.next().as_deref() {
                    Some("soft") => Kind::Soft,
                    Some("type1") => Kind::Type1,
                    Some("iommufd") => Kind::Iommufd,
                    other => panic!("--iommu {other:?}: soft, type1 or iommufd"),
                }
            }
            "--device" => asked.devices.extend(args.next()),
            "--rounds" => asked.rounds = args.next().and_then(|n| n.parse().ok()).expect("--rounds N"),
            "--check" => asked.check = true,
            // What cargo passes, and filters that mean nothing here.
            _ => {}
        }
    }
    asked
}

/// Nanoseconds of `work`.
fn timed<T>(samples: &mut Vec<u64>, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    samples.push(start.elapsed().as_nanos() as u64);
    result
}

fn at(samples: &[u64], share: f64) -> f64 {
    samples[((samples.len() - 1) as f64 * share) as usize] as f64 / 1000.0
}

fn main() -> ExitCode {
    let asked = asked();
    let Assignment { domain, devices } =
        assign(asked.kind, &asked.devices, Accept { unstoppable: true, scratch: true }, Tables::default())
            .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let options = Options::at(dir.path().join("socket"));
    let server = Server::bind(options, Arc::clone(&domain), devices).unwrap().spawn().unwrap();
    let file = Arc::new(GuestFile::memfd("bench", PAGES * PAGE).unwrap());
    let mut client = Client::connect(server.path()).unwrap();
    client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&*file]).unwrap();
    let mut channel = client.open_channel().unwrap();

    let raw = PageRange::<Iova>::new(RAW, PAGE).unwrap();
    let mut samples = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    for round in 0..asked.rounds + 1000 {
        if round == 1000 {
            samples.iter_mut().for_each(Vec::clear);
        }
        let [echoes, begins, ends, unmaps] = &mut samples;
        timed(echoes, || channel.echo()).unwrap();
        let page = PageRange::<Gpa>::new(round as u64 % PAGES * PAGE, PAGE).unwrap();
        let answer = timed(begins, || channel.begin(page, PageState::Shared, None)).unwrap();
        let Answer::Granted { invalidation } = answer else { panic!("{answer:?}") };
        timed(ends, || channel.end(invalidation, Outcome::NotCommitted)).unwrap();
        domain.map(raw, PAGE, &file, Offset(0), true).unwrap();
        let gone = timed(unmaps, || domain.unmap(raw));
        assert!(matches!(gone, Unmap::Gone { bytes: PAGE }), "{gone:?}");
    }
    drop((client, channel));
    server.stop().unwrap();

    samples.iter_mut().for_each(|samples| samples.sort_unstable());
    println!("{} rounds over {} (µs)            median      p99", asked.rounds, domain.name());
    for (name, samples) in ["echo", "begin", "end", "raw unmap"].iter().zip(&samples) {
        println!("{name:>28}  {:>10.2} {:>8.2}", at(samples, 0.5), at(samples, 0.99));
    }
    let [echo, begin, _, unmap] = &samples;
    let ratio = at(begin, 0.5) / (at(echo, 0.5) + at(unmap, 0.5));
    println!("median(begin) / (median(echo) + median(raw unmap)) = {ratio:.3}, limit {LIMIT}");
    if asked.check && ratio > LIMIT { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
