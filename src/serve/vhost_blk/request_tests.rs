use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::*;

/// The size of guest memory in bytes, in two regions with a hole between them.
const SIZE: u64 = 0x1_0000;
const HOLE: std::ops::Range<u64> = 0x8000..0xa000;
// The addresses of the ring's descriptor table and of an indirect one.
const TABLE: u64 = 0x1000;
const INDIRECT: u64 = 0x2000;
const ENTRIES: u16 = 16;
const HEADERS: u64 = 0x3000;

fn memory() -> GuestMemoryMmap {
    let regions = [(GuestAddress(0), 0x8000), (GuestAddress(0xa000), 0x6000)];
    GuestMemoryMmap::from_ranges(&regions).unwrap()
}

fn drive() -> Geometry {
    Geometry {
        block: 512,
        blocks: 1000,
        volatile_cache: true,
        write_zeroes: 64,
        discard: 128,
        serial: "SERIAL".into(),
        ..Geometry::default()
    }
}

/// A descriptor: address, length, flags, next.
type Raw = (u64, u32, u16, u16);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

fn put(memory: &GuestMemoryMmap, table: u64, index: u64, (addr, len, flags, next): Raw) {
    let mut bytes = addr.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    let _ = memory.write_slice(&bytes, GuestAddress(table + index * 16));
}

fn header(memory: &GuestMemoryMmap, at: u64, kind: u32, sector: u64) {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    memory.write_slice(&bytes, GuestAddress(at)).unwrap();
}

fn read(
    memory: &GuestMemoryMmap,
    head: u16,
    read_only: bool,
    write_through: bool,
) -> Result<(Request, Vec<Segment>), Malformed> {
    let (drive, mut segments) = (drive(), vec![Segment { iova: Iova(1), len: 1 }]);
    let limits = Limits { drive: &drive, read_only, write_through };
    let read = Chain::default().read(memory, GuestAddress(TABLE), ENTRIES, head, limits, &mut segments)?;
    Ok((read, segments))
}

/// Writes a chain of these pieces (address, length, flags) to the ring's table, from descriptor 0 on.
fn chain(memory: &GuestMemoryMmap, pieces: &[(u64, u32, u16)]) {
    for (index, (addr, len, flags)) in pieces.iter().enumerate() {
        let last = index + 1 == pieces.len();
        let flags = if last { *flags } else { flags | NEXT };
        put(memory, TABLE, index as u64, (*addr, *len, flags, index as u16 + 1));
    }
}

fn parse_request(kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (Action, Vec<(u64, u32)>, u32) {
    let memory = memory();
    header(&memory, HEADERS, kind, sector);
    chain(&memory, &[&[(HEADERS, 16, 0)], data, &[(0x3100, 1, WRITE)]].concat());
    let (request, segments) = read(&memory, 0, false, false).unwrap();
    assert_eq!(request.status, GuestAddress(0x3100));
    (request.action, segments.iter().map(|s| (s.iova.0, s.len)).collect(), request.written)
}

#[test]
fn valid_requests_become_drive_operations() {
    let data = [(0x4000, 512, WRITE), (0x5000, 1024, WRITE)];
    let op = Action::Drive(Op::Read { first: 7, blocks: 3 });
    assert_eq!(parse_request(VIRTIO_BLK_T_IN, 7, &data), (op, vec![(0x4000, 512), (0x5000, 1024)], 1536));
    let data = [(0x4000, 512, 0)];
    let op = Action::Drive(Op::Write { first: 999, blocks: 1, fua: false });
    assert_eq!(parse_request(VIRTIO_BLK_T_OUT, 999, &data), (op, vec![(0x4000, 512)], 0));
    assert_eq!(parse_request(VIRTIO_BLK_T_FLUSH, 5, &[]), (Action::Drive(Op::Flush), vec![], 0));
    let (id, segments, _) = parse_request(VIRTIO_BLK_T_GET_ID, 0, &[(0x4000, 20, WRITE)]);
    assert_eq!((id, segments), (Action::Id, vec![(0x4000, 20)]));
    let unsupported = Action::Status(VIRTIO_BLK_S_UNSUPP as u8);
    assert_eq!(parse_request(77, 0, &[]), (unsupported, vec![], 0));
}

#[test]
fn invalid_ranges_are_answered_with_ioerr() {
    let wrong = |kind, sector, data: &[(u64, u32, u16)]| {
        let (action, segments, _) = parse_request(kind, sector, data);
        assert_eq!(
            (action, segments),
            (Action::Status(VIRTIO_BLK_S_IOERR as u8), vec![]),
            "{kind} {sector} {data:?}"
        );
    };
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        let direction = if kind == VIRTIO_BLK_T_IN { WRITE } else { 0 };
        for (sector, len) in
            [(1000, 512), (999, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511), (0, 513), (0, 0)]
        {
            wrong(kind, sector, &[(0x4000, len, direction)]);
        }
        wrong(kind, 0, &[(0x4000, 512, WRITE - direction)]);
        wrong(kind, 0, &[]);
    }
    wrong(VIRTIO_BLK_T_GET_ID, 0, &[(0x4000, 19, WRITE)]);
}

