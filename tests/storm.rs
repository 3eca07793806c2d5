//! kill -9 at random, under DMA and in the middle of conversions, again and again: the next daemon always starts, and
//! no page that was said to be out of reach is ever written by a device. `PASSGATE_STORM` sets how often.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

mod daemon;

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use daemon::Daemon;
use passgate::client::{AddMemory, Answer, Channel, Client, Outcome, PageState};
use passgate::error::Error;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, PAGE, PageRange};

const GPA: u64 = 0x10_0000;
const PAGES: u64 = 32;
/// Pages that are away at a time.
const AWAY: usize = 8;
const KILLS: u64 = 1000;

/// xorshift64*: the same storm for the same seed.
struct Random(u64);

impl Random {
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

/// Pages that are away, each with what the owner wrote there when it was told that no device sees it.
type Away = BTreeMap<u64, u64>;

/// What a VMM does until its daemon dies; what was away then, and how many conversions went.
fn convert(memory: &GuestFile, mut channel: Channel, random: &mut Random) -> (Away, u64) {
    let (mut away, mut went) = (Away::new(), 0);
    loop {
        let number = random.below(PAGES);
        let back = away.contains_key(&number) || away.len() >= AWAY;
        let number = if back { *away.keys().next().unwrap() } else { number };
        let to = if back { PageState::Shared } else { PageState::Private };
        let invalidation = match channel.begin(page(number), to, Some(20_000)) {
            Ok(Answer::Granted { invalidation }) => invalidation,
            Ok(other) => panic!("a page of memory was not given: {other:?}"),
            Err(_) => return (away, went),
        };
        if back {
            check(memory, &away);
            away.remove(&number);
        } else {
            let canary = random.below(u64::MAX >> 34) << 32 | number;
            memory.store(number * PAGE, canary).unwrap();
            away.insert(number, canary);
        }
        if channel.end(invalidation, Outcome::Committed).is_err() {
            return (away, went);
        }
        went += 1;
    }
}

/// No device has been where none may be.
fn check(memory: &GuestFile, away: &Away) {
    for (number, canary) in away {
        let now = memory.load(number * PAGE).unwrap();
        assert_eq!(now, *canary, "a device wrote to page {number}, which it was said not to see");
    }
}

/// DMA to every page, until the daemon dies.
fn dma(mut client: Client) -> u64 {
    let mut wrote = 0;
    for number in (0..PAGES).cycle() {
        match client.dma_write("soft:0", GPA + number * PAGE, &u64::MAX.to_le_bytes()) {
            Ok(()) => wrote += 1,
            Err(Error::Refused { .. }) => {} // it faulted: the page is away
            Err(_) => break,
        }
    }
    wrote
}

#[test]
fn killed_at_random_under_dma_no_page_is_met_and_the_next_start_always_goes() {
    let kills = std::env::var("PASSGATE_STORM").map_or(KILLS, |kills| kills.parse().unwrap());
    let program = Path::new(env!("CARGO_BIN_EXE_passgate"));
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("passgate.sock");
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut conversions, mut writes, begun) = (0, 0, Instant::now());
    // Where the machine is slow some more, until it was a storm.
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
        let (seed, wait) = (random.below(u64::MAX >> 34) + 1, Duration::from_micros(random.below(10_000)));
        let (away, went, wrote) = thread::scope(|scope| {
            let owner = scope.spawn(|| convert(&memory, channel, &mut Random(seed)));
            let writer = scope.spawn(|| dma(writer));
            thread::sleep(wait);
            daemon.kill();
            let (away, went) = owner.join().unwrap();
            (away, went, writer.join().unwrap())
        });
        check(&memory, &away);
        conversions += went;
        writes += wrote;
    }
    assert!(
        conversions > kills && writes > kills,
        "{conversions} conversions, {writes} DMA writes: no storm"
    );
    println!(
        "{kills} kills and more in {:?}: {conversions} conversions, {writes} DMA writes",
        begun.elapsed()
    );
}
