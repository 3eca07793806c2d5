//! `passgate top`: shows the activity of a daemon, live. Rates are differences of two successive samples of the metrics;
//! it stores nothing else.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use clap::Args;

use super::status::{bytes, disk};
use super::{ControlSocket, WaitResult, note, print_next_line, wait};
use crate::client::{Client, Error as ClientError, Event, Status};
use crate::error::{Error, Result};
use crate::protocol::frame::FrameError;

/// The maximum number of events that are shown.
const MAX_EVENTS: usize = 8;
/// Moves the cursor to the top left and erases everything below it: CUP and ED of ECMA-48.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Shows the activity of a daemon, live.
#[derive(Debug, Args)]
pub(super) struct Top {
    #[command(flatten)]
    control: ControlSocket,
    /// Time between two views
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
    /// Print one view, and exit
    #[arg(long)]
    once: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("`{text}` is not a number of seconds"))?;
    if (0.1..=3600.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(format!("`{text}` seconds: choose 0.1 to 3600"))
    }
}

impl Top {
    pub(super) fn run(self) -> Result<ExitCode> {
        let (interrupt, interrupted) = UnixStream::pair().map_err(Error::Signal)?;
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            let end = interrupt.try_clone().map_err(Error::Signal)?;
            signal_hook::low_level::pipe::register(signal, end).map_err(Error::Signal)?;
        }
        match self.watch(&interrupted) {
            Err(Error::Client(ClientError::Frame(FrameError::Closed) | ClientError::Connection(_))) => {
                note("the daemon has closed the connection");
                Ok(ExitCode::SUCCESS)
            }
            result => result.map(|()| ExitCode::SUCCESS),
        }
    }

    /// Prints views until it is interrupted. Returns an error if the daemon closes the connection.
    fn watch(&self, interrupted: &UnixStream) -> Result<()> {
        let events = events(self.control.connect()?)?;
        let mut client = self.control.connect()?;
        let mut last = VecDeque::new();
        let mut before = Sample::take(&mut client)?;
        loop {
            match wait(&[interrupted.as_fd(), client.as_fd()], Some(Instant::now() + self.interval))? {
                WaitResult::TimedOut => {}
                // No request is pending, so the socket can only be readable because the daemon has closed it.
                WaitResult::Ready(1) => return Err(ClientError::Frame(FrameError::Closed).into()),
                WaitResult::Ready(_) | WaitResult::OutputClosed => return Ok(()),
            }
            let status = client.status()?;
            let now = Sample::take(&mut client)?;
            for event in events.try_iter() {
                last.push_back(super::events::text(&event));
            }
            last.drain(..last.len().saturating_sub(MAX_EVENTS));
            let printed = show(&view(&status, &before, &now, last.make_contiguous()))?;
            if self.once || printed.is_break() {
                return Ok(());
            }
            if !std::io::stdout().is_terminal() {
                last.clear();
            }
            before = now;
        }
    }
}

/// Receives the events on a thread of its own. Events are dropped while the channel is full.
fn events(client: Client) -> Result<Receiver<Event>> {
    let events = client.subscribe()?;
    let (sender, receiver) = sync_channel(64 * MAX_EVENTS);
    let read = move || {
        for event in events.map_while(Result::ok) {
            let _ = sender.try_send(event);
        }
    };
    std::thread::Builder::new().name("events".into()).spawn(read).map_err(Error::Thread)?;
    Ok(receiver)
}

fn show(view: &str) -> Result<ControlFlow<()>> {
    if std::io::stdout().is_terminal() {
        print_next_line(&format!("{CLEAR}{view}"))
    } else {
        print_next_line(view)
    }
}

/// The metrics of a daemon at one time.
#[derive(Debug, Clone)]
struct Sample {
    taken_at: Instant,
    /// The number of conversions by verdict.
    conversions: BTreeMap<String, f64>,
    /// The number of requests of the disk that were answered.
    requests: f64,
    /// The number of begins that were answered within a number of nanoseconds, as the buckets of the histogram count
    /// them; the last bucket has all of them.
    answered: BTreeMap<u64, f64>,
}

impl Sample {
    fn take(client: &mut Client) -> Result<Self> {
        Ok(Self::read(&client.metrics()?))
    }

    fn read(text: &str) -> Self {
        let (mut conversions, mut answered, mut requests) = (BTreeMap::new(), BTreeMap::new(), 0.0);
        for line in text.lines() {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            if series.starts_with("passgate_conversions_total{") {
                *conversions.entry(label(series, "verdict").to_owned()).or_default() += value;
            } else if series.starts_with("passgate_verdict_seconds_bucket{") {
                let limit = label(series, "le").parse::<f64>().unwrap_or(f64::INFINITY);
                *answered.entry((limit * 1e9).round() as u64).or_default() += value;
            } else if series.starts_with("passgate_disk_requests_total{") {
                requests += value;
            }
        }
        Self { taken_at: Instant::now(), conversions, requests, answered }
    }