/// Such a request is never submitted with a part of its pieces.
#[test]
fn request_beyond_seg_max_is_answered_with_ioerr() {
    let memory = memory();
    for (kind, direction) in [(VIRTIO_BLK_T_IN, WRITE), (VIRTIO_BLK_T_OUT, 0)] {
        header(&memory, HEADERS, kind, 0);
        for count in [MAX_SEGMENTS - 1, MAX_SEGMENTS, MAX_SEGMENTS + 1, MAX_SEGMENTS + 2, 200] {
            let data = vec![(0x4000, 512, direction | NEXT); count];
            let pieces = [&[(HEADERS, 16, NEXT)], &data[..], &[(0x3100, 1, WRITE)]].concat();
            for (index, (addr, len, flags)) in pieces.iter().enumerate() {
                put(&memory, INDIRECT, index as u64, (*addr, *len, *flags, index as u16 + 1));
            }
            put(&memory, TABLE, 0, (INDIRECT, pieces.len() as u32 * 16, INDIRECT_FLAG, 0));
            let (request, segments) = read(&memory, 0, false, false).unwrap();
            let op = match direction {
                WRITE => Op::Read { first: 0, blocks: count as u32 },
                _ => Op::Write { first: 0, blocks: count as u32, fua: false },
            };
            let (action, segment_count) = match count <= MAX_SEGMENTS {
                true => (Action::Drive(op), count),
                false => (Action::Status(VIRTIO_BLK_S_IOERR as u8), 0),
            };
            assert_eq!((request.action, segments.len()), (action, segment_count), "{count} pieces");
            assert_eq!(request.status, GuestAddress(0x3100), "{count} pieces");
        }
    }
}

#[test]
fn malformed_chains_are_distinguished() {
    let memory = memory();
    let parse = |head| read(&memory, head, false, false).map(drop);
    chain(&memory, &[(HEADERS, 16, 0), (0x4000, 512, WRITE), (0x3100, 1, 0)]);
    assert_eq!(parse(0), Err(Malformed::BadOrder));
    chain(&memory, &[(u64::MAX - 8, 16, WRITE)]);
    assert_eq!(parse(0), Err(Malformed::BadOrder));
    chain(&memory, &[(HEADERS, 16, 0)]);
    assert_eq!(parse(0), Err(Malformed::NoStatus));
    put(&memory, TABLE, 0, (HEADERS, 16, NEXT, 0));
    assert_eq!(parse(0), Err(Malformed::TooLong));
    put(&memory, TABLE, 0, (HEADERS, 16, NEXT, ENTRIES));
    assert_eq!((parse(0), parse(ENTRIES)), (Err(Malformed::NextOutOfTable), Err(Malformed::NextOutOfTable)));
    put(&memory, TABLE, 0, (HOLE.start, 16, INDIRECT_FLAG, 0));
    assert_eq!(parse(0), Err(Malformed::NotInMemory));
    put(&memory, TABLE, 0, (INDIRECT, 16, INDIRECT_FLAG, 0));
    put(&memory, INDIRECT, 0, (INDIRECT, 16, INDIRECT_FLAG, 0));
    assert_eq!(parse(0), Err(Malformed::BadIndirect));
    put(&memory, TABLE, 0, (INDIRECT, 17, INDIRECT_FLAG, 0));
    assert_eq!(parse(0), Err(Malformed::BadIndirect));
}

#[test]
fn read_only_drive_refuses_writes() {
    let memory = memory();
    for (kind, data) in [
        (VIRTIO_BLK_T_OUT, (0x4000, 512, 0)),
        (VIRTIO_BLK_T_DISCARD, (0x4000, 16, 0)),
        (VIRTIO_BLK_T_WRITE_ZEROES, (0x4000, 16, 0)),
    ] {
        header(&memory, HEADERS, kind, 0);
        memory.write_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], GuestAddress(0x4000)).unwrap();
        chain(&memory, &[(HEADERS, 16, 0), data, (0x3100, 1, WRITE)]);
        let action = |read_only| read(&memory, 0, read_only, false).unwrap().0.action;
        assert_eq!(action(true), Action::Status(VIRTIO_BLK_S_IOERR as u8), "{kind}");
        assert!(matches!(action(false), Action::Drive(_)), "{kind}");
    }
}

