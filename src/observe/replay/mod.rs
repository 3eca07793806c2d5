//! `passgate replay`: checks that a log supports the answers of its daemon.
//!
//! Every run is checked twice. A gate of this program gets the same events, and must ask for the same effects and give the same
//! answers. And a checker that has none of the gate's code uses only the results of calls: it can find an error that the gates of
//! both programs have.

mod checker;
mod checks;
mod mapped;
mod spans;
mod unanswered;

use std::collections::BTreeMap;
use std::path::PathBuf;

use passgate_bindings::words;
use serde::Serialize;

use crate::gate::{Effect, Effects, FileId, Gate, InvalidationId, Receipt};
use crate::observe::audit::{Head, Line, LoggedEffect, Mark, ReadError, Run};
use checker::Checker;
use spans::Spans;

/// The maximum number of problems in the report of one run; further ones are only counted.
const MAX_PROBLEMS: usize = 100;

/// The number of lines after which progress is reported.
const PROGRESS_LINES: u64 = 4096;

/// The result of replaying a log.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Every run of the daemon in the log, oldest first.
    pub runs: Vec<RunReport>,
}

/// The result of replaying one run.
#[derive(Debug, Serialize)]
pub struct RunReport {
    /// The time at which the run started, in nanoseconds since 1970.
    pub run: u64,
    /// The version of passgate that wrote it.
    pub passgate: String,
    /// The number of lines read.
    pub lines: u64,
    /// The number of answers in them.
    pub answers: u64,
    /// True if it was read from its beginning; else it was checked as far as it goes, and not by a gate.
    pub whole: bool,
    /// Circumstances of the check that are no problem.
    pub notes: Vec<String>,
    /// The first hundred problems.
    pub problems: Vec<Problem>,
    /// The number of further problems.
    pub more: u64,
}

/// A violated promise, or a fault of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The number of the line.
    pub n: u64,
    /// The description.
    pub what: String,
}

impl Report {
    /// Returns true if there is no problem.
    pub fn is_clean(&self) -> bool {
        self.runs.iter().all(|run| run.problems.is_empty())
    }
}

/// Replays the log in these files and directories. `progress` is called with the number of bytes read and of all bytes.
pub fn replay(paths: &[PathBuf], mut progress: impl FnMut(u64, u64)) -> Result<Report, ReadError> {
    let runs = Run::find(paths)?;
    let all: u64 = runs.iter().map(|run| run.bytes).sum();
    let (mut report, mut before, mut last) = (Report::default(), 0, LastQuarantine::default());
    for run in &runs {
        let mut one = Replay::new(run);
        one.opening = (last.boot == run.head.boot && one.whole).then_some(std::mem::take(&mut last.pages));
        let mut lines = run.lines();
        while let Some(line) = lines.next() {
            one.line(&line?);
            if one.report.lines.is_multiple_of(PROGRESS_LINES) {
                progress(before + lines.bytes(), all);
            }
        }
        before += run.bytes;
        progress(before, all);
        if lines.is_cut() {
            one.problem(
                one.last(),
                "a file ends in the middle of a line: what came after it is missing".to_owned(),
            );
        } else {
            one.check_end(&run.head, lines.mark(), lines.is_filled());
        }
        last = LastQuarantine { boot: run.head.boot.clone(), pages: one.end() };
        report.runs.push(one.report);
    }
    Ok(report)
}

/// Returns the evidence of one invalidation from the newest run in these files that has it, and the head of that run, which has the
/// names of the devices. Only runs that are there from their beginning can be searched.
pub fn explain(paths: &[PathBuf], id: InvalidationId) -> Result<Option<(Receipt, Head)>, ReadError> {
    let mut found = None;
    for run in Run::find(paths)?.into_iter().filter(Run::is_whole) {
        let (mut gate, mut effects, mut next) =
            (Gate::new(run.head.policy, words::private), Effects::new(), 0);
        for line in run.lines() {
            let line = line?;
            if line.n != next {
                break;
            }
            next += 1;
            gate.handle(line.e, &mut effects);
            for effect in effects.drain(..) {
                if let Effect::Receipt(receipt) = effect
                    && receipt.invalidation == id
                {
                    found = Some((*receipt, run.head.clone()));
                }
            }
        }
    }
    Ok(found)
}

/// Returns the reason why a run is not whole.
fn why_incomplete(head: &Head) -> &'static str {
    if head.resumed { "it resumes from an earlier daemon's run" } else { "its beginning was rotated away" }
}

/// The quarantine at the end of the last run.
#[derive(Debug, Default)]
struct LastQuarantine {
    boot: String,
    pages: BTreeMap<FileId, Spans>,
}

/// The replay of one run.
struct Replay {
    report: RunReport,
    /// True while no line is missing.
    whole: bool,
    /// The number of the next line.
    next: u64,
    gate: Gate,
    effects: Effects,
    checker: Checker,
    /// The quarantine of the last run, until the first line that does not belong to the start.
    opening: Option<BTreeMap<FileId, Spans>>,
}

impl Replay {
    fn new(run: &Run) -> Self {
        let whole = run.is_whole();
        let head = &run.head;
        let mut notes = Vec::new();
        if !whole {
            notes.push(format!("{}: checked as far as it goes, without a gate", why_incomplete(&run.head)));
        }
        if head.passgate != env!("CARGO_PKG_VERSION") {
            notes.push(format!("written by passgate {}, whose gate may differ from this one", head.passgate));
        }
        let report = RunReport {
            run: head.run,
            passgate: head.passgate.clone(),
            lines: 0,
            answers: 0,
            whole,
            notes,
            problems: Vec::new(),
            more: 0,
        };
        Self {
            report,
            whole,
            // Lines that were dropped before the first file was there are missing too.
            next: if head.segment == 0 { 0 } else { head.first },
            gate: Gate::new(head.policy, words::private),
            effects: Effects::new(),
            checker: Checker::new(whole),
            opening: None,
        }
    }