    /// Returns the number of conversions with this verdict.
    fn conversions_with(&self, verdict: &str) -> f64 {
        self.conversions.get(verdict).copied().unwrap_or(0.0)
    }
}

/// Returns the value of a label of a series; empty if it has no such label.
fn label<'a>(series: &'a str, name: &str) -> &'a str {
    let after = series.split_once(&format!("{name}=\"")).map_or("", |(_, after)| after);
    after.split('"').next().unwrap_or("")
}

/// Returns the time within which this quantile of the begins between two samples was answered, from the buckets of the
/// histogram; none if there was no begin.
fn latency_quantile(before: &Sample, now: &Sample, quantile: f64) -> Option<Duration> {
    let new = |(ns, count): (&u64, &f64)| (*ns, count - before.answered.get(ns).copied().unwrap_or(0.0));
    let all = now.answered.iter().next_back().map(new)?.1;
    if all < 1.0 {
        return None;
    }
    now.answered
        .iter()
        .map(new)
        .find(|(_, count)| *count >= all * quantile)
        .map(|(ns, _)| Duration::from_nanos(ns))
}

fn view(status: &Status, before: &Sample, now: &Sample, events: &[String]) -> String {
    let seconds = now.taken_at.duration_since(before.taken_at).as_secs_f64().max(1e-6);
    let rate = |verdict: &str| (now.conversions_with(verdict) - before.conversions_with(verdict)) / seconds;
    let latency = |quantile| match latency_quantile(before, now, quantile) {
        None => "-".to_owned(),
        Some(time) if time > Duration::from_secs(60) => "over 8 s".to_owned(),
        Some(time) => format!("within {time:?}"),
    };
    let mut text = format!(
        "passgate {}, {}, instance {}\n\
         conversions/s: {:.0} done, {:.0} refused, {:.0} unknown; p50 {}, p99 {}\n\
         mappings: {} of {} ({} at worst); {} mapped, {} in quarantine\n\
         {} conversions open, {} connections",
        status.version,
        status.iommu,
        status.instance,
        rate("done"),
        rate("refused"),
        rate("unknown"),
        latency(0.5),
        latency(0.99),
        status.mappings,
        status.max_mappings,
        status.forecast,
        bytes(status.pinned),
        bytes(status.quarantined),
        status.open,
        status.clients,
    );
    for device in &status.devices {
        let state = match &device.fenced {
            Some(step) => format!("FENCED by {step}"),
            None if device.lost => "LOST".to_owned(),
            None => "running".to_owned(),
        };
        _ = write!(text, "\ndevice {}: {state}; can be stopped by {}", device.device, device.stop.join(", "));
    }
    if let Some(served) = &status.disk {
        let answered = (now.requests - before.requests) / seconds;
        _ = write!(text, "\n{}, {answered:.0}/s answered", disk(served));
    }
    for event in events {
        _ = write!(text, "\nevent {event}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(fast: u64, all: u64) -> Sample {
        Sample::read(&format!(
            "# TYPE passgate_verdict_seconds histogram\n\
             passgate_verdict_seconds_bucket{{le=\"0.000001\",performer=\"client\"}} {fast}\n\
             passgate_verdict_seconds_bucket{{le=\"0.000002\",performer=\"client\"}} {all}\n\
             passgate_verdict_seconds_bucket{{le=\"+Inf\",performer=\"client\"}} {all}\n\
             passgate_verdict_seconds_bucket{{le=\"+Inf\",performer=\"passgate\"}} 0\n\
             passgate_conversions_total{{verdict=\"done\",to=\"shared\"}} {fast}\n\
             passgate_conversions_total{{verdict=\"done\",to=\"hole\"}} {all}\n\
             passgate_disk_requests_total{{kind=\"read\",status=\"ok\"}} {all}\n\
             passgate_disk_requests_total{{kind=\"flush\",status=\"ok\"}} {fast}\n# EOF\n"
        ))
    }

    #[test]
    fn top_shows_difference_of_two_samples() {
        let (before, now) = (sample(1000, 1000), sample(1060, 1100));
        assert_eq!(now.conversions_with("done") - before.conversions_with("done"), 160.0);
        assert_eq!(now.requests - before.requests, 160.0);
        assert_eq!(latency_quantile(&before, &now, 0.5), Some(Duration::from_micros(1)));
        assert_eq!(latency_quantile(&before, &now, 0.99), Some(Duration::from_micros(2)));
        assert_eq!(latency_quantile(&now, &now, 0.5), None, "nothing happened");
    }

    #[test]
    fn interval_out_of_range_is_refused() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "-1", "x", "1e9", "NaN"] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }
}
