use passgate_backends::{Device, Step};
use passgate_bindings::PAGE;
use rustix::io::Errno;

use super::*;

struct Rig {
    memory: Memory,
    sim: Sim,
    device: SimDevice,
    file: Arc<GuestFile>,
}

fn rig() -> Rig {
    rig_with(Sim::CAPABILITIES)
}

/// Makes a domain that supports cut and replace.
fn cutting_rig() -> Rig {
    rig_with(DomainCaps { cut: true, replace: true, ..Sim::CAPABILITIES })
}

fn rig_with(capabilities: DomainCaps) -> Rig {
    let memory = Memory::new();
    let sim = Sim::new(DomainCaps { max_mappings: 16, ..capabilities }, memory.clone()).unwrap();
    let device = sim.device("sim:0", Steps::all(), DeviceTraits { ats: true, ..DeviceTraits::default() });
    let file = Arc::new(GuestFile::memfd("sim", 64 * PAGE).unwrap());
    Rig { memory, sim, device, file }
}

impl Rig {
    fn map(&self, page: u64, pages: u64, piece: u64, from: u64) -> Result<()> {
        self.sim.map(iova(page, pages), piece * PAGE, &self.file, Offset(from * PAGE), true)
    }

    fn sees(&self, page: u64) -> Option<u64> {
        self.device.dma(Iova(page * PAGE)).map(|seen| seen.offset.0 / PAGE)
    }

    /// Returns the first page and the number of pages of each mapping.
    fn table(&self) -> Vec<(u64, u64)> {
        self.sim.mappings().iter().map(|m| (m.iova.start().0 / PAGE, m.iova.pages())).collect()
    }

    /// Returns the pages below 16 that the device reaches.
    fn reach(&self) -> Vec<u64> {
        (0..16).filter(|page| self.sees(*page).is_some()).collect()
    }

    fn ended(&self) -> usize {
        let mut ended = Vec::new();
        self.sim.poll(&mut ended);
        ended.len()
    }
}

fn iova(page: u64, pages: u64) -> PageRange<Iova> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

fn errno(result: Result<()>) -> Option<Errno> {
    result.err().and_then(|error| error.errno())
}

#[test]
fn maps_in_pieces_and_unmaps_whole_ones_only() {
    let rig = rig();
    rig.map(0, 10, 4, 20).unwrap();
    assert_eq!(rig.sim.mapping_count(), 3);
    assert_eq!((rig.sees(0), rig.sees(9), rig.sees(10)), (Some(20), Some(29), None));
    // An unmap that would cut a mapping fails and changes nothing; one of a superset with unmapped gaps succeeds.
    assert_eq!(rig.sim.unmap(iova(0, 5)), Unmap::Failed { errno: Errno::NOENT, bytes: 0 });
    assert_eq!(rig.sim.mapping_count(), 3);
    assert_eq!(rig.sim.unmap(iova(4, 40)), Unmap::Gone { bytes: 6 * PAGE });
    assert_eq!(rig.sim.unmap(iova(4, 40)), Unmap::Gone { bytes: 0 });
    assert_eq!((rig.sees(3), rig.sees(4)), (Some(23), None));
}

#[test]
fn mappings_lie_on_the_grid_of_their_piece() {
    let rig = rig();
    rig.map(3, 10, 4, 20).unwrap();
    assert_eq!(rig.table(), [(3, 1), (4, 4), (8, 4), (12, 1)]);
    assert_eq!((rig.sees(3), rig.sees(4), rig.sees(12)), (Some(20), Some(21), Some(29)));
    assert_eq!(rig.sim.unmap(iova(4, 4)), Unmap::Gone { bytes: 4 * PAGE });
}

