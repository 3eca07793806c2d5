//! The state of the gate as text, by which an exhaustive search tells states apart.
//!
//! It is made of the fields' own `Debug` output, so that a field that is added to a component is part of it at once. Left out
//! is what no decision depends on: the evidence of receipts, the numbers of calls, and the policy, which never changes.

use super::Gate;

impl Gate {
    /// Returns everything that decides how the gate goes on, as text. Two gates with the same policy whose texts differ
    /// only in the names of jobs and invalidations, in the same order, behave alike.
    pub fn canonical(&self) -> String {
        let Self {
            policy: _,
            limits: _,
            memory,
            mappings,
            calls,
            invalidations,
            devices,
            quarantine,
            clients,
            inconsistencies,
        } = self;
        let mut text = String::with_capacity(4096);
        memory.canonical(&mut text);
        mappings.iter().for_each(|domain| domain.canonical(&mut text));
        text + &calls.canonical()
            + &without_evidence(&invalidations.canonical())
            + &format!("{devices:?}\n{}\n{clients:?} {inconsistencies}\n", quarantine.canonical())
    }
}

/// `text` without the steps of receipts.
fn without_evidence(text: &str) -> String {
    const STEPS: &str = "steps: [";
    let mut rest = text;
    let mut kept = String::with_capacity(text.len());
    while let Some(at) = rest.find(STEPS) {
        kept.push_str(&rest[..at]);
        rest = &rest[at + STEPS.len()..];
        let mut depth = 1;
        let end = rest.bytes().position(|byte| {
            depth += i32::from(byte == b'[') - i32::from(byte == b']');
            depth == 0
        });
        rest = end.map_or("", |end| &rest[end + 1..]);
    }
    kept.push_str(rest);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_text_omits_only_evidence() {
        assert_eq!(without_evidence("a { steps: [b { c: [1] }, d], more: 2 }"), "a { , more: 2 }");
        assert_eq!(without_evidence("a { steps: [] } b { steps: [x] }"), "a {  } b {  }");
        assert_eq!(without_evidence("a"), "a");
    }
}
