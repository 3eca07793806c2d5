//! The command line: one file per command.
//!
//! Exit codes: 0 success, 1 the command failed, 2 wrong usage, 3 the host cannot do it. Results go to stdout, everything
//! else to stderr; with `--json` stdout contains only JSON.

mod convert;
mod daemon;
mod demo;
mod events;
mod explain;
mod list;
mod metrics;
mod release;
mod replay;
#[cfg(feature = "selftest")]
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

use crate::client::{Client, Error as ClientError, PageState};
use crate::error::{Error, Result};

/// Unmaps memory of confidential VMs from device DMA, with proof, before it is converted.
#[derive(Debug, Parser)]
#[command(name = "passgate", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Converts memory under DMA, without passthrough hardware
    Demo(demo::Demo),
    /// Runs the daemon of one VM
    Serve(serve::Serve),
    /// Serves an NVMe drive as a virtio block device (vhost-user-blk)
    VhostUserBlk(vhost_blk::VhostUserBlk),
    /// Lists PCI devices: holders, steps that stop their DMA, refusals
    List(list::List),
    /// Prints a daemon's regions, devices, quarantine and limits
    Status(status::StatusOf),
    /// Prints the events of a daemon as they occur
    Events(events::EventsOf),
    /// Has a daemon convert a range of guest memory
    Convert(convert::ConvertRange),
    /// Prints the evidence of one invalidation
    Explain(explain::ExplainOne),
    /// Tests on a device of this host what stops its DMA
    #[cfg(feature = "selftest")]
    Selftest(selftest::Selftest),
    /// Releases a range from quarantine, by decision of an operator
    Release(release::ReleaseRange),
    /// Prints the metrics of a daemon as OpenMetrics text
    Metrics(metrics::MetricsOf),
    /// Shows the activity of a daemon, live
    Top(top::Top),
    /// Checks an audit log: replays the gate, checks call results
    Replay(replay::Replay),
    /// Prints completions for a shell
    Completions(shell::Completions),
    /// Prints the manual page
    Man,
    /// Stops the devices of a daemon that has died; started by `serve`
    #[command(hide = true)]
    Guardian,
    /// Binds a device to its earlier driver when a test ends or dies; started by `selftest --bind`
    #[cfg(feature = "selftest")]
    #[command(hide = true, name = crate::selftest::rebind::SUBCOMMAND)]
    GiveBack {
        /// Address of the device, shown in the list of processes
        device: String,
    },
    /// Runs a command that is killed when its parent dies; started by `selftest`
    #[cfg(feature = "selftest")]
    #[command(hide = true, name = crate::selftest::crash::SUBCOMMAND)]
    UntilParentDies {
        /// Process ID of the parent
        parent: u32,
        /// Arguments of the command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<std::ffi::OsString>,
    },
}

/// The state of pages, as the command line names it.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum PageStateArg {
    /// Devices may access the pages
    Shared,
    /// Only the guest may access the pages
    Private,
    /// The pages are punched out of the file
    Hole,
}

impl From<PageStateArg> for PageState {
    fn from(to: PageStateArg) -> Self {
        match to {
            PageStateArg::Shared => Self::Shared,
            PageStateArg::Private => Self::Private,
            PageStateArg::Hole => Self::Hole,
        }
    }
}

/// The control socket of the daemon that a command talks to.
#[derive(Debug, Args)]
struct ControlSocket {
    /// Control socket of the daemon
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
    #[command(flatten)]
    timeout: Timeout,
}

impl ControlSocket {
    fn connect(&self) -> Result<Client> {
        self.timeout.connect(&self.socket_path)
    }
}

/// The time in which a daemon must answer.
#[derive(Debug, Clone, Copy, Args)]
struct Timeout {
    /// Time in which the daemon must answer
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
}

impl Timeout {
    fn connect(self, path: &Path) -> Result<Client> {
        Ok(Client::connect_within(path, Duration::from_secs(self.timeout.into()))?)
    }
}

/// The format of the result.
#[derive(Debug, Clone, Copy, Args)]
struct Output {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Output {
    /// Prints `value` as JSON if `--json` is given, else as `text` formats it.
    fn print<T: serde::Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        let text = if self.json {
            serde_json::to_string(value).map_err(|error| ClientError::Protocol(error.to_string()))?
        } else {
            text(value)
        };
        print_line(&text)
    }
}

