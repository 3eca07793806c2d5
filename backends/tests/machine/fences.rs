//! What a fence stops, and what brings the device back.

use libtest_mimic::Failed;
use passgate_backends::device::edu::POISON;
use passgate_backends::{FenceStep, Kind, StopClass, Unmap};
use passgate_bindings::PAGE;
use rustix::io::Errno;

use super::bench::{Bench, at, bytes, check, fresh, guest_memfd, memfd, same};

type Outcome = Result<(), Failed>;

pub fn detach_stops_dma_and_attach_brings_it_back(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(1)?);
    engine.map(0, 1, &file)?;
    check("an engine alone in its group can be detached", engine.device.stop_class() == StopClass::DETACH)?;
    check("DMA goes before", engine.reaches(0, &file)?)?;
    for _ in 0..2 {
        engine.device.fence(FenceStep::Detach)?;
        let kept = fresh(64);
        file.write(0, &kept)?;
        same("detached, a read brings poison", engine.sees(0, 64)?, vec![POISON; 64])?;
        engine.device.dma_write(at(0), &fresh(64))?;
        same("and a write changes nothing", bytes(&file, 0, 64)?, kept)?;
        engine.device.attach()?;
        check("DMA goes again", engine.reaches(0, &file)?)?;
    }
    same("the mapping was there all along", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })
}

/// An attach pins what is mapped by address once more, through the address: the window must still be there.
pub fn a_window_stays_open_for_the_next_attach(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, guest_memfd(1)?);
    engine.map(0, 1, &file)?;
    let written = fresh(64);
    file.write(0, &written)?;
    drop(file);
    engine.device.fence(FenceStep::Detach)?;
    engine.device.attach()?;
    same("the device reads", engine.sees(0, 64)?, written)?;
    same("unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })
}

pub fn detach_is_unsupported(bench: &Bench) -> Outcome {
    let engine = bench.engine()?;
    check("type1 has no blocking domain", engine.device.stop_class() == StopClass::empty())?;
    let error = engine.device.fence(FenceStep::Detach).expect_err("no such fence");
    same("the error", error.errno(), Some(Errno::OPNOTSUPP))
}

pub fn reset_is_offered_where_the_device_has_it(bench: &Bench) -> Outcome {
    let set = bench.assign(&[&bench.nvme, &bench.igb, &bench.edu[0]])?;
    for device in &set.devices[..2] {
        check("it resets", device.stop_class().has(FenceStep::Reset))?;
        device.fence(FenceStep::Reset)?;
        device.attach()?;
    }
    let edu = &set.devices[2];
    check("edu has no reset", !edu.stop_class().has(FenceStep::Reset))?;
    for step in [FenceStep::Reset, FenceStep::Drain] {
        let error = edu.fence(step).expect_err("no such fence");
        same("the error", error.errno(), Some(Errno::OPNOTSUPP))?;
    }
    Ok(())
}

pub fn a_closed_device_can_be_opened_again(bench: &Bench) -> Outcome {
    for _ in 0..3 {
        let (engine, file) = (bench.engine()?, memfd(1)?);
        engine.map(0, 1, &file)?;
        check("DMA goes", engine.reaches(0, &file)?)?;
        if bench.kind == Kind::Iommufd {
            engine.device.fence(FenceStep::Detach)?; // closed while fenced, and while its memory is mapped
        }
    }
    Ok(())
}
