//! A million random events in worlds by seed. `PASSGATE_EVENTS=n` sets the number of events, `PASSGATE_FIRST_SEED=n` the first
//! seed; `PASSGATE_SEED=n` runs one world again. A failure prints its seed and its last events.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Instant;

use passgate::gate::{DomainCaps, Hitless, OnStuckDma, Platform, Policy};
use passgate_backends::{DeviceTraits, Steps};
use passgate_bindings::PAGE;

use crate::action::{Action, FaultRates};
use crate::mutant::Plant;
use crate::oracle::{BrokenPromise, CheckResult};
use crate::rng::Rng;
use crate::world::{EVENT_KINDS, Setup, World};

/// The number of actions in one world.
const ACTIONS_PER_WORLD: u64 = 1500;

impl Setup {
    pub fn random(rng: &mut Rng) -> (Self, FaultRates) {
        let rates = match rng.below(6) {
            0 | 1 => FaultRates::CLEAN,
            2 => FaultRates { faults: 2, hangs: 0, deaths: 3 },
            3 => FaultRates { faults: 15, hangs: 2, deaths: 5 },
            4 => FaultRates { faults: 40, hangs: 0, deaths: 2 },
            _ => FaultRates { faults: 5, hangs: 20, deaths: 10 },
        };
        let tight = rng.odds(1, 4);
        let policy = Policy {
            on_stuck_dma: rng.pick(&[OnStuckDma::Refuse, OnStuckDma::Fence, OnStuckDma::Reset]),
            max_regions: if tight { 3 } else { 64 },
            max_open: if tight { 2 } else { 64 },
            max_memory: if tight { 600 * PAGE } else { 1 << 40 },
            close_deadline_ns: 1 << rng.below(18),
            platform: rng.pick(&[Platform::Contained, Platform::Contained, Platform::Strict]),
            end_tdi: rng.odds(1, 2),
            hitless: rng.pick(&[Hitless::Require, Hitless::Prefer, Hitless::Off]),
        };
        let domains = (0..1 + rng.below(3))
            .map(|_| {
                let count = rng.below(3);
                let devices = (0..count).map(|_| device(rng)).collect();
                let caps = DomainCaps {
                    max_mappings: if tight { 40 } else { 65_535 },
                    max_mapping_len: PAGE << rng.pick(&[0, 3, 9, 18]),
                    cut: rng.odds(1, 3),
                    replace: rng.odds(1, 3),
                    tickets: false,
                    counts_partial: false,
                };
                (caps, devices)
            })
            .collect();
        let count = if rng.odds(1, 3) { rng.below(4) } else { 0 };
        let earlier_quarantine = (0..count)
            .map(|_| (rng.next() as u8, rng.next() as u16, 1 + rng.below(64) as u16, 1 + rng.below(6)))
            .collect();
        (
            Self {
                policy,
                domains,
                earlier_quarantine,
                tolerant: rng.odds(1, 3),
                clean: rates.faults == 0 && rates.hangs == 0,
                small_calls: rng.odds(1, 2),
            },
            rates,
        )
    }
}

fn device(rng: &mut Rng) -> (Steps, DeviceTraits) {
    let traits = DeviceTraits { ats: rng.odds(1, 3), tdi: rng.odds(1, 4), tolerant: false };
    (Steps::from_bits_truncate((rng.next() as u8) << 1), traits)
}

/// Returns the number in an environment variable; none if it is unset or no number.
pub fn env_number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs the world of one seed to its end. With `trace`, its last events are recorded.
pub fn run_world(seed: u64, plant: Plant, trace: bool) -> (World, CheckResult) {
    let mut rng = Rng::new(seed);
    let (setup, rates) = Setup::random(&mut rng);
    let mut world = World::new(&setup, plant).expect("an empty world keeps every promise");
    world.trace = trace.then(VecDeque::new);
    let kept = (0..ACTIONS_PER_WORLD)
        .try_for_each(|_| world.apply(&Action::random(&mut rng, rates)))
        .and_then(|()| world.drain());
    (world, kept)
}

/// Runs the world of a seed again and returns its last events and the broken promise as text.
pub fn failure_report(seed: u64, plant: Plant, broken: &BrokenPromise) -> String {
    let (world, _) = run_world(seed, plant, true);
    let last: Vec<String> = world.trace.unwrap_or_default().into();
    format!(
        "{}\nseed {seed}: {broken}\n(PASSGATE_SEED={seed} cargo test --test promises million)",
        last.join("\n")
    )
}

#[test]
fn million_random_events_break_no_promise() {
    let wanted = env_number("PASSGATE_EVENTS").unwrap_or(1_000_000);
    let started = Instant::now();
    let (mut events, mut worlds, mut event_counts, mut verdicts) = (0, 0, [0; EVENT_KINDS.len()], [0; 3]);
    let mut digest = DefaultHasher::new();
    let seeds = match env_number("PASSGATE_SEED") {
        Some(seed) => seed..seed + 1,
        None => env_number("PASSGATE_FIRST_SEED").unwrap_or(0)..u64::MAX,
    };
    for seed in seeds {
        let (world, kept) = run_world(seed, Plant::Nothing, false);
        if let Err(broken) = kept {
            panic!("{}", failure_report(seed, Plant::Nothing, &broken));
        }
        events += world.events;
        worlds += 1;
        world.gate.digest().hash(&mut digest);
        verdicts.iter_mut().zip(world.verdicts).for_each(|(all, one)| *all += one);
        event_counts.iter_mut().zip(world.event_counts).for_each(|(all, one)| *all += one);
        if events >= wanted {
            break;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{events} events in {worlds} worlds, {:.0} a second", events as f64 / seconds);
    println!("verdicts: {} done, {} refused, {} unknown", verdicts[0], verdicts[1], verdicts[2]);
    println!("digest of all events and effects: {:016x}", digest.finish());
    for (kind, count) in EVENT_KINDS.iter().zip(event_counts) {
        println!("{count:>9} {kind}");
    }
}