#[test]
fn write_through_sets_force_unit_access() {
    let memory = memory();
    header(&memory, HEADERS, VIRTIO_BLK_T_OUT, 0);
    chain(&memory, &[(HEADERS, 16, 0), (0x4000, 512, 0), (0x3100, 1, WRITE)]);
    for through in [false, true] {
        let action = read(&memory, 0, false, through).unwrap().0.action;
        assert_eq!(action, Action::Drive(Op::Write { first: 0, blocks: 1, fua: through }));
    }
}

#[test]
fn discard_and_write_zeroes_ranges_are_checked() {
    let memory = memory();
    for (kind, sector, sectors, flags, good) in [
        (VIRTIO_BLK_T_DISCARD, 0, 128, 0, true),
        (VIRTIO_BLK_T_DISCARD, 872, 128, 0, true),
        (VIRTIO_BLK_T_DISCARD, 0, 129, 0, false),
        (VIRTIO_BLK_T_DISCARD, 873, 128, 0, false),
        (VIRTIO_BLK_T_DISCARD, 0, 0, 0, false),
        (VIRTIO_BLK_T_DISCARD, 0, 1, 1, false),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0, 64, 1, true),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0, 65, 0, false),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 2, false),
        (VIRTIO_BLK_T_WRITE_ZEROES, u64::MAX, u32::MAX, 0, false),
    ] {
        header(&memory, HEADERS, kind, 0);
        let mut range = u64::to_le_bytes(sector).to_vec();
        range.extend(u32::to_le_bytes(sectors));
        range.extend(u32::to_le_bytes(flags));
        memory.write_slice(&range, GuestAddress(0x4000)).unwrap();
        chain(&memory, &[(HEADERS, 16, 0), (0x4000, 16, 0), (0x3100, 1, WRITE)]);
        let action = read(&memory, 0, false, false).unwrap().0.action;
        assert_eq!(matches!(action, Action::Drive(_)), good, "{kind} {sector} {sectors} {flags}: {action:?}");
    }
    // Several ranges in one request are not offered.
    chain(&memory, &[(HEADERS, 16, 0), (0x4000, 32, 0), (0x3100, 1, WRITE)]);
    let action = read(&memory, 0, false, false).unwrap().0.action;
    assert_eq!(action, Action::Status(VIRTIO_BLK_S_IOERR as u8));
}

