//! The mapping engine against one mapping per page, on a real domain: calls, time, kernel memory, DMA.
//!
//! - *share*: all of the memory mapped, as passgate does and page by page, with small and with large IOMMU pages: calls,
//!   time, slab, page tables, and how fast a device reads it then.
//! - *cut*: one page out of a large mapping, through the gate and by the bare call, where the domain can.
//! - *boot*: a trace as a confidential guest makes it when it boots (`trace.rs` says how), played by passgate's gate, and by
//!   one mapping for each 4 KiB page, by range (as QEMU's listener does) and behind a tracker of what is mapped (as Cloud
//!   Hypervisor does).
//!
//! `cargo bench --bench mapping [-- --mib N]` plays *boot* over the soft domain;
//! `tests/vm/run --bench mapping --iommu iommufd --device 0000:00:06.0 --mib 256` all in the machine, or with `--iommu type1`.
//! The device is the machine's drive, whose last blocks it overwrites: the engine takes 200 ms for a read.
//! One run, one table; the machine is emulated and shared, so compare within a run only.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a benchmark that cannot go on stops

mod cut;
mod engine;
mod rivals;
mod trace;

use std::sync::Arc;
use std::time::Instant;

use passgate::gate::{Hitless, PageState};
use passgate_backends::assign::{Accept, Assignment, Kind, assign};
use passgate_backends::{Device, Tables, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use engine::Engine;
use rivals::{Paged, Rival, Tracker};

const MIB: u64 = 1 << 20;
/// Reads of one measurement of the DMA rate.
const READS: u64 = 2000;

struct Asked {
    kind: Kind,
    devices: Vec<String>,
    mib: u64,
}

fn asked() -> Asked {
    let mut asked = Asked { kind: Kind::Soft, devices: Vec::new(), mib: 32 };
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
            "--mib" => asked.mib = args.next().and_then(|n| n.parse().ok()).expect("--mib N"),
            _ => {}
        }
    }
    asked
}

/// Bytes of kernel memory, as /proc/meminfo has them: slab, and page tables (those of IOMMUs are `SecPageTables`).
fn kernel_memory() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    [of("Slab:"), of("SecPageTables:")]
}

/// What mapping everything cost.
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

/// Reads a second of 4 KiB, all over the memory.
fn rate(devices: &[Arc<dyn Device>], mib: u64) -> f64 {
    let Some(device) = devices.first() else { return f64::NAN };
    let began = Instant::now();
    for n in 0..READS {
        let page = n.wrapping_mul(0x9E37_79B9) % (mib * MIB / PAGE);
        device.dma_read(Iova(page * PAGE), PAGE as usize).expect("it is mapped");
    }
    READS as f64 / began.elapsed().as_secs_f64()
}

fn open(asked: &Asked, tables: Tables) -> Assignment {
    let accept = Accept { unstoppable: true, scratch: true, drive: None };
    assign(asked.kind, &asked.devices, accept, tables).unwrap_or_else(|error| panic!("{error}"))
}

fn all(mib: u64) -> PageRange<Iova> {
    PageRange::new(0, mib * MIB).unwrap()
}

fn share(asked: &Asked, file: &Arc<GuestFile>) {
    println!("\nshare: {} MiB of memfd, mapped whole ({})", asked.mib, name(asked));
    println!(
        "{:<34}{:>9}{:>11}{:>12}{:>13}{:>13}",
        "", "calls", "seconds", "slab KiB", "tables KiB", "DMA reads/s"
    );
    let tables: &[Tables] =
        if asked.kind == Kind::Iommufd { &[Tables::Small, Tables::Large] } else { &[Tables::Small] };
    let mut ours = Vec::new();
    for tables in tables {
        let Assignment { domain, devices, .. } = open(asked, *tables);
        let hitless = if *tables == Tables::Large { Hitless::Off } else { Hitless::Prefer };
        let hitless = if asked.kind == Kind::Iommufd { hitless } else { Hitless::Off };
        let mut engine = Engine::new(Arc::clone(&domain), Arc::clone(file), hitless);
        let cost = measure(&devices, asked.mib, || {
            engine.add(asked.mib * MIB / PAGE, PageState::Shared);
            engine.calls()
        });
        line(&format!("passgate, {tables:?} IOMMU pages"), &cost);
        ours.push((*tables, cost));
    }
    let Assignment { domain, devices, .. } = open(asked, Tables::Large);
    // type1 holds no more, and drivers have some of its mappings; what all of it would cost is more yet.
    let pages = (asked.mib * MIB / PAGE).min(domain.capabilities().max_mappings - 64);
    let paged = measure(&devices, pages * PAGE / MIB, || {
        for page in 0..pages {
            let iova = PageRange::new(page * PAGE, PAGE).unwrap();
            domain.map(iova, PAGE, file, Offset(page * PAGE), true).unwrap_or_else(|error| panic!("{error}"));
        }
        pages
    });
    line(&format!("a mapping per page, {pages} pages"), &paged);
    let part = pages as f64 / (asked.mib * MIB / PAGE) as f64;
    for (tables, cost) in ours {
        println!(
            "page by page / passgate, {tables:?}: calls {:.0}, time {:.1}, slab {:.0} (per byte mapped)",
            paged.calls as f64 / part / cost.calls as f64,
            paged.seconds / part / cost.seconds,
            paged.slab as f64 / part / (cost.slab.max(4096)) as f64
        );
    }
    assert!(matches!(domain.unmap(all(asked.mib)), Unmap::Gone { .. }));
}

