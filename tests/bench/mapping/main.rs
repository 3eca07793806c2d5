//! The mapping engine against one mapping per page, on a real domain: calls, time, kernel memory, DMA.
//!
//! - *share*: all of the memory mapped, by passgate and page by page, with small and with large IOMMU pages: calls, time, slab,
//!   page tables, and the rate at which a device reads it then.
//! - *cut*: one page out of a large mapping, through the gate and by the bare call, if the domain can.
//! - *boot*: the trace of a confidential guest that boots (`trace.rs` defines it), played by passgate's gate, and with one mapping
//!   for each 4 KiB page, by range (as QEMU's listener does) and with a tracker of mapped pages (as Cloud Hypervisor does).
//!
//! `cargo bench --bench mapping [-- --mib N]` plays *boot* over the soft domain;
//! `tests/vm/run --bench mapping --iommu iommufd --device 0000:00:06.0 --mib 256` all in the machine, or with `--iommu type1`.
//! The device is the machine's drive, whose last blocks it overwrites: the engine takes 200 ms for a read.
//! One run, one table; the machine is emulated and shared, so compare within a run only.
#![allow(clippy::unwrap_used, clippy::expect_used)] // an error ends the benchmark

mod baselines;
mod cut;
mod engine;
mod trace;

use std::sync::Arc;
use std::time::Instant;

use passgate::gate::{Hitless, PageState};
use passgate::host::drivers::drivers;
use passgate_backends::assign::{Accept, Assignment, Kind, assign};
use passgate_backends::{Device, Tables, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use baselines::{Baseline, Paged, Tracker};
use engine::Engine;

const MIB: u64 = 1 << 20;
/// The number of reads in one measurement of the DMA rate.
const READS: u64 = 2000;

struct Arguments {
    kind: Kind,
    devices: Vec<String>,
    mib: u64,
}

fn parse_arguments() -> Arguments {
    let mut arguments = Arguments { kind: Kind::Soft, devices: Vec::new(), mib: 32 };
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
            "--mib" => arguments.mib = args.next().and_then(|n| n.parse().ok()).expect("--mib N"),
            _ => {}
        }
    }
    arguments
}

/// Returns the bytes of kernel memory in slabs and in IOMMU page tables: `Slab` and `SecPageTables` of proc_meminfo(5).
fn kernel_memory() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    [of("Slab:"), of("SecPageTables:")]
}

/// The cost of mapping all of the memory.
struct Cost {
    calls: u64,
    seconds: f64,
    slab: i64,
    tables: i64,
    rate: f64,
}

fn measure(devices: &[Arc<dyn Device>], mib: u64, map: impl FnOnce() -> u64) -> Cost {
    let before = kernel_memory();
    let began = Instant::now();
    let calls = map();
    let seconds = began.elapsed().as_secs_f64();
    let after = kernel_memory();
    let delta = |n: usize| after[n] as i64 - before[n] as i64;
    Cost { calls, seconds, slab: delta(0), tables: delta(1), rate: rate(devices, mib) }
}

/// Returns the rate of 4 KiB reads by the first device, spread over the memory, per second.
fn rate(devices: &[Arc<dyn Device>], mib: u64) -> f64 {
    let Some(device) = devices.first() else { return f64::NAN };
    let began = Instant::now();
    for n in 0..READS {
        let page = n.wrapping_mul(0x9E37_79B9) % (mib * MIB / PAGE);
        device.dma_read(Iova(page * PAGE), PAGE as usize).expect("it is mapped");
    }
    READS as f64 / began.elapsed().as_secs_f64()
}

fn open(arguments: &Arguments, tables: Tables) -> Assignment {
    let accept = Accept { unstoppable: true, drive: None };
    assign(arguments.kind, &arguments.devices, accept, &drivers(true), tables)
        .unwrap_or_else(|error| panic!("{error}"))
}

fn all(mib: u64) -> PageRange<Iova> {
    PageRange::new(0, mib * MIB).unwrap()
}

fn map_whole(arguments: &Arguments, file: &Arc<GuestFile>) {
    println!("\nshare: {} MiB of memfd, mapped whole ({})", arguments.mib, name(arguments));
    println!(
        "{:<34}{:>9}{:>11}{:>12}{:>13}{:>13}",
        "", "calls", "seconds", "slab KiB", "tables KiB", "DMA reads/s"
    );
    let tables: &[Tables] =
        if arguments.kind == Kind::Iommufd { &[Tables::Small, Tables::Large] } else { &[Tables::Small] };
    let mut ours = Vec::new();
    for tables in tables {
        let Assignment { domain, devices, .. } = open(arguments, *tables);
        let hitless = if *tables == Tables::Large { Hitless::Off } else { Hitless::Prefer };
        let hitless = if arguments.kind == Kind::Iommufd { hitless } else { Hitless::Off };
        let mut engine = Engine::new(Arc::clone(&domain), Arc::clone(file), hitless);
        let cost = measure(&devices, arguments.mib, || {
            engine.add(arguments.mib * MIB / PAGE, PageState::Shared);
            engine.calls()
        });
        print_cost(&format!("passgate, {tables:?} IOMMU pages"), &cost);
        ours.push((*tables, cost));
    }
    let Assignment { domain, devices, .. } = open(arguments, Tables::Large);
    // type1 limits the number of mappings (`dma_entry_limit`), and drivers use some of them; mapping all of the memory would cost
    // more in proportion.
    let pages = (arguments.mib * MIB / PAGE).min(domain.capabilities().max_mappings - 64);
    let paged = measure(&devices, pages * PAGE / MIB, || {
        for page in 0..pages {
            let iova = PageRange::new(page * PAGE, PAGE).unwrap();
            domain.map(iova, PAGE, file, Offset(page * PAGE), true).unwrap_or_else(|error| panic!("{error}"));
        }
        pages
    });
    print_cost(&format!("a mapping per page, {pages} pages"), &paged);
    let part = pages as f64 / (arguments.mib * MIB / PAGE) as f64;
    for (tables, cost) in ours {
        println!(
            "page by page / passgate, {tables:?}: calls {:.0}, time {:.1}, slab {:.0} (per byte mapped)",
            paged.calls as f64 / part / cost.calls as f64,
            paged.seconds / part / cost.seconds,
            paged.slab as f64 / part / (cost.slab.max(4096)) as f64
        );
    }
    assert!(matches!(domain.unmap(all(arguments.mib)), Unmap::Gone { .. }));
}