/// Prints the line of a result. It is no error if stdout is closed, because the exit code reports the result too.
fn print_line(text: &str) -> Result<()> {
    print_next_line(text).map(drop)
}

/// Prints one line of many. Returns [`ControlFlow::Break`] if stdout is closed: then the command must end.
fn print_next_line(text: &str) -> Result<ControlFlow<()>> {
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(error) => Err(Error::Output(error)),
    }
}

/// The event that ended a [`wait`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WaitResult {
    /// The timeout has expired.
    TimedOut,
    /// The descriptor of this index is readable, or closed by its peer.
    Ready(usize),
    /// Stdout is closed: nobody reads the output any more.
    OutputClosed,
}

/// Waits until one of the descriptors is readable, until the time `until`, or until stdout is closed.
fn wait(fds: &[BorrowedFd<'_>], until: Option<Instant>) -> Result<WaitResult> {
    let stdout = std::io::stdout();
    loop {
        let remaining = until.map(|until| until.saturating_duration_since(Instant::now()));
        let remaining = remaining
            .map(|time| Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() });
        let mut all: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        // POLLERR, which the end of a pipe's reader causes, is reported without being requested: poll(2).
        all.push(PollFd::new(&stdout, PollFlags::empty()));
        match poll(&mut all, remaining.as_ref()) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Failed::new("poll", errno).into()),
            Ok(0) => return Ok(WaitResult::TimedOut),
            Ok(_) => {
                let ready = all.iter().position(|fd| !fd.revents().is_empty());
                return Ok(ready
                    .filter(|index| *index < fds.len())
                    .map_or(WaitResult::OutputClosed, WaitResult::Ready));
            }
        }
    }
}

/// Prints a message to stderr, beside the result. It is no error if stderr is closed.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "passgate: {text}");
}

/// The program name by which a management program starts the back-end, since it cannot give it a subcommand
/// (docs/guide/vhost-user-blk.md).
const VHOST_USER_BLK_PROGRAM: &str = "passgate-vhost-user-blk";

impl Cli {
    /// Parses the command line of this process.
    pub fn of_process() -> Self {
        let mut words: Vec<_> = std::env::args_os().collect();
        let name = words.first().map(PathBuf::from);
        if name.is_some_and(|name| name.file_name().is_some_and(|name| name == VHOST_USER_BLK_PROGRAM)) {
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
        Command::VhostUserBlk(vhost_user_blk) => vhost_user_blk.run(),
        Command::List(list) => list.run(),
        Command::Status(status) => status.run(),
        Command::Events(events) => events.run(),
        Command::Convert(convert) => convert.run(),
        Command::Explain(explain) => explain.run(),
        #[cfg(feature = "selftest")]
        Command::Selftest(selftest) => selftest.run(),
        Command::Release(release) => release.run(),
        Command::Metrics(metrics) => metrics.run(),
        Command::Top(top) => top.run(),
        Command::Replay(replay) => replay.run(),
        Command::Completions(completions) => completions.run(),
        Command::Man => shell::man(),
        Command::Guardian => serve::guardian(),
        #[cfg(feature = "selftest")]
        Command::GiveBack { .. } => crate::selftest::rebind::run().map(|()| ExitCode::SUCCESS),
        #[cfg(feature = "selftest")]
        Command::UntilParentDies { parent, words } => {
            crate::selftest::crash::run(parent, &words).map(|()| ExitCode::SUCCESS)
        }
    }
}

/// Parses a number of bytes or an address: decimal, `0x…`, or decimal with a suffix K, M or G.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a number: write 4096, 0x1000, 4K, 2M or 1G");
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
    fn command_line_definition_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_parsed_in_decimal_hexadecimal_and_with_suffix() {
        assert_eq!(parse_size("0x1000"), Ok(4096));
        assert_eq!(parse_size("4K"), Ok(4096));
        assert_eq!(parse_size("2M"), Ok(2 << 20));
        assert_eq!(parse_size("17"), Ok(17));
        for wrong in ["", "K", "-1", "0x", "99999999999G", "12k"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
