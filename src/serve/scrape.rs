//! The metrics socket: OpenMetrics text for a client that sends an HTTP GET, or that shuts its sending side down.
//!
//! At most eight clients are connected; a ninth replaces the oldest, so that silent clients do not lock others out. Nothing
//! here blocks: a client that reads slowly is written to when its socket has room.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use super::poller::{Interest, Poller};
use super::vm::Vm;
use crate::observe::metrics::CONTENT_TYPE;

/// The number of clients that are connected at a time.
pub(super) const MAX_METRICS_CLIENTS: usize = 8;
/// The length of a request in bytes beyond which it is refused.
const MAX_REQUEST_LEN: usize = 8192;

/// The socket and its clients.
#[derive(Debug)]
pub(super) struct Scrape {
    pub(super) listener: UnixListener,
    clients: [Option<MetricsClient>; MAX_METRICS_CLIENTS],
    /// The number of clients so far.
    accepted: u64,
}

/// A client of the metrics socket.
#[derive(Debug)]
struct MetricsClient {
    socket: OwnedFd,
    /// Grows with every client: the lowest is the oldest.
    number: u64,
    /// The bytes received so far.
    request: Vec<u8>,
    /// The response, and the number of its bytes that have been sent.
    answer: Option<(Vec<u8>, usize)>,
}

/// The state of a client after a read or a write.
enum Progress {
    /// The request or the response is not complete.
    Pending,
    /// The client has shut its sending side down without a request: it gets the text without a header.
    PlainText,
    /// The client has sent a GET: it gets the text in an HTTP response.
    Http,
    /// The request is refused with this HTTP status.
    BadRequest(&'static str),
    /// The client has disconnected, or has the whole response.
    Closed,
}

impl Scrape {
    pub(super) fn new(listener: UnixListener) -> Self {
        Self { listener, clients: Default::default(), accepted: 0 }
    }

    /// Accepts the next client. `first` is the token of the client at index 0.
    fn accept(&mut self, poller: &Poller, first: u64) -> Result<(), Errno> {
        let socket = accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        let empty = self.clients.iter().position(Option::is_none);
        let oldest = || self.clients.iter().enumerate().min_by_key(|(_, v)| v.as_ref().map(|v| v.number));
        let Some(at) = empty.or_else(|| oldest().map(|(at, _)| at)) else { return Ok(()) };
        self.accepted += 1;
        match poller.add(&socket, Interest::Read, first + at as u64) {
            Ok(()) => {
                let client =
                    MetricsClient { socket, number: self.accepted, request: Vec::new(), answer: None };
                self.clients[at] = Some(client);
            }
            Err(error) => log::error!("epoll: {error}"),
        }
        Ok(())
    }
}

impl MetricsClient {
    /// Reads what is in the socket.
    fn read(&mut self) -> Progress {
        let mut bytes = [0; 1024];
        let got = match recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT) {
            Err(Errno::INTR | Errno::AGAIN) => return Progress::Pending,
            Err(_) => return Progress::Closed,
            Ok((got, _)) => got,
        };
        self.request.extend_from_slice(&bytes[..got]);
        let ended = self.request.windows(4).any(|end| end == b"\r\n\r\n")
            || self.request.windows(2).any(|end| end == b"\n\n");
        match () {
            () if ended => parse_request(&self.request),
            () if got == 0 && self.request.is_empty() => Progress::PlainText,
            () if got == 0 => Progress::BadRequest("400 Bad Request"),
            () if self.request.len() > MAX_REQUEST_LEN => {
                Progress::BadRequest("431 Request Header Fields Too Large")
            }
            () => Progress::Pending,
        }
    }

    /// Sends as much of the response as the socket takes.
    fn write(&mut self) -> Progress {
        let Some((bytes, sent_bytes)) = &mut self.answer else { return Progress::Pending };
        while *sent_bytes < bytes.len() {
            match send(&self.socket, &bytes[*sent_bytes..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Progress::Pending,
                Err(_) => return Progress::Closed,
                Ok(sent) => *sent_bytes += sent,
            }
        }
        Progress::Closed
    }
}

/// Returns the answer to a complete request, by its request line (RFC 9112, section 3).
fn parse_request(request: &[u8]) -> Progress {
    let line = request.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    match words[..] {
        [method, _, version] if version.starts_with(b"HTTP/1.") => match method {
            b"GET" => Progress::Http,
            _ => Progress::BadRequest("405 Method Not Allowed\r\nAllow: GET"),
        },
        _ => Progress::BadRequest("400 Bad Request"),
    }
}

fn response(status: &str, content: &str, text: &str) -> Vec<u8> {
    let length = text.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: {content}\r\nContent-Length: {length}\r\n");
    format!("{head}Connection: close\r\n\r\n{text}").into_bytes()
}

impl Vm {
    /// Accepts a client of the metrics socket. Returns true if there may be more.
    pub(super) fn accept_metrics_client(&mut self, first: u64) -> bool {
        let Some(scrape) = &mut self.scrape else { return false };
        match scrape.accept(&self.poller, first) {
            Ok(()) => {
                self.acceptor.reserve_fd.accepted();
                true
            }
            Err(Errno::MFILE | Errno::NFILE) => {
                let text = "the daemon has as many files open as it may: raise its limit (LimitNOFILE=)\n";
                let refusal = response("503 Service Unavailable", "text/plain", text);
                let result = self.acceptor.reserve_fd.refuse(&scrape.listener, &refusal);
                self.after_refusal(result)
            }
            Err(errno) => {
                self.pause_accepting(errno);
                false
            }
        }
    }

    /// Reads the request of a client, or continues to send its response.
    pub(super) fn metrics_client_ready(&mut self, token: u64, at: usize) {
        let Some(client) = self.scrape.as_mut().and_then(|s| s.clients.get_mut(at)?.as_mut()) else {
            return;
        };
        let progress = if client.answer.is_some() { client.write() } else { client.read() };
        let answer = match progress {
            Progress::Pending => return,
            Progress::Closed => return self.remove_metrics_client(at),
            Progress::PlainText => self.metrics().into_bytes(),
            Progress::Http => response("200 OK", CONTENT_TYPE, &self.metrics()),
            Progress::BadRequest(status) => {
                let text = "GET the metrics with HTTP/1.1, or send nothing and close your side\n";
                response(status, "text/plain", text)
            }
        };
        let Some(client) = self.scrape.as_mut().and_then(|s| s.clients.get_mut(at)?.as_mut()) else {
            return;
        };
        client.answer = Some((answer, 0));
        match client.write() {
            Progress::Closed => self.remove_metrics_client(at),
            _ => {
                if let Err(error) = self.poller.change(&client.socket, Interest::Write, token) {
                    log::error!("epoll: {error}");
                    self.remove_metrics_client(at);
                }
            }
        }
    }

    fn remove_metrics_client(&mut self, at: usize) {
        if let Some(client) = self.scrape.as_mut().and_then(|scrape| scrape.clients.get_mut(at)) {
            *client = None;
        }
        self.resume_accepting();
    }
}
