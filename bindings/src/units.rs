//! The units that every layer speaks: addresses that cannot be mixed up, and page ranges checked once.
//!
//! A [`PageRange`] is half-open, not empty, page-aligned and below [`LIMIT`]: whoever holds one need not check
//! again. It is made at the border ([`PageRange::new`]) and only cut, never stretched, after that.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Bytes in a page: the granularity of guest_memfd and of every conversion.
pub const PAGE: u64 = 4096;

/// No address or offset reaches this (2^62): sums of two never overflow, and offsets fit the kernel's `loff_t`.
pub const LIMIT: u64 = 1 << 62;

/// An address or offset that a [`PageRange`] can be made of.
pub trait Address: Copy + Ord + fmt::LowerHex {
    /// The address with this number of bytes from zero.
    fn from_raw(raw: u64) -> Self;
    /// Bytes from zero.
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
    /// An I/O virtual address: what a device puts on the bus, in bytes.
    Iova
}
address! {
    /// An offset into a file that backs guest memory, in bytes.
    Offset
}

/// Why two numbers are not a page range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// The range has no byte.
    #[error("the range at {start:#x} is empty: give a length of at least {PAGE} bytes")]
    Empty {
        /// Where it starts.
        start: u64,
    },
    /// Start or length is not a multiple of [`PAGE`].
    #[error(
        "the range {start:#x}+{len:#x} is not page-aligned: start and length must be multiples of {PAGE}"
    )]
    Unaligned {
        /// Where it starts.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The end lies beyond [`LIMIT`] or overflows.
    #[error("the range {start:#x}+{len:#x} reaches beyond {LIMIT:#x}")]
    TooHigh {
        /// Where it starts.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
}

/// A half-open, page-aligned range that holds at least one page and ends below [`LIMIT`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange<A> {
    start: A,
    end: A,
}

impl<A: Address> PageRange<A> {
    /// The range of `len` bytes from `start`, checked. This is the border: nothing behind it checks again.
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

    /// The range from `start` to `end`, or none where it would be empty. Both are page-aligned by the caller.
    pub fn between(start: A, end: A) -> Option<Self> {
        debug_assert!(start.raw().is_multiple_of(PAGE) && end.raw().is_multiple_of(PAGE));
        (start < end).then_some(Self { start, end })
    }

    /// The first byte.
    pub fn start(self) -> A {
        self.start
    }

    /// The byte after the last.
    pub fn end(self) -> A {
        self.end
    }

    /// Length in bytes; never 0.
    #[allow(clippy::len_without_is_empty)] // it is never empty
    pub fn len(self) -> u64 {
        self.end.raw() - self.start.raw()
    }

    /// Length in pages; never 0.
    pub fn pages(self) -> u64 {
        self.len() / PAGE
    }

    /// Whether the two share a page.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether `other` lies wholly inside.
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether `address` lies inside.
    pub fn contains(self, address: A) -> bool {
        self.start <= address && address < self.end
    }

    /// The pages that both hold.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end.min(other.end))
    }

    /// What is left of `self` before and after `cut`.
    pub fn without(self, cut: Self) -> [Option<Self>; 2] {
        if !self.overlaps(cut) {
            return [Some(self), None];
        }
        [Self::between(self.start, cut.start), Self::between(cut.end, self.end)]
    }

    /// The same pages counted from another origin: `from` in this space is `to` in the other.
    /// `from` must not lie behind the start.
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

/// As `[start, length]`, in bytes.
impl<A: Address> Serialize for PageRange<A> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (self.start.raw(), self.len()).serialize(serializer)
    }
}

/// Checked as [`PageRange::new`] checks.
impl<'de, A: Address> Deserialize<'de> for PageRange<A> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (start, len) = <(u64, u64)>::deserialize(deserializer)?;
        Self::new(start, len).map_err(de::Error::custom)
    }
}
