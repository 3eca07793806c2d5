//! The connection to the trial: the second serial port, with one JSON message a line.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::Arc;

use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use serde_json::Value;

use super::Failure;

/// The serial port, in raw mode.
#[derive(Debug, Clone)]
pub struct Channel(Arc<File>);

impl Channel {
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let failure = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| failure(&e))?;
        let mut terminal = tcgetattr(&file).map_err(|e| failure(&e))?;
        terminal.make_raw();
        tcsetattr(&file, OptionalActions::Now, &terminal).map_err(|e| failure(&e))?;
        Ok(Self(Arc::new(file)))
    }

    /// Sends a message. One write for the whole line, so that lines of several threads do not mix.
    pub fn send(&self, message: &Value) {
        if let Err(e) = (&*self.0).write_all(format!("{message}\n").as_bytes()) {
            eprintln!("blk-guest: {message}: {e}");
        }
    }

    /// Passes every received line to `handle` until that returns false.
    pub fn lines(&self, mut handle: impl FnMut(String) -> bool) {
        let lines = BufReader::new(&*self.0).lines().map_while(Result::ok);
        lines.take_while(|line| handle(line.clone())).for_each(drop);
    }
}
