//! What a fence stops, and what brings the device back.

use libtest_mimic::Failed;
use passgate_backends::device::edu::POISON;
use passgate_backends::{Device, FenceStep, Kind, Nature, StopClass, Unmap};
use passgate_bindings::PAGE;
use passgate_bindings::vfio::config::Capabilities;
use rustix::io::Errno;

use super::bench::{Bench, at, bytes, check, fresh, guest_memfd, memfd, same};

type Outcome = Result<(), Failed>;

pub fn detach_stops_dma_and_attach_brings_it_back(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(1)?);
    engine.map(0, 1, &file)?;
    check("an engine alone in its group can be detached", engine.device.stop_class().has(FenceStep::Detach))?;
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
    check("type1 has no blocking domain", !engine.device.stop_class().has(FenceStep::Detach))?;
    let error = engine.device.fence(FenceStep::Detach).expect_err("no such fence");
    same("the error", error.errno(), Some(Errno::OPNOTSUPP))
}

/// What each device of the machine has, asked of the device itself: a driver of its kind may add a drain.
pub fn each_device_has_the_stop_class_that_it_shows(bench: &Bench) -> Outcome {
    let express = StopClass::MASTER | StopClass::RESET;
    let of =
        |variable| Ok::<_, Failed>(std::env::var(variable).map_err(|_| format!("{variable} is not set"))?);
    let (net, gpu) = (of("PASSGATE_VIRTIO_NET")?, of("PASSGATE_VIRTIO_GPU")?);
    let none = StopClass::empty();
    // QEMU puts virtio on the root bus as conventional PCI, without a reset; edu is no more anywhere.
    let classes = [(&bench.nvme, express), (&bench.igb, express), (&net, express)].into_iter();
    let plain = bench.edu.iter().chain([&gpu]).map(|name| (name, none));
    for (name, class) in classes.chain(plain) {
        let device = bench.raw(name, &[])?;
        let class = if bench.kind == Kind::Iommufd { class | StopClass::DETACH } else { class };
        same(name, device.stop_class(), class)?;
        same("one has ATS on, and none is a TDI", device.nature(), Nature { ats: *name == net, tdi: false })?;
        for step in [FenceStep::Drain, FenceStep::Stop] {
            let error = device.fence(step).expect_err("no such fence");
            same("the error", error.errno(), Some(Errno::OPNOTSUPP))?;
        }
    }
    Ok(())
}

/// What stands in the command register and in Device Status, by sysfs: past VFIO, past the device's driver.
/// QEMU's devices never leave a transaction pending, so that DMA really ends with it is for each driver's tests.
pub fn bus_master_off_is_off_and_attach_brings_it_back(bench: &Bench) -> Outcome {
    const MASTER: u32 = 1 << 2;
    for name in [&bench.nvme, &bench.igb] {
        let device = bench.raw(name, &[])?;
        let config = |at: u16| -> Result<u32, std::io::Error> {
            let bytes = std::fs::read(format!("/sys/bus/pci/devices/{name}/config"))?;
            let word = bytes.get(usize::from(at)..usize::from(at) + 4).unwrap_or(&[0xff; 4]);
            Ok(u32::from_le_bytes(word.try_into().unwrap_or([0xff; 4])))
        };
        check("on when opened", config(4)? & MASTER != 0)?;
        for _ in 0..2 {
            device.fence(FenceStep::Master)?;
            check("off", config(4)? & MASTER == 0)?;
            let found = Capabilities::find(4096, config)?;
            same("nothing pending", found.transactions_pending(config)?, Some(false))?;
            device.attach()?;
            check("on again", config(4)? & MASTER != 0)?;
        }
        device.fence(FenceStep::Reset)?;
        check("off after a reset", config(4)? & MASTER == 0)?;
        device.attach()?;
        check("and on again", config(4)? & MASTER != 0)?;
    }
    Ok(())
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
    let error = edu.fence(FenceStep::Reset).expect_err("no such fence");
    same("the error", error.errno(), Some(Errno::OPNOTSUPP))
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
