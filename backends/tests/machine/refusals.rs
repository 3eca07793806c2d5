//! Devices that are refused when they are opened, and the remedies in the errors.

use std::os::fd::OwnedFd;
use std::path::Path;

use libtest_mimic::Failed;
use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::iommu::iommufd::IommufdDomain;
use passgate_backends::{Accept, Device, Kind, assign};
use passgate_bindings::vfio::pci::{PciDevice, SYSFS};
use passgate_exercise::Drivers;

use super::bench::{Bench, check, same};

/// Accepts devices that cannot be stopped reliably.
const ACCEPT_ALL: Accept = Accept { unstoppable: true, drive: None };

type Outcome = Result<(), Failed>;

pub fn refusal<T>(opened: Result<T, passgate_backends::Error>) -> Result<String, Failed> {
    let error = opened.err().ok_or("it was not refused")?.to_string();
    check("the error is one line", !error.contains('\n'))?;
    Ok(error)
}

pub fn says(error: &str, what: &str) -> Outcome {
    if error.contains(what) { Ok(()) } else { Err(format!("`{error}` does not say `{what}`").into()) }
}

pub fn busy_device_is_refused(bench: &Bench) -> Outcome {
    let _first = bench.engine()?;
    let error = refusal(assign(bench.kind, &bench.edu[..1], ACCEPT_ALL, &Drivers::default(), bench.tables))?;
    says(&error, &bench.edu[0])?;
    says(&error, "another process has")
}

/// The machine's SMBus controller is bound to a host driver or to none; the root port above igb is a bridge.
pub fn unbound_device_is_refused(bench: &Bench) -> Outcome {
    let error = refusal(assign(
        bench.kind,
        &["0000:00:1f.3".to_owned()],
        ACCEPT_ALL,
        &Drivers::default(),
        bench.tables,
    ))?;
    says(&error, "not to vfio-pci; bind it:")?;
    let error = refusal(assign(
        bench.kind,
        &["0000:00:07.0".to_owned()],
        ACCEPT_ALL,
        &Drivers::default(),
        bench.tables,
    ))?;
    says(&error, "0000:00:07.0 is a bridge")
}

/// The edu engine has no reset, and on type1 no device can be detached.
pub fn unstoppable_device_is_refused_unless_accepted(bench: &Bench) -> Outcome {
    let error =
        refusal(assign(bench.kind, &bench.edu[..1], Accept::default(), &Drivers::default(), bench.tables))?;
    says(&error, "cannot be stopped for certain")?;
    says(&error, "type1 detaches nothing: use --iommu iommufd")?;
    says(&error, "--allow-unstoppable")?;
    let taken = assign(bench.kind, &bench.edu[..1], ACCEPT_ALL, &Drivers::default(), bench.tables)?;
    check("it has no fence", taken.devices[0].stop_class().is_empty())?;
    assign(
        bench.kind,
        std::slice::from_ref(&bench.nvme),
        Accept::default(),
        &Drivers::default(),
        bench.tables,
    )?;
    Ok(())
}

pub fn passed_cdev_must_be_of_the_named_device(bench: &Bench) -> Outcome {
    let open = |name: &str| -> Result<OwnedFd, Failed> {
        let device = PciDevice::find(Path::new(SYSFS), name.parse()?).ok_or("no such device")?;
        let cdev = device.cdev().ok_or("no cdev")?.name;
        Ok(std::fs::File::options().read(true).write(true).open(format!("/dev/vfio/devices/{cdev}"))?.into())
    };
    let iommu: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/iommu")?.into();
    let domain = IommufdDomain::from_fd(iommu, bench.tables)?;
    let error = refusal(VfioDevice::from_cdev(&bench.edu[0], open(&bench.edu[1])?, &domain))?;
    says(&error, "not its character device")?;
    let device = VfioDevice::from_cdev(&bench.edu[0], open(&bench.edu[0])?, &domain)?;
    same("the device's name", device.name(), bench.edu[0].as_str())
}

pub fn auto_is_iommufd(bench: &Bench) -> Outcome {
    let set = assign(Kind::Auto, &bench.edu, Accept::default(), &Drivers::default(), bench.tables)?;
    same("the domain", set.domain.name(), "iommufd")
}