fn descriptor() -> impl Strategy<Value = Raw> {
    let addr = prop_oneof![
        4 => (0..8u64).prop_map(|n| HEADERS + n * 16),
        4 => (0x40..0x60u64).prop_map(|n| n * 0x100),
        1 => Just(INDIRECT),
        1 => Just(HOLE.start - 4),
        1 => Just(SIZE - 8),
        1 => any::<u64>(),
        1 => (0..600u64).prop_map(|n| u64::MAX - n),
    ];
    let len = prop_oneof![
        4 => prop_oneof![Just(1), Just(16), Just(512), Just(1024), Just(511), Just(0), Just(17)],
        1 => (0..8u32).prop_map(|n| n * 16),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![6 => 0..4u16, 2 => Just(NEXT), 2 => Just(NEXT | WRITE), 1 => 0..8u16, 1 => Just(INDIRECT_FLAG)];
    let next = prop_oneof![8 => 0..ENTRIES, 1 => any::<u16>()];
    (addr, len, flags, next)
}

/// Generates a table in which most descriptors chain to the next one.
fn table() -> impl Strategy<Value = Vec<Raw>> {
    proptest::collection::vec((descriptor(), 0..4u8), usize::from(ENTRIES)).prop_map(|table| {
        let follow = |(index, ((addr, len, flags, next), any)): (usize, (Raw, u8))| {
            // An indirect table elsewhere in memory would have descriptors that this test does not know.
            let addr = if flags & INDIRECT_FLAG != 0 && addr < SIZE { INDIRECT } else { addr };
            (addr, len, flags, if any == 0 { next } else { index as u16 + 1 })
        };
        table.into_iter().enumerate().map(follow).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Whatever is in the tables, an accepted request uses only bytes of descriptors of the right direction and blocks that the
    /// drive has, and as many bytes as blocks.
    #[test]
    fn accepted_requests_use_only_described_memory_and_blocks(
        table in table(),
        indirect in table(),
        headers in proptest::collection::vec((prop_oneof![0..2u32, 0..16u32], prop_oneof![0..1000u64, any::<u64>()]), 8),
        head in prop_oneof![8 => 0..ENTRIES, 1 => any::<u16>()],
    ) {
        let memory = memory();
        table.iter().enumerate().for_each(|(at, raw)| put(&memory, TABLE, at as u64, *raw));
        indirect.iter().enumerate().for_each(|(at, raw)| put(&memory, INDIRECT, at as u64, *raw));
        headers.iter().enumerate().for_each(|(at, (kind, sector))| header(&memory, HEADERS + at as u64 * 16, *kind, *sector));
        let Ok((request, segments)) = read(&memory, head, false, false) else { return Ok(()) };
        let named = |writable: bool, at: u64, len: u32| {
            table.iter().chain(&indirect).any(|(addr, of, flags, _)| {
                (flags & WRITE != 0) == writable && *addr <= at && at - addr + u64::from(len) <= u64::from(*of)
            })
        };
        prop_assert!(named(true, request.status.0, 1), "no descriptor has the status byte");
        prop_assert!(segments.len() <= MAX_SEGMENTS);
        let bytes: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
        prop_assert!(segments.iter().all(|segment| segment.len > 0 && segment.iova.0.checked_add(segment.len.into()).is_some()));
        match request.action {
            Action::Drive(Op::Read { first, blocks }) => {
                prop_assert!(blocks > 0 && first + u64::from(blocks) <= 1000);
                prop_assert_eq!(bytes, u64::from(blocks) * 512);
                prop_assert_eq!(u64::from(request.written), bytes);
                prop_assert!(segments.iter().all(|segment| named(true, segment.iova.0, segment.len)));
            }
            Action::Drive(Op::Write { first, blocks, .. }) => {
                prop_assert!(blocks > 0 && first + u64::from(blocks) <= 1000);
                prop_assert_eq!((bytes, request.written), (u64::from(blocks) * 512, 0));
                prop_assert!(segments.iter().all(|segment| named(false, segment.iova.0, segment.len)));
            }
            Action::Drive(Op::WriteZeroes { first, blocks, .. } | Op::Discard { first, blocks }) => {
                prop_assert!(blocks > 0 && first + u64::from(blocks) <= 1000);
                prop_assert!(segments.is_empty());
            }
            Action::Id => prop_assert!(segments.iter().all(|segment| named(true, segment.iova.0, segment.len))),
            Action::Drive(Op::Flush) | Action::Status(_) => prop_assert!(segments.is_empty()),
        }
    }

    /// A request is parsed alike, whatever pieces it is in.
    #[test]
    fn request_is_independent_of_its_framing(
        cuts in proptest::collection::btree_set(1..16u32, 0..5),
        data in proptest::collection::btree_set((1..8u32).prop_map(|n| n * 128), 0..6),
        out in any::<bool>(),
        joined in any::<bool>(),
        sector in 0..998u64,
    ) {
        let memory = memory();
        let kind = if out { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        header(&memory, HEADERS, kind, sector);
        let cut = |from: u64, len: u32, cuts: &std::collections::BTreeSet<u32>, direction: u16| {
            let borders: Vec<u32> = std::iter::once(0).chain(cuts.iter().copied()).chain([len]).collect();
            borders.windows(2).map(|two| (from + u64::from(two[0]), two[1] - two[0], direction)).collect::<Vec<_>>()
        };
        let direction = if out { 0 } else { WRITE };
        let mut pieces = cut(HEADERS, 16, &cuts, 0);
        pieces.extend(cut(0x4000, 1024, &data, direction));
        // The status may follow the data in the same piece.
        let together = joined && !out;
        match pieces.last_mut() {
            Some(last) if together => last.1 += 1,
            _ => pieces.push((0x3100, 1, WRITE)),
        }
        chain(&memory, &pieces);
        let (request, segments) = read(&memory, 0, false, false).unwrap();
        let op = if out { Op::Write { first: sector, blocks: 2, fua: false } } else { Op::Read { first: sector, blocks: 2 } };
        prop_assert_eq!(request.action, Action::Drive(op));
        prop_assert_eq!(request.status.0, if together { 0x4400 } else { 0x3100 });
        let bytes: Vec<u64> =
            segments.iter().flat_map(|segment| segment.iova.0..segment.iova.0 + u64::from(segment.len)).collect();
        prop_assert_eq!(bytes, (0x4000..0x4400).collect::<Vec<u64>>());
    }
}
