//! What is refused when it is opened, and that the reason helps.

use std::os::fd::OwnedFd;
use std::path::Path;

use libtest_mimic::Failed;
use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::iommu::iommufd::IommufdDomain;
use passgate_backends::{Device, Kind, assign};
use passgate_bindings::vfio::pci::{PciDevice, SYSFS};

use super::bench::{Bench, check, same};

type Outcome = Result<(), Failed>;

fn refusal<T>(opened: Result<T, passgate_backends::Error>) -> Result<String, Failed> {
    let error = opened.err().ok_or("it was opened all the same")?.to_string();
    check("the error is one line", !error.contains('\n'))?;
    Ok(error)
}

fn says(error: &str, what: &str) -> Outcome {
    if error.contains(what) { Ok(()) } else { Err(format!("`{error}` does not say `{what}`").into()) }
}

pub fn a_busy_device_is_refused(bench: &Bench) -> Outcome {
    let _first = bench.engine()?;
    let error = refusal(assign(bench.kind, &bench.edu[..1]))?;
    says(&error, &bench.edu[0])?;
    says(&error, "another process has")
}

/// The root port in front of igb belongs to the host, or to nobody.
pub fn an_unbound_device_is_refused(bench: &Bench) -> Outcome {
    let error = refusal(assign(bench.kind, &["0000:00:07.0".to_owned()]))?;
    says(&error, "not to vfio-pci; bind it:")
}

pub fn a_passed_cdev_must_be_the_device_named(bench: &Bench) -> Outcome {
    let open = |name: &str| -> Result<OwnedFd, Failed> {
        let device = PciDevice::find(Path::new(SYSFS), name.parse()?).ok_or("no such device")?;
        let cdev = device.cdev().ok_or("no cdev")?.name;
        Ok(std::fs::File::options().read(true).write(true).open(format!("/dev/vfio/devices/{cdev}"))?.into())
    };
    let iommu: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/iommu")?.into();
    let domain = IommufdDomain::from_fd(iommu)?;
    let error = refusal(VfioDevice::from_cdev(&bench.edu[0], open(&bench.edu[1])?, &domain))?;
    says(&error, "not its character device")?;
    let device = VfioDevice::from_cdev(&bench.edu[0], open(&bench.edu[0])?, &domain)?;
    same("the device's name", device.name(), bench.edu[0].as_str())
}

pub fn auto_is_iommufd(bench: &Bench) -> Outcome {
    let set = assign(Kind::Auto, &bench.edu)?;
    same("the domain", set.domain.name(), "iommufd")
}
