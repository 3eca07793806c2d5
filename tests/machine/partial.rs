//! Random pages leave large mappings while devices do DMA, without a break, into the pages beside them.
//!
//! The judge is memory: every DMA that a device was told to do must be seen there, or have brought what was there.
//! Memory lies in groups of eight pages. The first page of each stays shared for ever and is what devices work in, each
//! in a slot of its own; any run of the other seven is converted. The drive may write here although QEMU's may do so
//! late (docs/guide/rig.md): what it writes to is never taken away.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use passgate::client::{Answer, Client, PageState};
use passgate::error::Error;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};

use super::rig::{GPA, PASSGATE, Rig, UNHURRIED, Vmm, memfd};
use crate::daemon::Daemon;

const PAGES: u64 = 16_384;
/// Pages of a group; the first is the devices'.
const GROUP: u64 = 8;
/// Longer than what is ever mapped page by page because it keeps being split (`gate/merge`).
const PIECE: u64 = 16 << 20;
/// Bytes of one DMA, and of a device's slot.
const LEN: usize = 512;
/// DMA that each device does at least, however few conversions there are: an engine takes 200 ms for one.
const LEAST: u64 = 10;

/// Pages of the memory.
type Pages = Range<u64>;

/// A way by which pages leave, and what is asked of it.
struct Way {
    name: &'static str,
    arguments: &'static [&'static str],
    /// Bytes per mapping; 0 as the daemon chooses.
    piece: u64,
    /// Whether engines take part: nothing pauses one.
    engines: bool,
    /// Runs of pages that leave by one conversion.
    batch: u64,
    /// Conversions in a usual run; `PASSGATE_CONVERSIONS` sets another number (docs/guide/rig.md).
    conversions: u64,
}

/// What one device did.
#[derive(Debug, Default)]
struct Tally {
    done: u64,
    /// DMA that memory does not show, or that did not bring what was there.
    lost: u64,
}

/// Where the conversions are, how much each device did, and whether all is over.
struct Board {
    group: AtomicU64,
    done: Vec<AtomicU64>,
    stop: AtomicBool,
}

/// Stops the devices, also where a check has failed.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

fn slot(group: u64, device: usize) -> u64 {
    group * GROUP * PAGE + (device * LEN) as u64
}

fn seen(memory: &GuestFile, at: u64) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    memory.read(at, &mut bytes).unwrap();
    bytes
}

/// What a device is told to write for the `nth` time: a number unlike any before, all over.
fn stamp(device: usize, nth: u64) -> Vec<u8> {
    ((nth + 1) << 4 | device as u64).to_le_bytes().repeat(LEN / 8)
}

/// Writes to both neighbours of where the conversions are and reads there, in turns, until all is over.
fn dma(mut client: Client, (nth, device): (usize, &str), memory: &GuestFile, board: &Board) -> Tally {
    let (mut tally, mut last) = (Tally::default(), BTreeMap::new());
    for turn in 0.. {
        if board.stop.load(SeqCst) {
            break;
        }
        let group = (board.group.load(SeqCst) + turn / 2 % 2) % (PAGES / GROUP);
        let at = slot(group, nth);
        let (told, came) = if turn % 2 == 0 {
            let bytes = stamp(nth, turn);
            let told = client.dma_write(device, GPA + at, &bytes);
            let came = seen(memory, at) == bytes;
            (told, came)
        } else {
            let there = seen(memory, at);
            match client.dma_read(device, GPA + at, LEN as u32) {
                Ok(bytes) => (Ok(()), bytes == there),
                Err(error) => (Err(error), false),
            }
        };
        match told {
            Ok(()) | Err(Error::Refused { .. }) => {}
            Err(error) => panic!("{device}: {error}"),
        }
        last.insert(at, seen(memory, at));
        tally.done += 1;
        tally.lost += u64::from(!came);
        board.done[nth].fetch_add(1, SeqCst);
    }
    for (at, bytes) in last {
        assert_eq!(seen(memory, at), bytes, "{device}'s slot at {at:#x} was written by something else");
    }
    tally
}

/// Begins a conversion that must be granted.
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

/// Takes random runs of pages away, puts a canary in each page and gives them back, where every canary must be as it
/// was. Says how long each begin to private took.
fn convert(
    vmm: &mut Vmm,
    board: &Board,
    wanted: u64,
    batch: u64,
    broken: impl Fn() -> bool,
) -> Vec<Duration> {
    let (mut draw, mut took) = (1u64, Vec::new());
    while took.len() as u64 * batch < wanted || board.done.iter().any(|done| done.load(SeqCst) < LEAST) {
        assert!(!broken(), "a device has ended");
        let mut runs = BTreeMap::new();
        while (runs.len() as u64) < batch {
            draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let group = (draw >> 33) % (PAGES / GROUP);
            board.group.store(group, SeqCst);
            // Half are single pages.
            let first = 1 + (draw >> 20) % (GROUP - 1);
            let pages = if draw >> 19 & 1 == 0 { 1 } else { 1 + (draw >> 12) % (GROUP - first) };
            let page = group * GROUP + first;
            runs.insert(group, page..page + pages);
        }
        let runs: Vec<_> = runs.into_values().collect();
        let pages = || runs.iter().cloned().flatten();
        let canary = |page: u64| (draw | 1) ^ (page << 1);
        let begun = Instant::now();
        let invalidation = begin(vmm, &runs, PageState::Private);
        took.push(begun.elapsed());
        pages().for_each(|page| vmm.memory.store(page * PAGE, canary(page)).unwrap());
        vmm.end(invalidation);
        let invalidation = begin(vmm, &runs, PageState::Shared);
        for page in pages() {
            let found = vmm.memory.load(page * PAGE).unwrap();
            assert_eq!(found, canary(page), "page {page} was written to while it was away");
        }
        vmm.end(invalidation);
    }
    took
}

