//! Errors of kernel calls: the call, its errno, and the output that the kernel wrote before the call failed.

use rustix::io::Errno;

/// A kernel call that failed, with the partial output `T` that the kernel had written by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {errno}")]
pub struct Failed<T = ()> {
    /// The call, as its uAPI header names it (`IOMMU_IOAS_UNMAP`).
    pub call: &'static str,
    /// The errno that the kernel returned.
    pub errno: Errno,
    /// The output that the kernel wrote although the call failed (for an unmap: the number of bytes unmapped).
    pub partial: T,
}

impl Failed {
    /// Returns the failure of `call` with the calling thread's current errno and no partial output.
    pub fn last(call: &'static str) -> Self {
        Self::last_with(call, ())
    }

    /// Returns the failure of `call` with `errno` and no partial output.
    pub fn new(call: &'static str, errno: Errno) -> Self {
        Self { call, errno, partial: () }
    }
}

impl<T> Failed<T> {
    /// Returns the failure of `call` with the calling thread's current errno and its partial output.
    pub fn last_with(call: &'static str, partial: T) -> Self {
        let raw = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        Self { call, errno: Errno::from_raw_os_error(raw), partial }
    }

    /// Returns the same failure without its partial output.
    pub fn without_partial(self) -> Failed {
        Failed { call: self.call, errno: self.errno, partial: () }
    }
}

impl<T: std::fmt::Debug> From<Failed<T>> for std::io::Error {
    fn from(failed: Failed<T>) -> Self {
        failed.errno.into()
    }
}
