//! Which driver a PCI device is bound to, and what decides that: read, changed, and brought back exactly.

use std::fs;
use std::path::{Path, PathBuf};

use passgate_bindings::vfio::PciAddress;
use passgate_bindings::vfio::pci::PciDevice;
use serde::{Deserialize, Serialize};

/// Results whose errors are words.
type Result<T> = std::result::Result<T, String>;

/// The driver that a borrowed device is bound to.
const VFIO: &str = "vfio-pci";

/// What taking a device from its driver changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Binding {
    /// The driver; none where it is bound to none.
    pub(super) driver: Option<String>,
    /// The only driver that may have it; none where its ids decide (`driver_override`).
    pub(super) only: Option<String>,
    /// The policy of runtime power management (`power/control`), which vfio-pci sets when it comes and goes; none where
    /// the kernel has none.
    pub(super) power: Option<String>,
}

/// One device on the PCI bus, as the kernel lets its binding be read and changed.
pub(super) trait Bus {
    fn read(&self) -> Result<Binding>;
    /// Sets the only driver that may have the device; none lets its ids decide.
    fn restrict(&mut self, driver: Option<&str>) -> Result<()>;
    /// Takes the device from its driver.
    fn unbind(&mut self) -> Result<()>;
    /// Has this driver try the device.
    fn bind(&mut self, driver: &str) -> Result<()>;
    /// Has every driver try the device that may have it.
    fn probe(&mut self) -> Result<()>;
    fn set_power(&mut self, policy: &str) -> Result<()>;
}

/// True for vfio-pci and its variants.
pub(super) fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

/// Binds the device to vfio-pci. After an error nothing is certain: [`give_back`] brings back what was.
pub(super) fn take(bus: &mut impl Bus) -> Result<()> {
    let before = bus.read()?;
    bus.restrict(Some(VFIO))?;
    if before.driver.is_some() {
        bus.unbind()?;
    }
    bus.probe()?;
    match bus.read()?.driver {
        Some(driver) if driver == VFIO => Ok(()),
        other => Err(format!(
            "it went to {} and not to vfio-pci: modprobe vfio-pci",
            other.as_deref().unwrap_or("no driver")
        )),
    }
}

/// Brings back `before`, from wherever [`take`] or an earlier call of this ended.
pub(super) fn give_back(bus: &mut impl Bus, before: &Binding) -> Result<()> {
    let now = bus.read()?;
    if now.driver != before.driver {
        match now.driver.as_deref() {
            // Nobody tries a device because it is unbound, so the restriction may be set first.
            Some(driver) if is_vfio(driver) => {
                bus.restrict(before.driver.as_deref().or(before.only.as_deref()))?;
                bus.unbind()?;
            }
            None => {}
            // Somebody else has given it to this one.
            Some(other) => {
                return Err(format!("it was bound to {other} by somebody else, and is left there"));
            }
        }
        if let Some(driver) = &before.driver {
            // A driver may have had it that neither its ids nor its restriction would choose now.
            bus.restrict(Some(driver))?;
            if bus.bind(driver).is_err() {
                bus.probe()?;
            }
        }
    }
    bus.restrict(before.only.as_deref())?;
    if let Some(policy) = &before.power
        && bus.read()?.power.as_ref() != Some(policy)
    {
        bus.set_power(policy)?;
    }
    let found = bus.read()?;
    if found == *before { Ok(()) } else { Err(format!("it is {} and not {}", found.words(), before.words())) }
}

impl Binding {
    /// The binding in words.
    pub(super) fn words(&self) -> String {
        let driver = self
            .driver
            .as_deref()
            .map_or("bound to no driver".to_owned(), |driver| format!("bound to {driver}"));
        let only = self.only.as_ref().map(|only| format!(", driver_override {only}")).unwrap_or_default();
        let power = self.power.as_ref().map(|policy| format!(", power/control {policy}")).unwrap_or_default();
        format!("{driver}{only}{power}")
    }
}

/// A device in sysfs.
#[derive(Debug)]
pub(super) struct Sysfs {
    root: PathBuf,
    address: PciAddress,
}

