//! The driver binding of a PCI device, and the files that decide it: read, changed, and restored exactly.

use std::fs;
use std::path::{Path, PathBuf};

use passgate_bindings::vfio::PciAddress;
use passgate_bindings::vfio::pci::PciDevice;
use serde::{Deserialize, Serialize};

/// A result whose error is a text for the user.
type Result<T> = std::result::Result<T, String>;

/// The driver to which a device is bound for the test.
const VFIO: &str = "vfio-pci";

/// The attributes of a device in sysfs that binding it to vfio-pci changes
/// (Documentation/ABI/testing/sysfs-bus-pci and sysfs-devices-power of Linux).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Binding {
    /// The driver; none where it is bound to none.
    pub(super) driver: Option<String>,
    /// The only driver that may bind to it (`driver_override`); none where its ids decide.
    #[serde(rename = "only")]
    pub(super) driver_override: Option<String>,
    /// The policy of runtime power management (`power/control`), which vfio-pci sets when it binds and unbinds; none
    /// where the kernel has no power management.
    pub(super) power: Option<String>,
}

/// One device on the PCI bus: the operations by which the kernel lets its binding be read and changed.
pub(super) trait Bus {
    fn read(&self) -> Result<Binding>;
    /// Sets the only driver that may bind to the device; with none, its ids decide.
    fn set_driver_override(&mut self, driver: Option<&str>) -> Result<()>;
    /// Unbinds the device from its driver.
    fn unbind(&mut self) -> Result<()>;
    /// Has the kernel probe the device with this driver.
    fn bind(&mut self, driver: &str) -> Result<()>;
    /// Has the kernel probe the device with every driver that may bind to it.
    fn probe(&mut self) -> Result<()>;
    fn set_power(&mut self, policy: &str) -> Result<()>;
}

/// True for vfio-pci and its variants.
pub(super) fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

