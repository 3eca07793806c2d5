//! The calls of `bindings` that no backend uses, or uses only in part, checked against their documentation.

use std::path::Path;
use std::sync::Arc;

use libtest_mimic::Failed;
use passgate_backends::iommu::Domain;
use passgate_backends::iommu::type1::Type1Domain;
use passgate_bindings::iommufd::{IoasId, Iommufd, RlimitMode};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::vfio::device::Feature;
use passgate_bindings::vfio::pci::{PciDevice, SYSFS};
use passgate_bindings::vfio::{Cdev, Container, Group};
use passgate_bindings::{Iova, PAGE, PageRange};
use rustix::event::EventfdFlags;
use rustix::io::Errno;

use super::bench::{Bench, at, check, guest_memfd, memfd, range, same};

type Outcome = Result<(), Failed>;

fn pci(name: &str) -> Result<PciDevice, Failed> {
    Ok(PciDevice::find(Path::new(SYSFS), name.parse()?).ok_or("no such device")?)
}

/// Makes an iommufd with one IOAS and a device attached to it.
fn attached(bench: &Bench) -> Result<(Cdev, Iommufd, IoasId), Failed> {
    let (cdev, iommufd) = (Cdev::open(&pci(&bench.edu[0])?)?, Iommufd::open()?);
    let ioas = iommufd.ioas_alloc()?;
    cdev.bind(&iommufd)?;
    cdev.attach(ioas)?;
    Ok((cdev, iommufd, ioas))
}

pub fn ranges_and_options_of_an_ioas(bench: &Bench) -> Outcome {
    let iommufd = Iommufd::open()?;
    iommufd.set_rlimit_mode(RlimitMode::Process)?;
    let ioas = iommufd.ioas_alloc()?;
    let all = iommufd.iova_ranges(ioas)?;
    same("an empty IOAS maps everything", all.ranges, vec![Iova(0)..=Iova(u64::MAX)])?;
    check("huge pages by default", iommufd.huge_pages(ioas)?)?;
    iommufd.set_huge_pages(ioas, false)?;
    check("and not when switched off", !iommufd.huge_pages(ioas)?)?;

    let (_cdev, iommufd, ioas) = attached(bench)?;
    let narrow = iommufd.iova_ranges(ioas)?;
    check("a device narrows the ranges", narrow.ranges.len() > 1)?;
    let msi = Iova(0xfee0_0000);
    check("the MSI range is excluded", !narrow.ranges.iter().any(|range| range.contains(&msi)))?;
    iommufd.allow_iovas(ioas, &[range(0, 16)])?;
    let refused = iommufd.allow_iovas(ioas, &[PageRange::new(msi.0, PAGE)?]).unwrap_err();
    same("a reserved range cannot be allowed", refused.errno, Errno::ADDRINUSE)?;
    iommufd.allow_iovas(ioas, &[])?;
    iommufd.map_file(ioas, range(0, 1), &*memfd(1)?, Offset(0), true)?;
    same("too late", iommufd.set_huge_pages(ioas, false).unwrap_err().errno, Errno::INVAL)
}

pub fn copy_maps_a_part_of_a_mapping(bench: &Bench) -> Outcome {
    let (_cdev, iommufd, ioas) = attached(bench)?;
    let (file, other) = (guest_memfd(4)?, iommufd.ioas_alloc()?);
    iommufd.map(ioas, range(0, 4), &file, Offset(0), true)?;
    iommufd.copy((ioas, range(1, 2)), (other, at(100)), true)?;
    same("the original is unmapped", iommufd.unmap(ioas, range(0, 4)), Ok(4 * PAGE))?;
    check("the copy has a reference to the file", Arc::strong_count(&file) == 2)?;
    same("the copy is unmapped", iommufd.unmap(other, range(0, 200)), Ok(2 * PAGE))?;
    check("no reference remains", Arc::strong_count(&file) == 1)?;
    let nothing = iommufd.unmap(other, range(0, 200)).unwrap_err();
    same("nothing is mapped", (nothing.errno, nothing.partial), (Errno::NOENT, 0))
}

pub fn cut_preserves_adjacent_pages(bench: &Bench) -> Outcome {
    let (cdev, iommufd) = (Cdev::open(&pci(&bench.edu[0])?)?, Iommufd::open()?);
    same("no compatibility IOAS", iommufd.compat_ioas().unwrap_err().errno, Errno::NODEV)?;
    let ioas = iommufd.ioas_alloc()?;
    iommufd.set_compat_ioas(ioas)?;
    same("the compatibility IOAS", iommufd.compat_ioas(), Ok(ioas))?;
    iommufd.set_huge_pages(ioas, false)?;
    cdev.bind(&iommufd)?;
    cdev.attach(ioas)?;
    let file = guest_memfd(8)?;
    iommufd.map(ioas, range(0, 8), &file, Offset(0), true)?;
    same("a page out of eight", iommufd.cut(range(3, 1)), Ok(PAGE))?;
    same("the same again", iommufd.cut(range(3, 1)), Ok(0))?;
    same("both pieces", iommufd.unmap(ioas, range(0, 8)), Ok(7 * PAGE))?;
    check("no reference to the file remains", Arc::strong_count(&file) == 1)
}

