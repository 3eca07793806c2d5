//! Arbitrary sequences of actions, also those that no correct session or client produces: made-up ids, numbers at the limits
//! of their types, results of no call. A failing sequence is shrunk before it is printed. `PASSGATE_CASES=n` sets the number of
//! sequences, `PASSGATE_SEED=n` their seed.

use passgate::gate::{
    DeviceId, DomainCaps, DomainId, Event, Hitless, JobId, MapResult, OnStuckDma, Outcome, PageState,
    Platform, Policy, Rung, UnmapResult,
};
use passgate_backends::{DeviceTraits, Steps};
use passgate_bindings::PAGE;
use passgate_bindings::units::LIMIT;
use passgate_sim::iommu::Fault;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use crate::action::{Action, CLIENTS, FAULTS, FILE_PAGES};
use crate::mutant::Plant;
use crate::oracle::CheckResult;
use crate::random_events::env_number;
use crate::world::{Setup, World};

fn state() -> impl Strategy<Value = PageState> {
    proptest::sample::select(&PageState::ALL)
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        4 => Just(Outcome::Committed),
        1 => Just(Outcome::NotCommitted),
        1 => (any::<i32>(), edge()).prop_map(|(errno, offset)| Outcome::Unknown { errno, offset }),
    ]
}

/// Numbers at which arithmetic overflows or is off by one.
fn edge() -> impl Strategy<Value = u64> {
    prop_oneof![
        proptest::sample::select(vec![
            0,
            1,
            PAGE - 1,
            PAGE,
            PAGE + 1,
            1 << 32,
            LIMIT - PAGE,
            LIMIT,
            1 << 63,
            u64::MAX - PAGE + 1,
            u64::MAX,
        ]),
        (0..64u64).prop_map(|page| page * PAGE),
        (0..64u64).prop_map(|page| LIMIT - page * PAGE),
        any::<u64>(),
    ]
}

fn deadline() -> impl Strategy<Value = u64> {
    prop_oneof![(0..18u32).prop_map(|bits| 1 << bits), edge()]
}

fn fault() -> impl Strategy<Value = Option<Fault>> {
    prop_oneof![3 => Just(None), 1 => proptest::sample::select(&FAULTS).prop_map(Some)]
}

/// A job id that the gate never assigned.
fn unknown_job() -> impl Strategy<Value = JobId> {
    prop_oneof![Just(JobId(0)), (1u64 << 40..=u64::MAX).prop_map(JobId)]
}

fn raw() -> impl Strategy<Value = Event> {
    let unmap = prop_oneof![
        edge().prop_map(|bytes| UnmapResult::Gone { bytes }),
        edge().prop_map(|bytes| UnmapResult::InFlight { bytes }),
        (any::<i32>(), edge()).prop_map(|(errno, bytes)| UnmapResult::Failed { errno, bytes }),
    ];
    let map = prop_oneof![
        Just(MapResult::Mapped),
        any::<i32>().prop_map(|errno| MapResult::Refused { errno }),
        any::<i32>().prop_map(|errno| MapResult::Unknown { errno }),
    ];
    // Timers only of invalidations that never existed: the gate relies on the session's clock, so others may not expire early.
    let invalidation = || (1u64 << 40..=u64::MAX).prop_map(passgate::gate::InvalidationId);
    prop_oneof![
        (unknown_job(), map).prop_map(|(job, result)| Event::Mapped { job, result }),
        (unknown_job(), unmap, any::<u64>()).prop_map(|(job, result, took_ns)| Event::Unmapped {
            job,
            result,
            took_ns
        }),
        unknown_job().prop_map(|job| Event::FlightEnded { job }),
        (unknown_job(), any::<i32>(), any::<u64>()).prop_map(|(job, errno, took_ns)| Event::Fenced {
            job,
            errno,
            took_ns
        }),
        (unknown_job(), any::<i32>()).prop_map(|(job, errno)| Event::Attached { job, errno }),
        (invalidation(), proptest::sample::select(&Rung::LADDER))
            .prop_map(|(invalidation, rung)| Event::Expired { invalidation, rung }),
        (1u64 << 40..u64::MAX, outcome()).prop_map(|(id, outcome)| Event::Converted {
            invalidation: passgate::gate::InvalidationId(id),
            outcome
        }),
        Just(Event::DomainAdded { domain: DomainId(0), caps: DomainCaps::new(u64::MAX, u64::MAX) }),
        Just(Event::DeviceAdded {
            device: DeviceId(0),
            domain: DomainId(0),
            steps: Default::default(),
            traits: Default::default()
        }),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let client = || 0..CLIENTS as u8;
    let add =
        (client(), 0..160u16, 1..48u16, any::<u8>(), 0..FILE_PAGES as u16, 0..10u8, state(), any::<bool>())
            .prop_map(|(client, gpa, pages, file, offset, piece, initial, writable)| {
                // Few files and offsets, to make aliases common.
                let offset = offset % 64;
                Action::Add { client, gpa, pages, file: file % 2, offset, piece, initial, writable }
            });
    let begin = (client(), any::<u16>(), 0..64u16, 1..40u16, state(), any::<bool>(), deadline(), 0..12u8)
        .prop_map(|(client, region, page, pages, to, passgate, deadline_ns, batch)| Action::Begin {
            client,
            region,
            page,
            pages,
            to,
            passgate,
            deadline_ns,
            batch,
        });
    let wild = (client(), edge(), edge(), any::<u8>(), edge(), edge()).prop_map(
        |(client, gpa, len, file, offset, piece)| Action::AddExtreme {
            client,
            gpa,
            len,
            file,
            offset,
            piece,
        },
    );
    prop_oneof![
        4 => add,
        1 => (any::<u16>(), any::<bool>()).prop_map(|(region, by_other)| Action::Remove { region, by_other }),
        8 => begin,
        2 => any::<u16>().prop_map(|granted| Action::ChangePages { granted }),
        5 => (any::<u16>(), outcome(), any::<bool>())
            .prop_map(|(granted, outcome, by_other)| Action::End { granted, outcome, by_other }),
        1 => client().prop_map(|client| Action::MustUnmap { client }),
        1 => client().prop_map(|client| Action::ClientGone { client }),
        14 => (any::<u16>(), any::<bool>(), fault())
            .prop_map(|(task, deliver, fault)| Action::RunTask { task, deliver, fault }),
        1 => (any::<u16>(), any::<bool>()).prop_map(|(task, done)| Action::HangTask { task, done }),
        1 => any::<u16>().prop_map(|task| Action::OverreportUnmap { task }),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(domain, stuck)| Action::Flush { domain, stuck }),
        3 => deadline().prop_map(|ns| Action::Advance { ns }),
        1 => Just(Action::Settle),
        1 => Just(Action::Quiet),
        2 => (any::<u8>(), any::<u8>(), 0..200u16)
            .prop_map(|(domain, device, gpa)| Action::Dma { domain, device, gpa }),
        1 => wild,
        1 => (client(), edge(), edge(), deadline())
            .prop_map(|(client, gpa, len, deadline_ns)| Action::BeginExtreme { client, gpa, len, deadline_ns }),
        1 => (client(), prop_oneof![0..50u64, edge()], outcome())
            .prop_map(|(client, id, outcome)| Action::EndMadeUp { client, id, outcome }),
        2 => (client(), any::<u16>(), state())
            .prop_map(|(client, quarantine, to)| Action::Release { client, quarantine, to }),
        1 => (client(), edge(), state())
            .prop_map(|(client, id, to)| Action::ReleaseMadeUp { client, id, to }),
        2 => raw().prop_map(Action::Raw),
    ]
}

