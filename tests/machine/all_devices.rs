//! Every device of the machine in one domain, all doing DMA, during random conversions.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use passgate_bindings::PAGE;
use passgate_client::{Client, Error, PageState};

use super::rig::{GPA, PASSGATE, Rig, Vmm, memfd};
use crate::daemon::Daemon;

const PAGES: u64 = 64;
/// The number of pages that are converted at a time.
const MAX_CONVERTED: usize = 8;
/// The number of conversions; `PASSGATE_CONVERSIONS` sets another (docs/guide/rig.md).
const CONVERSIONS: u64 = 10_000;
/// The length of one DMA in bytes: a block of a drive, a frame of a network card.
const DMA_BYTES: usize = 512;
/// The high bits of every byte that a device writes; the low bits are its number.
const STAMP: u8 = 0xf0;

/// A counter for each page: odd from before its begin to private until after its end to shared.
struct ConversionCounts(Vec<AtomicU64>);

/// Stops the devices when dropped, also where a check has failed.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// The DMA operations of one device.
#[derive(Debug, Default)]
struct Tally {
    completed: u64,
    faults: u64,
    /// Faults in a page that was not under conversion.
    unexplained: u64,
}

/// Does DMA to every page in turn until `stop`.
fn dma(
    mut client: Client,
    (nth, device): (usize, &str),
    counts: &ConversionCounts,
    stop: &AtomicBool,
) -> Tally {
    let (stamp, drive) = ([STAMP | nth as u8; DMA_BYTES], std::env::var("PASSGATE_NVME").unwrap());
    let mut tally = Tally::default();
    for nth in 0.. {
        if stop.load(SeqCst) {
            break;
        }
        let page = nth * 29 % PAGES;
        let before = counts.0[page as usize].load(SeqCst);
        let at = GPA + page * PAGE;
        // QEMU's drive writes by a host thread to memory that was translated when the write started, and QEMU's IOMMU does not
        // wait for it on an unmap, as a real one must: the write may land after the unmap. So the drive only reads.
        let done = if drive == device {
            client.dma_read(device, at, DMA_BYTES as u32).map(drop)
        } else {
            client.dma_write(device, at, &stamp)
        };
        let after = counts.0[page as usize].load(SeqCst);
        match done {
            Ok(()) => tally.completed += 1,
            Err(Error::Refused { message, .. }) => {
                tally.faults += 1;
                if before == after && before.is_multiple_of(2) {
                    eprintln!("page {page} was mapped all the time: {message}");
                    tally.unexplained += 1;
                }
            }
            Err(error) => panic!("{device}: {error}"),
        }
    }
    tally
}

/// Converts random pages to private, writes a canary to each, and converts them back, when no device may have changed the canary.
fn convert(vmm: &mut Vmm, counts: &ConversionCounts, conversions: u64) {
    let (mut converted, mut random_state) = (BTreeMap::new(), 1u64);
    for nth in 0..conversions {
        random_state =
            random_state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let page = (random_state >> 33) % PAGES;
        let toggle = |page: u64| counts.0[page as usize].fetch_add(1, SeqCst);
        if converted.len() < MAX_CONVERTED && !converted.contains_key(&page) {
            toggle(page);
            let invalidation = vmm.begin(page, PageState::Private);
            vmm.memory.store(page * PAGE, nth).unwrap();
            converted.insert(page, nth);
            vmm.end(invalidation);
        } else if let Some((page, canary)) = converted.pop_first() {
            let invalidation = vmm.begin(page, PageState::Shared);
            let found = vmm.memory.load(page * PAGE).unwrap();
            assert_eq!(found, canary, "page {page} is {found:#x}: a device wrote to it");
            vmm.end(invalidation);
            toggle(page);
        }
    }
}

/// From the verdict *done* until the conversion back, no device writes to a page, and no device faults in a page that is mapped.
pub fn convert_under_dma(rig: &Rig) {
    let conversions =
        std::env::var("PASSGATE_CONVERSIONS").map_or(CONVERSIONS, |number| number.parse().unwrap());
    let devices: Vec<String> = ["EDU", "NVME", "IGB", "VIRTIO_NET", "VIRTIO_GPU"]
        .map(|name| std::env::var(format!("PASSGATE_{name}")).unwrap())
        .iter()
        .map(|names| names.split_whitespace().next().unwrap().to_owned())
        .collect();
    let mut arguments = vec!["--iommu", rig.iommu, "--allow-dma", "--allow-unstoppable", "--scratch"];
    arguments.extend(devices.iter().flat_map(|device| ["--device", device]));
    let daemon = Daemon::start(std::path::Path::new(PASSGATE), &arguments);
    let mut vmm = rig.join(&daemon, memfd(PAGES), PAGE);
    let counts = ConversionCounts((0..PAGES).map(|_| AtomicU64::new(0)).collect());
    let (stop, started) = (AtomicBool::new(false), Instant::now());
    let tallies: BTreeMap<&str, Tally> = std::thread::scope(|scope| {
        let threads: Vec<_> = devices
            .iter()
            .enumerate()
            .map(|device| {
                let (client, counts, stop) = (daemon.client(), &counts, &stop);
                let device = (device.0, device.1.as_str());
                (device.1, scope.spawn(move || dma(client, device, counts, stop)))
            })
            .collect();
        let stop_on_drop = StopOnDrop(&stop);
        convert(&mut vmm, &counts, conversions);
        drop(stop_on_drop);
        threads.into_iter().map(|(device, thread)| (device, thread.join().unwrap())).collect()
    });
    println!("{conversions} conversions in {:.1?}: {tallies:?}", started.elapsed());
    for (device, tally) in &tallies {
        assert!(tally.completed > 0, "{device} did no DMA");
        assert_eq!(tally.unexplained, 0, "{device} faulted in mapped pages");
    }
    let status = vmm.client.status().unwrap();
    assert_eq!((status.totals.refused, status.totals.unknown, status.quarantine.len()), (0, 0, 0));
}
