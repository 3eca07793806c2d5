//! What is known of a device's cache of translations (PCI ATS; PCIe 6.0, 10.5.1).
//!
//! A kernel that uses ATS switches it on when the device is attached and off when it is detached. So *off* says
//! something only when it is read right after an attach that succeeded: then the kernel does not use ATS for this
//! device (`pci=noats`, no support in the IOMMU or a bridge), and it stays so until the next attach. At any other time
//! a device that has the capability counts as one that caches.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

/// What is known of one device.
#[derive(Debug)]
pub(super) struct Ats {
    /// True where the device has the capability.
    capable: bool,
    /// True while ATS is known to be unused, since it was read as off after the last attach.
    unused: AtomicBool,
}

impl Ats {
    /// Returns what is known of a device that nobody has looked at since its last attach; `unused` where an earlier
    /// process did and has left word.
    pub(super) fn new(capable: bool, unused: bool) -> Self {
        Self { capable, unused: AtomicBool::new(unused) }
    }

    /// An attach begins: nothing is known until it has succeeded.
    pub(super) fn attaching(&self) {
        self.unused.store(false, Relaxed);
    }

    /// The attach has succeeded, and the enable bit was read since; none where it could not be read.
    pub(super) fn attached(&self, enabled: Option<bool>) {
        self.unused.store(enabled == Some(false), Relaxed);
    }

    /// Returns whether the device may hold translations, now that its enable bit reads so.
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
    fn a_detached_device_that_reads_off_still_counts_as_caching() {
        let ats = Ats::new(true, false);
        ats.attaching();
        ats.attached(ON);
        assert!(ats.caches(ON));
        assert!(ats.caches(OFF), "detached");
        // The process that takes it over has never seen it attached.
        let taken_over = Ats::new(true, false);
        assert!(taken_over.caches(OFF));
        taken_over.attaching();
        assert!(taken_over.caches(OFF), "an attach that has not succeeded");
        taken_over.attached(ON);
        assert!(taken_over.caches(ON));
    }

    #[test]
    fn a_device_whose_ats_the_kernel_leaves_off_counts_as_caching_no_more() {
        for unused in [false, true] {
            let ats = Ats::new(true, unused);
            assert_eq!(ats.caches(OFF), !unused);
            assert!(ats.caches(ON) && ats.caches(None), "what is left word of is no excuse");
            ats.attaching();
            ats.attached(OFF);
            assert!(!ats.caches(OFF) && ats.caches(ON) && ats.caches(None));
            ats.attaching();
            assert!(ats.caches(OFF));
            ats.attached(None);
            assert!(ats.caches(OFF), "what cannot be read is taken for the worse");
        }
    }

    #[test]
    fn a_device_without_the_capability_caches_nothing() {
        let ats = Ats::new(false, false);
        for enabled in [ON, OFF, None] {
            assert!(!ats.caches(enabled));
        }
    }
}