    fn line(&mut self, line: &Line) {
        self.report.lines += 1;
        if line.n != self.next {
            let (from, to) = (self.next, line.n);
            let what = match to.checked_sub(from + 1) {
                Some(0) => format!("line {from} is missing"),
                Some(_) => format!("lines {from} to {} are missing", to - 1),
                None => format!("line {to} comes after line {}", from.saturating_sub(1)),
            };
            self.problem(line.n, what + ": the rest is checked as far as it goes, without a gate");
            self.whole = false;
            self.checker = Checker::new(false);
            self.opening = None;
        }
        self.next = line.n + 1;
        self.report.answers += line.x.iter().filter(|effect| effect.answers().is_some()).count() as u64;
        if self.whole {
            self.compare(line);
        }
        let mut violations = Vec::new();
        self.checker.line(line, &mut violations);
        for what in violations {
            self.problem(line.n, what);
        }
        if !is_start(line) {
            self.check_opening(line.n);
        }
    }

    /// Passes the event to the gate, and compares its effects with those in the log. Only the first difference is a problem.
    fn compare(&mut self, line: &Line) {
        self.effects.clear();
        self.gate.handle(line.e.clone(), &mut self.effects);
        let mut replayed = self.effects.iter().filter_map(LoggedEffect::of);
        let mut logged = line.x.iter();
        loop {
            match (logged.next(), replayed.next()) {
                (None, None) => return,
                (Some(logged), Some(replayed)) if *logged == replayed => {}
                (logged, replayed) => {
                    let text = |effect: Option<&LoggedEffect<'_>>| {
                        effect.map_or("nothing".to_owned(), |effect| {
                            serde_json::to_string(effect).unwrap_or_else(|_| format!("{effect:?}"))
                        })
                    };
                    let (logged, replayed) = (text(logged), text(replayed.as_ref()));
                    let what = format!("the log says {logged}, the gate says {replayed}");
                    return self.problem(line.n, what);
                }
            }
        }
    }

    /// Checks at the end of the start that everything is in quarantine that was when the last run ended.
    fn check_opening(&mut self, n: u64) {
        let Some(earlier) = self.opening.take() else { return };
        let mut now: BTreeMap<FileId, Spans> = BTreeMap::new();
        self.checker.quarantined().for_each(|(file, range)| now.entry(file).or_default().insert(range));
        for (file, spans) in &earlier {
            for range in spans.iter() {
                if !now.get(file).is_some_and(|spans| spans.covers(range.clone())) {
                    let at = mapped::show(&(*file, range));
                    self.problem(
                        n,
                        format!("{at} was in quarantine when the last run ended, and is not now"),
                    );
                }
            }
        }
    }

    /// Returns the number of the last line read.
    fn last(&self) -> u64 {
        self.next.saturating_sub(1)
    }

    /// Checks that the run's end is there, by the mark that its last line is. A daemon that was killed leaves no mark, and a file that
    /// is `filled` up with NULs.
    fn check_end(&mut self, head: &Head, mark: Option<Mark>, filled: bool) {
        let (last, next) = (self.last(), self.next);
        match mark {
            Some(Mark::End { n, dropped }) if n > next => {
                let what =
                    format!("lines {next} to {} are missing ({dropped} were dropped since the start)", n - 1);
                self.problem(last, what);
            }
            Some(Mark::End { .. }) => {}
            Some(Mark::Gap { n }) => self.problem(
                last,
                format!("from line {n} on nothing could be written: how many lines are missing is unknown"),
            ),
            Some(Mark::More { segment }) => {
                self.problem(last, format!("it continues in its file {segment}, which is missing"));
            }
            None if head.format == 0 => {
                self.report
                    .notes
                    .push("of an earlier format: missing lines at its end cannot be detected".to_owned());
            }
            None if filled => {}
            None => self.problem(last, "its end is missing: the file was cut, or changed".to_owned()),
        }
    }

    fn problem(&mut self, n: u64, what: String) {
        if self.report.problems.len() < MAX_PROBLEMS {
            self.report.problems.push(Problem { n, what });
        } else {
            self.report.more += 1;
        }
    }

    /// Ends the run. Returns what is in quarantine.
    fn end(&mut self) -> BTreeMap<FileId, Spans> {
        // The run ended during its start: the quarantine of the run before it still counts.
        if let Some(earlier) = self.opening.take() {
            return earlier;
        }
        let mut violations = Vec::new();
        self.checker.end(&mut violations);
        for what in violations {
            self.problem(self.next.saturating_sub(1), what);
        }
        let mut quarantine: BTreeMap<FileId, Spans> = BTreeMap::new();
        self.checker
            .quarantined()
            .for_each(|(file, range)| quarantine.entry(file).or_default().insert(range));
        quarantine
    }
}

/// Returns true for a line of the daemon's start, before any client.
fn is_start(line: &Line) -> bool {
    use crate::gate::Event::{DeviceAdded, DomainAdded, Quarantine};
    matches!(line.e, DomainAdded { .. } | DeviceAdded { .. } | Quarantine { .. })
}
