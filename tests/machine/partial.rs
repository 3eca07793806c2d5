//! Random pages are unmapped from large mappings while devices do DMA continuously to the pages beside them.
//!
//! The oracle is memory: every DMA write must be seen there, and every DMA read must return what was there. Memory is divided
//! into groups of eight pages. The first page of a group is always shared and contains one slot for each device; runs of the
//! other seven are converted. QEMU's NVMe drive may write late (docs/guide/rig.md); it may write here because the pages that it
//! writes to are never unmapped.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};
use passgate_client::{Answer, Client, Error, PageState};

use super::rig::{GPA, PASSGATE, Rig, UNHURRIED, Vmm, memfd};
use crate::daemon::Daemon;

const PAGES: u64 = 16_384;
/// The pages of a group; the first is for the devices.
const GROUP_PAGES: u64 = 8;
/// A piece longer than any that passgate maps page by page because it is split repeatedly (`gate/merge`). In bytes.
const LARGE_PIECE: u64 = 16 << 20;
/// The length of one DMA, and of a device's slot, in bytes.
const DMA_BYTES: usize = 512;
/// The least number of DMA operations of each device, however few conversions there are: an edu device takes 200 ms for one.
const MIN_DMA_OPS: u64 = 10;

/// A run of pages of the memory.
type Pages = Range<u64>;

/// A method by which pages are unmapped, and the parameters of its run.
struct Method {
    name: &'static str,
    arguments: &'static [&'static str],
    /// The bytes of one mapping; 0 lets the daemon choose.
    piece: u64,
    /// True if edu devices take part, which cannot be paused.
    engines: bool,
    /// The runs of pages of one conversion.
    batch: u64,
    /// The number of conversions; `PASSGATE_CONVERSIONS` sets another (docs/guide/rig.md).
    conversions: u64,
}

/// The DMA operations of one device.
#[derive(Debug, Default)]
struct Tally {
    done: u64,
    /// Writes that memory does not show, and reads that did not return what was there.
    lost: u64,
}

/// The group under conversion, the number of operations of each device, and the request to stop.
struct Progress {
    group: AtomicU64,
    done: Vec<AtomicU64>,
    stop: AtomicBool,
}

/// Stops the devices when dropped, also where a check has failed.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Returns the offset of a device's slot.
fn slot(group: u64, device: usize) -> u64 {
    group * GROUP_PAGES * PAGE + (device * DMA_BYTES) as u64
}

/// Returns the bytes of a slot as the owner sees them.
fn slot_bytes(memory: &GuestFile, at: u64) -> Vec<u8> {
    let mut bytes = vec![0; DMA_BYTES];
    memory.read(at, &mut bytes).unwrap();
    bytes
}

/// Returns the bytes of the `nth` write of a device: a number that it has not written before, repeated.
fn stamp(device: usize, nth: u64) -> Vec<u8> {
    ((nth + 1) << 4 | device as u64).to_le_bytes().repeat(DMA_BYTES / 8)
}

/// Writes to and reads from the slots beside the pages under conversion, in turns, until the request to stop.
fn dma(mut client: Client, (nth, device): (usize, &str), memory: &GuestFile, progress: &Progress) -> Tally {
    let (mut tally, mut last_seen) = (Tally::default(), BTreeMap::new());
    for turn in 0.. {
        if progress.stop.load(SeqCst) {
            break;
        }
        let group = (progress.group.load(SeqCst) + turn / 2 % 2) % (PAGES / GROUP_PAGES);
        let at = slot(group, nth);
        let (result, arrived) = if turn % 2 == 0 {
            let bytes = stamp(nth, turn);
            let result = client.dma_write(device, GPA + at, &bytes);
            let arrived = slot_bytes(memory, at) == bytes;
            (result, arrived)
        } else {
            let expected = slot_bytes(memory, at);
            match client.dma_read(device, GPA + at, DMA_BYTES as u32) {
                Ok(bytes) => (Ok(()), bytes == expected),
                Err(error) => (Err(error), false),
            }
        };
        match result {
            Ok(()) | Err(Error::Refused { .. }) => {}
            Err(error) => panic!("{device}: {error}"),
        }
        last_seen.insert(at, slot_bytes(memory, at));
        tally.done += 1;
        tally.lost += u64::from(!arrived);
        progress.done[nth].fetch_add(1, SeqCst);
    }
    for (at, bytes) in last_seen {
        assert_eq!(slot_bytes(memory, at), bytes, "{device}'s slot at {at:#x} was written by something else");
    }
    tally
}