fn print_cost(name: &str, cost: &Cost) {
    println!(
        "{name:<34}{:>9}{:>11.3}{:>12}{:>13}{:>13.0}",
        cost.calls,
        cost.seconds,
        cost.slab / 1024,
        cost.tables / 1024,
        cost.rate
    );
}

fn boot(arguments: &Arguments, file: &Arc<GuestFile>) {
    let pages = arguments.mib * MIB / PAGE;
    let trace = trace::boot(pages);
    let converted: u64 =
        trace.iter().map(|step| step.ranges.iter().map(|range| range.pages()).sum::<u64>()).sum();
    println!(
        "\nboot: {} MiB, {} conversions of {} ranges, {converted} pages ({})",
        arguments.mib,
        trace.len(),
        trace.iter().map(|step| step.ranges.len()).sum::<usize>(),
        name(arguments)
    );
    println!("{:<34}{:>9}{:>11}{:>16}{:>14}", "", "calls", "seconds", "max mappings", "at the end");
    let mut first: Option<(u64, f64)> = None;
    let mut print_row = |name: &str, calls: u64, seconds: f64, max_mappings: u64, mappings: u64| {
        let (c, s) = *first.get_or_insert((calls, seconds));
        let ratio = format!("{:.2} × calls, {:.2} × time", calls as f64 / c as f64, seconds / s);
        println!("{name:<34}{calls:>9}{seconds:>11.3}{max_mappings:>16}{mappings:>14}   {ratio}");
    };
    let ways: &[(&str, Tables, Hitless)] = if arguments.kind == Kind::Iommufd {
        &[
            ("passgate, cut", Tables::Small, Hitless::Prefer),
            ("passgate, split", Tables::Large, Hitless::Off),
            ("passgate, replace", Tables::Standby, Hitless::Off),
        ]
    } else {
        &[
            ("passgate, --hitless off", Tables::Small, Hitless::Off),
            ("passgate, prefer", Tables::Small, Hitless::Prefer),
        ]
    };
    for (name, tables, hitless) in ways {
        let Assignment { domain, devices: _devices, .. } = open(arguments, *tables);
        let mut engine = Engine::new(domain, Arc::clone(file), *hitless);
        engine.add(pages, PageState::Private);
        trace.iter().for_each(|step| engine.convert(step));
        print_row(
            name,
            engine.calls(),
            engine.spent().as_secs_f64(),
            engine.max_mappings(),
            engine.mappings(),
        );
    }
    for tracked in [false, true] {
        let Assignment { domain, devices: _devices, .. } = open(arguments, Tables::Large);
        let mut baseline: Box<dyn Baseline> = if tracked {
            Box::new(Tracker::new(domain, Arc::clone(file), pages))
        } else {
            Box::new(Paged::new(domain, Arc::clone(file), pages))
        };
        let began = Instant::now();
        trace.iter().for_each(|step| baseline.convert(step));
        let seconds = began.elapsed().as_secs_f64();
        let score = baseline.score();
        print_row(
            if tracked { "a mapping per page, tracked" } else { "a mapping per page, by range" },
            score.calls,
            seconds,
            score.max_mappings,
            score.mappings,
        );
    }
}

fn name(arguments: &Arguments) -> String {
    let kind = match arguments.kind {
        Kind::Auto => "auto",
        Kind::Iommufd => "iommufd",
        Kind::Type1 => "type1",
        Kind::Soft => "soft",
    };
    format!("{kind} {}", arguments.devices.join(" "))
}

fn main() {
    let arguments = parse_arguments();
    let file = Arc::new(GuestFile::memfd("mapping", arguments.mib * MIB).unwrap());
    // Touched first, so that the allocation of pages is not measured.
    for page in 0..arguments.mib * MIB / PAGE {
        file.store(page * PAGE, page + 1).unwrap();
    }
    if arguments.kind != Kind::Soft {
        map_whole(&arguments, &file);
        cut::cut(&arguments, &file);
    }
    boot(&arguments, &file);
}
