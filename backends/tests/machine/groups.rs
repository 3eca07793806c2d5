//! An IOMMU group of two devices: the machine's SATA and SMBus controllers. Neither has a reset or is a PCI Express
//! device, so that a detach is their only fence.

use std::fs;

use libtest_mimic::Failed;
use passgate_backends::{Accept, Step, assign};
use passgate_exercise::Drivers;

use super::bench::{Bench, check, same};
use super::refusals::{refusal, says};

type Outcome = Result<(), Failed>;

const PAIR: [&str; 2] = ["0000:00:1f.2", "0000:00:1f.3"];

/// A device that is bound to vfio-pci until this value is dropped, and to no driver afterwards.
struct Bound(&'static str);

impl Bound {
    fn new(address: &'static str) -> Result<Self, Failed> {
        let device = Self(address);
        fs::write(device.at("driver_override"), "vfio-pci")?;
        fs::write("/sys/bus/pci/drivers_probe", address)?;
        check("it is bound to vfio-pci", fs::exists(device.at("driver"))?)?;
        Ok(device)
    }

    fn at(&self, name: &str) -> String {
        format!("/sys/bus/pci/devices/{}/{name}", self.0)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        fs::write(self.at("driver_override"), "\n").expect("the override is cleared");
        fs::write(self.at("driver/unbind"), self.0).expect("it is unbound");
    }
}

/// The kernel moves a group to the blocking domain only when its last device is detached.
pub fn detach_is_offered_for_the_whole_group_only(bench: &Bench) -> Outcome {
    let _first = Bound::new(PAIR[0])?;
    let alone = bench.raw(PAIR[0], &[])?;
    check("one of two cannot be detached", !passgate_backends::Device::stop_class(&alone).has(Step::Detach))?;
    drop(alone);
    let error = refusal(assign(
        bench.kind,
        &[PAIR[0].to_owned()],
        Accept::default(),
        &Drivers::default(),
        bench.tables,
    ))?;
    says(&error, "0000:00:1f.2 cannot be stopped for certain")?;
    says(
        &error,
        "0000:00:1f.3 shares its IOMMU group, so that detaching it proves nothing: serve 0000:00:1f.3 with",
    )?;

    let error = refusal(assign(
        bench.kind,
        &PAIR.map(str::to_owned),
        Accept::default(),
        &Drivers::default(),
        bench.tables,
    ))?;
    says(&error, "0000:00:1f.3 is bound to no driver")?;
    let _second = Bound::new(PAIR[1])?;
    let both =
        assign(bench.kind, &PAIR.map(str::to_owned), Accept::default(), &Drivers::default(), bench.tables)?;
    for _ in 0..2 {
        for device in &both.devices {
            check("both can be detached", device.stop_class().has(Step::Detach))?;
            device.fence(Step::Detach)?;
        }
        for device in &both.devices {
            device.attach()?;
        }
    }
    same("both", both.devices.len(), 2)
}