fn line(name: &str, cost: &Cost) {
    println!(
        "{name:<34}{:>9}{:>11.3}{:>12}{:>13}{:>13.0}",
        cost.calls,
        cost.seconds,
        cost.slab / 1024,
        cost.tables / 1024,
        cost.rate
    );
}

fn boot(asked: &Asked, file: &Arc<GuestFile>) {
    let pages = asked.mib * MIB / PAGE;
    let trace = trace::boot(pages);
    let converted: u64 =
        trace.iter().map(|step| step.ranges.iter().map(|range| range.pages()).sum::<u64>()).sum();
    println!(
        "\nboot: {} MiB, {} conversions of {} ranges, {converted} pages ({})",
        asked.mib,
        trace.len(),
        trace.iter().map(|step| step.ranges.len()).sum::<usize>(),
        name(asked)
    );
    println!("{:<34}{:>9}{:>11}{:>16}{:>14}", "", "calls", "seconds", "mappings, most", "at the end");
    let mut first: Option<(u64, f64)> = None;
    let mut tell = |name: &str, calls: u64, seconds: f64, most: u64, left: u64| {
        let (c, s) = *first.get_or_insert((calls, seconds));
        let ratio = format!("{:.2} × calls, {:.2} × time", calls as f64 / c as f64, seconds / s);
        println!("{name:<34}{calls:>9}{seconds:>11.3}{most:>16}{left:>14}   {ratio}");
    };
    let ways: &[(&str, Tables, Hitless)] = if asked.kind == Kind::Iommufd {
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
        let Assignment { domain, devices: _devices, .. } = open(asked, *tables);
        let mut engine = Engine::new(domain, Arc::clone(file), *hitless);
        engine.add(pages, PageState::Private);
        trace.iter().for_each(|step| engine.convert(step));
        tell(name, engine.calls(), engine.spent().as_secs_f64(), engine.most(), engine.mappings());
    }
    for tracked in [false, true] {
        let Assignment { domain, devices: _devices, .. } = open(asked, Tables::Large);
        let mut rival: Box<dyn Rival> = if tracked {
            Box::new(Tracker::new(domain, Arc::clone(file), pages))
        } else {
            Box::new(Paged::new(domain, Arc::clone(file), pages))
        };
        let began = Instant::now();
        trace.iter().for_each(|step| rival.convert(step));
        let seconds = began.elapsed().as_secs_f64();
        let score = rival.score();
        tell(
            if tracked { "a mapping per page, tracked" } else { "a mapping per page, by range" },
            score.calls,
            seconds,
            score.most,
            score.now,
        );
    }
}

fn name(asked: &Asked) -> String {
    let kind = match asked.kind {
        Kind::Auto => "auto",
        Kind::Iommufd => "iommufd",
        Kind::Type1 => "type1",
        Kind::Soft => "soft",
    };
    format!("{kind} {}", asked.devices.join(" "))
}

fn main() {
    let asked = asked();
    let file = Arc::new(GuestFile::memfd("mapping", asked.mib * MIB).unwrap());
    // Touched first: the cost of fresh pages is nobody's here.
    for page in 0..asked.mib * MIB / PAGE {
        file.store(page * PAGE, page + 1).unwrap();
    }
    if asked.kind != Kind::Soft {
        share(&asked, &file);
        cut::cut(&asked, &file);
    }
    boot(&asked, &file);
}
