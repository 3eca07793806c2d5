//! The kinds of verdicts.

/// The kind of a verdict on an invalidation. The numbers are those of the notification channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum VerdictKind {
    /// No device can access the range any more.
    Done = 0,
    /// The client must not convert.
    Refused = 1,
    /// The client must not convert; devices may still access the range.
    Unknown = 2,
}

impl VerdictKind {
    /// Returns its name in messages and in JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
        }
    }

    /// Returns the kind with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Done, Self::Refused, Self::Unknown].into_iter().find(|kind| *kind as u32 == number)
    }
}
