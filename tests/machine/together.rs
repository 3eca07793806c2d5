//! Every device of the machine in one domain, all doing DMA, beside random conversions.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use passgate::client::{Client, PageState};
use passgate::error::Error;
use passgate_bindings::PAGE;

use super::rig::{GPA, PASSGATE, Rig, Vmm, memfd};
use crate::daemon::Daemon;

const PAGES: u64 = 64;
/// Pages that are away at a time.
const AWAY: usize = 8;
/// Conversions in a usual run; `PASSGATE_CONVERSIONS` sets another number (docs/guide/rig.md).
const CONVERSIONS: u64 = 10_000;
/// Bytes of one DMA: a block of a drive, a frame of a network card.
const LEN: usize = 512;
/// In every byte that a device writes, beside its number.
const STAMP: u8 = 0xf0;

/// For each page a number that is odd from before it is asked for until it is back.
struct Board(Vec<AtomicU64>);

/// Stops the devices, also where a check has failed.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// What one device did.
#[derive(Debug, Default)]
struct Tally {
    went: u64,
    faults: u64,
    /// Faults in a page that nobody had asked for.
    unexplained: u64,
}

fn dma(mut client: Client, (nth, device): (usize, &str), board: &Board, stop: &AtomicBool) -> Tally {
    let (stamp, drive) = ([STAMP | nth as u8; LEN], std::env::var("PASSGATE_NVME").unwrap());
    let mut tally = Tally::default();
    for nth in 0.. {
        if stop.load(SeqCst) {
            break;
        }
        let page = nth * 29 % PAGES;
        let before = board.0[page as usize].load(SeqCst);
        let at = GPA + page * PAGE;
        // A write of QEMU's drive is done by a thread of the host's in memory that was looked up when it began, and
        // QEMU's IOMMU does not wait for it, as a real one must: it may land after the unmap. So the drive reads.
        let done = if drive == device {
            client.dma_read(device, at, LEN as u32).map(drop)
        } else {
            client.dma_write(device, at, &stamp)
        };
        let after = board.0[page as usize].load(SeqCst);
        match done {
            Ok(()) => tally.went += 1,
            Err(Error::Refused { message, .. }) => {
                tally.faults += 1;
                if before == after && before.is_multiple_of(2) {
                    eprintln!("page {page} was there all the time: {message}");
                    tally.unexplained += 1;
                }
            }
            Err(error) => panic!("{device}: {error}"),
        }
    }
    tally
}

/// Converts random pages: away, a canary in it, and back, while no device may have touched the canary.
fn convert(vmm: &mut Vmm, board: &Board, wanted: u64) {
    let (mut away, mut draw) = (BTreeMap::new(), 1u64);
    for nth in 0..wanted {
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let page = (draw >> 33) % PAGES;
        let turn = |page: u64| board.0[page as usize].fetch_add(1, SeqCst);
        if away.len() < AWAY && !away.contains_key(&page) {
            turn(page);
            let invalidation = vmm.begin(page, PageState::Private);
            vmm.memory.store(page * PAGE, nth).unwrap();
            away.insert(page, nth);
            vmm.end(invalidation);
        } else if let Some((page, canary)) = away.pop_first() {
            let invalidation = vmm.begin(page, PageState::Shared);
            let seen = vmm.memory.load(page * PAGE).unwrap();
            assert_eq!(seen, canary, "page {page} is {seen:#x}: a device wrote to it");
            vmm.end(invalidation);
            turn(page);
        }
    }
}

/// No page that was answered *done* is written by any device until it is given back, and no device faults in a page
/// that is there.
pub fn every_device(rig: &Rig) {
    let wanted = std::env::var("PASSGATE_CONVERSIONS").map_or(CONVERSIONS, |number| number.parse().unwrap());
    let devices: Vec<String> = ["EDU", "NVME", "IGB", "VIRTIO_NET", "VIRTIO_GPU"]
        .map(|name| std::env::var(format!("PASSGATE_{name}")).unwrap())
        .iter()
        .map(|names| names.split_whitespace().next().unwrap().to_owned())
        .collect();
    let mut arguments = vec!["--iommu", rig.iommu, "--allow-dma", "--allow-unstoppable", "--scratch"];
    arguments.extend(devices.iter().flat_map(|device| ["--device", device]));
    let daemon = Daemon::start(std::path::Path::new(PASSGATE), &arguments);
    let mut vmm = rig.join(&daemon, memfd(PAGES), PAGE);
    let board = Board((0..PAGES).map(|_| AtomicU64::new(0)).collect());
    let (stop, begun) = (AtomicBool::new(false), Instant::now());
    let tallies: BTreeMap<&str, Tally> = std::thread::scope(|scope| {
        let threads: Vec<_> = devices
            .iter()
            .enumerate()
            .map(|device| {
                let (client, board, stop) = (daemon.client(), &board, &stop);
                let device = (device.0, device.1.as_str());
                (device.1, scope.spawn(move || dma(client, device, board, stop)))
            })
            .collect();
        let over = Over(&stop);
        convert(&mut vmm, &board, wanted);
        drop(over);
        threads.into_iter().map(|(device, thread)| (device, thread.join().unwrap())).collect()
    });
    println!("{wanted} conversions in {:.1?}: {tallies:?}", begun.elapsed());
    for (device, tally) in &tallies {
        assert!(tally.went > 0, "{device} did no DMA");
        assert_eq!(tally.unexplained, 0, "{device} faulted in pages that were there");
    }
    let status = vmm.client.status().unwrap();
    assert_eq!((status.totals.refused, status.totals.unknown, status.quarantine.len()), (0, 0, 0));
}