/// Begins a conversion that must be granted; returns the invalidation.
fn begin(vmm: &mut Vmm, runs: &[Pages], to: PageState) -> u64 {
    let range = |run: &Pages| PageRange::new(GPA + run.start * PAGE, (run.end - run.start) * PAGE).unwrap();
    let ranges: Vec<PageRange<Gpa>> = runs.iter().map(range).collect();
    let answer = match ranges[..] {
        [range] => vmm.channel.begin(range, to, UNHURRIED),
        _ => vmm.channel.begin_many(&ranges, to, UNHURRIED),
    };
    match answer.unwrap() {
        Answer::Granted { invalidation } => invalidation,
        other => panic!("{runs:?} are not granted: {other:x?}"),
    }
}

/// Converts random runs of pages to private, writes a canary to each page and converts them back, when every canary must be
/// unchanged. Returns how long each begin to private took.
fn convert(
    vmm: &mut Vmm,
    progress: &Progress,
    conversions: u64,
    batch: u64,
    device_ended: impl Fn() -> bool,
) -> Vec<Duration> {
    let (mut random_state, mut durations) = (1u64, Vec::new());
    while durations.len() as u64 * batch < conversions
        || progress.done.iter().any(|done| done.load(SeqCst) < MIN_DMA_OPS)
    {
        assert!(!device_ended(), "a device has ended");
        let mut runs = BTreeMap::new();
        while (runs.len() as u64) < batch {
            random_state =
                random_state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let group = (random_state >> 33) % (PAGES / GROUP_PAGES);
            progress.group.store(group, SeqCst);
            // Half of the runs are single pages.
            let first = 1 + (random_state >> 20) % (GROUP_PAGES - 1);
            let pages = if random_state >> 19 & 1 == 0 {
                1
            } else {
                1 + (random_state >> 12) % (GROUP_PAGES - first)
            };
            let page = group * GROUP_PAGES + first;
            runs.insert(group, page..page + pages);
        }
        let runs: Vec<_> = runs.into_values().collect();
        let pages = || runs.iter().cloned().flatten();
        let canary = |page: u64| (random_state | 1) ^ (page << 1);
        let started = Instant::now();
        let invalidation = begin(vmm, &runs, PageState::Private);
        durations.push(started.elapsed());
        pages().for_each(|page| vmm.memory.store(page * PAGE, canary(page)).unwrap());
        vmm.end(invalidation);
        let invalidation = begin(vmm, &runs, PageState::Shared);
        for page in pages() {
            let found = vmm.memory.load(page * PAGE).unwrap();
            assert_eq!(found, canary(page), "page {page} was written to while it was private");
        }
        vmm.end(invalidation);
    }
    durations
}

