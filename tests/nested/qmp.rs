//! QEMU's control socket (QMP): one command at a time, and the events between the replies.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The longest time that QEMU may take to reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// A QMP connection, and the events that were received and not taken yet.
#[derive(Debug)]
pub struct Qmp {
    socket: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        let mut qmp = Self { socket: BufReader::new(socket), events: VecDeque::new() };
        let greeting = qmp.line(REPLY_TIMEOUT).expect("no greeting from QEMU");
        assert!(greeting["QMP"].is_object(), "{greeting}");
        qmp.execute("qmp_capabilities", &json!({})).unwrap();
        qmp
    }

    /// Runs a command; returns its result, or QEMU's error description.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let line = json!({ "execute": command, "arguments": arguments });
        self.socket.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        loop {
            let answer = self.line(REPLY_TIMEOUT).unwrap_or_else(|| panic!("QEMU does not answer {command}"));
            if answer["event"].is_string() {
                self.events.push_back(answer);
            } else if answer["error"].is_object() {
                return Err(answer["error"]["desc"].to_string());
            } else {
                return Ok(answer["return"].clone());
            }
        }
    }

    /// Waits for one of these events; returns none after `within`.
    pub fn event(&mut self, names: &[&str], within: Duration) -> Option<Value> {
        let started = Instant::now();
        let is_wanted = |event: &Value| event["event"].as_str().is_some_and(|name| names.contains(&name));
        loop {
            if let Some(at) = self.events.iter().position(is_wanted) {
                return self.events.remove(at);
            }
            let event = self.line(within.checked_sub(started.elapsed())?)?;
            self.events.push_back(event);
        }
    }

    /// Returns everything received and not taken yet, for the report of a failed trial.
    pub fn drain(&mut self) -> String {
        let mut text: String = self.events.drain(..).map(|event| format!("{event}\n")).collect();
        let _ = self.socket.get_ref().set_read_timeout(Some(Duration::from_millis(100)));
        while self.socket.read_line(&mut text).is_ok_and(|read| read > 0) {}
        text
    }

    fn line(&mut self, within: Duration) -> Option<Value> {
        self.socket.get_ref().set_read_timeout(Some(within.max(Duration::from_millis(1)))).unwrap();
        let mut line = String::new();
        match self.socket.read_line(&mut line) {
            Ok(0) => panic!("QEMU has closed its control socket"),
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
            Err(_) if line.is_empty() => None,
            Err(e) => panic!("incomplete line of QEMU: {line}: {e}"),
        }
    }
}