#[test]
fn cut_preserves_the_rest_with_its_frames() {
    let rig = cutting_rig();
    rig.map(0, 8, 8, 20).unwrap();
    let file = FileKey::of(&rig.file).unwrap();
    rig.memory.replace(file, PageRange::new(21 * PAGE, PAGE).unwrap(), 9);
    assert_eq!(rig.sim.unmap(iova(2, 3)), Unmap::Gone { bytes: 3 * PAGE });
    assert_eq!(rig.table(), [(0, 2), (5, 3)]);
    assert_eq!((rig.sees(1), rig.sees(2), rig.sees(4), rig.sees(5)), (Some(21), None, None, Some(25)));
    let pinned: Vec<_> = rig.sim.mappings().iter().map(|mapping| mapping.since).collect();
    assert!(pinned.iter().all(|since| *since < rig.memory.now()), "neither part was pinned again");
    // Across both parts, from the middle of one into the middle of the other.
    assert_eq!(rig.sim.unmap(iova(1, 5)), Unmap::Gone { bytes: 2 * PAGE });
    assert_eq!(rig.table(), [(0, 1), (6, 2)]);
    rig.map(1, 5, 8, 40).unwrap();
    assert_eq!(rig.reach(), [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn replace_removes_exactly_its_ranges() {
    let rig = cutting_rig();
    rig.map(0, 8, 8, 20).unwrap();
    rig.map(8, 4, 2, 40).unwrap();
    let gone = [iova(1, 1), iova(3, 2), iova(7, 2), iova(12, 2)];
    assert_eq!(rig.sim.replace(&gone), Unmap::Gone { bytes: 5 * PAGE });
    assert_eq!(rig.table(), [(0, 1), (2, 1), (5, 2), (9, 1), (10, 2)]);
    assert_eq!((rig.sees(2), rig.sees(6), rig.sees(9)), (Some(22), Some(26), Some(41)));
    assert_eq!((rig.sim.calls(Call::Replace), rig.sim.calls(Call::Unmap)), (1, 0));
    assert_eq!(rig.sim.replace(&[]), Unmap::Gone { bytes: 0 });
    for wrong in [[iova(2, 1), iova(0, 1)], [iova(0, 2), iova(1, 1)]] {
        assert_eq!(rig.sim.replace(&wrong), Unmap::Failed { errno: Errno::INVAL, bytes: 0 });
    }
    assert_eq!(rig.table().len(), 5);
}

#[test]
fn unsupported_replace_returns_enosys_and_changes_nothing() {
    let rig = rig();
    rig.map(0, 4, 4, 0).unwrap();
    assert_eq!(rig.sim.replace(&[iova(0, 4)]), Unmap::Failed { errno: Errno::NOSYS, bytes: 0 });
    assert_eq!(rig.reach(), [0, 1, 2, 3]);
}

#[test]
fn unmap_faults_apply_to_cut_and_replace() {
    for call in [Call::Unmap, Call::Replace] {
        let take = |rig: &Rig| match call {
            Call::Unmap => rig.sim.unmap(iova(1, 6)),
            _ => rig.sim.replace(&[iova(1, 2), iova(5, 2)]),
        };
        let after = |fault| {
            let rig = cutting_rig();
            rig.map(0, 4, 4, 20).unwrap();
            rig.map(4, 4, 4, 30).unwrap();
            rig.sim.fail_next(call, fault);
            let went = take(&rig);
            (rig, went)
        };
        let both: u64 = if call == Call::Unmap { 6 } else { 4 };
        let (rig, went) = after(Fault::Errno(Errno::BUSY));
        assert_eq!((went, rig.reach().len()), (Unmap::Failed { errno: Errno::BUSY, bytes: 0 }, 8));
        let (rig, went) = after(Fault::HalfUnmapped(Errno::IO));
        assert_eq!(went, Unmap::Failed { errno: Errno::IO, bytes: 0 });
        assert_eq!((rig.sees(0), rig.sees(1), rig.sees(5)), (Some(20), None, Some(31)));
        let (rig, went) = after(Fault::Short);
        assert_eq!((went, rig.sees(5)), (Unmap::Gone { bytes: both / 2 * PAGE }, Some(31)));
        for late in [Fault::Late, Fault::Stuck] {
            let (rig, went) = after(late);
            assert!(matches!(went, Unmap::InFlight { bytes, .. } if bytes == both * PAGE), "{went:?}");
            assert_eq!((rig.reach().len(), rig.table()[0]), (8, (0, 1)), "the stale translation is used");
            rig.sim.unstick();
            assert_eq!((rig.ended(), rig.reach().len() as u64), (1, 8 - both));
        }
        let (rig, went) = after(Fault::Cached);
        assert_eq!((went, rig.reach().len()), (Unmap::Gone { bytes: both * PAGE }, 8));
        rig.device.fence(Step::Reset).unwrap();
        assert_eq!(rig.reach().len() as u64, 8 - both);
    }
}

#[test]
fn map_refuses_overlap_bounds_limit_and_zero_piece() {
    let rig = rig();
    rig.map(0, 4, 4, 0).unwrap();
    assert_eq!(errno(rig.map(3, 2, 1, 0)), Some(Errno::EXIST));
    assert_eq!(errno(rig.map(8, 2, 1, 63)), Some(Errno::INVAL));
    assert_eq!(errno(rig.map(8, 16, 1, 0)), Some(Errno::NOSPC));
    assert_eq!(errno(rig.sim.map(iova(8, 1), 0, &rig.file, Offset(0), true)), Some(Errno::INVAL));
    assert_eq!(rig.sim.mapping_count(), 1);
}

#[test]
fn each_fault_hits_its_planned_call() {
    let rig = rig();
    let plan = FaultPlan::new()
        .at(Call::Map, 2, Fault::HalfMapped(Errno::IO))
        .at(Call::Unmap, 1, Fault::Errno(Errno::BUSY))
        .at(Call::Unmap, 2, Fault::HalfUnmapped(Errno::IO))
        .at(Call::Unmap, 3, Fault::Short)
        .at_any(7, Fault::Errno(Errno::NODEV));
    rig.sim.plan(plan);
    rig.map(0, 4, 1, 0).unwrap();
    assert!(matches!(rig.map(8, 4, 1, 8), Err(Error::HalfMapped { .. })));
    assert_eq!((rig.sees(9), rig.sees(10)), (Some(9), None));
    assert_eq!(rig.sim.unmap(iova(0, 4)), Unmap::Failed { errno: Errno::BUSY, bytes: 0 });
    assert_eq!(rig.sim.unmap(iova(0, 4)), Unmap::Failed { errno: Errno::IO, bytes: 0 });
    assert_eq!((rig.sees(1), rig.sees(2)), (None, Some(2)));
    assert_eq!(rig.sim.unmap(iova(0, 4)), Unmap::Gone { bytes: PAGE });
    assert_eq!(rig.sim.unmap(iova(0, 4)), Unmap::Gone { bytes: PAGE });
    assert_eq!(errno(rig.device.fence(Step::Detach)), Some(Errno::NODEV));
    assert_eq!((rig.sim.calls(Call::Unmap), rig.sim.all_calls()), (4, 7));
}

#[test]
fn late_flush_leaves_the_old_frame_reachable() {
    let rig = rig();
    rig.map(0, 1, 1, 5).unwrap();
    rig.sim.fail_next(Call::Unmap, Fault::Late);
    assert!(matches!(rig.sim.unmap(iova(0, 1)), Unmap::InFlight { bytes: PAGE, .. }));
    let page = PageRange::new(5 * PAGE, PAGE).unwrap();
    rig.memory.replace(FileKey::of(&rig.file).unwrap(), page, 0);
    let seen = rig.device.dma(Iova(0)).unwrap();
    assert!(rig.memory.replaced_since(seen.file, page, seen.since));
    assert_eq!(rig.ended(), 0);
    assert_eq!(rig.sim.flush(), 1);
    assert_eq!((rig.ended(), rig.ended(), rig.sees(0)), (1, 0, None));
}

#[test]
fn stuck_operations_end_by_detach_or_reset_of_every_device() {
    let rig = rig();
    let other = rig.sim.device("sim:1", Steps::all(), DeviceTraits::default());
    rig.map(0, 1, 1, 5).unwrap();
    rig.sim.fail_next(Call::Unmap, Fault::Stuck);
    assert!(matches!(rig.sim.unmap(iova(0, 1)), Unmap::InFlight { .. }));
    rig.sim.flush();
    rig.device.fence(Step::Drain).unwrap();
    assert_eq!(rig.sees(0), Some(5));
    rig.device.fence(Step::Reset).unwrap();
    assert_eq!((rig.sees(0), rig.ended()), (None, 0));
    assert!(other.dma(Iova(0)).is_some());
    other.fence(Step::Detach).unwrap();
    assert_eq!((other.dma(Iova(0)), rig.ended()), (None, 1));
}

#[test]
fn quiesced_device_does_only_stuck_dma_until_attach() {
    for step in [Step::Stop, Step::Master] {
        let rig = rig();
        rig.map(0, 3, 1, 5).unwrap();
        rig.sim.fail_next(Call::Unmap, Fault::Late);
        assert!(matches!(rig.sim.unmap(iova(0, 1)), Unmap::InFlight { .. }));
        rig.device.fence(step).unwrap();
        assert_eq!((rig.ended(), rig.sees(0), rig.sees(1)), (1, None, None));
        // A quiesced device has nothing in flight that a late flush could leave.
        rig.sim.fail_next(Call::Unmap, Fault::Late);
        assert_eq!(rig.sim.unmap(iova(1, 1)), Unmap::Gone { bytes: PAGE });
        rig.device.attach().unwrap();
        assert_eq!((rig.sees(1), rig.sees(2)), (None, Some(7)));
        rig.sim.fail_next(Call::Unmap, Fault::Stuck);
        assert!(matches!(rig.sim.unmap(iova(2, 1)), Unmap::InFlight { .. }));
        assert_eq!(errno(rig.device.fence(step)), Some(Errno::TIMEDOUT));
        assert_eq!((rig.ended(), rig.sees(2)), (0, Some(7)));
    }
}

#[test]
fn reset_device_does_dma_again() {
    let rig = rig();
    rig.map(0, 1, 1, 5).unwrap();
    rig.device.fence(Step::Stop).unwrap();
    rig.device.fence(Step::Reset).unwrap();
    assert_eq!(rig.sees(0), Some(5));
    rig.device.fence(Step::Detach).unwrap();
    rig.device.fence(Step::Reset).unwrap();
    assert_eq!(rig.sees(0), None);
}

#[test]
fn cached_translation_ends_only_by_detach_or_reset() {
    for last in [Step::Detach, Step::Reset] {
        let rig = rig();
        let plain = rig.sim.device("sim:1", Steps::all(), DeviceTraits::default());
        rig.map(0, 1, 1, 5).unwrap();
        rig.sim.fail_next(Call::Unmap, Fault::Cached);
        assert_eq!(rig.sim.unmap(iova(0, 1)), Unmap::Gone { bytes: PAGE });
        rig.device.fence(Step::Drain).unwrap();
        assert_eq!((rig.sim.flush(), rig.sim.unstick(), rig.sees(0)), (0, 0, Some(5)));
        assert_eq!(plain.dma(Iova(0)), None);
        rig.device.fence(Step::Master).unwrap();
        assert_eq!(rig.sees(0), None);
        rig.device.attach().unwrap();
        assert_eq!(rig.sees(0), Some(5));
        rig.device.fence(last).unwrap();
        rig.device.attach().unwrap();
        assert_eq!(rig.sees(0), None);
    }
}

#[test]
fn detached_device_reaches_nothing_until_attach() {
    let rig = rig();
    rig.map(0, 1, 1, 5).unwrap();
    rig.device.fence(Step::Detach).unwrap();
    assert_eq!((rig.sees(0), rig.sim.mapping_count()), (None, 1));
    rig.sim.fail_next(Call::Attach, Fault::Errno(Errno::NODEV));
    assert_eq!(errno(rig.device.attach()), Some(Errno::NODEV));
    assert_eq!(rig.sees(0), None);
    rig.device.attach().unwrap();
    assert_eq!(rig.sees(0), Some(5));
}

#[test]
fn hanging_call_continues_after_release() {
    let rig = rig();
    rig.map(0, 1, 1, 5).unwrap();
    rig.sim.fail_next(Call::Unmap, Fault::Hang);
    let sim = rig.sim.clone();
    let call = std::thread::spawn(move || sim.unmap(iova(0, 1)));
    while rig.sim.hanging() == 0 {
        std::thread::yield_now();
    }
    assert_eq!(rig.sees(0), Some(5));
    rig.sim.release();
    assert_eq!(call.join().unwrap(), Unmap::Gone { bytes: PAGE });
    assert_eq!((rig.sees(0), rig.sim.hanging()), (None, 0));
}

#[test]
fn dma_on_demand_moves_the_bytes_of_the_file() {
    let rig = rig();
    rig.map(0, 2, 1, 5).unwrap();
    rig.device.dma_write(Iova(PAGE - 2), b"over").unwrap();
    let mut bytes = [0; 4];
    rig.file.read(6 * PAGE - 2, &mut bytes).unwrap();
    assert_eq!(&bytes, b"over");
    assert_eq!(rig.device.dma_read(Iova(PAGE - 2), 4).unwrap(), b"over");
    assert_eq!(rig.device.dma_read(Iova(2 * PAGE - 2), 4).unwrap_err().errno(), Some(Errno::FAULT));
}
