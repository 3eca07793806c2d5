//! The command line: one file per command.
//!
//! Exit codes: 0 good, 1 the job failed, 2 usage, 3 the host is not able. Results go to stdout, everything else to
//! stderr; with `--json` stdout has nothing but JSON.

mod convert;
mod demo;
mod engine;
mod events;
mod explain;
mod list;
mod metrics;
mod release;
mod replay;
mod selftest;
mod serve;
mod shell;
mod status;
mod top;
mod vhost_blk;

use std::io::Write;
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand, ValueEnum};
use passgate_bindings::Failed;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::client::{Client, State};
use crate::error::{Error, Result};

/// Takes pages of confidential VMs out of device DMA, with proof, before they are converted.
#[derive(Debug, Parser)]
#[command(name = "passgate", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows the main job on this machine, without hardware
    Demo(demo::Demo),
    /// Runs one VM's daemon
    Serve(serve::Serve),
    /// Serves an NVMe drive to a VMM as a virtio block device (vhost-user-blk)
    VhostUserBlk(vhost_blk::VhostUserBlk),
    /// Lists this host's PCI devices: who has them, how their DMA can be stopped, why one would not be taken
    List(list::List),
    /// Says what a daemon knows: regions, devices, quarantine, limits
    Status(status::StatusOf),
    /// Prints what happens in a daemon, as it happens
    Events(events::EventsOf),
    /// Has a daemon convert a range itself
    Convert(convert::ConvertRange),
    /// Prints the evidence of one invalidation
    Explain(explain::ExplainOne),
    /// Tests how a device of this host can be stopped, by doing it
    Selftest(selftest::Selftest),
    /// Takes a range out of quarantine, by a person who knows what its pages are
    Release(release::ReleaseRange),
    /// Prints what a daemon counts and times, in OpenMetrics text
    Metrics(metrics::MetricsOf),
    /// Shows what a daemon does, live
    Top(top::Top),
    /// Checks an audit log: by a gate again, and by what its calls returned
    Replay(replay::Replay),
    /// Prints completions for a shell
    Completions(shell::Completions),
    /// Prints the manual page
    Man,
    /// Stops devices when their daemon dies; started by `serve`
    #[command(hide = true)]
    Guardian,
    /// Gives a device back to its driver when a test ends or dies; started by `selftest --bind`
    #[command(hide = true, name = crate::selftest::borrow::SUBCOMMAND)]
    GiveBack {
        /// The device, for whoever looks at the list of processes
        device: String,
    },
    /// Runs a command that ends with its parent; started by `selftest`
    #[command(hide = true, name = crate::selftest::crash::SUBCOMMAND)]
    UntilParentDies {
        /// The parent
        parent: u32,
        /// The command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<std::ffi::OsString>,
    },
}

/// What pages are, as the command line names it.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum To {
    /// Devices may see them
    Shared,
    /// Only the guest may
    Private,
    /// Nothing is there
    Hole,
}

impl From<To> for State {
    fn from(to: To) -> Self {
        match to {
            To::Shared => Self::Shared,
            To::Private => Self::Private,
            To::Hole => Self::Hole,
        }
    }
}

/// Which daemon.
#[derive(Debug, Args)]
struct Daemon {
    /// The daemon's socket
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
    #[command(flatten)]
    timeout: Timeout,
}

impl Daemon {
    fn connect(&self) -> Result<Client> {
        self.timeout.connect(&self.socket_path)
    }
}

/// How long a daemon may take to answer.
#[derive(Debug, Clone, Copy, Args)]
struct Timeout {
    /// How long the daemon may take to answer
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
}

impl Timeout {
    fn connect(self, path: &Path) -> Result<Client> {
        Client::connect_within(path, Duration::from_secs(self.timeout.into()))
    }
}