/// DMA that was lost in all, after everything else was found as it must be.
fn run(rig: &Rig, way: &Way) -> u64 {
    let wanted =
        std::env::var("PASSGATE_CONVERSIONS").map_or(way.conversions, |number| number.parse().unwrap());
    let kinds: &[&str] = if way.engines { &["NVME", "EDU"] } else { &["NVME"] };
    let named: Vec<String> =
        kinds.iter().map(|kind| std::env::var(format!("PASSGATE_{kind}")).unwrap()).collect();
    let devices: Vec<&str> = named.iter().flat_map(|names| names.split_whitespace()).collect();
    let mut arguments = vec!["--iommu", rig.iommu, "--allow-dma", "--allow-unstoppable", "--scratch"];
    arguments.extend(devices.iter().flat_map(|device| ["--device", device]));
    arguments.extend(way.arguments);
    let daemon = Daemon::start(std::path::Path::new(PASSGATE), &arguments);
    let mut vmm = rig.join(&daemon, memfd(PAGES), way.piece);
    let board = Board {
        group: AtomicU64::new(0),
        done: devices.iter().map(|_| AtomicU64::new(0)).collect(),
        stop: AtomicBool::new(false),
    };
    let (memory, begun) = (vmm.memory.clone(), Instant::now());
    let (mut took, tallies) = std::thread::scope(|scope| {
        let threads: Vec<_> = devices
            .iter()
            .enumerate()
            .map(|(nth, device)| {
                let (client, board, memory) = (daemon.client(), &board, &memory);
                scope.spawn(move || dma(client, (nth, device), memory, board))
            })
            .collect();
        let over = Over(&board.stop);
        let broken = || threads.iter().any(|thread| thread.is_finished());
        let took = convert(&mut vmm, &board, wanted, way.batch, broken);
        drop(over);
        let tallies: BTreeMap<&str, Tally> =
            devices.iter().copied().zip(threads.into_iter().map(|thread| thread.join().unwrap())).collect();
        (took, tallies)
    });
    took.sort_unstable();
    println!(
        "{}, {}: {} conversions of {} runs of pages and back in {:.1?}, begin {:.0?} (median); {tallies:?}",
        rig.iommu,
        way.name,
        took.len(),
        way.batch,
        begun.elapsed(),
        took[took.len() / 2],
    );
    let status = vmm.client.status().unwrap();
    assert_eq!((status.totals.refused, status.totals.unknown, status.quarantine.len()), (0, 0, 0));
    tallies.values().map(|tally| tally.lost).sum()
}

/// Small IOMMU pages: nothing but the pages that go is unmapped, and DMA beside them knows of nothing.
pub fn cut(rig: &Rig) {
    let way = Way { name: "cut", arguments: &[], piece: 0, engines: true, batch: 1, conversions: 1000 };
    assert_eq!(run(rig, &way), 0, "DMA beside pages that were cut out was lost");
}

/// The proof that the judge can fail: a mapping goes as a whole, the rest comes back, and nobody waits.
pub fn split(rig: &Rig) {
    let arguments = &["--hitless", "off"];
    let way = Way { name: "split", arguments, piece: PIECE, engines: true, batch: 1, conversions: 200 };
    // Some ten are lost in a run; by chance there may be none.
    assert!(
        (0..3).any(|_| run(rig, &way) > 0),
        "no DMA was lost, though mappings went as a whole beneath it"
    );
}

/// The same, but a device that can be drained is: its transfers wait for the window to close.
pub fn drained(rig: &Rig) {
    // On iommufd a domain that cannot cut is one with a second table.
    let arguments: &[&str] = if rig.iommu == "iommufd" { &["--standby"] } else { &[] };
    let way = Way { name: "drained", arguments, piece: PIECE, engines: false, batch: 1, conversions: 200 };
    assert_eq!(run(rig, &way), 0, "DMA of a device that is drained was lost");
}

/// Many runs at once: a second page table and a switch of the devices: what it loses is reported, what it takes away it must.
pub fn replace(rig: &Rig) {
    let arguments = &["--standby", "--hitless", "off"];
    let way = Way { name: "replace", arguments, piece: PIECE, engines: true, batch: 16, conversions: 400 };
    let lost = run(rig, &way);
    println!("replace lost {lost} DMA");
}
