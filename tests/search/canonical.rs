//! The text of a state, made independent of the names and the times in it.
//!
//! Jobs, invalidations, tickets and requests are numbered on and on, and a gate only ever compares their numbers; so
//! each number is replaced by its rank among those of its kind. Times are taken relative to now.

use std::hash::{DefaultHasher, Hash, Hasher};

/// What stands before a number that is a name, and before one that is a time.
const NAMES: [&str; 4] = ["JobId(", "InvalidationId(", "Ticket(", "cookie: "];
const SECONDS: &str = "tv_sec: ";
const NANOSECONDS: &str = ", tv_nsec: ";
/// A measured duration, on which nothing depends.
const MEASURED: &str = "took_ns: ";

/// A hash that tells states apart.
pub type Fingerprint = (u64, u64);

/// Returns the fingerprint of a state's text, where it is `now`.
pub fn fingerprint(text: &str, now: i128) -> Fingerprint {
    let plain = plain(text, now);
    let hash = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        (salt, plain.as_str()).hash(&mut hasher);
        hasher.finish()
    };
    (hash(1), hash(2))
}

/// Returns the time of an `Instant` by its `Debug` text.
pub fn time_of(instant: std::time::Instant) -> i128 {
    let text = format!("{instant:?}");
    let at = text.find(SECONDS).expect("an Instant prints its seconds") + SECONDS.len();
    time(&text[at..]).0
}

/// The time that begins at the start of `text`, and its length there.
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

/// Returns `text` with ranks in place of names and times relative to `now`.
pub fn plain(text: &str, now: i128) -> String {
    let mut tokens = Vec::new();
    let (mut kept, mut at) = (0, 0);
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
            tokens.push(Token::Text(&text[kept..at]));
            tokens.push(Token::Name(kind, value));
            at += len;
            kept = at;
        } else if before.ends_with(SECONDS) {
            let (value, len) = time(after);
            tokens.push(Token::Text(&text[kept..at]));
            tokens.push(Token::Time(value - now));
            at += len;
            kept = at;
        } else if before.ends_with(MEASURED) {
            tokens.push(Token::Text(&text[kept..at]));
            at += number(after).1;
            kept = at;
        }
    }
    tokens.push(Token::Text(&text[kept..]));
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
fn names_become_ranks_and_times_relative() {
    let text = "JobId(7) JobId(3) cookie: 12 took_ns: 55, tv_sec: 2, tv_nsec: 5 } JobId(7)";
    assert_eq!(plain(text, 2_000_000_000), "JobId(1) JobId(0) cookie: 0 took_ns: , tv_sec: 5 } JobId(1)");
}
