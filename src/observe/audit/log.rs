//! The writer.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use passgate_bindings::segment::Segment;

use super::files;
use super::line::{FORMAT, Head, Mark, Said};
use super::spare::Spare;
use crate::gate::{Effect, Event, Policy};

/// How long until a log that could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a session waits for the disk, where it is not told otherwise.
pub const PATIENCE: Duration = Duration::from_millis(250);
/// What of the line's buffer is kept from one line to the next; lines are some hundred bytes, but for rare ones.
const USUAL: usize = 64 << 10;
/// A line longer than a file less this never fits one.
const HEAD: u64 = 4096;
/// Bytes at the end of a file that are kept for its marks: three, of at most 80 bytes each.
const MARKS: u64 = 256;

/// What a log is told once.
#[derive(Debug, Clone)]
pub struct LogOptions {
    /// Bytes of one file.
    pub segment: u64,
    /// How long the writer waits for a file that is not ready when it is needed; then lines are dropped.
    pub patience: Duration,
    /// Files that are kept, with the one that is written and the one that is next; the oldest goes.
    pub keep: usize,
    /// The gate's policy, which replay needs.
    pub policy: Policy,
    /// The kernel's boot.
    pub boot: String,
    /// The interface to the IOMMU.
    pub iommu: String,
    /// The devices' names, in the order of their numbers.
    pub devices: Vec<String>,
    /// Whether the run goes on from what an earlier daemon had.
    pub resumed: bool,
}

/// The log of one run of one session.
#[derive(Debug)]
pub struct Log {
    dir: PathBuf,
    head: Head,
    start: Instant,
    spare: Spare,
    segment: Option<Segment>,
    /// Set once the file that is written says that lines after it were dropped: no other line may follow.
    gap: bool,
    /// Bytes of one.
    room: u64,
    /// When to try again, after a failure.
    again: Option<Instant>,
    next: u64,
    dropped: u64,
    line: Vec<u8>,
}

impl Log {
    /// A log in `dir`, which is this process's own ([`crate::observe::keep`] holds the lock).
    pub fn open(dir: &Path, options: LogOptions) -> std::io::Result<Self> {
        files::remove_unwritten(dir)?;
        let number = files::list(dir)?.last().map_or(0, |(number, _)| number + 1);
        let wall = wall();
        let head = Head {
            passgate: env!("CARGO_PKG_VERSION").into(),
            format: FORMAT,
            run: wall,
            boot: options.boot,
            segment: 0,
            first: 0,
            wall,
            policy: options.policy,
            iommu: options.iommu,
            devices: options.devices,
            resumed: options.resumed,
        };
        let mut log = Self {
            dir: dir.to_owned(),
            head,
            start: Instant::now(),
            spare: Spare::start(dir, number, options.segment, options.keep.max(2), options.patience)?,
            segment: None,
            gap: false,
            room: options.segment,
            again: None,
            next: 0,
            dropped: 0,
            line: Vec::with_capacity(USUAL),
        };
        log.turn();
        Ok(log)
    }

    /// Takes down an event; [`Log::finish`] must follow, with what the gate made of it.
    pub fn begin(&mut self, event: &Event) {
        let t = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.line.clear();
        self.line.shrink_to(USUAL);
        self.line.extend_from_slice(b"{\"n\":");
        json(&mut self.line, &self.next);
        self.line.extend_from_slice(b",\"t\":");
        json(&mut self.line, &t);
        self.line.extend_from_slice(b",\"e\":");
        json(&mut self.line, event);
    }

    /// Completes the line with the effects, and writes it.
    pub fn finish(&mut self, effects: &[Effect]) {
        let mut open: &[u8] = b",\"x\":[";
        for said in effects.iter().filter_map(Said::of) {
            self.line.extend_from_slice(open);
            json(&mut self.line, &said);
            open = b",";
        }
        self.line.extend_from_slice(if open == b"," { b"]}\n" } else { b"}\n" });
        let number = self.next;
        self.next += 1;
        if self.append() || self.overflow(number) {
            return;
        }
        self.dropped += 1;
        if !self.gap {
            self.gap = self.mark(Mark::Gap { n: number });
        }
    }

    /// Writes the line where there is room for it besides the marks.
    fn append(&mut self) -> bool {
        let needed = self.line.len() as u64 + MARKS;
        let segment = self.segment.as_mut().filter(|segment| !self.gap && segment.room() >= needed);
        segment.is_some_and(|segment| segment.append(&self.line))
    }

    /// Writes a mark into the file that is written; false where there is none.
    fn mark(&mut self, mark: Mark) -> bool {
        let mut line = Vec::with_capacity(96);
        json(&mut line, &mark);
        line.push(b'\n');
        self.segment.as_mut().is_some_and(|segment| segment.append(&line))
    }

    /// Lines that could not be written since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Goes on in the next segment, with line `number` that did not fit; whether it is written now.
    fn overflow(&mut self, number: u64) -> bool {
        let too_long = self.line.len() as u64 + HEAD > self.room;
        if too_long || self.again.is_some_and(|again| Instant::now() < again) {
            return false;
        }
        self.head.first = number;
        self.turn();
        self.append()
    }

    /// Begins the next segment.
    fn turn(&mut self) {
        // The old one is kept until there is a new one: it has the room to say that there is none.
        let failed = match self.spare.take() {
            Ok(mut segment) => {
                self.head.wall = wall();
                let mut head = Vec::with_capacity(512);
                json(&mut head, &self.head);
                head.push(b'\n');
                let fits = segment.append(&head);
                // Once the new one has its first line: a daemon that is killed in between leaves no mark of a file that
                // is not there.
                self.mark(Mark::More { segment: self.head.segment });
                if let Some(full) = self.segment.take() {
                    self.spare.finish(full);
                }
                self.gap = false;
                self.head.segment += u64::from(fits);
                self.segment = Some(segment);
                self.again = None;
                if fits { None } else { Some("its files are too small for their first line".to_owned()) }
            }
            Err(error) => Some(error.to_string()),
        };
        if let Some(why) = failed {
            if self.again.is_none() {
                log::error!(
                    "{}: the audit log cannot be written ({why}): its lines are dropped and counted until it can; \
                     make room there, on a file system that has fallocate",
                    self.dir.display()
                );
            }
            self.again = Some(Instant::now() + AGAIN);
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.mark(Mark::End { n: self.next, dropped: self.dropped });
    }
}

/// Nanoseconds since 1970.
fn wall() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// These types have no map with odd keys, and a `Vec` takes every byte: it cannot fail.
fn json(to: &mut Vec<u8>, value: &impl serde::Serialize) {
    let _ = serde_json::to_writer(to, value);
}
