//! Whoever changes a line is found out, and by whom.

use std::path::{Path, PathBuf};

use passgate::gate::{Outcome, PageState, Performer};
use passgate::observe::replay::{Problem, replay};
use serde_json::{Value, json};

use crate::play::Play;

/// A log of a few conversions, and one that failed.
fn log(dir: &Path) -> (PathBuf, Vec<Value>) {
    let mut play = Play::new(dir, 0);
    for page in 0..8 {
        let id = play.begin(page, 1, PageState::Private, Performer::Client).unwrap();
        play.end(id, Outcome::Committed);
    }
    let id = play.begin(100, 1, PageState::Private, Performer::Client).unwrap();
    play.end(id, Outcome::Unknown { errno: 5, offset: 0 });
    let id = play.begin(101, 1, PageState::Private, Performer::Client).unwrap();
    play.end(id, Outcome::NotCommitted);
    drop(play);
    let file = std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(&file).unwrap();
    (file, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

/// Changes the lines, and replays what comes of it.
fn changed(change: impl FnOnce(&mut Vec<Value>)) -> Vec<Problem> {
    let dir = tempfile::tempdir().unwrap();
    let (file, mut lines) = log(dir.path());
    change(&mut lines);
    let text: Vec<String> = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(&file, text.concat()).unwrap();
    let report = replay(&[file], |_, _| {}).unwrap();
    report.runs.into_iter().flat_map(|run| run.problems).collect()
}

/// The first line whose event is of this kind, from `from` on.
fn find(lines: &[Value], kind: &str, from: usize) -> usize {
    from + lines[from..].iter().position(|line| line["e"].get(kind).is_some()).unwrap()
}

#[track_caller]
fn said(problems: &[Problem], words: &str) {
    assert!(problems.iter().any(|problem| problem.what.contains(words)), "no `{words}` in {problems:#?}");
}

#[test]
fn nothing_changed_is_clean() {
    assert_eq!(changed(|_| {}), []);
}

#[test]
fn a_line_that_is_gone_is_missed() {
    let problems = changed(|lines| {
        let at = find(lines, "unmapped", 1);
        lines.remove(at);
    });
    said(&problems, "is missing");
}

/// Cuts the log to its first `lines` lines; what replay says of it, and the bytes behind them as they were.
fn cut(lines: usize, behind: &[u8]) -> Vec<Problem> {
    let dir = tempfile::tempdir().unwrap();
    let (file, all) = log(dir.path());
    assert!(lines <= all.len());
    let text = std::fs::read(&file).unwrap();
    let kept: Vec<u8> = text.split_inclusive(|byte| *byte == b'\n').take(lines).flatten().copied().collect();
    std::fs::write(&file, [&kept, behind].concat()).unwrap();
    let report = replay(&[file], |_, _| {}).unwrap();
    assert_eq!(report.is_clean(), report.runs[0].problems.is_empty());
    report.runs.into_iter().flat_map(|run| run.problems).collect()
}

#[test]
fn an_end_that_is_missing_is_missed_unless_the_daemon_was_killed() {
    let lines = {
        let dir = tempfile::tempdir().unwrap();
        log(dir.path()).1.len()
    };
    for fewer in 1..lines - 1 {
        said(&cut(lines - fewer, b""), "its end is missing");
        said(&cut(lines - fewer, b"{\"n\":12,\"t\""), "in the middle of a line");
        assert_eq!(cut(lines - fewer, &[0; 64]), [], "so it is where the daemon was killed");
    }
}

#[test]
fn lines_that_are_missing_before_the_mark_of_the_end_are_missed() {
    let problems = changed(|lines| {
        let at = lines.len() - 2;
        lines.remove(at);
    });
    said(&problems, "are missing");
}

#[test]
fn a_log_without_marks_is_read_and_says_so() {
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
fn a_done_over_what_is_mapped_is_found_by_both() {
    let problems = changed(|lines| {
        let at = find(lines, "begin", 1);
        let to = lines[at]["e"]["begin"]["caller"].clone();
        let x = lines[at]["x"].as_array_mut().unwrap();
        let id = x.iter().find_map(|said| said["arm"]["invalidation"].as_u64()).unwrap();
        x.push(json!({ "verdict": { "to": to, "invalidation": id, "verdict": "done" } }));
    });
    said(&problems, "done is said while IOVA");
    said(&problems, "the gate says nothing");
    // The true one comes later.
    said(&problems, "is answered twice");
}

#[test]
fn an_unmap_that_failed_makes_its_done_a_lie() {
    let problems = changed(|lines| {
        let at = find(lines, "unmapped", 1);
        lines[at]["e"]["unmapped"]["result"] = json!({ "failed": { "errno": 16, "bytes": 0 } });
    });
    said(&problems, "done is said while IOVA");
    said(&problems, "the gate says");
}

#[test]
fn an_alias_that_is_still_mapped_makes_its_done_a_lie() {
    let problems = changed(|lines| {
        // The unmap of the second address, of the second domain, comes up short.
        let at = (1..lines.len()).filter(|at| lines[*at]["e"].get("unmapped").is_some()).nth(3).unwrap();
        lines[at]["e"]["unmapped"]["result"] = json!({ "in-flight": { "bytes": 4096 } });
    });
    said(&problems, "in domain 1 is mapped or in flight");
}

#[test]
fn a_map_between_begin_and_end_and_one_over_quarantine_are_found() {
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
    said(&problems, "which is between begin and end");
    let problems = changed(|lines| {
        // The last line is the mark of the log's end.
        let last = lines.len() - 2;
        lines[last]["x"] = json!([map(100)]);
    });
    said(&problems, "which is in quarantine");
}

#[test]
fn an_end_that_said_unknown_must_be_followed_by_quarantine() {
    let problems = changed(|lines| {
        for line in lines.iter_mut().filter_map(|line| line.get_mut("x")?.as_array_mut()) {
            line.retain(|said| said.get("quarantined").is_none());
        }
    });
    said(&problems, "unknown and not in quarantine");
}

#[test]
fn an_answer_that_comes_late_or_never_is_found() {
    let late = changed(|lines| {
        let at = find(lines, "begin", 1);
        lines[at]["e"]["begin"]["deadline_ns"] = json!(1);
    });
    said(&late, "its deadline was 1");
    let never = changed(|lines| {
        let at = find(lines, "begin", 1);
        lines[at]["e"]["begin"]["deadline_ns"] = json!(1);
        for line in lines.iter_mut().filter_map(|line| line.get_mut("x")?.as_array_mut()) {
            line.retain(|said| said.get("verdict").is_none());
        }
    });
    said(&never, "was not answered within its deadline");
}

#[test]
fn an_answer_given_twice_is_found() {
    let problems = changed(|lines| {
        let at = (1..lines.len())
            .find(|at| lines[*at]["x"].as_array().is_some_and(|x| x.iter().any(|s| s.get("ended").is_some())))
            .unwrap();
        let x = lines[at]["x"].as_array_mut().unwrap();
        let again = x.iter().find(|said| said.get("ended").is_some()).unwrap().clone();
        x.push(again);
    });
    said(&problems, "twice, or unasked");
}

#[test]
fn what_is_no_log_is_refused_with_the_line() {
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
fn numbers_that_no_daemon_writes_are_errors_and_no_panics() {
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