/// How the result is printed.
#[derive(Debug, Clone, Copy, Args)]
struct Output {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Output {
    /// Prints `value` as JSON, or else `text` of it.
    fn print<T: serde::Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        let said = if self.json {
            serde_json::to_string(value).map_err(|error| Error::Protocol(error.to_string()))?
        } else {
            text(value)
        };
        line(&said)
    }
}

/// Prints one line of a result; a reader that has gone away is no error, because the exit code says the result too.
fn line(text: &str) -> Result<()> {
    next_line(text).map(drop)
}

/// Prints one line of many; where nobody reads any more, it says so, and the command is to end.
fn next_line(text: &str) -> Result<ControlFlow<()>> {
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(error) => Err(Error::Output(error)),
    }
}

/// What a command that goes on has waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    /// The time is over.
    Time,
    /// This one of the descriptors is ready.
    Ready(usize),
    /// Nobody reads what is printed any more.
    Unread,
}

/// Waits until one of these descriptors is readable, or `until`, or until the reader of stdout has gone.
fn wait(fds: &[BorrowedFd<'_>], until: Option<Instant>) -> Result<Woken> {
    let stdout = std::io::stdout();
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left =
            left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        let mut all: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        // The end of a pipe's reader is told without being asked for (POLLERR).
        all.push(PollFd::new(&stdout, PollFlags::empty()));
        match poll(&mut all, left.as_ref()) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Failed::new("poll", errno).into()),
            Ok(0) => return Ok(Woken::Time),
            Ok(_) => {
                let ready = all.iter().position(|fd| !fd.revents().is_empty());
                return Ok(ready.filter(|nth| *nth < fds.len()).map_or(Woken::Unread, Woken::Ready));
            }
        }
    }
}

/// Says something beside the result. Nobody may be there to read it, and that is no error.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "passgate: {text}");
}

/// The name by which a management program starts a back-end, which it cannot tell a subcommand (docs/guide/vhost-user-blk.md).
const BACKEND: &str = "passgate-vhost-user-blk";

impl Cli {
    /// The command line of this process.
    pub fn of_process() -> Self {
        let mut words: Vec<_> = std::env::args_os().collect();
        let name = words.first().map(PathBuf::from);
        if name.is_some_and(|name| name.file_name().is_some_and(|name| name == BACKEND)) {
            words.insert(1, "vhost-user-blk".into());
        }
        Self::parse_from(words)
    }
}

/// Runs the command.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Demo(demo) => demo.run(),
        Command::Serve(serve) => serve.run(),
        Command::VhostUserBlk(door) => door.run(),
        Command::List(list) => list.run(),
        Command::Status(status) => status.run(),
        Command::Events(events) => events.run(),
        Command::Convert(convert) => convert.run(),
        Command::Explain(explain) => explain.run(),
        Command::Selftest(selftest) => selftest.run(),
        Command::Release(release) => release.run(),
        Command::Metrics(metrics) => metrics.run(),
        Command::Top(top) => top.run(),
        Command::Replay(replay) => replay.run(),
        Command::Completions(completions) => completions.run(),
        Command::Man => shell::man(),
        Command::Guardian => serve::guardian(),
        Command::GiveBack { .. } => crate::selftest::borrow::run().map(|()| ExitCode::SUCCESS),
        Command::UntilParentDies { parent, words } => {
            crate::selftest::crash::run(parent, &words).map(|()| ExitCode::SUCCESS)
        }
    }
}

/// A number of bytes or an address: decimal, `0x…`, or with a suffix K, M, G.
fn number(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no number: write 4096, 0x1000, 4K, 2M or 1G");
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).map_err(|_| wrong());
    }
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn numbers_are_read_as_people_write_them() {
        assert_eq!(number("0x1000"), Ok(4096));
        assert_eq!(number("4K"), Ok(4096));
        assert_eq!(number("2M"), Ok(2 << 20));
        assert_eq!(number("17"), Ok(17));
        for wrong in ["", "K", "-1", "0x", "99999999999G", "12k"] {
            assert!(number(wrong).is_err(), "{wrong}");
        }
    }
}
