//! A guest's disk served by `passgate vhost-user-blk`, and by `qemu-storage-daemon` with its `nvme://` driver: the same guest
//! under the same stock QEMU, with the same drive, in one run.
//!
//! `tests/vm/run --bench vhost_blk [--rounds N] [--ms N] [--iommu type1|iommufd] [--passgate ARG]… [--check]`
//!
//! Runs inside the machine that tests/vm boots. Each round boots the guest once for each back-end, in turns, and runs six
//! workloads by io_uring: 4 KiB random reads and writes with 1 and 32 in flight, 128 KiB sequential reads and writes with 8.
//! The figures are the IOPS per second of processor time of the back-end's process with all its threads, and the median time of
//! a request with 1 in flight; medians over the rounds. Times in an emulated machine mean nothing by themselves: only the ratios
//! do. The storage daemon runs with its default settings and with an I/O thread of its own; each figure is compared with the
//! better of the two.
//!
//! The last figure is conversions per second, of single pages beside those in use, during reads with 32 in flight.
//!
//! `--check` exits with 1 if passgate has less than 1.3 times the better storage daemon's IOPS per processor second in any
//! workload, or a median with 1 in flight of more than 1.05 times the better one's.
#![allow(clippy::unwrap_used, clippy::expect_used)] // an error ends the benchmark

#[path = "../nested/mod.rs"]
mod nested;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use passgate_bindings::{Gpa, PAGE, PageRange};
use passgate_client::{Answer, Client, Outcome, PageState};
use serde_json::{Value, json};

use nested::back_end::{BackEnd, Which};
use nested::guest::{Guest, RESERVED};

const QUEUES: u32 = 2;
/// The minimum of passgate's IOPS per processor second, relative to the better storage daemon's.
const MIN_IOPS_RATIO: f64 = 1.3;
/// The maximum of passgate's median time with 1 in flight, relative to the better storage daemon's.
const MAX_LATENCY_RATIO: f64 = 1.05;

/// A workload on the disk.
struct Workload {
    name: &'static str,
    write: bool,
    sequential: bool,
    depth: u32,
    len: u32,
}

const fn random(name: &'static str, write: bool, depth: u32) -> Workload {
    Workload { name, write, sequential: false, depth, len: 4096 }
}

const fn sequential(name: &'static str, write: bool) -> Workload {
    Workload { name, write, sequential: true, depth: 8, len: 128 << 10 }
}

const WORKLOADS: [Workload; 6] = [
    random("random read, 1 in flight", false, 1),
    random("random write, 1 in flight", true, 1),
    random("random read, 32 in flight", false, 32),
    random("random write, 32 in flight", true, 32),
    sequential("128 KiB sequential read", false),
    sequential("128 KiB sequential write", true),
];

const BACK_END_NAMES: [&str; 3] = ["passgate", "storage daemon", "storage daemon, iothread"];

/// The result of one back-end for one workload, in one round.
#[derive(Debug, Clone, Copy)]
struct Figure {
    iops: f64,
    median_us: f64,
    /// Requests per second of the back-end's processor time.
    iops_per_cpu_second: f64,
}

struct Arguments {
    rounds: usize,
    ms: u64,
    passgate: Vec<String>,
    check: bool,
}

fn parse_arguments() -> Arguments {
    let mut arguments = Arguments { rounds: 3, ms: 3000, passgate: Vec::new(), check: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} wants a value"));
        match arg.as_str() {
            "--rounds" => arguments.rounds = value().parse().expect("--rounds N"),
            "--ms" => arguments.ms = value().parse().expect("--ms N"),
            "--iommu" => arguments.passgate.extend(["--iommu".to_owned(), value()]),
            "--passgate" => arguments.passgate.push(value()),
            "--check" => arguments.check = true,
            "--bench" => {} // from cargo
            other => panic!("{other}: --rounds, --ms, --iommu, --passgate or --check"),
        }
    }
    arguments
}

fn main() -> ExitCode {
    if let Some(missing) = nested::missing() {
        println!("skipped: {missing}; tests/vm/run --bench vhost_blk has it");
        return ExitCode::SUCCESS;
    }
    let arguments = parse_arguments();
    let backs = [
        Which::Passgate(arguments.passgate.clone()),
        Which::Stock { thread: false },
        Which::Stock { thread: true },
    ];
    let mut figures: Vec<Vec<Vec<Figure>>> = vec![vec![Vec::new(); WORKLOADS.len()]; backs.len()];
    let mut conversions = Vec::new();
    for round in 0..arguments.rounds {
        for turn in 0..backs.len() {
            let nth = (round + turn) % backs.len(); // a drift of the machine affects each back-end alike
            let back_end = BackEnd::start(backs[nth].clone(), &nested::drive(), QUEUES);
            let mut guest = Guest::boot(&back_end.socket(), QUEUES);
            // A warm-up: it allocates the drive's blocks and touches pages and rings for the first time.
            measure(&mut guest, &back_end, &WORKLOADS[5], arguments.ms / 2);
            for (workload, samples) in WORKLOADS.iter().zip(&mut figures[nth]) {
                let figure = measure(&mut guest, &back_end, workload, arguments.ms);
                println!("round {round}, {}: {}: {figure:.1?}", BACK_END_NAMES[nth], workload.name);
                samples.push(figure);
            }
            if nth == 0 {
                conversions.push(convert(&mut guest, &back_end, arguments.ms));
            }
            guest.off();
        }
    }
    report(&figures, &mut conversions, arguments.check)
}

