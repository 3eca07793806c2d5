//! A changed, missing or malformed line of an audit log is detected, and the report names the rule that it breaks.

use std::path::{Path, PathBuf};

use passgate::gate::{Outcome, PageState, Performer};
use passgate::observe::replay::{Problem, replay};
use serde_json::{Value, json};

use crate::harness::Harness;

/// Writes a log of ten conversions, of which one ended with unknown and one was not committed; returns its file and lines.
fn log(dir: &Path) -> (PathBuf, Vec<Value>) {
    let mut harness = Harness::new(dir, 0);
    for page in 0..8 {
        let id = harness.begin(page, 1, PageState::Private, Performer::Client).unwrap();
        harness.end(id, Outcome::Committed);
    }
    let id = harness.begin(100, 1, PageState::Private, Performer::Client).unwrap();
    harness.end(id, Outcome::Unknown { errno: 5, offset: 0 });
    let id = harness.begin(101, 1, PageState::Private, Performer::Client).unwrap();
    harness.end(id, Outcome::NotCommitted);
    drop(harness);
    let file = std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(&file).unwrap();
    (file, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

/// Replays a log whose lines `change` has changed; returns the problems found.
fn changed(change: impl FnOnce(&mut Vec<Value>)) -> Vec<Problem> {
    let dir = tempfile::tempdir().unwrap();
    let (file, mut lines) = log(dir.path());
    change(&mut lines);
    let text: Vec<String> = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(&file, text.concat()).unwrap();
    let report = replay(&[file], |_, _| {}).unwrap();
    report.runs.into_iter().flat_map(|run| run.problems).collect()
}

/// Returns the index of the first line from `from` on whose event is of this kind.
fn find(lines: &[Value], kind: &str, from: usize) -> usize {
    from + lines[from..].iter().position(|line| line["e"].get(kind).is_some()).unwrap()
}

#[track_caller]
fn assert_reported(problems: &[Problem], expected: &str) {
    assert!(
        problems.iter().any(|problem| problem.what.contains(expected)),
        "no `{expected}` in {problems:#?}"
    );
}

#[test]
fn unmodified_log_is_clean() {
    assert_eq!(changed(|_| {}), []);
}

#[test]
fn missing_line_is_detected() {
    let problems = changed(|lines| {
        let at = find(lines, "unmapped", 1);
        lines.remove(at);
    });
    assert_reported(&problems, "is missing");
}

/// A daemon whose first file comes late drops the lines until then, and has no file to say so.
#[test]
fn lines_dropped_before_the_first_file_are_missing_and_no_contradiction() {
    let problems = changed(|lines| {
        let begin = find(lines, "begin", 1);
        lines[0]["first"] = lines[begin]["n"].clone();
        lines.drain(1..begin);
    });
    let [missing] = &problems[..] else { panic!("{problems:#?}") };
    assert!(missing.what.starts_with("lines 0 to "), "{missing:?}");
}

/// Replays a log cut to its first `lines` lines, followed by `trailing`; returns the problems found.
fn cut(lines: usize, trailing: &[u8]) -> Vec<Problem> {
    let dir = tempfile::tempdir().unwrap();
    let (file, log_lines) = log(dir.path());
    assert!(lines <= log_lines.len());
    let text = std::fs::read(&file).unwrap();
    let head: Vec<u8> = text.split_inclusive(|byte| *byte == b'\n').take(lines).flatten().copied().collect();
    std::fs::write(&file, [&head, trailing].concat()).unwrap();
    let report = replay(&[file], |_, _| {}).unwrap();
    assert_eq!(report.is_clean(), report.runs[0].problems.is_empty());
    report.runs.into_iter().flat_map(|run| run.problems).collect()
}

#[test]
fn truncated_log_is_detected_unless_daemon_was_killed() {
    let lines = {
        let dir = tempfile::tempdir().unwrap();
        log(dir.path()).1.len()
    };
    for fewer in 1..lines - 1 {
        assert_reported(&cut(lines - fewer, b""), "its end is missing");
        assert_reported(&cut(lines - fewer, b"{\"n\":12,\"t\""), "in the middle of a line");
        assert_eq!(cut(lines - fewer, &[0; 64]), [], "zeros at the end are what a killed daemon leaves");
    }
}

#[test]
fn lines_missing_before_end_mark_are_detected() {
    let problems = changed(|lines| {
        let at = lines.len() - 2;
        lines.remove(at);
    });
    assert_reported(&problems, "are missing");
}

#[test]
fn log_without_marks_is_read_and_noted() {
    let dir = tempfile::tempdir().unwrap();
    let (file, mut lines) = log(dir.path());
    lines.pop();
    lines[0].as_object_mut().unwrap().remove("format");
    let text: Vec<String> = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(&file, text.concat()).unwrap();
    let report = replay(&[file], |_, _| {}).unwrap();
    assert!(report.is_clean(), "{:?}", report.runs[0].problems);
    assert!(report.runs[0].notes.iter().any(|note| note.contains("earlier format")));
}

#[test]
fn done_over_mapped_range_is_detected_by_checker_and_gate() {
    let problems = changed(|lines| {
        let at = find(lines, "begin", 1);
        let to = lines[at]["e"]["begin"]["caller"].clone();
        let x = lines[at]["x"].as_array_mut().unwrap();
        let id = x.iter().find_map(|effect| effect["arm"]["invalidation"].as_u64()).unwrap();
        x.push(json!({ "verdict": { "to": to, "invalidation": id, "verdict": "done" } }));
    });
    assert_reported(&problems, "done is said while IOVA");
    assert_reported(&problems, "the gate says nothing");
    // The true verdict follows the forged one.
    assert_reported(&problems, "is answered twice");
}

#[test]
fn done_after_failed_unmap_is_detected() {
    let problems = changed(|lines| {
        let at = find(lines, "unmapped", 1);
        lines[at]["e"]["unmapped"]["result"] = json!({ "failed": { "errno": 16, "bytes": 0 } });
    });
    assert_reported(&problems, "done is said while IOVA");
    assert_reported(&problems, "the gate says");
}

#[test]
fn done_with_alias_still_mapped_is_detected() {
    let problems = changed(|lines| {
        // The unmap at the second address, in the second domain, leaves operations in flight.
        let at = (1..lines.len()).filter(|at| lines[*at]["e"].get("unmapped").is_some()).nth(3).unwrap();
        lines[at]["e"]["unmapped"]["result"] = json!({ "in-flight": { "bytes": 4096 } });
    });
    assert_reported(&problems, "in domain 1 is mapped or in flight");
}

#[test]
fn map_during_conversion_or_over_quarantine_is_detected() {
    let map = |page: u64| {
        json!({ "map": {
            "job": 9_999, "domain": 0, "iova": [page * 4096, 4096], "piece": 4096,
            "file": { "device": 1, "inode": 7 }, "offset": page * 4096, "writable": true,
        } })
    };
    let problems = changed(|lines| {
        let at = find(lines, "begin", 1);
        lines[at]["x"].as_array_mut().unwrap().push(map(0));
    });
    assert_reported(&problems, "which is between begin and end");
    let problems = changed(|lines| {
        // The last line is the mark of the log's end.
        let last = lines.len() - 2;
        lines[last]["x"] = json!([map(100)]);
    });
    assert_reported(&problems, "which is in quarantine");
}

#[test]
fn unknown_end_without_quarantine_is_detected() {
    let problems = changed(|lines| {
        for line in lines.iter_mut().filter_map(|line| line.get_mut("x")?.as_array_mut()) {
            line.retain(|effect| effect.get("quarantined").is_none());
        }
    });
    assert_reported(&problems, "unknown and not in quarantine");
}

#[test]
fn late_or_missing_answer_is_detected() {
    let late_answer = changed(|lines| {
        let at = find(lines, "begin", 1);
        lines[at]["e"]["begin"]["deadline_ns"] = json!(1);
    });
    assert_reported(&late_answer, "its deadline was 1");
    let missing = changed(|lines| {
        let at = find(lines, "begin", 1);
        lines[at]["e"]["begin"]["deadline_ns"] = json!(1);
        for line in lines.iter_mut().filter_map(|line| line.get_mut("x")?.as_array_mut()) {
            line.retain(|effect| effect.get("verdict").is_none());
        }
    });
    assert_reported(&missing, "was not answered within its deadline");
}

#[test]
fn duplicate_answer_is_detected() {
    let problems = changed(|lines| {
        let at = (1..lines.len())
            .find(|at| lines[*at]["x"].as_array().is_some_and(|x| x.iter().any(|s| s.get("ended").is_some())))
            .unwrap();
        let x = lines[at]["x"].as_array_mut().unwrap();
        let second_end = x.iter().find(|effect| effect.get("ended").is_some()).unwrap().clone();
        x.push(second_end);
    });
    assert_reported(&problems, "twice, or unasked");
}

#[test]
fn malformed_log_is_refused_with_line_number() {
    let dir = tempfile::tempdir().unwrap();
    let (file, _) = log(dir.path());
    let mut bytes = std::fs::read(&file).unwrap();
    let third = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(1).unwrap().0 + 1;
    bytes[third] = b'x';
    std::fs::write(&file, &bytes).unwrap();
    let error = replay(std::slice::from_ref(&file), |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("line 3") && error.contains(file.to_str().unwrap()), "{error}");
    std::fs::write(&file, b"no log\n").unwrap();
    let error = replay(&[file], |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("not the head"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    assert!(replay(&[empty.path().into()], |_, _| {}).is_err());
}

#[test]
fn out_of_range_numbers_are_errors_not_panics() {
    for (gpa, offset) in [([0, 4096], 1u64), ([0, 4097], 0), ([0, 4096], 1 << 62), ([0, 0], 0)] {
        let dir = tempfile::tempdir().unwrap();
        let (file, mut lines) = log(dir.path());
        let at = find(&lines, "add-region", 1);
        lines[at]["e"]["add-region"]["spec"]["gpa"] = json!(gpa);
        lines[at]["e"]["add-region"]["spec"]["backing"]["offset"] = json!(offset);
        let text: Vec<String> = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&file, text.concat()).unwrap();
        assert!(replay(&[file], |_, _| {}).is_err(), "{gpa:?} at {offset}");
    }
}
