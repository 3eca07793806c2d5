//! Ranges removed by moving the devices to a page table without them.

use std::sync::Arc;

use libtest_mimic::Failed;
use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::iommu::iommufd::IommufdDomain;
use passgate_backends::{Assignment, Device, Domain, Step, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{PAGE, PageRange};
use passgate_exercise::edu::Edu;
use rustix::io::Errno;

use super::bench::{Bench, check, guest_memfd, memfd, range, same};
use super::cut::{pinned, reaches};

type Outcome = Result<(), Failed>;

/// Checks for each page whether every device reaches it.
fn reached(devices: &[Arc<dyn Device>], file: &GuestFile, pages: &[(u64, bool)]) -> Outcome {
    for device in devices {
        for (page, should) in pages {
            let what = format!("{} reaches page {page}: {should}", device.name());
            check(&what, reaches(&**device, *page, file)? == *should)?;
        }
    }
    Ok(())
}

pub fn replace_removes_its_ranges_and_preserves_the_rest(bench: &Bench) -> Outcome {
    removes_ranges(bench, &memfd(512)?)?;
    let file = guest_memfd(512)?;
    removes_ranges(bench, &file)?;
    same("references to the file", Arc::strong_count(&file), 1)
}

fn removes_ranges(bench: &Bench, file: &Arc<GuestFile>) -> Outcome {
    let Assignment { domain, devices, .. } = bench.assign(&[&bench.edu[0], &bench.nvme])?;
    let before = pinned()?;
    domain.map(range(0, 512), 256 * PAGE, file, Offset(0), true)?;
    let gone = [range(3, 1), range(5, 2), range(254, 4), range(511, 3)];
    same("replaced", domain.replace(&gone), Unmap::Gone { bytes: 8 * PAGE })?;
    same("pinned without the removed pages", pinned()? - before, 504 * PAGE)?;
    let holes = [(2, true), (3, false), (4, true), (6, false), (253, true), (257, false), (511, false)];
    reached(&devices, file, &holes)?;

    // Back to the first table, and out of a mapping that is the rest of another after the first replace.
    same("again", domain.replace(&[range(8, 1), range(510, 1)]), Unmap::Gone { bytes: 2 * PAGE })?;
    reached(&devices, file, &[(7, true), (8, false), (3, false), (509, true), (510, false)])?;
    same("an unmapped range", domain.replace(&[range(8, 1)]), Unmap::Gone { bytes: 0 })?;
    same("out of order", domain.replace(&[range(20, 1), range(10, 1)]), refused(Errno::INVAL))?;

    domain.map(range(8, 1), PAGE, file, Offset(8 * PAGE), true)?;
    reached(&devices, file, &[(8, true)])?;
    same("with holes on both sides", domain.unmap(range(3, 4)), Unmap::Gone { bytes: PAGE })?;
    same("all of it", domain.unmap(range(0, 600)), Unmap::Gone { bytes: (512 - 8 - 2 + 1 - 1) * PAGE })?;
    same("pinned", pinned()?, before)
}

fn refused(errno: Errno) -> Unmap {
    Unmap::Failed { errno, bytes: 0 }
}

/// A detached device is not attached by a replace; its attach puts it into the table that is active then.
pub fn detached_device_stays_detached_after_replace(bench: &Bench) -> Outcome {
    let Assignment { domain, devices, .. } = bench.assign(&[&bench.edu[0], &bench.edu[1]])?;
    let file = memfd(8)?;
    domain.map(range(0, 8), 8 * PAGE, &file, Offset(0), true)?;
    for hole in [2, 5] {
        devices[0].fence(Step::Detach)?;
        same("replaced", domain.replace(&[range(hole, 1)]), Unmap::Gone { bytes: PAGE })?;
        check("it stays detached", !reaches(&*devices[0], 0, &file)?)?;
        reached(&devices[1..], &file, &[(0, true), (hole, false)])?;
        devices[0].attach()?;
        reached(&devices[..1], &file, &[(0, true), (hole, false)])?;
    }
    Ok(())
}

/// A mapping in the idle IOAS over the MSI range prevents that devices are moved there: every device stays in the
/// active one, and nothing is reported as gone. Without that mapping the same replace succeeds.
pub fn device_that_cannot_move_fails_the_replace(bench: &Bench) -> Outcome {
    const MSI_ADDRESS: u64 = 0xfee0_0000;
    let iommufd = IommufdDomain::open(bench.tables)?;
    let domain: Arc<dyn Domain> = iommufd.clone();
    let engine = |name| -> Result<Arc<dyn Device>, Failed> {
        Ok(Arc::new(Edu::new(VfioDevice::open_cdev(name, &iommufd, &[])?, domain.clone())?))
    };
    let devices = [engine(&bench.edu[0])?, engine(&bench.edu[1])?];
    let (file, other) = (guest_memfd(8)?, memfd(1)?);
    domain.map(range(0, 8), 8 * PAGE, &file, Offset(0), true)?;
    let before = pinned()?;
    let msi = PageRange::new(MSI_ADDRESS, PAGE)?;
    for _ in 0..2 {
        let idle = iommufd.ioases()[1];
        iommufd.iommufd().map_file(idle, msi, &other, Offset(0), true)?;
        for _ in 0..2 {
            same("a replace", domain.replace(&[range(3, 2)]), refused(Errno::ADDRINUSE))?;
            same("the idle IOAS", iommufd.ioases()[1], idle)?;
            reached(&devices, &file, &[(0, true), (3, true), (7, true)])?;
        }
        same("the mapping over the MSI range", iommufd.iommufd().unmap(idle, msi), Ok(PAGE))?;
        same("a replace", domain.replace(&[range(3, 2)]), Unmap::Gone { bytes: 2 * PAGE })?;
        same("unpinned", before - pinned()?, 2 * PAGE)?;
        reached(&devices, &file, &[(2, true), (3, false), (4, false), (7, true)])?;
        domain.map(range(3, 2), PAGE, &file, Offset(3 * PAGE), true)?;
        reached(&devices, &file, &[(3, true), (4, true)])?;
    }
    Ok(())
}
