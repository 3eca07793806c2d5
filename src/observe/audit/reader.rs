//! The reader: the files of a log as runs of a daemon, and their lines one by one.
//!
//! A log may come from anywhere, so every number in it is checked as a client's is.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use passgate_bindings::PAGE;
use passgate_bindings::units::LIMIT;

use super::files;
use super::line::{Head, Line, Mark};
use crate::gate::Event;
use crate::regular_file;

/// The maximum size of a line in bytes. The writer's lines have some hundred bytes, except for the death of a client with the maximum
/// of regions and invalidations.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// The maximum size of a file's first line in bytes.
const MAX_HEAD_BYTES: u64 = 1 << 20;

/// The reason why a log cannot be read. The text is the message that the user reads.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file cannot be read.
    #[error("{path}: {source}: name the files of a log, or their directory")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// There is no log.
    #[error(
        "{path}: no audit-*.jsonl with anything in it: name the --state-dir of a daemon, or files from there"
    )]
    Nothing {
        /// The file or directory.
        path: PathBuf,
    },
    /// A file does not begin as a log does.
    #[error("{path}: the first line is not the head of an audit log: {why}")]
    Head {
        /// The file.
        path: PathBuf,
        /// The error in its first line.
        why: String,
    },
    /// A line is not one of an audit log.
    #[error("{path}, line {line}: not a line of an audit log: {why}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The number of the line in the file, from 1.
        line: u64,
        /// The error in the line.
        why: String,
    },
}

/// The files of one run of a daemon.
#[derive(Debug)]
pub struct Run {
    /// The head of its first file.
    pub head: Head,
    /// Its files, in order.
    pub files: Vec<PathBuf>,
    /// The sum of their sizes in bytes, including what was not written.
    pub bytes: u64,
}

impl Run {
    /// Returns every run in these files and directories, oldest first.
    pub fn find(paths: &[PathBuf]) -> Result<Vec<Self>, ReadError> {
        let mut segments = Vec::new();
        for path in paths {
            let before = segments.len();
            if path.is_dir() {
                let all = files::list(path).map_err(|source| ReadError::Io { path: path.clone(), source })?;
                for (_, path) in all {
                    segments.extend(head(&path)?.map(|head| (head, path)));
                }
            } else {
                segments.extend(head(path)?.map(|head| (head, path.clone())));
            }
            if segments.len() == before {
                return Err(ReadError::Nothing { path: path.clone() });
            }
        }
        segments.sort_by_key(|(head, _)| (head.run, head.segment));
        segments.dedup_by_key(|(head, _)| (head.run, head.segment));
        let mut runs: Vec<Self> = Vec::new();
        for (head, path) in segments {
            let bytes = std::fs::metadata(&path).map_or(0, |about| about.len());
            match runs.last_mut() {
                Some(run) if run.head.run == head.run => {
                    run.files.push(path);
                    run.bytes += bytes;
                }
                _ => runs.push(Self { head, files: vec![path], bytes }),
            }
        }
        Ok(runs)
    }

    /// Returns true if its first file is there, and it did not resume from an earlier run.
    pub fn is_whole(&self) -> bool {
        self.head.segment == 0 && !self.head.resumed
    }

    /// Returns a reader of its lines.
    pub fn lines(&self) -> Reader<'_> {
        Reader {
            files: self.files.iter(),
            open: None,
            bytes: 0,
            cut: false,
            mark: None,
            filled: false,
            line: Vec::new(),
        }
    }
}

/// Reads the head of a file; none if nothing was written to the file.
pub(crate) fn head(path: &Path) -> Result<Option<Head>, ReadError> {
    let io = |source| ReadError::Io { path: path.to_owned(), source };
    let mut file = BufReader::new(regular_file::open(path, true).map_err(io)?);
    let mut line = Vec::new();
    if !has_line(&mut file).map_err(io)? {
        return Ok(None);
    }
    file.take(MAX_HEAD_BYTES).read_until(b'\n', &mut line).map_err(io)?;
    let wrong = |error: serde_json::Error| ReadError::Head { path: path.to_owned(), why: error.to_string() };
    serde_json::from_slice(&line).map(Some).map_err(wrong)
}