pub fn change_process_works_for_file_mappings_only(_: &Bench) -> Outcome {
    let iommufd = Iommufd::open()?;
    let (ioas, file) = (iommufd.ioas_alloc()?, memfd(2)?);
    iommufd.map_file(ioas, range(0, 1), &file, Offset(0), true)?;
    iommufd.change_process()?;
    iommufd.map(ioas, range(1, 1), &file, Offset(0), true)?;
    same("by address", iommufd.change_process().unwrap_err().errno, Errno::INVAL)?;
    iommufd.ioas_destroy(ioas)?;
    check("no reference to the file remains", Arc::strong_count(&file) == 1)
}

pub fn attach_moves_a_device_between_spaces(bench: &Bench) -> Outcome {
    let (cdev, iommufd, ioas) = attached(bench)?;
    let other = iommufd.ioas_alloc()?;
    cdev.attach(other)?;
    iommufd.ioas_destroy(ioas)?;
    same("in use", iommufd.ioas_destroy(other).unwrap_err().errno, Errno::BUSY)?;
    cdev.detach()?;
    iommufd.ioas_destroy(other)?;
    same("bound already", cdev.bind(&iommufd).unwrap_err().errno, Errno::INVAL)
}

pub fn interrupts_features_and_registers(bench: &Bench) -> Outcome {
    let (cdev, iommufd) = (Cdev::open(&pci(&bench.nvme)?)?, Iommufd::open()?);
    same("before it is bound", cdev.device().info().unwrap_err().errno, Errno::INVAL)?;
    cdev.bind(&iommufd)?;
    let device = cdev.device();
    let info = device.info()?;
    check("it has a reset", info.resets())?;

    let (bar, config) = (device.region(0)?, device.region(7)?);
    let (mut vendor, mut version) = ([0; 2], [0; 4]);
    device.read(config, 0, &mut vendor)?;
    same("QEMU's vendor id", vendor, [0x36, 0x1b])?;
    device.read(bar, 8, &mut version)?;
    same("NVMe 1.4", u32::from_le_bytes(version), 0x0001_0400)?;
    let beyond = device.read(bar, bar.size, &mut version).unwrap_err();
    same("beyond the BAR", (beyond.errno, beyond.partial), (Errno::INVAL, 0))?;

    const MSIX: u32 = 2;
    let vectors = device.irq_info(MSIX)?.count;
    check("it has MSI-X", vectors > 2)?;
    let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    use std::os::fd::AsFd;
    device.set_irqs(MSIX, 0, &[Some(event.as_fd()), None, Some(event.as_fd())])?;
    device.set_irqs(MSIX, 1, &[Some(event.as_fd())])?;
    let many = device.set_irqs(MSIX, vectors, &[Some(event.as_fd())]).unwrap_err();
    same("one too many", many.errno, Errno::INVAL)?;
    device.disable_irqs(MSIX)?;

    let none = device.feature_probe(Feature::BUS_MASTER, false, true).unwrap_err();
    same("vfio-pci sets bus mastering in configuration space", none.errno, Errno::NOTTY)?;
    let none = device.feature_get(Feature::MIGRATION, &mut [0; 8]).unwrap_err();
    same("it does not migrate", none.errno, Errno::NOTTY)?;
    same("and so cannot be stopped that way", device.can_stop(), Ok(false))?;
    same("and has no migration state", device.migration_state().unwrap_err().errno, Errno::NOTTY)
}

pub fn container_reports_its_capabilities(bench: &Bench) -> Outcome {
    let device = pci(&bench.edu[0])?;
    let group = device.group().ok_or("no group")?;
    {
        let (container, opened) = (Container::open()?, Group::open(group.id)?);
        same("no group in it yet", container.set_type1().unwrap_err().errno, Errno::INVAL)?;
        check("viable", opened.viable()?)?;
        opened.set_container(&container)?;
        container.set_type1()?;
        let info = container.info()?;
        check("4 KiB pages", info.page_sizes & PAGE != 0)?;
        same("mappings", info.mappings_left, Some(65_535))?;
        check("the MSI range is excluded", info.iova_ranges.len() > 1)?;
        let file = Arc::new(GuestFile::memfd("container", 4 * PAGE)?);
        container.map(range(0, 4), &file, Offset(0), true)?;
        same("one fewer", container.info()?.mappings_left, Some(65_534))?;
        check("the mapping has a reference to the file", Arc::strong_count(&file) == 2)?;
        same("all of it", container.unmap_all(), Ok(4 * PAGE))?;
        check("no reference remains", Arc::strong_count(&file) == 1)?;
        let in_it = opened.device(device.address())?;
        same("a device is open", opened.unset_container().unwrap_err().errno, Errno::BUSY)?;
        drop(in_it);
        opened.unset_container()?;
    }
    let container = std::fs::File::options().read(true).write(true).open("/dev/vfio/vfio")?.into();
    let opened = std::fs::File::options().read(true).write(true).open(format!("/dev/vfio/{}", group.id))?;
    let domain = Type1Domain::from_fds(container, (group.id, opened.into()), device.address())?;
    same("from passed files", domain.capabilities().max_mappings, 65_535)
}
