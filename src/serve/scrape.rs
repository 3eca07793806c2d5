//! The metrics socket: OpenMetrics text for whoever asks by HTTP, or by closing its side.
//!
//! At most eight ask at a time; where a ninth comes the first of them goes, so that who says nothing keeps nobody
//! out. Nothing here waits: a visitor that reads slowly is written to when it has room.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use super::poller::{Interest, Poller};
use super::vm::Vm;
use crate::observe::metrics::CONTENT_TYPE;

/// Visitors at a time.
pub(super) const VISITORS: usize = 8;
/// Bytes of a request.
const MAX_REQUEST: usize = 8192;

/// The socket and its visitors.
#[derive(Debug)]
pub(super) struct Scrape {
    pub(super) listener: UnixListener,
    visitors: [Option<Visitor>; VISITORS],
    /// Visitors so far.
    came: u64,
}

#[derive(Debug)]
struct Visitor {
    socket: OwnedFd,
    /// Which visitor it is.
    number: u64,
    asked: Vec<u8>,
    /// What it is answered, and how much of it has gone.
    answer: Option<(Vec<u8>, usize)>,
}

/// What a visitor has come to.
enum Asks {
    /// It has more to say, or to read.
    Waits,
    /// The text, and nothing before it.
    Plain,
    /// The text, by HTTP.
    Http,
    /// What is no request: it is answered with this status.
    Wrong(&'static str),
    /// It is gone, or has everything.
    Gone,
}

impl Scrape {
    pub(super) fn new(listener: UnixListener) -> Self {
        Self { listener, visitors: Default::default(), came: 0 }
    }

    /// Takes the next visitor; `first` is the token of the first one.
    fn accept(&mut self, poller: &Poller, first: u64) -> Result<(), Errno> {
        let socket = accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        let empty = self.visitors.iter().position(Option::is_none);
        let oldest = || self.visitors.iter().enumerate().min_by_key(|(_, v)| v.as_ref().map(|v| v.number));
        let Some(at) = empty.or_else(|| oldest().map(|(at, _)| at)) else { return Ok(()) };
        self.came += 1;
        match poller.add(&socket, Interest::Read, first + at as u64) {
            Ok(()) => {
                let visitor = Visitor { socket, number: self.came, asked: Vec::new(), answer: None };
                self.visitors[at] = Some(visitor);
            }
            Err(error) => log::error!("epoll: {error}"),
        }
        Ok(())
    }
}

impl Visitor {
    /// Reads what has come.
    fn read(&mut self) -> Asks {
        let mut bytes = [0; 1024];
        let got = match recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT) {
            Err(Errno::INTR | Errno::AGAIN) => return Asks::Waits,
            Err(_) => return Asks::Gone,
            Ok((got, _)) => got,
        };
        self.asked.extend_from_slice(&bytes[..got]);
        let ended = self.asked.windows(4).any(|end| end == b"\r\n\r\n")
            || self.asked.windows(2).any(|end| end == b"\n\n");
        match () {
            () if ended => request(&self.asked),
            () if got == 0 && self.asked.is_empty() => Asks::Plain,
            () if got == 0 => Asks::Wrong("400 Bad Request"),
            () if self.asked.len() > MAX_REQUEST => Asks::Wrong("431 Request Header Fields Too Large"),
            () => Asks::Waits,
        }
    }

    /// Writes what it has room for.
    fn write(&mut self) -> Asks {
        let Some((bytes, gone)) = &mut self.answer else { return Asks::Waits };
        while *gone < bytes.len() {
            match send(&self.socket, &bytes[*gone..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Asks::Waits,
                Err(_) => return Asks::Gone,
                Ok(sent) => *gone += sent,
            }
        }
        Asks::Gone
    }
}

/// What a whole request asks for (RFC 9112, section 3).
fn request(asked: &[u8]) -> Asks {
    let line = asked.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    match words[..] {
        [method, _, version] if version.starts_with(b"HTTP/1.") => match method {
            b"GET" => Asks::Http,
            _ => Asks::Wrong("405 Method Not Allowed\r\nAllow: GET"),
        },
        _ => Asks::Wrong("400 Bad Request"),
    }
}

fn response(status: &str, content: &str, text: &str) -> Vec<u8> {
    let length = text.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: {content}\r\nContent-Length: {length}\r\n");
    format!("{head}Connection: close\r\n\r\n{text}").into_bytes()
}

impl Vm {
    /// Takes a visitor of the metrics socket; whether there may be more.
    pub(super) fn visitor_comes(&mut self, first: u64) -> bool {
        let Some(scrape) = &mut self.scrape else { return false };
        match scrape.accept(&self.poller, first) {
            Ok(()) => {
                self.spare.accepted();
                true
            }
            Err(Errno::MFILE | Errno::NFILE) => {
                let text = "the daemon has as many files open as it may: raise its limit (LimitNOFILE=)\n";
                let refusal = response("503 Service Unavailable", "text/plain", text);
                let told = self.spare.refuse(&scrape.listener, &refusal);
                self.told(told)
            }
            Err(errno) => {
                self.starved(errno);
                false
            }
        }
    }

    /// Reads from a visitor, or writes to it.
    pub(super) fn visitor_ready(&mut self, token: u64, at: usize) {
        let Some(visitor) = self.scrape.as_mut().and_then(|s| s.visitors.get_mut(at)?.as_mut()) else {
            return;
        };
        let asks = if visitor.answer.is_some() { visitor.write() } else { visitor.read() };
        let answer = match asks {
            Asks::Waits => return,
            Asks::Gone => return self.visitor_goes(at),
            Asks::Plain => self.metrics().into_bytes(),
            Asks::Http => response("200 OK", CONTENT_TYPE, &self.metrics()),
            Asks::Wrong(status) => {
                let text = "GET the metrics with HTTP/1.1, or send nothing and close your side\n";
                response(status, "text/plain", text)
            }
        };
        let Some(visitor) = self.scrape.as_mut().and_then(|s| s.visitors.get_mut(at)?.as_mut()) else {
            return;
        };
        visitor.answer = Some((answer, 0));
        match visitor.write() {
            Asks::Gone => self.visitor_goes(at),
            _ => {
                if let Err(error) = self.poller.change(&visitor.socket, Interest::Write, token) {
                    log::error!("epoll: {error}");
                    self.visitor_goes(at);
                }
            }
        }
    }

    fn visitor_goes(&mut self, at: usize) {
        if let Some(visitor) = self.scrape.as_mut().and_then(|scrape| scrape.visitors.get_mut(at)) {
            *visitor = None;
        }
        self.listen_again();
    }
}
