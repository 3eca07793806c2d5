//! The drivers that this program gives its devices, for DMA on demand.
//!
//! With the feature `selftest` they are those of the package passgate-exercise. Without it no device has a driver,
//! except a drive that is served as a block device: `serve --allow-dma` then does DMA on demand with software devices
//! only.

use passgate_backends::Drivers;

/// Returns the drivers. `scratch` permits them to overwrite the last blocks of a drive, for DMA of given bytes.
#[cfg(feature = "selftest")]
pub fn drivers(scratch: bool) -> impl Drivers {
    passgate_exercise::Drivers { scratch }
}

/// Returns no drivers. `scratch` has no effect.
#[cfg(not(feature = "selftest"))]
pub fn drivers(_scratch: bool) -> impl Drivers {
    passgate_backends::NoDrivers
}