fn measure(guest: &mut Guest, back_end: &BackEnd, workload: &Workload, ms: u64) -> Figure {
    let before = back_end.processor();
    let done = guest.ask(&bench(workload, ms), Duration::from_millis(ms) + Duration::from_secs(60));
    figure(&done, back_end.processor() - before)
}

fn bench(workload: &Workload, ms: u64) -> Value {
    json!({ "do": "bench", "write": workload.write, "sequential": workload.sequential, "depth": workload.depth, "len": workload.len, "ms": ms })
}

fn figure(done: &Value, processor: f64) -> Figure {
    let number = |name: &str| done[name].as_f64().unwrap();
    Figure {
        iops: number("iops"),
        median_us: number("median_us"),
        iops_per_cpu_second: number("requests") / processor,
    }
}

/// Returns the conversions per second during reads with 32 in flight, and the IOPS of these reads.
fn convert(guest: &mut Guest, back_end: &BackEnd, ms: u64) -> (f64, f64) {
    let mut control = Client::connect(back_end.control()).unwrap();
    let mut channel = control.open_channel().unwrap();
    let stop = AtomicBool::new(false);
    let (mut count, first) = (0_u64, RESERVED.0 / PAGE);
    std::thread::scope(|scope| {
        let converting = scope.spawn(|| {
            let begun = Instant::now();
            while !stop.load(Ordering::Relaxed) {
                let at = first + count % (RESERVED.1 / PAGE);
                let range = PageRange::<Gpa>::new(at * PAGE, PAGE).unwrap();
                for to in [PageState::Hole, PageState::Shared] {
                    match channel.begin(range, to, None).unwrap() {
                        Answer::Granted { invalidation } => {
                            channel.end(invalidation, Outcome::Committed).unwrap()
                        }
                        other => panic!("{range:?} is not granted: {other:?}"),
                    }
                    count += 1;
                }
            }
            count as f64 / begun.elapsed().as_secs_f64()
        });
        let figure = measure(guest, back_end, &WORKLOADS[2], ms);
        stop.store(true, Ordering::Relaxed);
        (converting.join().unwrap(), figure.iops)
    })
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    let at = |index: usize| of.get(index).copied().unwrap_or(0.0);
    (at(of.len() / 2) + at(of.len().saturating_sub(1) / 2)) / 2.0
}

fn report(figures: &[Vec<Vec<Figure>>], conversions: &mut [(f64, f64)], check: bool) -> ExitCode {
    let mut limits_met = true;
    for (nth, workload) in WORKLOADS.iter().enumerate() {
        let of =
            |which: usize, what: fn(&Figure) -> f64| median(figures[which][nth].iter().map(what).collect());
        println!("\n{}", workload.name);
        for (which, name) in BACK_END_NAMES.iter().enumerate() {
            let (iops, latency) = (of(which, |f| f.iops), of(which, |f| f.median_us));
            println!(
                "  {name:26} {iops:9.0} IOPS  median {latency:9.0} µs  {:9.0} IOPS per processor second",
                of(which, |f| f.iops_per_cpu_second)
            );
        }
        let baseline =
            |what: fn(&Figure) -> f64, better: fn(f64, f64) -> f64| better(of(1, what), of(2, what));
        let economy = of(0, |f| f.iops_per_cpu_second) / baseline(|f| f.iops_per_cpu_second, f64::max);
        let latency = of(0, |f| f.median_us) / baseline(|f| f.median_us, f64::min);
        println!(
            "  against the better: {economy:.2} × IOPS per processor second, {latency:.2} × the median time"
        );
        limits_met &= economy >= MIN_IOPS_RATIO && (workload.depth > 1 || latency <= MAX_LATENCY_RATIO);
        println!(
            "{}",
            json!({ "way": workload.name, "economy_ratio": economy, "latency_ratio": latency,
                "iops": (0..BACK_END_NAMES.len()).map(|which| of(which, |f| f.iops)).collect::<Vec<_>>() })
        );
    }
    let under = median(conversions.iter().map(|&(_, iops)| iops).collect());
    let rate = median(conversions.iter().map(|&(rate, _)| rate).collect());
    println!("\nconversions a second under {under:.0} IOPS of random reads: {rate:.0}");
    println!("{}", json!({ "conversions_per_second": rate, "iops_meanwhile": under }));
    if check && !limits_met {
        println!("passgate is not {MIN_IOPS_RATIO} times as economical, or slower with 1 in flight");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