/// Returns true if a line follows. A part of the file that was not written reads as NULs.
fn has_line(file: &mut impl BufRead) -> io::Result<bool> {
    Ok(file.fill_buf()?.first().is_some_and(|byte| *byte != 0))
}

/// The file that is being read.
struct OpenFile<'a> {
    path: &'a Path,
    file: BufReader<File>,
    /// The number of lines read.
    line: u64,
}

/// The lines of a run, one by one.
pub struct Reader<'a> {
    files: std::slice::Iter<'a, PathBuf>,
    open: Option<OpenFile<'a>>,
    bytes: u64,
    cut: bool,
    mark: Option<Mark>,
    filled: bool,
    line: Vec<u8>,
}

impl Reader<'_> {
    /// Returns the last line read, if it is a mark.
    pub fn mark(&self) -> Option<Mark> {
        self.mark
    }

    /// Returns true if the last file read is filled up with NULs, as a daemon that was killed leaves it.
    pub fn is_filled(&self) -> bool {
        self.filled
    }

    /// Returns the number of bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns true if a file ended in the middle of a line, which is skipped.
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// Reads the next line into the buffer. Returns true for the head of a file, none at the end of the run.
    fn read(&mut self) -> Result<Option<bool>, ReadError> {
        loop {
            if self.open.is_none() {
                let Some(path) = self.files.next() else { return Ok(None) };
                let io = |source| ReadError::Io { path: path.clone(), source };
                let file = BufReader::with_capacity(256 << 10, regular_file::open(path, true).map_err(io)?);
                self.open = Some(OpenFile { path, file, line: 0 });
            }
            let Some(open) = &mut self.open else { return Ok(None) };
            let io = |source| ReadError::Io { path: open.path.to_owned(), source };
            self.line.clear();
            if has_line(&mut open.file).map_err(io)? {
                self.mark = None;
                let got =
                    (&mut open.file).take(MAX_LINE_BYTES).read_until(b'\n', &mut self.line).map_err(io)?;
                self.bytes += got as u64;
                open.line += 1;
                if self.line.ends_with(b"\n") {
                    return Ok(Some(open.line == 1));
                }
                self.cut = true;
            }
            self.filled = !open.file.fill_buf().map_err(io)?.is_empty();
            self.open = None;
        }
    }

    fn parse(&self) -> Result<Line, ReadError> {
        let wrong = |why: String| {
            let (path, line) = self.open.as_ref().map_or((Path::new(""), 0), |open| (open.path, open.line));
            ReadError::Line { path: path.to_owned(), line, why }
        };
        let line: Line = serde_json::from_slice(&self.line).map_err(|error| wrong(error.to_string()))?;
        if let Event::AddRegion { spec, .. } = &line.e {
            let (at, len) = (spec.backing.offset.0, spec.gpa.len());
            if !at.is_multiple_of(PAGE) || at.checked_add(len).is_none_or(|end| end > LIMIT) {
                return Err(wrong(format!("offset {at:#x} of the file is not valid for a region")));
            }
        }
        Ok(line)
    }
}

impl Iterator for Reader<'_> {
    type Item = Result<Line, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.read() {
                Err(error) => return Some(Err(error)),
                Ok(None) => return None,
                Ok(Some(true)) => {}
                Ok(Some(false)) => match self.parse() {
                    Ok(line) => return Some(Ok(line)),
                    Err(error) => match serde_json::from_slice(&self.line) {
                        Ok(mark) => self.mark = Some(mark),
                        Err(_) => return Some(Err(error)),
                    },
                },
            }
        }
    }
}
