//! The state of a page of guest memory.

use serde::{Deserialize, Deserializer, Serialize, de};

/// The state of a page of guest memory. The numbers are those of the notification channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum PageState {
    /// Devices may access it.
    Shared = 0,
    /// Only the guest may access it.
    Private = 1,
    /// No page is allocated: a hole was punched.
    Hole = 2,
    /// Not known: its owner did not know at the end of a conversion, or there was no end. The daemon reports it; no request
    /// may name it.
    Unknown = 3,
}

impl PageState {
    /// All states, in the order of their numbers.
    pub const ALL: [PageState; 4] = [Self::Shared, Self::Private, Self::Hole, Self::Unknown];

    /// The states that a request may name, in the order of their numbers.
    pub const REQUESTABLE: [PageState; 3] = [Self::Shared, Self::Private, Self::Hole];

    /// Returns its name in messages and in JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Private => "private",
            Self::Hole => "hole",
            Self::Unknown => "unknown",
        }
    }

    /// Returns the state with this number; none unless a request may name it.
    pub fn from_request(number: u32) -> Option<Self> {
        Self::REQUESTABLE.into_iter().find(|state| *state as u32 == number)
    }
}

/// Deserializes a state of [`PageState::REQUESTABLE`], for the parameters of a request.
pub(crate) fn requested<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PageState, D::Error> {
    const WORDS: [&str; 3] = [PageState::Shared.word(), PageState::Private.word(), PageState::Hole.word()];
    let word = String::deserialize(deserializer)?;
    let state = PageState::REQUESTABLE.into_iter().find(|state| state.word() == word);
    state.ok_or_else(|| de::Error::unknown_variant(&word, &WORDS))
}

/// Returns the state of memory that is added without one.
pub(crate) fn shared() -> PageState {
    PageState::Shared
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_cannot_name_the_unknown_state() {
        for state in PageState::ALL {
            let json = format!("\"{}\"", state.word());
            assert_eq!(serde_json::to_string(&state).unwrap(), json);
            assert_eq!(serde_json::from_str::<PageState>(&json).unwrap(), state);
            let read = requested(&mut serde_json::Deserializer::from_str(&json));
            let requestable = state != PageState::Unknown;
            assert_eq!(read.ok(), requestable.then_some(state));
            assert_eq!(PageState::from_request(state as u32), requestable.then_some(state));
        }
        let error = requested(&mut serde_json::Deserializer::from_str("\"unknown\"")).unwrap_err();
        assert!(error.to_string().contains("expected one of `shared`, `private`, `hole`"), "{error}");
    }
}
