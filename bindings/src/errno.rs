//! How a kernel call failed: which call, with what errno, and what it had done by then.

use rustix::io::Errno;

/// A kernel call that failed, with the partial outputs `T` that it had written back before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {errno}")]
pub struct Failed<T = ()> {
    /// The call, as its uAPI header names it (`IOMMU_IOAS_UNMAP`).
    pub call: &'static str,
    /// What the kernel answered.
    pub errno: Errno,
    /// What the kernel had written back all the same (for an unmap: bytes).
    pub partial: T,
}

impl Failed {
    /// The failure of `call` with the calling thread's current errno.
    pub fn last(call: &'static str) -> Self {
        Self::last_with(call, ())
    }

    /// The failure of `call` with `errno`, nothing written back.
    pub fn new(call: &'static str, errno: Errno) -> Self {
        Self { call, errno, partial: () }
    }
}

impl<T> Failed<T> {
    /// The failure of `call` with the calling thread's current errno and its partial outputs.
    pub fn last_with(call: &'static str, partial: T) -> Self {
        let raw = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        Self { call, errno: Errno::from_raw_os_error(raw), partial }
    }

    /// The same failure with what was written back left out.
    pub fn without_partial(self) -> Failed {
        Failed { call: self.call, errno: self.errno, partial: () }
    }
}

impl<T: std::fmt::Debug> From<Failed<T>> for std::io::Error {
    fn from(failed: Failed<T>) -> Self {
        failed.errno.into()
    }
}