impl Sysfs {
    pub(super) fn new(root: &Path, address: PciAddress) -> Self {
        Self { root: root.to_owned(), address }
    }

    fn device(&self) -> PathBuf {
        self.root.join("bus/pci/devices").join(self.address.to_string())
    }

    fn write(&self, path: PathBuf, text: &str) -> Result<()> {
        fs::write(&path, format!("{text}\n"))
            .map_err(|error| format!("cannot write {}: {error}; run as root", path.display()))
    }

    fn text(&self, name: &str) -> Result<String> {
        let path = self.device().join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim_end_matches('\n').to_owned()),
            Err(error) => Err(format!("cannot read {}: {error}", path.display())),
        }
    }
}

impl Bus for Sysfs {
    fn read(&self) -> Result<Binding> {
        // The kernel prints a null pointer where nothing is set.
        let only = Some(self.text("driver_override")?).filter(|name| !name.is_empty() && name != "(null)");
        let power = if self.device().join("power/control").exists() {
            Some(self.text("power/control")?)
        } else {
            None
        };
        let driver = PciDevice::find(&self.root, self.address).and_then(|device| device.driver());
        Ok(Binding { driver, only, power })
    }

    fn restrict(&mut self, driver: Option<&str>) -> Result<()> {
        self.write(self.device().join("driver_override"), driver.unwrap_or_default())
    }

    fn unbind(&mut self) -> Result<()> {
        self.write(self.device().join("driver/unbind"), &self.address.to_string())
    }

    fn bind(&mut self, driver: &str) -> Result<()> {
        self.write(self.root.join("bus/pci/drivers").join(driver).join("bind"), &self.address.to_string())
    }

    fn probe(&mut self) -> Result<()> {
        self.write(self.root.join("bus/pci/drivers_probe"), &self.address.to_string())
    }

