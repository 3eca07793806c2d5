//! The state of a device's translation cache (PCI ATS; PCIe 6.0, 10.5.1).
//!
//! A kernel that uses ATS enables it when the device is attached and disables it when it is detached. So a disabled
//! state is meaningful only if it is read right after a successful attach: then the kernel does not use ATS for this
//! device (`pci=noats`, no support in the IOMMU or a bridge), until the next attach. At any other time a device with
//! the capability is assumed to cache translations.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

/// The ATS state of one device.
#[derive(Debug)]
pub(super) struct Ats {
    /// True if the device has the capability.
    capable: bool,
    /// True while ATS is known to be unused, because it was read as off after the last attach.
    unused: AtomicBool,
}

impl Ats {
    /// Makes the state of a device that was not read since its last attach; `unused` is set if an earlier process has
    /// read ATS as off after that attach.
    pub(super) fn new(capable: bool, unused: bool) -> Self {
        Self { capable, unused: AtomicBool::new(unused) }
    }

    /// An attach begins: ATS is not known to be unused until it has succeeded.
    pub(super) fn attaching(&self) {
        self.unused.store(false, Relaxed);
    }

    /// The attach has succeeded, and the enable bit was read since; none if it could not be read.
    pub(super) fn attached(&self, enabled: Option<bool>) {
        self.unused.store(enabled == Some(false), Relaxed);
    }

    /// Returns true if the device may cache translations, given the present value of its enable bit.
    pub(super) fn caches(&self, enabled: Option<bool>) -> bool {
        self.capable && !(self.unused.load(Relaxed) && enabled == Some(false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: Option<bool> = Some(true);
    const OFF: Option<bool> = Some(false);

    #[test]
    fn detached_device_with_ats_off_counts_as_caching() {
        let ats = Ats::new(true, false);
        ats.attaching();
        ats.attached(ON);
        assert!(ats.caches(ON));
        assert!(ats.caches(OFF), "detached");
        // A process that takes the device over has not read the bit after an attach.
        let taken_over = Ats::new(true, false);
        assert!(taken_over.caches(OFF));
        taken_over.attaching();
        assert!(taken_over.caches(OFF), "an attach that has not succeeded");
        taken_over.attached(ON);
        assert!(taken_over.caches(ON));
    }

    #[test]
    fn device_with_ats_off_after_attach_does_not_count_as_caching() {
        for unused in [false, true] {
            let ats = Ats::new(true, unused);
            assert_eq!(ats.caches(OFF), !unused);
            assert!(ats.caches(ON) && ats.caches(None), "whatever an earlier process has read");
            ats.attaching();
            ats.attached(OFF);
            assert!(!ats.caches(OFF) && ats.caches(ON) && ats.caches(None));
            ats.attaching();
            assert!(ats.caches(OFF));
            ats.attached(None);
            assert!(ats.caches(OFF), "a bit that cannot be read counts as on");
        }
    }

    #[test]
    fn device_without_ats_capability_does_not_cache() {
        let ats = Ats::new(false, false);
        for enabled in [ON, OFF, None] {
            assert!(!ats.caches(enabled));
        }
    }
}
