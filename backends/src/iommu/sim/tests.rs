use super::*;
use crate::{Device, FenceStep};

struct Rig {
    memory: Memory,
    sim: Sim,
    device: SimDevice,
    file: Arc<GuestFile>,
}

fn rig() -> Rig {
    let memory = Memory::new();
    let sim = Sim::new(Capabilities { max_mappings: 16, ..Sim::CAPABILITIES }, memory.clone()).unwrap();
    let device = sim.device("sim:0", StopClass::all(), Nature { ats: true, tdi: false });
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
    // Cutting a mapping in two fails and changes nothing; a superset with holes is fine.
    assert_eq!(rig.sim.unmap(iova(0, 5)), Unmap::Failed { errno: Errno::NOENT, bytes: 0 });
    assert_eq!(rig.sim.mapping_count(), 3);
    assert_eq!(rig.sim.unmap(iova(4, 40)), Unmap::Gone { bytes: 6 * PAGE });
    assert_eq!(rig.sim.unmap(iova(4, 40)), Unmap::Gone { bytes: 0 });
    assert_eq!((rig.sees(3), rig.sees(4)), (Some(23), None));
}

#[test]
fn refuses_what_the_kernel_refuses() {
    let rig = rig();
    rig.map(0, 4, 4, 0).unwrap();
    assert_eq!(errno(rig.map(3, 2, 1, 0)), Some(Errno::EXIST));
    assert_eq!(errno(rig.map(8, 2, 1, 63)), Some(Errno::INVAL));
    assert_eq!(errno(rig.map(8, 16, 1, 0)), Some(Errno::NOSPC));
    assert_eq!(errno(rig.sim.map(iova(8, 1), 0, &rig.file, Offset(0), true)), Some(Errno::INVAL));
    assert_eq!(rig.sim.mapping_count(), 1);
}

#[test]
fn each_fault_befalls_the_call_it_was_planned_for() {
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
    assert_eq!(errno(rig.device.fence(FenceStep::Detach)), Some(Errno::NODEV));
    assert_eq!((rig.sim.calls(Call::Unmap), rig.sim.all_calls()), (4, 7));
}

#[test]
fn a_late_flush_leaves_the_old_frame_in_reach_until_it_comes() {
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
fn what_is_stuck_ends_by_detach_or_reset_of_every_device() {
    let rig = rig();
    let other = rig.sim.device("sim:1", StopClass::all(), Nature::default());
    rig.map(0, 1, 1, 5).unwrap();
    rig.sim.fail_next(Call::Unmap, Fault::Stuck);
    assert!(matches!(rig.sim.unmap(iova(0, 1)), Unmap::InFlight { .. }));
    rig.sim.flush();
    rig.device.fence(FenceStep::Drain).unwrap();
    assert_eq!(rig.sees(0), Some(5));
    rig.device.fence(FenceStep::Reset).unwrap();
    assert_eq!((rig.sees(0), rig.ended()), (None, 0));
    assert!(other.dma(Iova(0)).is_some());
    other.fence(FenceStep::Detach).unwrap();
    assert_eq!((other.dma(Iova(0)), rig.ended()), (None, 1));
}

#[test]
fn a_silent_device_sees_nothing_until_it_is_attached_but_for_what_is_stuck() {
    for step in [FenceStep::Stop, FenceStep::Master] {
        let rig = rig();
        rig.map(0, 3, 1, 5).unwrap();
        rig.sim.fail_next(Call::Unmap, Fault::Late);
        assert!(matches!(rig.sim.unmap(iova(0, 1)), Unmap::InFlight { .. }));
        rig.device.fence(step).unwrap();
        assert_eq!((rig.ended(), rig.sees(0), rig.sees(1)), (1, None, None));
        // It has nothing in flight that could be late.
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
fn a_reset_device_does_dma_again() {
    let rig = rig();
    rig.map(0, 1, 1, 5).unwrap();
    rig.device.fence(FenceStep::Stop).unwrap();
    rig.device.fence(FenceStep::Reset).unwrap();
    assert_eq!(rig.sees(0), Some(5));
    rig.device.fence(FenceStep::Detach).unwrap();
    rig.device.fence(FenceStep::Reset).unwrap();
    assert_eq!(rig.sees(0), None);
}

#[test]
fn a_cached_translation_outlives_everything_but_detach_and_reset() {
    for last in [FenceStep::Detach, FenceStep::Reset] {
        let rig = rig();
        let plain = rig.sim.device("sim:1", StopClass::all(), Nature::default());
        rig.map(0, 1, 1, 5).unwrap();
        rig.sim.fail_next(Call::Unmap, Fault::Cached);
        assert_eq!(rig.sim.unmap(iova(0, 1)), Unmap::Gone { bytes: PAGE });
        rig.device.fence(FenceStep::Drain).unwrap();
        assert_eq!((rig.sim.flush(), rig.sim.unstick(), rig.sees(0)), (0, 0, Some(5)));
        assert_eq!(plain.dma(Iova(0)), None);
        rig.device.fence(FenceStep::Master).unwrap();
        assert_eq!(rig.sees(0), None);
        rig.device.attach().unwrap();
        assert_eq!(rig.sees(0), Some(5));
        rig.device.fence(last).unwrap();
        rig.device.attach().unwrap();
        assert_eq!(rig.sees(0), None);
    }
}

#[test]
fn a_detached_device_sees_nothing_until_it_is_attached() {
    let rig = rig();
    rig.map(0, 1, 1, 5).unwrap();
    rig.device.fence(FenceStep::Detach).unwrap();
    assert_eq!((rig.sees(0), rig.sim.mapping_count()), (None, 1));
    rig.sim.fail_next(Call::Attach, Fault::Errno(Errno::NODEV));
    assert_eq!(errno(rig.device.attach()), Some(Errno::NODEV));
    assert_eq!(rig.sees(0), None);
    rig.device.attach().unwrap();
    assert_eq!(rig.sees(0), Some(5));
}

#[test]
fn a_call_that_hangs_goes_on_when_it_is_released() {
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
