//! Transfers without faults: the right bytes arrive, and nothing else changes.

use passgate_sim::nvme::{CommandFilter, FaultAction, opcode};
use proptest::prelude::*;

use super::*;

/// The properties of a drive, and a request.
#[derive(Debug, Clone)]
struct Shape {
    options: Options,
    first: u64,
    segments: Vec<Segment>,
}

/// Generates segments of all kinds: whole pages or parts, at any byte or at multiples of 4 or 512.
fn shapes() -> impl Strategy<Value = Shape> {
    let piece = (0..PAGES / 2, prop_oneof![Just(1u64), Just(4), Just(512), Just(PAGE)], 0..PAGE, 1..40u32);
    let drive = (0u8..3, 0u8..7, any::<bool>(), 0u8..3);
    (drive, prop::collection::vec(piece, 1..12), 0..1000u64).prop_map(
        |((sgl, mdts, big, stride), pieces, first)| {
            let block = if big { 4096 } else { 512 };
            let mut segments: Vec<_> = pieces
                .into_iter()
                .map(|(page, align, skew, units)| {
                    let unit = if align < 512 { 512 } else { align as u32 };
                    segment(page * PAGE + skew / align * align, units * unit / if align == 1 { 3 } else { 1 })
                })
                .collect();
            // Padded to whole blocks.
            let bytes: u32 = segments.iter().map(|segment| segment.len).sum();
            if !bytes.is_multiple_of(block) {
                segments.push(segment((PAGES - 2) * PAGE, block - bytes % block));
            }
            let options = Options { sgl, mdts, block, stride, ..Options::default() };
            Shape { options, first, segments }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_of_any_memory_layout_move_the_right_bytes(shape in shapes()) {
        let Shape { options, first, segments } = shape;
        let (sgl, block) = (options.sgl, u64::from(options.block));
        let bench = Bench::new(options, 1);
        let mut owner = bench.owner(0);
        let bytes: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
        let blocks = (bytes / block) as u32;
        let before = pattern(1, (bytes + 2 * block) as usize);
        bench.sim.medium().write(first, &before);
        bench.fill(&segments, 2);
        // Segments may overlap: the final content of memory is what is written.
        let expected = bench.read_memory(&segments);
        match owner.submit(1, write(first + 1, blocks), &segments) {
            Submitted::Started => {}
            Submitted::Wrong => {
                let whole = |segment: &Segment| {
                    segment.iova.0.is_multiple_of(4) && u64::from(segment.len).is_multiple_of(block)
                };
                prop_assert!(sgl != 1 && !segments.iter().all(whole), "a well-formed request is rejected");
                prop_assert_eq!(bench.sim.taken(), 0);
                return Ok(());
            }
            other => prop_assert!(false, "{:?}", other),
        }
        prop_assert_eq!(owner.result(1), Ok(()));
        let now = bench.sim.medium().read(first, u64::from(blocks) + 2);
        let (b, n) = (block as usize, bytes as usize);
        prop_assert!(now[b..b + n] == expected[..], "the medium has other bytes");
        prop_assert!(now[..b] == before[..b] && now[b + n..] == before[b + n..], "a neighbour was written");

        let fresh = pattern(3, n);
        bench.sim.medium().write(first + 1, &fresh);
        let mut all = vec![0; (PAGES * PAGE) as usize];
        bench.memory.read(0, &mut all).unwrap();
        let mut rest = &fresh[..];
        for segment in &segments {
            let (part, later) = rest.split_at(segment.len as usize);
            let at = (segment.iova.0 - BASE) as usize;
            all[at..at + part.len()].copy_from_slice(part);
            rest = later;
        }
        // A controller may write overlapping segments in any order; this one does so in theirs.
        prop_assert_eq!(owner.run(read(first + 1, blocks), &segments), Ok(()));
        let mut after = vec![0; all.len()];
        bench.memory.read(0, &mut after).unwrap();
        prop_assert!(after == all, "guest memory has other bytes");
        prop_assert_eq!(bench.sim.dma_faults(), 0);
        drop(owner);
    }
}

#[test]
fn threads_with_a_queue_each_move_the_right_bytes() {
    let bench = Bench::new(Options::default(), 4);
    assert_eq!(bench.drive().queues(), 4);
    std::thread::scope(|scope| {
        for nth in 0..4u16 {
            let (bench, mut owner) = (&bench, bench.owner(nth));
            scope.spawn(move || {
                let (base, first) = (u64::from(nth) * 64, u64::from(nth) * 1000);
                for round in 0..20u64 {
                    for tag in 0..32 {
                        bench.fill(&page(base + tag), round * 1000 + first + tag);
                        owner.start(tag as u32, write(first + tag * 8, 8), &page(base + tag));
                    }
                    for tag in 0..32 {
                        assert_eq!(owner.result(tag as u32), Ok(()));
                        owner.start(tag as u32, read(first + tag * 8, 8), &page(base + 32 + tag));
                    }
                    for tag in 0..32 {
                        assert_eq!(owner.result(tag as u32), Ok(()));
                        let seen = bench.read_memory(&page(base + 32 + tag));
                        assert!(seen == pattern(round * 1000 + first + tag, PAGE as usize));
                    }
                }
            });
        }
    });
    assert_eq!((bench.sim.taken(), bench.sim.enabled()), (4 * 20 * 64, 1));
    assert!(bench.drive().window().idle());
}

#[test]
fn full_queue_is_reported_and_has_room_again() {
    let bench = Bench::new(Options { entries: 8, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    let room = (0..8).take_while(|tag| owner.submit(*tag, Op::Flush, &[]) == Submitted::Started).count();
    assert_eq!((room, owner.queue.in_flight()), (7, 7));
    for tag in 0..7 {
        assert_eq!(owner.result(tag), Ok(()));
    }
    assert_eq!(owner.run(Op::Flush, &[]), Ok(()));
}

#[test]
fn flushed_data_survives_a_power_cut_and_cached_data_does_not() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    let (medium, zeroes) = (bench.sim.medium(), vec![0; PAGE as usize]);
    let bytes = bench.fill(&page(0), 1);
    assert_eq!(owner.run(write(0, 8), &page(0)), Ok(()));
    assert_eq!((medium.read(0, 8), medium.durable(0, 8)), (bytes.clone(), zeroes.clone()));
    assert_eq!(owner.run(Op::Flush, &[]), Ok(()));
    assert_eq!(medium.durable(0, 8), bytes);
    assert_eq!(owner.run(Op::Write { first: 8, blocks: 8, fua: true }, &page(0)), Ok(()));
    assert_eq!(medium.durable(8, 8), bytes);
    assert_eq!(owner.run(Op::WriteZeroes { first: 0, blocks: 4, unmap: false, fua: false }, &[]), Ok(()));
    assert_eq!(owner.run(Op::Discard { first: 8, blocks: 8 }, &[]), Ok(()));
    assert_eq!((medium.read(0, 4), medium.read(8, 8)), (vec![0; 2048], zeroes));
    assert!(medium.is_given_up(8) && !medium.is_given_up(0));
    assert_eq!(owner.run(Op::WriteZeroes { first: 4, blocks: 1, unmap: true, fua: false }, &[]), Ok(()));
    assert!(medium.is_given_up(4) && !medium.is_given_up(5));
    bench.sim.power_cut();
    assert_eq!((medium.read(0, 8), medium.read(8, 8)), (bytes.clone(), bytes));
    assert_eq!(owner.run(Op::WriteZeroes { first: 8, blocks: 8, unmap: false, fua: true }, &[]), Ok(()));
    assert_eq!(medium.durable(8, 8), vec![0; PAGE as usize], "FUA applies to zeroes");
}

#[test]
fn closing_flushes_the_cache_and_unmaps_driver_memory() {
    let bench = Bench::new(Options::default(), 1);
    let mut owner = bench.owner(0);
    let bytes = bench.fill(&page(0), 1);
    assert_eq!(owner.run(write(0, 8), &page(0)), Ok(()));
    drop(owner);
    let mut bench = bench;
    bench.drive = None;
    assert_eq!(bench.sim.medium().durable(0, 8), bytes, "the cache was not flushed");
    assert_eq!(bench.domain.mapping_count(), 1, "only guest memory is mapped");
}

#[test]
fn unsupported_operations_are_refused() {
    let options = Options { write_zeroes: false, discard: false, read_only: true, ..Options::default() };
    let bench = Bench::new(options, 1);
    let mut owner = bench.owner(0);
    let geometry = bench.drive().geometry().clone();
    assert_eq!((geometry.write_zeroes, geometry.discard, geometry.read_only), (0, 0, true));
    assert_eq!((geometry.serial.as_str(), geometry.blocks), ("SIMULATED", 1 << 17));
    for op in [
        Op::WriteZeroes { first: 0, blocks: 1, unmap: false, fua: false },
        Op::Discard { first: 0, blocks: 1 },
        read((1 << 17) - 7, 8),
        read(u64::MAX, 8),
        read(0, 7),
    ] {
        assert_eq!(owner.submit(1, op, &page(0)), Submitted::Wrong, "{op:?}");
    }
    assert_eq!((bench.sim.taken(), owner.queue.in_flight()), (0, 0));
    assert_eq!(owner.run(write(0, 8), &page(0)), Err(Fault::Status(0x20)));
    assert_eq!(owner.run(read((1 << 17) - 8, 8), &page(0)), Ok(()));
}

#[test]
fn queue_count_is_limited_by_controller_queues_and_vectors() {
    let few = Bench::new(Options { queues: 2, ..Options::default() }, 4);
    assert_eq!(few.drive().queues(), 2);
    assert!(few.drive().take_queue(2).is_err());
    drop(few);
    let mute = Bench::new(Options { vectors: 1, ..Options::default() }, 4);
    assert_eq!(mute.drive().queues(), 1, "each queue needs a vector");
    let mut owner = mute.owner(0);
    assert!(mute.drive().take_queue(0).is_err(), "it is taken");
    assert_eq!(owner.run(read(0, 8), &page(0)), Ok(()));
}

/// Segments no two of which fit into one command.
#[test]
fn request_longer_than_a_queue_is_done_in_turns() {
    for (entries, mdts, sgl) in [(8, 1, 0), (2, 1, 0), (8, 5, 1), (16, 0, 2)] {
        let bench = Bench::new(Options { entries, mdts, sgl, ..Options::default() }, 1);
        let mut owner = bench.owner(0);
        let odd =
            (0..126).map(|nth| segment(nth * 3 * PAGE + nth * 512 % PAGE, 512 + (nth as u32 % 3) * 512));
        let odd: Vec<_> = odd.collect();
        let blocks: u32 = odd.iter().map(|segment| segment.len / 512).sum();
        let bytes = bench.fill(&odd, 1);
        owner.start(1, write(5, blocks), &odd);
        // A second request beside it, as soon as there is room.
        while owner.submit(2, read(9000, 8), &page(900)) == Submitted::Full {
            owner.wait();
        }
        assert_eq!((owner.result(1), owner.result(2)), (Ok(()), Ok(())));
        assert!(bench.sim.medium().read(5, blocks.into()) == bytes, "{entries} {mdts} {sgl}");
        bench.fill(&odd, 2);
        assert_eq!(owner.run(read(5, blocks), &odd), Ok(()));
        assert!(bench.read_memory(&odd) == bytes, "{entries} {mdts} {sgl}");
        let whole = segment(0, 256 * PAGE as u32);
        let bytes = bench.fill(&[whole], 3);
        assert_eq!(owner.run(write(5, 2048), &[whole]), Ok(()));
        assert!(bench.sim.medium().read(5, 2048) == bytes);
        assert!(bench.drive().window().idle());
        assert_eq!(owner.queue.in_flight(), 0);
    }
}

/// A turn may use half of a queue of eight entries: four commands of two pages.
#[test]
fn fault_of_any_turn_ends_the_request_with_its_status() {
    let bench = Bench::without_deadline(Options { entries: 8, mdts: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    let whole = [segment(0, 64 * PAGE as u32)];
    for (failing, turns) in [(1u64, 1), (4, 1), (5, 2), (18, 5), (32, 8)] {
        let before = bench.sim.taken();
        bench.sim.fault(CommandFilter::io(opcode::WRITE).nth(failing), FaultAction::Status(0x281));
        assert_eq!(owner.run(write(0, 512), &whole), Err(Fault::Status(0x281)), "command {failing}");
        assert_eq!(bench.sim.taken() - before, 4 * turns, "command {failing}: more turns were issued");
    }
    assert_eq!(owner.run(write(0, 512), &whole), Ok(()));
}

/// Nothing is lost between two turns, and an unmap does not wait for later turns.
#[test]
fn reset_or_unmap_between_turns_loses_nothing() {
    let bench = Bench::new(Options { entries: 8, mdts: 1, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    let whole = [segment(0, 64 * PAGE as u32)];
    let bytes = bench.fill(&whole, 1);
    // A reset in the middle of a request, which starts from its beginning; several requests are in flight.
    bench.sim.fault(CommandFilter::io(opcode::WRITE).nth(9), FaultAction::StallData);
    bench.sim.fault(CommandFilter::io(opcode::READ).times(6), FaultAction::StallData);
    owner.start(0, write(0, 512), &whole);
    while !(bench.sim.stalled_commands() == 1 && bench.sim.taken() >= 12) {
        owner.wait();
    }
    owner.wait();
    for tag in 1..7 {
        owner.start(tag, read(4096, 8), &page(100 + u64::from(tag)));
    }
    assert!(bench.sim.await_stalled(7, TIMEOUT));
    assert_eq!(owner.submit(7, Op::Flush, &[]), Submitted::Full);
    bench.sim.fail();
    for tag in 0..7 {
        assert_eq!(owner.result(tag), Ok(()), "{tag}");
    }
    assert!(bench.sim.medium().read(0, 512) == bytes);
    assert_eq!(bench.sim.enabled(), 2);
    // An unmap in the middle of a request: it completes once the current turn has.
    bench.sim.fault(CommandFilter::io(opcode::WRITE).nth(9), FaultAction::StallData);
    owner.start(1, write(0, 512), &whole);
    while bench.sim.stalled_commands() == 0 {
        owner.wait();
    }
    let taken = bench.sim.taken();
    let gone = |unmap| matches!(unmap, passgate_backends::Unmap::Gone { .. });
    std::thread::scope(|scope| {
        let unmap = scope.spawn(|| while !gone(bench.windowed.unmap(pages_at(0, PAGES))) {});
        while bench.drive().window().enter(7, &page(63)) == passgate_backends::window::Entered::In {
            bench.drive().window().leave(7);
        }
        bench.sim.release();
        assert_eq!(owner.result(1), Err(Fault::Withheld));
        unmap.join().unwrap();
    });
    assert!(bench.sim.taken() - taken < 8, "turns were issued after a page was unmapped");
}

/// Commands without data have limits of their own.
#[test]
fn write_zeroes_and_discard_respect_their_limits() {
    let bench = Bench::new(Options { wzsl: 2, dmrsl: 1000, ..Options::default() }, 1);
    let mut owner = bench.owner(0);
    let geometry = bench.drive().geometry().clone();
    assert_eq!((geometry.write_zeroes, geometry.discard), (32, 1000));
    let zeroes = |blocks| Op::WriteZeroes { first: 0, blocks, unmap: false, fua: false };
    assert_eq!(owner.submit(1, zeroes(33), &[]), Submitted::Wrong);
    assert_eq!(owner.run(zeroes(32), &[]), Ok(()));
    assert_eq!(owner.submit(1, Op::Discard { first: 0, blocks: 1001 }, &[]), Submitted::Wrong);
    assert_eq!(owner.run(Op::Discard { first: 0, blocks: 1000 }, &[]), Ok(()));
    drop((owner, bench));
    let bench = Bench::new(Options::default(), 1);
    let geometry = bench.drive().geometry();
    assert_eq!(
        (geometry.write_zeroes, geometry.discard),
        (1 << 16, u32::MAX),
        "without limits of the controller"
    );
}
