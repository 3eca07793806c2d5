//! The units of every layer, from the client to the kernel bindings: address types that cannot be confused, and page ranges that are checked once.
//!
//! A [`PageRange`] is half-open, not empty, page-aligned and ends at or below [`LIMIT`]. Numbers from outside are checked
//! in [`PageRange::new`]; all other operations only shrink or shift a range, so that no later check is needed.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The size of a page in bytes: the granularity of guest_memfd and of every conversion.
pub const PAGE: u64 = 4096;

/// The upper bound of addresses and offsets in bytes (2^62): the sum of two never overflows, and offsets fit the kernel's
/// `loff_t`.
pub const LIMIT: u64 = 1 << 62;

/// An address or offset: the unit of a [`PageRange`].
pub trait Address: Copy + Ord + fmt::LowerHex {
    /// Returns the address that is `raw` bytes from zero.
    fn from_raw(raw: u64) -> Self;
    /// Returns the number of bytes from zero.
    fn raw(self) -> u64;
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        pub struct $name(pub u64);

        impl Address for $name {
            fn from_raw(raw: u64) -> Self {
                Self(raw)
            }
            fn raw(self) -> u64 {
                self.0
            }
        }
        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// A guest-physical address, in bytes.
    Gpa
}
address! {
    /// An I/O virtual address, in bytes: the address in a device's DMA requests.
    Iova
}
address! {
    /// An offset into a file that backs guest memory, in bytes.
    Offset
}

/// The reason why two numbers are not a page range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeError {
    /// The length is 0.
    Empty {
        /// Its first address in bytes.
        start: u64,
    },
    /// Start or length is not a multiple of [`PAGE`].
    Unaligned {
        /// Its first address in bytes.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The end lies above [`LIMIT`], or overflows.
    TooHigh {
        /// Its first address in bytes.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty { start } => {
                write!(f, "the range at {start:#x} is empty: give a length of at least {PAGE} bytes")
            }
            Self::Unaligned { start, len } => write!(
                f,
                "the range {start:#x}+{len:#x} is not page-aligned: start and length must be multiples of {PAGE}"
            ),
            Self::TooHigh { start, len } => {
                write!(f, "the range {start:#x}+{len:#x} reaches beyond {LIMIT:#x}")
            }
        }
    }
}

impl std::error::Error for RangeError {}

/// A half-open, page-aligned range of at least one page that ends at or below [`LIMIT`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange<A> {
    start: A,
    end: A,
}

impl<A: Address> PageRange<A> {
    /// Returns the range of `len` bytes from `start`. Numbers from outside are checked here and nowhere else.
    pub fn new(start: u64, len: u64) -> Result<Self, RangeError> {
        if len == 0 {
            return Err(RangeError::Empty { start });
        }
        if !start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(RangeError::Unaligned { start, len });
        }
        match start.checked_add(len) {
            Some(end) if end <= LIMIT => Ok(Self { start: A::from_raw(start), end: A::from_raw(end) }),
            _ => Err(RangeError::TooHigh { start, len }),
        }
    }

    /// Returns the range from `start` to `end`, or none where it would be empty. The caller ensures that both are
    /// page-aligned and at most [`LIMIT`].
    pub fn between(start: A, end: A) -> Option<Self> {
        debug_assert!(start.raw().is_multiple_of(PAGE) && end.raw().is_multiple_of(PAGE));
        (start < end).then_some(Self { start, end })
    }

    /// Returns the address of the first byte.
    pub fn start(self) -> A {
        self.start
    }

    /// Returns the address after the last byte.
    pub fn end(self) -> A {
        self.end
    }

    /// Returns the length in bytes; never 0.
    #[allow(clippy::len_without_is_empty)] // it is never empty
    pub fn len(self) -> u64 {
        self.end.raw() - self.start.raw()
    }

    /// Returns the length in pages; never 0.
    pub fn pages(self) -> u64 {
        self.len() / PAGE
    }

    /// Returns true where the two ranges have a page in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Returns true where `other` lies entirely inside.
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Returns true where `address` lies inside.
    pub fn contains(self, address: A) -> bool {
        self.start <= address && address < self.end
    }

    /// Returns the pages that both have in common, or none.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end.min(other.end))
    }

    /// Returns the parts of `self` before and after `cut`.
    pub fn without(self, cut: Self) -> [Option<Self>; 2] {
        if !self.overlaps(cut) {
            return [Some(self), None];
        }
        [Self::between(self.start, cut.start), Self::between(cut.end, self.end)]
    }

    /// Returns the same pages in another address space, in which the address `from` is `to`. `from` must not lie above
    /// the start.
    pub fn rebase<B: Address>(self, from: A, to: B) -> PageRange<B> {
        let shift = |a: A| B::from_raw(a.raw() - from.raw() + to.raw());
        PageRange { start: shift(self.start), end: shift(self.end) }
    }
}

impl<A: Address> fmt::Debug for PageRange<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.len())
    }
}

impl<A: Address> fmt::Display for PageRange<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Serialized as `[start, length]`, in bytes.
impl<A: Address> Serialize for PageRange<A> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (self.start.raw(), self.len()).serialize(serializer)
    }
}

/// Checked as in [`PageRange::new`].
impl<'de, A: Address> Deserialize<'de> for PageRange<A> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (start, len) = <(u64, u64)>::deserialize(deserializer)?;
        Self::new(start, len).map_err(de::Error::custom)
    }
}
