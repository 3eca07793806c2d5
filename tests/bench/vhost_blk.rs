//! A guest's disk by `passgate vhost-user-blk` against `qemu-storage-daemon` with its `nvme://` driver: the same guest under
//! the same stock QEMU, the same drive, in one run.
//!
//! `tests/vm/run --bench vhost_blk [--rounds N] [--ms N] [--iommu type1|iommufd] [--passgate ARG]… [--check]`
//!
//! Runs inside the machine that tests/vm boots. Each round boots the guest once for each back-end, in turns, and works the disk
//! in six ways by io_uring: 4 KiB random reads and writes with 1 and 32 in flight, 128 KiB sequential reads and writes with 8.
//! What counts is IOPS for each second of processor time that the back-end's process takes, threads and all, and the
//! median time of a request with 1 in flight; medians over the rounds. Times in an emulated machine mean nothing by
//! themselves: read the ratios. The storage daemon is run as it comes and with an I/O thread of its own, and each figure is held
//! against the better of the two.
//!
//! At the end: conversions a second, of single pages beside those in use, while reads with 32 in flight go on.
//!
//! `--check` exits with 1 where passgate has less than 1.3 times the better rival's IOPS per processor second in any
//! way, or a median with 1 in flight more than 1.05 times the better rival's.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a benchmark that cannot go on stops

#[path = "../nested/mod.rs"]
mod nested;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use passgate::client::{Answer, Client, Outcome, PageState};
use passgate_bindings::{Gpa, PAGE, PageRange};
use serde_json::{Value, json};

use nested::back_end::{BackEnd, Which};
use nested::guest::{Guest, RESERVED};

const QUEUES: u32 = 2;
/// What passgate promises: IOPS per processor second, and the median at depth 1, against the rival.
const ECONOMY: f64 = 1.3;
const LATENCY: f64 = 1.05;

/// How the disk is worked.
struct Way {
    name: &'static str,
    write: bool,
    sequential: bool,
    depth: u32,
    len: u32,
}

const fn random(name: &'static str, write: bool, depth: u32) -> Way {
    Way { name, write, sequential: false, depth, len: 4096 }
}

const fn sequential(name: &'static str, write: bool) -> Way {
    Way { name, write, sequential: true, depth: 8, len: 128 << 10 }
}

const WAYS: [Way; 6] = [
    random("random read, 1 in flight", false, 1),
    random("random write, 1 in flight", true, 1),
    random("random read, 32 in flight", false, 32),
    random("random write, 32 in flight", true, 32),
    sequential("128 KiB sequential read", false),
    sequential("128 KiB sequential write", true),
];

const NAMES: [&str; 3] = ["passgate", "storage daemon", "storage daemon, iothread"];

/// What one back-end did in one way, in one round.
#[derive(Debug, Clone, Copy)]
struct Figure {
    iops: f64,
    median_us: f64,
    /// Requests for each second of its processor time.
    economy: f64,
}

struct Asked {
    rounds: usize,
    ms: u64,
    passgate: Vec<String>,
    check: bool,
}

fn asked() -> Asked {
    let mut asked = Asked { rounds: 3, ms: 3000, passgate: Vec::new(), check: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} wants a value"));
        match arg.as_str() {
            "--rounds" => asked.rounds = value().parse().expect("--rounds N"),
            "--ms" => asked.ms = value().parse().expect("--ms N"),
            "--iommu" => asked.passgate.extend(["--iommu".to_owned(), value()]),
            "--passgate" => asked.passgate.push(value()),
            "--check" => asked.check = true,
            "--bench" => {} // cargo says so
            other => panic!("{other}: --rounds, --ms, --iommu, --passgate or --check"),
        }
    }
    asked
}

