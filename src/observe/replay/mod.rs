//! `passgate replay`: whether a log bears out what its daemon said.
//!
//! Two judges read it, run by run. One is a gate of this program: told the same events it must want the same things
//! done and give the same answers. The other is a checker that has none of the gate's code and looks at nothing but
//! what calls returned: a mistake that gate and daemon share is one that it can still see.

mod checker;
mod judge;
mod mapped;
mod spans;
mod waiting;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::gate::{Effect, Effects, FileId, Gate, InvalidationId, Receipt};
use crate::observe::audit::{Head, Line, Mark, ReadError, Run, Said};
use checker::Checker;
use spans::Spans;

/// Problems that are told of one run; further ones are only counted.
const TOLD: usize = 100;

/// What replaying a log came to.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Every run of the daemon in it, oldest first.
    pub runs: Vec<RunReport>,
}

/// One run.
#[derive(Debug, Serialize)]
pub struct RunReport {
    /// When it started, in nanoseconds since 1970.
    pub run: u64,
    /// Its version of passgate.
    pub passgate: String,
    /// Lines read.
    pub lines: u64,
    /// Answers in them.
    pub answers: u64,
    /// Whether it was read from its very beginning; else it was checked as far as it goes, and not by a gate.
    pub whole: bool,
    /// What is worth knowing and no fault.
    pub notes: Vec<String>,
    /// What is wrong; the first hundred.
    pub problems: Vec<Problem>,
    /// How many more there are.
    pub more: u64,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The number of the line.
    pub n: u64,
    /// What.
    pub what: String,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.runs.iter().all(|run| run.problems.is_empty())
    }
}

/// Replays the log in these files and directories. `progress` hears how many bytes of how many were read.
pub fn replay(paths: &[PathBuf], mut progress: impl FnMut(u64, u64)) -> Result<Report, ReadError> {
    let runs = Run::find(paths)?;
    let all: u64 = runs.iter().map(|run| run.bytes).sum();
    let (mut report, mut before, mut kept) = (Report::default(), 0, Kept::default());
    for run in &runs {
        let mut one = Replay::new(run);
        one.opening = (kept.boot == run.head.boot && one.whole).then_some(std::mem::take(&mut kept.pages));
        let mut lines = run.lines();
        while let Some(line) = lines.next() {
            one.line(&line?);
            if one.report.lines.is_multiple_of(4096) {
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
            one.ends(&run.head, lines.mark(), lines.is_filled());
        }
        kept = Kept { boot: run.head.boot.clone(), pages: one.end() };
        report.runs.push(one.report);
    }
    Ok(report)
}

/// The evidence of one invalidation, from the newest run in these files that has it, and the names in that run.
pub fn explain(paths: &[PathBuf], id: InvalidationId) -> Result<Option<(Receipt, Head)>, ReadError> {
    let mut found = None;
    for run in Run::find(paths)?.into_iter().filter(Run::is_whole) {
        let (mut gate, mut effects, mut next) = (Gate::new(run.head.policy), Effects::new(), 0);
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

/// Why a run is not whole.
fn why(head: &Head) -> &'static str {
    if head.resumed { "it goes on from an earlier daemon's run" } else { "its beginning was rotated away" }
}

/// What was in quarantine when the last run ended.
#[derive(Debug, Default)]
struct Kept {
    boot: String,
    pages: BTreeMap<FileId, Spans>,
}

/// One run, as it is replayed.
struct Replay {
    report: RunReport,
    /// Whether all lines so far are there.
    whole: bool,
    next: u64,
    gate: Gate,
    effects: Effects,
    checker: Checker,
    /// What the last run left in quarantine, until the first line that is not of the start.
    opening: Option<BTreeMap<FileId, Spans>>,
}

impl Replay {
    fn new(run: &Run) -> Self {
        let whole = run.is_whole();
        let head = &run.head;
        let mut notes = Vec::new();
        if !whole {
            notes.push(format!("{}: checked as far as it goes, without a gate", why(&run.head)));
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
            next: head.first,
            gate: Gate::new(head.policy),
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
        self.report.answers += line.x.iter().filter(|said| said.answers().is_some()).count() as u64;
        if self.whole {
            self.again(line);
        }
        let mut found = Vec::new();
        self.checker.line(line, &mut found);
        for what in found {
            self.problem(line.n, what);
        }
        if !is_start(line) {
            self.opened(line.n);
        }
    }

    /// Has the gate do it again.
    fn again(&mut self, line: &Line) {
        self.effects.clear();
        self.gate.handle(line.e.clone(), &mut self.effects);
        let mut now = self.effects.iter().filter_map(Said::of);
        let mut then = line.x.iter();
        loop {
            match (then.next(), now.next()) {
                (None, None) => return,
                (Some(then), Some(now)) if *then == now => {}
                (then, now) => {
                    let words = |said: Option<&Said<'_>>| {
                        said.map_or("nothing".to_owned(), |said| {
                            serde_json::to_string(said).unwrap_or_else(|_| format!("{said:?}"))
                        })
                    };
                    let what = format!("the log says {}, the gate says {}", words(then), words(now.as_ref()));
                    return self.problem(line.n, what);
                }
            }
        }
    }

    /// The start is over: all that the last run left in quarantine must be in it again.
    fn opened(&mut self, n: u64) {
        let Some(left) = self.opening.take() else { return };
        let mut now: BTreeMap<FileId, Spans> = BTreeMap::new();
        self.checker.quarantined().for_each(|(file, range)| now.entry(file).or_default().insert(range));
        for (file, spans) in &left {
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

    /// The number of the last line read.
    fn last(&self) -> u64 {
        self.next.saturating_sub(1)
    }

    /// Judges whether the run's end is there, by the mark that its last line is. A daemon that was killed has left none,
    /// and a file that is `filled` up.
    fn ends(&mut self, head: &Head, mark: Option<Mark>, filled: bool) {
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
                self.problem(last, format!("it goes on in its file {segment}, which is missing"));
            }
            None if head.format == 0 => {
                self.report.notes.push(
                    "of an earlier format: whether lines are missing at its end cannot be told".to_owned(),
                );
            }
            None if filled => {}
            None => self.problem(last, "its end is missing: the file was cut, or changed".to_owned()),
        }
    }

    fn problem(&mut self, n: u64, what: String) {
        if self.report.problems.len() < TOLD {
            self.report.problems.push(Problem { n, what });
        } else {
            self.report.more += 1;
        }
    }

    /// The run is over; what is in quarantine.
    fn end(&mut self) -> BTreeMap<FileId, Spans> {
        // It ended before it was told all that the last run had left.
        if let Some(left) = self.opening.take() {
            return left;
        }
        let mut found = Vec::new();
        self.checker.end(&mut found);
        for what in found {
            self.problem(self.next.saturating_sub(1), what);
        }
        let mut left: BTreeMap<FileId, Spans> = BTreeMap::new();
        self.checker.quarantined().for_each(|(file, range)| left.entry(file).or_default().insert(range));
        left
    }
}

/// Whether a line is of the daemon's start, before any client.
fn is_start(line: &Line) -> bool {
    use crate::gate::Event::{DeviceAdded, DomainAdded, Quarantine};
    matches!(line.e, DomainAdded { .. } | DeviceAdded { .. } | Quarantine { .. })
}
