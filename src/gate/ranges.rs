//! The ranges of one invalidation: one range of guest memory, or a batch.

use std::sync::Arc;

use passgate_bindings::{Gpa, PageRange};
use serde::{Deserialize, Serialize};

/// One range, or several: ascending, none overlapping another, at least one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<PageRange<Gpa>>", into = "Vec<PageRange<Gpa>>")]
pub struct Ranges(Inner);

/// One range, the common case, needs no memory of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Inner {
    One(PageRange<Gpa>),
    Many(Arc<[PageRange<Gpa>]>),
}

/// The reason for which ranges are no batch. The text is the message that the user reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangesError {
    /// There is no range.
    #[error("a batch has at least one range")]
    Empty,
    /// Out of order, or overlapping.
    #[error("range {0} of the batch does not lie behind the one before it: give them in ascending order")]
    Order(usize),
}

impl Ranges {
    /// Returns the ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = PageRange<Gpa>> + '_ {
        self.as_slice().iter().copied()
    }

    /// Returns the ranges in order; never empty.
    pub fn as_slice(&self) -> &[PageRange<Gpa>] {
        match &self.0 {
            Inner::One(range) => std::slice::from_ref(range),
            Inner::Many(ranges) => ranges,
        }
    }

    /// Returns the first range.
    pub fn first(&self) -> PageRange<Gpa> {
        match &self.0 {
            Inner::One(range) => *range,
            Inner::Many(ranges) => ranges[0],
        }
    }

    /// Returns the bytes of all ranges together.
    pub fn len(&self) -> u64 {
        self.iter().map(|range| range.len()).sum()
    }

    /// A batch is never empty.
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl From<PageRange<Gpa>> for Ranges {
    fn from(range: PageRange<Gpa>) -> Self {
        Self(Inner::One(range))
    }
}

impl TryFrom<Vec<PageRange<Gpa>>> for Ranges {
    type Error = RangesError;

    fn try_from(ranges: Vec<PageRange<Gpa>>) -> Result<Self, RangesError> {
        if let Some(at) = ranges.windows(2).position(|pair| pair[1].start() < pair[0].end()) {
            return Err(RangesError::Order(at + 1));
        }
        match ranges[..] {
            [] => Err(RangesError::Empty),
            [one] => Ok(one.into()),
            _ => Ok(Self(Inner::Many(ranges.into()))),
        }
    }
}

impl From<Ranges> for Vec<PageRange<Gpa>> {
    fn from(ranges: Ranges) -> Self {
        ranges.as_slice().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use passgate_bindings::PAGE;

    fn page(page: u64, pages: u64) -> PageRange<Gpa> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    #[test]
    fn batch_is_ascending_and_not_empty() {
        assert_eq!(Ranges::try_from(vec![]), Err(RangesError::Empty));
        assert_eq!(Ranges::try_from(vec![page(4, 2), page(5, 1)]), Err(RangesError::Order(1)));
        assert_eq!(Ranges::try_from(vec![page(4, 2), page(1, 1)]), Err(RangesError::Order(1)));
        let many = Ranges::try_from(vec![page(1, 1), page(2, 1), page(9, 3)]).unwrap();
        assert_eq!((many.first(), many.len()), (page(1, 1), 5 * PAGE));
        assert_eq!(Ranges::try_from(vec![page(7, 2)]).unwrap(), page(7, 2).into());
    }
}