/// Runs a method; returns the number of lost DMA operations. Panics if any other check fails.
fn run(rig: &Rig, method: &Method) -> u64 {
    let conversions =
        std::env::var("PASSGATE_CONVERSIONS").map_or(method.conversions, |number| number.parse().unwrap());
    let kinds: &[&str] = if method.engines { &["NVME", "EDU"] } else { &["NVME"] };
    let addresses: Vec<String> =
        kinds.iter().map(|kind| std::env::var(format!("PASSGATE_{kind}")).unwrap()).collect();
    let devices: Vec<&str> = addresses.iter().flat_map(|names| names.split_whitespace()).collect();
    let mut arguments = vec!["--iommu", rig.iommu, "--allow-dma", "--allow-unstoppable", "--scratch"];
    arguments.extend(devices.iter().flat_map(|device| ["--device", device]));
    arguments.extend(method.arguments);
    let daemon = Daemon::start(std::path::Path::new(PASSGATE), &arguments);
    let mut vmm = rig.join(&daemon, memfd(PAGES), method.piece);
    let progress = Progress {
        group: AtomicU64::new(0),
        done: devices.iter().map(|_| AtomicU64::new(0)).collect(),
        stop: AtomicBool::new(false),
    };
    let (memory, started) = (vmm.memory.clone(), Instant::now());
    let (mut durations, tallies) = std::thread::scope(|scope| {
        let threads: Vec<_> = devices
            .iter()
            .enumerate()
            .map(|(nth, device)| {
                let (client, progress, memory) = (daemon.client(), &progress, &memory);
                scope.spawn(move || dma(client, (nth, device), memory, progress))
            })
            .collect();
        let stop_on_drop = StopOnDrop(&progress.stop);
        let device_ended = || threads.iter().any(|thread| thread.is_finished());
        let durations = convert(&mut vmm, &progress, conversions, method.batch, device_ended);
        drop(stop_on_drop);
        let tallies: BTreeMap<&str, Tally> =
            devices.iter().copied().zip(threads.into_iter().map(|thread| thread.join().unwrap())).collect();
        (durations, tallies)
    });
    durations.sort_unstable();
    println!(
        "{}, {}: {} conversions of {} runs of pages and back in {:.1?}, begin {:.0?} (median); {tallies:?}",
        rig.iommu,
        method.name,
        durations.len(),
        method.batch,
        started.elapsed(),
        durations[durations.len() / 2],
    );
    let status = vmm.client.status().unwrap();
    assert_eq!((status.totals.refused, status.totals.unknown, status.quarantine.len()), (0, 0, 0));
    tallies.values().map(|tally| tally.lost).sum()
}

/// Cut, with small IOMMU pages: only the pages of the conversion are unmapped, and no DMA beside them is lost.
pub fn cut(rig: &Rig) {
    let method = Method { name: "cut", arguments: &[], piece: 0, engines: true, batch: 1, conversions: 1000 };
    assert_eq!(run(rig, &method), 0, "DMA beside pages that were cut out was lost");
}

/// Split: the whole mapping is unmapped, the rest is mapped again, and no device is paused. Shows that the oracle detects lost
/// DMA.
pub fn split(rig: &Rig) {
    let arguments = &["--hitless", "off"];
    let method =
        Method { name: "split", arguments, piece: LARGE_PIECE, engines: true, batch: 1, conversions: 200 };
    // About ten operations are lost in a run, but by chance there may be none: up to three runs.
    assert!(
        (0..3).any(|_| run(rig, &method) > 0),
        "no DMA was lost, though mappings went as a whole beneath it"
    );
}

/// Split with a device that can be drained: its transfers wait until the gap is over.
pub fn drained(rig: &Rig) {
    // With iommufd, a domain cannot cut if it has a second page table (`--standby`).
    let arguments: &[&str] = if rig.iommu == "iommufd" { &["--standby"] } else { &[] };
    let method =
        Method { name: "drained", arguments, piece: LARGE_PIECE, engines: false, batch: 1, conversions: 200 };
    assert_eq!(run(rig, &method), 0, "DMA of a device that is drained was lost");
}

/// Replace, of many runs at once: a second page table, to which the devices are switched. The pages must be unmapped; lost DMA is
/// allowed, and printed.
pub fn replace(rig: &Rig) {
    let arguments = &["--standby", "--hitless", "off"];
    let method =
        Method { name: "replace", arguments, piece: LARGE_PIECE, engines: true, batch: 16, conversions: 400 };
    let lost = run(rig, &method);
    println!("replace lost {lost} DMA");
}
