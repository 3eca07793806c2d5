//! The line to the trial: the second serial port, in lines of JSON.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::Arc;

use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use serde_json::Value;

use super::Wrong;

#[derive(Debug, Clone)]
pub struct Channel(Arc<File>);

impl Channel {
    pub fn open(path: &Path) -> Result<Self, Wrong> {
        let wrong = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| wrong(&e))?;
        let mut terminal = tcgetattr(&file).map_err(|e| wrong(&e))?;
        terminal.make_raw();
        tcsetattr(&file, OptionalActions::Now, &terminal).map_err(|e| wrong(&e))?;
        Ok(Self(Arc::new(file)))
    }

    /// Says a line; one thread at a time is heard in one piece.
    pub fn say(&self, what: &Value) {
        if let Err(e) = (&*self.0).write_all(format!("{what}\n").as_bytes()) {
            eprintln!("blk-guest: {what}: {e}");
        }
    }

    /// Hands on every line until nobody wants more.
    pub fn lines(&self, mut hand_on: impl FnMut(String) -> bool) {
        let lines = BufReader::new(&*self.0).lines().map_while(Result::ok);
        lines.take_while(|line| hand_on(line.clone())).for_each(drop);
    }
}
