//! A daemon is killed (SIGKILL) at random times, under DMA and during conversions: the next daemon always starts, and no device
//! ever writes to a page that was granted to its owner. `PASSGATE_STORM` sets the number of kills.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod daemon;

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use daemon::Daemon;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};
use passgate_client::{AddMemory, Answer, Channel, Client, Error, Outcome, PageState};

const GPA: u64 = 0x10_0000;
const PAGES: u64 = 32;
/// The maximum number of private pages at a time.
const MAX_PRIVATE_PAGES: usize = 8;
const DEFAULT_KILLS: u64 = 1000;

/// A reproducible random number generator (xorshift64*).
struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

fn page(number: u64) -> PageRange<Gpa> {
    PageRange::new(GPA + number * PAGE, PAGE).unwrap()
}

/// The private pages, each with the word that the owner wrote to it at the grant.
type PrivatePages = BTreeMap<u64, u64>;

/// Converts pages as a VMM does, until the daemon dies. Returns the pages that were private then, and the number of conversions.
fn convert(memory: &GuestFile, mut channel: Channel, rng: &mut Rng) -> (PrivatePages, u64) {
    let (mut private, mut converted) = (PrivatePages::new(), 0);
    loop {
        let number = rng.below(PAGES);
        let to_shared = private.contains_key(&number) || private.len() >= MAX_PRIVATE_PAGES;
        let number = if to_shared { *private.keys().next().unwrap() } else { number };
        let to = if to_shared { PageState::Shared } else { PageState::Private };
        let invalidation = match channel.begin(page(number), to, Some(20_000)) {
            Ok(Answer::Granted { invalidation }) => invalidation,
            Ok(other) => panic!("a begin was not granted: {other:?}"),
            Err(_) => return (private, converted),
        };
        if to_shared {
            check(memory, &private);
            private.remove(&number);
        } else {
            let canary = rng.below(u64::MAX >> 34) << 32 | number;
            memory.store(number * PAGE, canary).unwrap();
            private.insert(number, canary);
        }
        if channel.end(invalidation, Outcome::Committed).is_err() {
            return (private, converted);
        }
        converted += 1;
    }
}

/// Checks that no device has written to a private page.
fn check(memory: &GuestFile, private: &PrivatePages) {
    for (number, canary) in private {
        let now = memory.load(number * PAGE).unwrap();
        assert_eq!(now, *canary, "a device wrote to page {number}, which was granted to its owner");
    }
}

/// Writes to every page by DMA, until the daemon dies. Returns the number of writes that succeeded.
fn dma(mut client: Client) -> u64 {
    let mut written = 0;
    for number in (0..PAGES).cycle() {
        match client.dma_write("soft:0", GPA + number * PAGE, &u64::MAX.to_le_bytes()) {
            Ok(()) => written += 1,
            Err(Error::Refused { .. }) => {} // it faulted: the page is private
            Err(_) => break,
        }
    }
    written
}

#[test]
fn random_kills_under_dma_leak_no_page_and_every_start_succeeds() {
    let kills = std::env::var("PASSGATE_STORM").map_or(DEFAULT_KILLS, |kills| kills.parse().unwrap());
    let program = Path::new(env!("CARGO_BIN_EXE_passgate"));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("passgate.sock");
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let (mut conversions, mut writes, begun) = (0, 0, Instant::now());
    // On a slow machine some kills come before anything was converted: more of them, until enough was.
    for kill in 0..10 * kills {
        if kill >= kills && conversions > kills && writes > kills {
            break;
        }
        let memory = GuestFile::memfd("storm", PAGES * PAGE).unwrap();
        let mut daemon =
            Daemon::start_at(program, &path, &["--iommu", "soft", "--device", "soft:0", "--allow-dma"]);
        let mut client = daemon.client();
        client.add_memory(&AddMemory::shared(GPA, PAGES * PAGE), &[&memory]).unwrap();
        let channel = client.open_channel().unwrap();
        let writer = daemon.client();
        let (seed, wait) = (rng.below(u64::MAX >> 34) + 1, Duration::from_micros(rng.below(10_000)));
        let (private, converted, written) = thread::scope(|scope| {
            let owner = scope.spawn(|| convert(&memory, channel, &mut Rng(seed)));
            let writer = scope.spawn(|| dma(writer));
            thread::sleep(wait);
            daemon.kill();
            let (private, converted) = owner.join().unwrap();
            (private, converted, writer.join().unwrap())
        });
        check(&memory, &private);
        conversions += converted;
        writes += written;
    }
    assert!(
        conversions > kills && writes > kills,
        "{conversions} conversions, {writes} DMA writes: too few for {kills} kills"
    );
    println!(
        "{kills} kills and more in {:?}: {conversions} conversions, {writes} DMA writes",
        begun.elapsed()
    );
}