fn main() -> ExitCode {
    if let Some(missing) = nested::missing() {
        println!("skipped: {missing}; tests/vm/run --bench vhost_blk has it");
        return ExitCode::SUCCESS;
    }
    let asked = asked();
    let backs = [
        Which::Passgate(asked.passgate.clone()),
        Which::Stock { thread: false },
        Which::Stock { thread: true },
    ];
    let mut figures: Vec<Vec<Vec<Figure>>> = vec![vec![Vec::new(); WAYS.len()]; backs.len()];
    let mut conversions = Vec::new();
    for round in 0..asked.rounds {
        for turn in 0..backs.len() {
            let nth = (round + turn) % backs.len(); // whatever drifts falls on each in turn
            let back_end = BackEnd::start(backs[nth].clone(), &nested::drive(), QUEUES);
            let mut guest = Guest::boot(&back_end.socket(), QUEUES);
            // Once without counting: blocks come into being, pages and rings are met for the first time.
            measure(&mut guest, &back_end, &WAYS[5], asked.ms / 2);
            for (way, kept) in WAYS.iter().zip(&mut figures[nth]) {
                let figure = measure(&mut guest, &back_end, way, asked.ms);
                println!("round {round}, {}: {}: {figure:.1?}", NAMES[nth], way.name);
                kept.push(figure);
            }
            if nth == 0 {
                conversions.push(convert(&mut guest, &back_end, asked.ms));
            }
            guest.off();
        }
    }
    report(&figures, &mut conversions, asked.check)
}

fn measure(guest: &mut Guest, back_end: &BackEnd, way: &Way, ms: u64) -> Figure {
    let before = back_end.processor();
    let done = guest.ask(&bench(way, ms), Duration::from_millis(ms) + Duration::from_secs(60));
    figure(&done, back_end.processor() - before)
}

fn bench(way: &Way, ms: u64) -> Value {
    json!({ "do": "bench", "write": way.write, "sequential": way.sequential, "depth": way.depth, "len": way.len, "ms": ms })
}

fn figure(done: &Value, processor: f64) -> Figure {
    let number = |name: &str| done[name].as_f64().unwrap();
    Figure { iops: number("iops"), median_us: number("median_us"), economy: number("requests") / processor }
}

/// Conversions a second while reads with 32 in flight go on, and what became of those.
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
        let figure = measure(guest, back_end, &WAYS[2], ms);
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
    let mut kept = true;
    for (nth, way) in WAYS.iter().enumerate() {
        let of =
            |which: usize, what: fn(&Figure) -> f64| median(figures[which][nth].iter().map(what).collect());
        println!("\n{}", way.name);
        for (which, name) in NAMES.iter().enumerate() {
            let (iops, latency) = (of(which, |f| f.iops), of(which, |f| f.median_us));
            println!(
                "  {name:26} {iops:9.0} IOPS  median {latency:9.0} µs  {:9.0} IOPS per processor second",
                of(which, |f| f.economy)
            );
        }
        let rival = |what: fn(&Figure) -> f64, better: fn(f64, f64) -> f64| better(of(1, what), of(2, what));
        let economy = of(0, |f| f.economy) / rival(|f| f.economy, f64::max);
        let latency = of(0, |f| f.median_us) / rival(|f| f.median_us, f64::min);
        println!(
            "  against the better: {economy:.2} × IOPS per processor second, {latency:.2} × the median time"
        );
        kept &= economy >= ECONOMY && (way.depth > 1 || latency <= LATENCY);
        println!(
            "{}",
            json!({ "way": way.name, "economy_ratio": economy, "latency_ratio": latency,
                "iops": (0..NAMES.len()).map(|which| of(which, |f| f.iops)).collect::<Vec<_>>() })
        );
    }
    let under = median(conversions.iter().map(|&(_, iops)| iops).collect());
    let rate = median(conversions.iter().map(|&(rate, _)| rate).collect());
    println!("\nconversions a second under {under:.0} IOPS of random reads: {rate:.0}");
    println!("{}", json!({ "conversions_per_second": rate, "iops_meanwhile": under }));
    if check && !kept {
        println!("passgate is not {ECONOMY} times as economical, or slower with 1 in flight");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
