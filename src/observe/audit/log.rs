//! The writer of the audit log.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use passgate_bindings::segment::Segment;

use super::files;
use super::line::{FORMAT, Head, LoggedEffect, Mark};
use super::next_segment::NextSegment;
use crate::gate::{Effect, Event, Policy};

/// The time after which a log that could not be written is tried again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// The time that a session waits for a new file, unless its options say otherwise.
pub const NEW_FILE_TIMEOUT: Duration = Duration::from_millis(250);
/// The time that a log waits for its first file. Nobody waits for an answer yet, and without it the run has no beginning.
const FIRST_FILE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of the line's buffer that stay allocated between two lines; lines have some hundred bytes, except for rare ones.
const LINE_BUFFER_BYTES: usize = 64 << 10;
/// Bytes of a file that are reserved for its first line: a longer line than the rest fits no file.
const HEAD_BYTES: u64 = 4096;
/// Bytes at the end of a file that are reserved for its marks: three, of at most 80 bytes each.
const MARKS_BYTES: u64 = 256;

/// The options of a log.
#[derive(Debug, Clone)]
pub struct LogOptions {
    /// Bytes of one file.
    pub segment: u64,
    /// The time that the writer waits for a file that is not ready when it is needed; after that, lines are dropped.
    pub new_file_timeout: Duration,
    /// The maximum number of files, including the one that is written and the one that is allocated next; the oldest is removed.
    pub keep: usize,
    /// The gate's policy, which replay needs.
    pub policy: Policy,
    /// The boot identifier of the kernel.
    pub boot: String,
    /// The interface to the IOMMU.
    pub iommu: String,
    /// The devices' names, in the order of their numbers.
    pub devices: Vec<String>,
    /// True if the run resumes from an earlier daemon's ledger.
    pub resumed: bool,
}

/// The log of one run of one session.
#[derive(Debug)]
pub struct Log {
    dir: PathBuf,
    head: Head,
    start: Instant,
    next_segment: NextSegment,
    segment: Option<Segment>,
    /// Set once the present file says that the lines after it were dropped: no other line may follow in it.
    gap: bool,
    /// Bytes of one file.
    segment_bytes: u64,
    /// The time before which a failed change of files is not tried again.
    retry_at: Option<Instant>,
    /// The number of the next line.
    next: u64,
    dropped: u64,
    /// The buffer of the line that is being composed.
    line: Vec<u8>,
}

impl Log {
    /// Begins a log in `dir`, which this process has locked ([`crate::session::records`]).
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
            next_segment: NextSegment::start(
                dir,
                number,
                options.segment,
                options.keep.max(2),
                options.new_file_timeout.max(FIRST_FILE_TIMEOUT),
            )?,
            segment: None,
            gap: false,
            segment_bytes: options.segment,
            retry_at: None,
            next: 0,
            dropped: 0,
            line: Vec::with_capacity(LINE_BUFFER_BYTES),
        };
        log.rotate();
        log.next_segment.set_timeout(options.new_file_timeout);
        Ok(log)
    }

    /// Begins the line of an event that the gate is about to take. [`Log::finish`] must follow.
    pub fn begin(&mut self, event: &Event) {
        let t = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.line.clear();
        self.line.shrink_to(LINE_BUFFER_BYTES);
        self.line.extend_from_slice(b"{\"n\":");
        json(&mut self.line, &self.next);
        self.line.extend_from_slice(b",\"t\":");
        json(&mut self.line, &t);
        self.line.extend_from_slice(b",\"e\":");
        json(&mut self.line, event);
    }

    /// Completes the line with the effects that the gate asked for, and writes it.
    pub fn finish(&mut self, effects: &[Effect]) {
        let mut separator: &[u8] = b",\"x\":[";
        for logged in effects.iter().filter_map(LoggedEffect::of) {
            self.line.extend_from_slice(separator);
            json(&mut self.line, &logged);
            separator = b",";
        }
        self.line.extend_from_slice(if separator == b"," { b"]}\n" } else { b"}\n" });
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

    /// Writes the line. Returns false if there is no room for it besides the marks.
    fn append(&mut self) -> bool {
        let needed = self.line.len() as u64 + MARKS_BYTES;
        let segment = self.segment.as_mut().filter(|segment| !self.gap && segment.room() >= needed);
        segment.is_some_and(|segment| segment.append(&self.line))
    }

    /// Writes a mark into the present file. Returns false if there is none.
    fn mark(&mut self, mark: Mark) -> bool {
        let mut line = Vec::with_capacity(96);
        json(&mut line, &mark);
        line.push(b'\n');
        self.segment.as_mut().is_some_and(|segment| segment.append(&line))
    }

    /// Returns the number of lines that could not be written since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Writes line `number`, which did not fit, into the next file. Returns false if that failed.
    fn overflow(&mut self, number: u64) -> bool {
        let too_long = self.line.len() as u64 + HEAD_BYTES > self.segment_bytes;
        if too_long || self.retry_at.is_some_and(|retry_at| Instant::now() < retry_at) {
            return false;
        }
        self.head.first = number;
        self.rotate();
        self.append()
    }

    /// Changes to the next file.
    fn rotate(&mut self) {
        // The old file stays open until there is a new one: it has room for the mark that says that there is none.
        let failed = match self.next_segment.take() {
            Ok(mut segment) => {
                self.head.wall = wall();
                let mut head = Vec::with_capacity(512);
                json(&mut head, &self.head);
                head.push(b'\n');
                let fits = segment.append(&head);
                // After the new file has its first line: else a daemon that is killed in between leaves the mark of a file
                // that is not there.
                self.mark(Mark::More { segment: self.head.segment });
                if let Some(full) = self.segment.take() {
                    self.next_segment.finish(full);
                }
                self.gap = false;
                self.head.segment += u64::from(fits);
                self.segment = Some(segment);
                self.retry_at = None;
                if fits { None } else { Some("its files are too small for their first line".to_owned()) }
            }
            Err(error) => Some(error.to_string()),
        };
        if let Some(why) = failed {
            if self.retry_at.is_none() {
                log::error!(
                    "{}: the audit log cannot be written ({why}): its lines are dropped and counted until it can; \
                     make room there, on a file system that has fallocate",
                    self.dir.display()
                );
            }
            self.retry_at = Some(Instant::now() + RETRY_INTERVAL);
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.mark(Mark::End { n: self.next, dropped: self.dropped });
    }
}

/// Returns the wall clock time in nanoseconds since 1970.
fn wall() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Appends a value as JSON.
fn json(to: &mut Vec<u8>, value: &impl serde::Serialize) {
    // Fails only for a map whose keys are no strings, which no logged type has: writing to a Vec does not fail.
    let _ = serde_json::to_writer(to, value);
}
