//! The cost that passgate adds to a conversion: `begin` of one 4 KiB page against `echo` and the unavoidable unmap.
//!
//! The three alternate, so that other load on the machine affects all of them: an echo, a begin (and its end) over the
//! notification channel of a real server, and a raw unmap of one page in the same domain.
//!
//! `cargo bench --bench channel [-- --iommu soft|type1|iommufd] [--device BDF]… [--rounds N] [--check]`
//!
//! Then bursts of 4 096 pages to private: as one batch of every other page, as one batch of neighbours, and as single records
//! of which 64 are in flight; the time per page of each is compared with a single begin.
//!
//! `--check` exits with 1 if median(begin) is more than 1.25 × (median(echo) + median(raw unmap)).
#![allow(clippy::unwrap_used, clippy::expect_used)] // an error ends the benchmark

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use passgate::host::drivers::drivers;
use passgate::serve::{Options, Server};
use passgate_backends::assign::{Accept, Assignment, Kind, assign};
use passgate_backends::{Tables, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};
use passgate_client::{AddMemory, Answer, Channel, Client, Outcome, PageState};

/// The number of pages of the session's memory; begins take them in turn.
const PAGES: u64 = 64;
/// The IOVA of the raw unmap, outside the session's memory.
const RAW_UNMAP_IOVA: u64 = 1 << 30;
/// The guest-physical address of the memory of the bursts.
const BURST_GPA: u64 = 2 << 30;
/// The number of pages in a burst.
const BURST_PAGES: u64 = 4096;
/// The number of records in flight.
const RECORDS_IN_FLIGHT: u64 = 64;
/// The number of bursts of each kind.
const BURST_ROUNDS: usize = 15;
/// The maximum of median(begin) / (median(echo) + median(raw unmap)).
const MAX_RATIO: f64 = 1.25;

struct Arguments {
    kind: Kind,
    devices: Vec<String>,
    rounds: usize,
    check: bool,
}

fn parse_arguments() -> Arguments {
    let mut arguments = Arguments { kind: Kind::Soft, devices: Vec::new(), rounds: 20_000, check: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--iommu" => {
                arguments.kind = match args.next().as_deref() {
                    Some("soft") => Kind::Soft,
                    Some("type1") => Kind::Type1,
                    Some("iommufd") => Kind::Iommufd,
                    other => panic!("--iommu {other:?}: soft, type1 or iommufd"),
                }
            }
            "--device" => arguments.devices.extend(args.next()),
            "--rounds" => arguments.rounds = args.next().and_then(|n| n.parse().ok()).expect("--rounds N"),
            "--check" => arguments.check = true,
            // `--bench` from cargo, and filters, which have no meaning here.
            _ => {}
        }
    }
    arguments
}

/// Runs `work` and adds its duration to `samples`, in nanoseconds.
fn timed<T>(samples: &mut Vec<u64>, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    samples.push(start.elapsed().as_nanos() as u64);
    result
}

/// Returns a quantile of sorted samples in nanoseconds, as microseconds.
fn quantile_us(samples: &[u64], quantile: f64) -> f64 {
    samples[((samples.len() - 1) as f64 * quantile) as usize] as f64 / 1000.0
}

/// Returns the median time per page of each kind of burst, in microseconds.
fn bursts(client: &mut Client, channel: &mut Channel, cut: bool) -> [(&'static str, f64); 3] {
    let file = GuestFile::memfd("bursts", 2 * BURST_PAGES * PAGE).unwrap();
    let piece = if cut { 0 } else { PAGE };
    let memory = AddMemory { piece, ..AddMemory::shared(BURST_GPA, 2 * BURST_PAGES * PAGE) };
    client.add_memory(&memory, &[&file]).unwrap();
    let page = |n: u64| PageRange::<Gpa>::new(BURST_GPA + n * PAGE, PAGE).unwrap();
    let mut samples: [Vec<u64>; 3] = Default::default();
    for _ in 0..BURST_ROUNDS {
        for (kind, step) in [(0, 2), (1, 1)] {
            let ranges: Vec<_> = (0..BURST_PAGES).map(|n| page(n * step)).collect();
            let answer = timed(&mut samples[kind], || channel.begin_many(&ranges, PageState::Private, None));
            let Ok(Answer::Granted { invalidation }) = answer else { panic!("{answer:?}") };
            channel.end(invalidation, Outcome::NotCommitted).unwrap();
        }
        let mut granted = Vec::with_capacity(BURST_PAGES as usize);
        timed(&mut samples[2], || {
            for first in (0..BURST_PAGES).step_by(RECORDS_IN_FLIGHT as usize) {
                for n in first..first + RECORDS_IN_FLIGHT {
                    channel.submit(page(n), PageState::Private, None).unwrap();
                }
                for _ in 0..RECORDS_IN_FLIGHT {
                    let (_, answer) = channel.completed().unwrap();
                    let Ok(Answer::Granted { invalidation }) = answer else { panic!("{answer:?}") };
                    granted.push(invalidation);
                }
            }
        });
        for invalidation in granted {
            channel.end(invalidation, Outcome::NotCommitted).unwrap();
        }
    }
    let names = ["batch of every other page", "batch of neighbours", "64 records in flight"];
    let mut samples = samples.into_iter();
    names.map(|name| {
        let mut samples = samples.next().unwrap_or_default();
        samples.sort_unstable();
        (name, quantile_us(&samples, 0.5) / BURST_PAGES as f64)
    })
}

fn main() -> ExitCode {
    let arguments = parse_arguments();
    let Assignment { domain, devices, .. } = assign(
        arguments.kind,
        &arguments.devices,
        Accept { unstoppable: true, drive: None },
        &drivers(true),
        Tables::default(),
    )
    .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let options = Options::at(dir.path().join("socket"));
    let server = Server::bind(options, Arc::clone(&domain), devices).unwrap().spawn().unwrap();
    let file = Arc::new(GuestFile::memfd("bench", PAGES * PAGE).unwrap());
    let mut client = Client::connect(server.path()).unwrap();
    client.add_memory(&AddMemory::shared(0, PAGES * PAGE), &[&*file]).unwrap();
    let mut channel = client.open_channel().unwrap();

    let raw = PageRange::<Iova>::new(RAW_UNMAP_IOVA, PAGE).unwrap();
    let mut samples = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    for round in 0..arguments.rounds + 1000 {
        // The first thousand rounds only warm up.
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
    let bursts = bursts(&mut client, &mut channel, domain.capabilities().cut);
    drop((client, channel));
    server.stop().unwrap();

    samples.iter_mut().for_each(|samples| samples.sort_unstable());
    println!("{} rounds over {} (µs)            median      p99", arguments.rounds, domain.name());
    for (name, samples) in ["echo", "begin", "end", "raw unmap"].iter().zip(&samples) {
        println!("{name:>28}  {:>10.2} {:>8.2}", quantile_us(samples, 0.5), quantile_us(samples, 0.99));
    }
    let alone = quantile_us(&samples[1], 0.5);
    for (name, us) in bursts {
        println!("{name:>28}  {us:>10.2} a page, {:.3} of a begin", us / alone);
    }
    let [echo, begin, _, unmap] = &samples;
    let ratio = quantile_us(begin, 0.5) / (quantile_us(echo, 0.5) + quantile_us(unmap, 0.5));
    println!("median(begin) / (median(echo) + median(raw unmap)) = {ratio:.3}, limit {MAX_RATIO}");
    if arguments.check && ratio > MAX_RATIO { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