fn hitless() -> impl Strategy<Value = Hitless> {
    proptest::sample::select(&[Hitless::Require, Hitless::Prefer, Hitless::Off][..])
}

fn setup() -> impl Strategy<Value = Setup> {
    let policy = (
        proptest::sample::select(&[OnStuckDma::Refuse, OnStuckDma::Fence, OnStuckDma::Reset][..]),
        1..20u32,
        1..6u32,
        edge(),
        any::<bool>(),
        any::<bool>(),
        hitless(),
    )
        .prop_map(
            |(on_stuck_dma, max_regions, max_open, close_deadline_ns, strict, end_tdi, hitless)| Policy {
                hitless,
                on_stuck_dma,
                platform: if strict { Platform::Strict } else { Platform::Contained },
                end_tdi,
                max_regions,
                max_open,
                max_memory: 1 << 44,
                close_deadline_ns,
            },
        );
    let device = (0..32u8, any::<bool>(), any::<bool>()).prop_map(|(bits, ats, tdi)| {
        (Steps::from_bits_truncate(bits << 1), DeviceTraits { ats, tdi, tolerant: false })
    });
    let domain = (1..200u64, 0..20u32, any::<bool>(), any::<bool>(), proptest::collection::vec(device, 0..3))
        .prop_map(|(max_mappings, bits, cut, replace, devices)| {
            (DomainCaps { cut, replace, ..DomainCaps::new(max_mappings, PAGE << bits) }, devices)
        });
    // In the first pages of the files, which most regions show.
    let seed = (0..2u8, 0..100u16, 1..20u16, 1..4u64);
    let earlier_quarantine = proptest::collection::vec(seed, 0..3);
    let domains = proptest::collection::vec(domain, 1..3);
    (policy, domains, earlier_quarantine, any::<bool>(), any::<bool>()).prop_map(
        |(policy, domains, earlier_quarantine, tolerant, small_calls)| Setup {
            policy,
            tolerant,
            domains,
            earlier_quarantine,
            clean: false,
            small_calls,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: env_number("PASSGATE_CASES").unwrap_or(3000) as u32,
        max_shrink_iters: 20_000,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(env_number("PASSGATE_SEED").unwrap_or(0)),
        ..ProptestConfig::default()
    })]

    #[test]
    fn arbitrary_sequences_break_no_promise(
        setup in setup(),
        actions in proptest::collection::vec(action(), 0..120),
    ) {
        if let (_, Err(broken)) = play(&setup, &actions, false) {
            let (world, _) = play(&setup, &actions, true);
            let last: Vec<String> = world.trace.unwrap_or_default().into();
            prop_assert!(false, "{}\n{broken}", last.join("\n"));
        }
    }
}

fn play(setup: &Setup, actions: &[Action], trace: bool) -> (World, CheckResult) {
    let mut world = World::new(setup, Plant::Nothing).expect("an empty world keeps every promise");
    world.trace = trace.then(Default::default);
    let kept = actions.iter().try_for_each(|action| world.apply(action)).and_then(|()| world.drain());
    (world, kept)
}
