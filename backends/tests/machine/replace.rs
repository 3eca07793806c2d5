//! Ranges taken out by moving the devices to a page table without them.

use std::sync::Arc;

use libtest_mimic::Failed;
use passgate_backends::device::edu::Edu;
use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::iommu::iommufd::IommufdDomain;
use passgate_backends::{Assignment, Device, Domain, FenceStep, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};
use rustix::io::Errno;

use super::bench::{Bench, check, guest_memfd, memfd, range, same};
use super::cut::{pinned, reaches};

type Outcome = Result<(), Failed>;

/// Pages that are reached and pages that are not, by every device.
fn reached(devices: &[Arc<dyn Device>], file: &GuestFile, pages: &[(u64, bool)]) -> Outcome {
    for device in devices {
        for (page, should) in pages {
            let what = format!("{} reaches page {page}: {should}", device.name());
            check(&what, reaches(&**device, *page, file)? == *should)?;
        }
    }
    Ok(())
}

pub fn a_replace_takes_its_ranges_out_and_leaves_the_rest(bench: &Bench) -> Outcome {
    takes_out(bench, &memfd(512)?)?;
    let file = guest_memfd(512)?;
    takes_out(bench, &file)?;
    same("nothing holds the file", Arc::strong_count(&file), 1)
}

fn takes_out(bench: &Bench, file: &Arc<GuestFile>) -> Outcome {
    let Assignment { domain, devices, .. } = bench.assign(&[&bench.edu[0], &bench.nvme])?;
    let before = pinned()?;
    domain.map(range(0, 512), 256 * PAGE, file, Offset(0), true)?;
    let gone = [range(3, 1), range(5, 2), range(254, 4), range(511, 3)];
    same("replaced", domain.replace(&gone), Unmap::Gone { bytes: 8 * PAGE })?;
    same("what it took out is not pinned", pinned()? - before, 504 * PAGE)?;
    let holes = [(2, true), (3, false), (4, true), (6, false), (253, true), (257, false), (511, false)];
    reached(&devices, file, &holes)?;

    // Back to the first table, and from a mapping that the first replace has left over.
    same("again", domain.replace(&[range(8, 1), range(510, 1)]), Unmap::Gone { bytes: 2 * PAGE })?;
    reached(&devices, file, &[(7, true), (8, false), (3, false), (509, true), (510, false)])?;
    same("what is gone already", domain.replace(&[range(8, 1)]), Unmap::Gone { bytes: 0 })?;
    same("out of order", domain.replace(&[range(20, 1), range(10, 1)]), refused(Errno::INVAL))?;

    domain.map(range(8, 1), PAGE, file, Offset(8 * PAGE), true)?;
    reached(&devices, file, &[(8, true)])?;
    same("with holes on both sides", domain.unmap(range(3, 4)), Unmap::Gone { bytes: PAGE })?;
    same("all of it", domain.unmap(range(0, 600)), Unmap::Gone { bytes: (512 - 8 - 2 + 1 - 1) * PAGE })?;
    same("nothing is pinned", pinned()?, before)
}

fn refused(errno: Errno) -> Unmap {
    Unmap::Failed { errno, bytes: 0 }
}

/// A device that was fenced by a detach is not brought back by a replace; its attach brings it to the table that
/// is used now.
pub fn a_detached_device_stays_detached(bench: &Bench) -> Outcome {
    let Assignment { domain, devices, .. } = bench.assign(&[&bench.edu[0], &bench.edu[1]])?;
    let file = memfd(8)?;
    domain.map(range(0, 8), 8 * PAGE, &file, Offset(0), true)?;
    for hole in [2, 5] {
        devices[0].fence(FenceStep::Detach)?;
        same("replaced", domain.replace(&[range(hole, 1)]), Unmap::Gone { bytes: PAGE })?;
        check("it stays away", !reaches(&*devices[0], 0, &file)?)?;
        reached(&devices[1..], &file, &[(0, true), (hole, false)])?;
        devices[0].attach()?;
        reached(&devices[..1], &file, &[(0, true), (hole, false)])?;
    }
    Ok(())
}

/// Something stands in the idle table where interrupts are written to, so that no device can be moved there: every
/// device stays where it was, and nothing is said to be gone. Without it the same replace is made.
pub fn a_device_that_does_not_move_fails_the_replace(bench: &Bench) -> Outcome {
    const INTERRUPTS: u64 = 0xfee0_0000;
    let kept = IommufdDomain::open(bench.tables)?;
    let domain: Arc<dyn Domain> = kept.clone();
    let engine = |name| -> Result<Arc<dyn Device>, Failed> {
        Ok(Arc::new(Edu::new(VfioDevice::open_cdev(name, &kept, &[])?, domain.clone())?))
    };
    let devices = [engine(&bench.edu[0])?, engine(&bench.edu[1])?];
    let (file, other) = (guest_memfd(8)?, memfd(1)?);
    domain.map(range(0, 8), 8 * PAGE, &file, Offset(0), true)?;
    let before = pinned()?;
    let msi = PageRange::new(INTERRUPTS, PAGE)?;
    for _ in 0..2 {
        let idle = kept.ioases()[1];
        kept.iommufd().map_file(idle, msi, &other, Offset(0), true)?;
        for _ in 0..2 {
            same("a replace", domain.replace(&[range(3, 2)]), refused(Errno::ADDRINUSE))?;
            same("the devices are where they were", kept.ioases()[1], idle)?;
            reached(&devices, &file, &[(0, true), (3, true), (7, true)])?;
        }
        same("it stands in the way no more", kept.iommufd().unmap(idle, msi), Ok(PAGE))?;
        same("a replace", domain.replace(&[range(3, 2)]), Unmap::Gone { bytes: 2 * PAGE })?;
        same("what it took out is not pinned", before - pinned()?, 2 * PAGE)?;
        reached(&devices, &file, &[(2, true), (3, false), (4, false), (7, true)])?;
        domain.map(range(3, 2), PAGE, &file, Offset(3 * PAGE), true)?;
        reached(&devices, &file, &[(3, true), (4, true)])?;
    }
    Ok(())
}
