//! The text of a state, made independent of the ids and the times in it.
//!
//! Jobs, invalidations, tickets and requests are numbered consecutively, and a gate only ever compares their numbers; so each
//! number is replaced by its rank among those of its kind. Times are made relative to now.

use std::hash::{DefaultHasher, Hash, Hasher};

/// The `Debug` text before a number that is an id.
const NAMES: [&str; 4] = ["JobId(", "InvalidationId(", "Ticket(", "cookie: "];
/// The `Debug` text before the seconds of an `Instant`.
const SECONDS: &str = "tv_sec: ";
/// The `Debug` text between the seconds and the nanoseconds of an `Instant`.
const NANOSECONDS: &str = ", tv_nsec: ";
/// The `Debug` text before a measured duration, on which nothing depends.
const MEASURED: &str = "took_ns: ";

/// A 128-bit hash of a state.
pub type Fingerprint = (u64, u64);

/// Returns the fingerprint of a state's text at the time `now`.
pub fn fingerprint(text: &str, now: i128) -> Fingerprint {
    let plain = plain(text, now);
    let hash = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        (salt, plain.as_str()).hash(&mut hasher);
        hasher.finish()
    };
    (hash(1), hash(2))
}

/// Returns the nanoseconds of an `Instant`, read from its `Debug` text.
pub fn time_of(instant: std::time::Instant) -> i128 {
    let text = format!("{instant:?}");
    let at = text.find(SECONDS).expect("an Instant prints its seconds") + SECONDS.len();
    time(&text[at..]).0
}

/// Returns the time at the start of `text`, in nanoseconds, and the length of its text.
fn time(text: &str) -> (i128, usize) {
    let (seconds, len) = number(text);
    let rest = &text[len..];
    let after = rest.strip_prefix(NANOSECONDS).expect("an Instant prints its nanoseconds");
    let (nanoseconds, more) = number(after);
    (i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds), len + NANOSECONDS.len() + more)
}

fn number(text: &str) -> (u64, usize) {
    let len = text.bytes().take_while(u8::is_ascii_digit).count();
    (text[..len].parse().unwrap_or(0), len)
}

enum Token<'a> {
    Text(&'a str),
    Name(usize, u64),
    Time(i128),
}

/// Returns `text` with ranks in place of ids, and times relative to `now`.
pub fn plain(text: &str, now: i128) -> String {
    let mut tokens = Vec::new();
    let (mut copied, mut at) = (0, 0);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        let rest = &text[at..];
        // Every pattern ends with one of these.
        if bytes[at] != b'(' && bytes[at] != b' ' {
            at += 1;
            continue;
        }
        at += 1;
        let before = &text[..at];
        let after = &rest[1..];
        if let Some(kind) = NAMES.iter().position(|name| before.ends_with(name)) {
            let (value, len) = number(after);
            tokens.push(Token::Text(&text[copied..at]));
            tokens.push(Token::Name(kind, value));
            at += len;
            copied = at;
        } else if before.ends_with(SECONDS) {
            let (value, len) = time(after);
            tokens.push(Token::Text(&text[copied..at]));
            tokens.push(Token::Time(value - now));
            at += len;
            copied = at;
        } else if before.ends_with(MEASURED) {
            tokens.push(Token::Text(&text[copied..at]));
            at += number(after).1;
            copied = at;
        }
    }
    tokens.push(Token::Text(&text[copied..]));
    let mut names: [Vec<u64>; NAMES.len()] = Default::default();
    for token in &tokens {
        if let Token::Name(kind, value) = token {
            names[*kind].push(*value);
        }
    }
    for values in &mut names {
        values.sort_unstable();
        values.dedup();
    }
    let mut plain = String::with_capacity(text.len());
    for token in tokens {
        match token {
            Token::Text(part) => plain.push_str(part),
            Token::Name(kind, value) => {
                let rank = names[kind].partition_point(|other| *other < value);
                plain.push_str(&rank.to_string());
            }
            Token::Time(relative) => plain.push_str(&relative.to_string()),
        }
    }
    plain
}

#[test]
fn ids_become_ranks_and_times_become_relative() {
    let text = "JobId(7) JobId(3) cookie: 12 took_ns: 55, tv_sec: 2, tv_nsec: 5 } JobId(7)";
    assert_eq!(plain(text, 2_000_000_000), "JobId(1) JobId(0) cookie: 0 took_ns: , tv_sec: 5 } JobId(1)");
}