    fn set_power(&mut self, policy: &str) -> Result<()> {
        self.write(self.device().join("power/control"), policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model of the kernel's PCI bus with one device, for which nvme is the driver by its ids. `steps` is how many
    /// changes are made before every further one fails, as if the process had died.
    #[derive(Debug, Clone)]
    struct Model {
        is: Binding,
        steps: usize,
        vfio_is_loaded: bool,
    }

    impl Model {
        fn step(&mut self) -> Result<()> {
            if self.steps == 0 {
                return Err("died".to_owned());
            }
            self.steps -= 1;
            Ok(())
        }

        /// `pci_match_device`: a restriction alone decides, where there is one.
        fn may_have(&self, driver: &str) -> bool {
            self.is.only.as_deref().map_or(driver == "nvme", |only| only == driver)
        }

        fn try_driver(&mut self, driver: &str) {
            let is_there = driver != VFIO || self.vfio_is_loaded;
            if self.is.driver.is_none() && is_there && self.may_have(driver) {
                self.is.driver = Some(driver.to_owned());
                if driver == VFIO {
                    self.is.power = self.is.power.as_ref().map(|_| "auto".to_owned());
                }
            }
        }
    }

    impl Bus for Model {
        fn read(&self) -> Result<Binding> {
            Ok(self.is.clone())
        }
        fn restrict(&mut self, driver: Option<&str>) -> Result<()> {
            self.step()?;
            self.is.only = driver.map(str::to_owned);
            Ok(())
        }
        fn unbind(&mut self) -> Result<()> {
            self.step()?;
            if self.is.driver.take().as_deref() == Some(VFIO) {
                self.is.power = self.is.power.as_ref().map(|_| "on".to_owned());
            }
            Ok(())
        }
        fn bind(&mut self, driver: &str) -> Result<()> {
            self.step()?;
            // The driver `odd` was bound with a restriction that has changed since, and has no file to bind by.
            if driver == "odd" {
                return Err("no such file".to_owned());
            }
            self.try_driver(driver);
            Ok(())
        }
        fn probe(&mut self) -> Result<()> {
            self.step()?;
            for driver in ["nvme", "odd", VFIO] {
                self.try_driver(driver);
            }
            Ok(())
        }
        fn set_power(&mut self, policy: &str) -> Result<()> {
            self.step()?;
            self.is.power = Some(policy.to_owned());
            Ok(())
        }
    }

    fn bindings() -> impl Iterator<Item = Binding> {
        let own = |name: Option<&str>| name.map(str::to_owned);
        let drivers = [None, Some("nvme"), Some("odd")];
        let only = [None, Some("none"), Some("nvme"), Some(VFIO)];
        let power = [None, Some("on"), Some("auto")];
        drivers.into_iter().flat_map(move |driver| {
            only.into_iter().flat_map(move |only| {
                power.map(|power| Binding { driver: own(driver), only: own(only), power: own(power) })
            })
        })
    }

    /// Every binding that a device can have, every step after which whoever takes it may die, with and without
    /// vfio-pci, and a give-back that dies too.
    #[test]
    fn a_binding_is_brought_back_exactly_wherever_its_taking_ended() {
        let mut tried = 0;
        for before in bindings() {
            for (steps, vfio_is_loaded, again) in (0..=4).flat_map(|steps| {
                [true, false].into_iter().flat_map(move |is| (0..=6).map(move |n| (steps, is, n)))
            }) {
                let mut bus = Model { is: before.clone(), steps, vfio_is_loaded };
                let taken = take(&mut bus);
                assert_eq!(taken.is_ok(), bus.is.driver.as_deref() == Some(VFIO), "{before:?} {steps}");
                bus.steps = again;
                let _ = give_back(&mut bus, &before);
                bus.steps = usize::MAX;
                let text = format!("{before:?}, taken for {steps} steps, given back for {again}: {bus:?}");
                assert!(give_back(&mut bus, &before).is_ok(), "{text}");
                assert_eq!(bus.is, before, "{text}");
                tried += 1;
            }
        }
        assert_eq!(tried, 36 * 5 * 2 * 7);
    }

    #[test]
    fn a_device_that_somebody_else_has_bound_meanwhile_is_left_there() {
        let binding = |driver: &str| Binding { driver: Some(driver.into()), only: None, power: None };
        let mut bus = Model { is: binding("other"), steps: usize::MAX, vfio_is_loaded: true };
        let error = give_back(&mut bus, &binding("nvme")).unwrap_err();
        assert_eq!(error, "it was bound to other by somebody else, and is left there");
        assert_eq!(bus.is, binding("other"));
    }

    #[test]
    fn sysfs_is_read_and_written_as_the_kernel_has_it() {
        let sysfs = tempfile::tempdir().unwrap();
        let device = sysfs.path().join("bus/pci/devices/0000:04:00.0");
        fs::create_dir_all(device.join("power")).unwrap();
        let mut bus = Sysfs::new(sysfs.path(), "04:00.0".parse().unwrap());
        assert!(bus.read().is_err(), "without an override nothing is taken");
        for (text, only) in [("(null)\n", None), ("\n", None), ("none\n", Some("none".to_owned()))] {
            fs::write(device.join("driver_override"), text).unwrap();
            assert_eq!(bus.read().unwrap(), Binding { driver: None, only, power: None }, "{text:?}");
        }
        fs::write(device.join("power/control"), "auto\n").unwrap();
        std::os::unix::fs::symlink("../../drivers/nvme", device.join("driver")).unwrap();
        let found = bus.read().unwrap();
        assert_eq!((found.driver.as_deref(), found.power.as_deref()), (Some("nvme"), Some("auto")));
        bus.restrict(None).unwrap();
        assert_eq!(fs::read_to_string(device.join("driver_override")).unwrap(), "\n");
        bus.restrict(Some("x")).unwrap();
        assert_eq!(fs::read_to_string(device.join("driver_override")).unwrap(), "x\n");
        bus.probe().unwrap();
        assert_eq!(fs::read_to_string(sysfs.path().join("bus/pci/drivers_probe")).unwrap(), "0000:04:00.0\n");
        fs::create_dir_all(sysfs.path().join("bus/pci/drivers/nvme")).unwrap();
        bus.bind("nvme").unwrap();
        bus.unbind().unwrap();
        for name in ["bind", "unbind"] {
            let path = sysfs.path().join("bus/pci/drivers/nvme").join(name);
            assert_eq!(fs::read_to_string(path).unwrap(), "0000:04:00.0\n");
        }
    }
}