/// Binds the device to vfio-pci. After an error its binding may be any; [`restore`] brings back the earlier one.
pub(super) fn bind_to_vfio(bus: &mut impl Bus) -> Result<()> {
    let before = bus.read()?;
    // Set before the unbind, so that no other driver can bind to the device in between.
    bus.set_driver_override(Some(VFIO))?;
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

/// Restores the binding `before`, whichever step [`bind_to_vfio`] or an earlier call of this ended at.
pub(super) fn restore(bus: &mut impl Bus, before: &Binding) -> Result<()> {
    let now = bus.read()?;
    if now.driver != before.driver {
        match now.driver.as_deref() {
            // An unbind makes no driver probe the device, so the override may be set first.
            Some(driver) if is_vfio(driver) => {
                bus.set_driver_override(before.driver.as_deref().or(before.driver_override.as_deref()))?;
                bus.unbind()?;
            }
            None => {}
            // Somebody else has bound it to this driver meanwhile.
            Some(other) => {
                return Err(format!("it was bound to {other} by somebody else, and is left there"));
            }
        }
        if let Some(driver) = &before.driver {
            // Neither its ids nor its earlier override need choose this driver now, so it is named.
            bus.set_driver_override(Some(driver))?;
            if bus.bind(driver).is_err() {
                bus.probe()?;
            }
        }
    }
    bus.set_driver_override(before.driver_override.as_deref())?;
    if let Some(policy) = &before.power
        && bus.read()?.power.as_ref() != Some(policy)
    {
        bus.set_power(policy)?;
    }
    let found = bus.read()?;
    if found == *before {
        Ok(())
    } else {
        Err(format!("it is {} and not {}", found.describe(), before.describe()))
    }
}

impl Binding {
    /// Returns the binding as text for the user.
    pub(super) fn describe(&self) -> String {
        let driver = self
            .driver
            .as_deref()
            .map_or("bound to no driver".to_owned(), |driver| format!("bound to {driver}"));
        let driver_override =
            self.driver_override.as_ref().map(|name| format!(", driver_override {name}")).unwrap_or_default();
        let power = self.power.as_ref().map(|policy| format!(", power/control {policy}")).unwrap_or_default();
        format!("{driver}{driver_override}{power}")
    }
}

/// A device in the sysfs at `root`.
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
        let driver_override =
            Some(self.text("driver_override")?).filter(|name| !name.is_empty() && name != "(null)");
        let power = if self.device().join("power/control").exists() {
            Some(self.text("power/control")?)
        } else {
            None
        };
        let driver = PciDevice::find(&self.root, self.address).and_then(|device| device.driver());
        Ok(Binding { driver, driver_override, power })
    }

    fn set_driver_override(&mut self, driver: Option<&str>) -> Result<()> {
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

    /// A model of the kernel's PCI bus with one device, for which nvme is the driver by its ids. `steps` is the number of
    /// changes that succeed before every further one fails, as if the process had died.
    #[derive(Debug, Clone)]
    struct FakeBus {
        binding: Binding,
        steps: usize,
        vfio_is_loaded: bool,
    }

    impl FakeBus {
        fn step(&mut self) -> Result<()> {
            if self.steps == 0 {
                return Err("died".to_owned());
            }
            self.steps -= 1;
            Ok(())
        }

        /// Returns true if `driver` may bind: a driver_override alone decides, where there is one (`pci_match_device`).
        fn matches(&self, driver: &str) -> bool {
            self.binding.driver_override.as_deref().map_or(driver == "nvme", |name| name == driver)
        }

        fn try_driver(&mut self, driver: &str) {
            let is_loaded = driver != VFIO || self.vfio_is_loaded;
            if self.binding.driver.is_none() && is_loaded && self.matches(driver) {
                self.binding.driver = Some(driver.to_owned());
                if driver == VFIO {
                    self.binding.power = self.binding.power.as_ref().map(|_| "auto".to_owned());
                }
            }
        }
    }

    impl Bus for FakeBus {
        fn read(&self) -> Result<Binding> {
            Ok(self.binding.clone())
        }
        fn set_driver_override(&mut self, driver: Option<&str>) -> Result<()> {
            self.step()?;
            self.binding.driver_override = driver.map(str::to_owned);
            Ok(())
        }
        fn unbind(&mut self) -> Result<()> {
            self.step()?;
            if self.binding.driver.take().as_deref() == Some(VFIO) {
                self.binding.power = self.binding.power.as_ref().map(|_| "on".to_owned());
            }
            Ok(())
        }
        fn bind(&mut self, driver: &str) -> Result<()> {
            self.step()?;
            // The driver `odd` was bound under an override that has changed since, and has no `bind` file.
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
            self.binding.power = Some(policy.to_owned());
            Ok(())
        }
    }

    fn bindings() -> impl Iterator<Item = Binding> {
        let owned = |name: Option<&str>| name.map(str::to_owned);
        let drivers = [None, Some("nvme"), Some("odd")];
        let overrides = [None, Some("none"), Some("nvme"), Some(VFIO)];
        let power = [None, Some("on"), Some("auto")];
        drivers.into_iter().flat_map(move |driver| {
            overrides.into_iter().flat_map(move |name| {
                power.map(|power| Binding {
                    driver: owned(driver),
                    driver_override: owned(name),
                    power: owned(power),
                })
            })
        })
    }

    /// Every binding that a device can have; every step after which [`bind_to_vfio`] may be killed, with and without
    /// vfio-pci; and every step after which a first [`restore`] may be killed.
    #[test]
    fn binding_is_restored_exactly_after_any_interrupted_step() {
        let mut tried = 0;
        for before in bindings() {
            for (steps, vfio_is_loaded, again) in (0..=4).flat_map(|steps| {
                [true, false]
                    .into_iter()
                    .flat_map(move |loaded| (0..=6).map(move |again| (steps, loaded, again)))
            }) {
                let mut bus = FakeBus { binding: before.clone(), steps, vfio_is_loaded };
                let bound = bind_to_vfio(&mut bus);
                assert_eq!(bound.is_ok(), bus.binding.driver.as_deref() == Some(VFIO), "{before:?} {steps}");
                bus.steps = again;
                let _ = restore(&mut bus, &before);
                bus.steps = usize::MAX;
                let text = format!("{before:?}, bound for {steps} steps, restored for {again}: {bus:?}");
                assert!(restore(&mut bus, &before).is_ok(), "{text}");
                assert_eq!(bus.binding, before, "{text}");
                tried += 1;
            }
        }
        assert_eq!(tried, 36 * 5 * 2 * 7);
    }

    #[test]
    fn device_bound_by_somebody_else_is_not_rebound() {
        let binding =
            |driver: &str| Binding { driver: Some(driver.into()), driver_override: None, power: None };
        let mut bus = FakeBus { binding: binding("other"), steps: usize::MAX, vfio_is_loaded: true };
        let error = restore(&mut bus, &binding("nvme")).unwrap_err();
        assert_eq!(error, "it was bound to other by somebody else, and is left there");
        assert_eq!(bus.binding, binding("other"));
    }

    #[test]
    fn sysfs_binding_files_are_read_and_written_as_the_kernel_has_them() {
        let sysfs = tempfile::tempdir().unwrap();
        let device = sysfs.path().join("bus/pci/devices/0000:04:00.0");
        fs::create_dir_all(device.join("power")).unwrap();
        let mut bus = Sysfs::new(sysfs.path(), "04:00.0".parse().unwrap());
        assert!(bus.read().is_err(), "a kernel without driver_override is refused");
        for (text, driver_override) in [("(null)\n", None), ("\n", None), ("none\n", Some("none".to_owned()))]
        {
            fs::write(device.join("driver_override"), text).unwrap();
            assert_eq!(
                bus.read().unwrap(),
                Binding { driver: None, driver_override, power: None },
                "{text:?}"
            );
        }
        fs::write(device.join("power/control"), "auto\n").unwrap();
        std::os::unix::fs::symlink("../../drivers/nvme", device.join("driver")).unwrap();
        let found = bus.read().unwrap();
        assert_eq!((found.driver.as_deref(), found.power.as_deref()), (Some("nvme"), Some("auto")));
        bus.set_driver_override(None).unwrap();
        assert_eq!(fs::read_to_string(device.join("driver_override")).unwrap(), "\n");
        bus.set_driver_override(Some("x")).unwrap();
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
