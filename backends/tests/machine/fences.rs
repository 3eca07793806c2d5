//! The effect of each fence, and of the attach after it.

use libtest_mimic::Failed;
use passgate_backends::{Device, DeviceTraits, Kind, Step, Steps, Unmap};
use passgate_bindings::PAGE;
use passgate_bindings::vfio::config::Capabilities;
use passgate_exercise::edu::POISON;
use rustix::io::Errno;

use super::bench::{Bench, at, bytes, check, fresh, guest_memfd, memfd, same};

type Outcome = Result<(), Failed>;

pub fn detach_stops_dma_and_attach_resumes_it(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(1)?);
    engine.map(0, 1, &file)?;
    check("an engine alone in its group can be detached", engine.device.stop_class().has(Step::Detach))?;
    check("DMA works before", engine.reaches(0, &file)?)?;
    for _ in 0..2 {
        engine.device.fence(Step::Detach)?;
        let content = fresh(64);
        file.write(0, &content)?;
        same("detached, a read returns poison", engine.sees(0, 64)?, vec![POISON; 64])?;
        engine.device.dma_write(at(0), &fresh(64))?;
        same("and a write changes nothing", bytes(&file, 0, 64)?, content)?;
        engine.device.attach()?;
        check("DMA works again", engine.reaches(0, &file)?)?;
    }
    same("the mapping was not changed", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })
}

/// An attach pins memory that is mapped by address again, through the address: so the file must still be mapped in this
/// process.
pub fn mapping_by_address_survives_detach_and_attach(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, guest_memfd(1)?);
    engine.map(0, 1, &file)?;
    let written = fresh(64);
    file.write(0, &written)?;
    drop(file);
    engine.device.fence(Step::Detach)?;
    engine.device.attach()?;
    same("the device reads", engine.sees(0, 64)?, written)?;
    same("unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })
}

pub fn detach_is_unsupported_on_type1(bench: &Bench) -> Outcome {
    let engine = bench.engine()?;
    check("type1 has no blocking domain", !engine.device.stop_class().has(Step::Detach))?;
    let error = engine.device.fence(Step::Detach).expect_err("no such fence");
    same("the error", error.errno(), Some(Errno::OPNOTSUPP))
}

/// The fences of each device without its driver, which may add a drain.
pub fn each_device_has_its_expected_stop_class(bench: &Bench) -> Outcome {
    let express = Steps::MASTER | Steps::RESET;
    let of =
        |variable| Ok::<_, Failed>(std::env::var(variable).map_err(|_| format!("{variable} is not set"))?);
    let (net, gpu) = (of("PASSGATE_VIRTIO_NET")?, of("PASSGATE_VIRTIO_GPU")?);
    let none = Steps::empty();
    // On the root bus QEMU's virtio devices are conventional PCI devices without a reset; edu always is.
    let classes = [(&bench.nvme, express), (&bench.igb, express), (&net, express)].into_iter();
    let plain = bench.edu.iter().chain([&gpu]).map(|name| (name, none));
    for (name, class) in classes.chain(plain) {
        let device = bench.raw(name, &[])?;
        let class = if bench.kind == Kind::Iommufd { class | Steps::DETACH } else { class };
        same(name, device.stop_class(), class)?;
        same(
            "one has ATS on, and none is a TDI",
            device.traits(),
            DeviceTraits { ats: *name == net, ..DeviceTraits::default() },
        )?;
        for step in [Step::Drain, Step::Stop] {
            let error = device.fence(step).expect_err("no such fence");
            same("the error", error.errno(), Some(Errno::OPNOTSUPP))?;
        }
    }
    Ok(())
}

/// Checks the Command register and Device Status through sysfs, independently of VFIO. QEMU's devices never have a
/// pending transaction, so the tests of each driver check that DMA really ends.
pub fn bus_master_off_takes_effect_and_attach_reverts_it(bench: &Bench) -> Outcome {
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
            device.fence(Step::Master)?;
            check("off", config(4)? & MASTER == 0)?;
            let found = Capabilities::find(4096, config)?;
            same("nothing pending", found.transactions_pending(config)?, Some(false))?;
            device.attach()?;
            check("on again", config(4)? & MASTER != 0)?;
        }
        device.fence(Step::Reset)?;
        check("off after a reset", config(4)? & MASTER == 0)?;
        device.attach()?;
        check("and on again", config(4)? & MASTER != 0)?;
    }
    Ok(())
}

pub fn reset_is_offered_where_the_device_has_it(bench: &Bench) -> Outcome {
    let set = bench.assign(&[&bench.nvme, &bench.igb, &bench.edu[0]])?;
    for device in &set.devices[..2] {
        check("it has a reset", device.stop_class().has(Step::Reset))?;
        device.fence(Step::Reset)?;
        device.attach()?;
    }
    let edu = &set.devices[2];
    check("edu has no reset", !edu.stop_class().has(Step::Reset))?;
    let error = edu.fence(Step::Reset).expect_err("no such fence");
    same("the error", error.errno(), Some(Errno::OPNOTSUPP))
}

pub fn closed_device_can_be_opened_again(bench: &Bench) -> Outcome {
    for _ in 0..3 {
        let (engine, file) = (bench.engine()?, memfd(1)?);
        engine.map(0, 1, &file)?;
        check("DMA works", engine.reaches(0, &file)?)?;
        if bench.kind == Kind::Iommufd {
            engine.device.fence(Step::Detach)?; // closed while fenced, and while its memory is mapped
        }
    }
    Ok(())
}
