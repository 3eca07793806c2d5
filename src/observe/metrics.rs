//! The counters and histograms of one VM, and their OpenMetrics text (docs/guide/metrics.md lists every series).
//!
//! A conversion changes only a counter, the histogram of its wait, and a histogram for each of its steps. Gauges (mappings, bytes,
//! quarantine) are computed from the gate's state when the text is requested.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge as SignedGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::gate::{
    Answer, Cause, Effect, Event, InvalidationId, Notice, PageState, Performer, Receipt, Rung, Snapshot,
    Verdict,
};
use crate::observe::disk::Disk;

/// The content type of [`Meter::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels<const N: usize> = [(&'static str, &'static str); N];
type Gauge = SignedGauge<u64, AtomicU64>;

/// The labels of the performers, in the order of [`performer_index`].
const PERFORMERS: [&str; 2] = ["client", "passgate"];
/// The labels of the verdicts, in the order of [`verdict_index`].
const VERDICTS: [&str; 3] = ["done", "refused", "unknown"];

/// Returns a histogram with 24 buckets from 1 µs to 8.4 s, each twice the one before.
fn latency() -> Histogram {
    Histogram::new(exponential_buckets(1e-6, 2.0, 24))
}

/// A begin that is not answered yet.
#[derive(Debug, Clone, Copy)]
pub struct Begun {
    since: Instant,
    to: PageState,
    /// The index in [`PERFORMERS`].
    performer: usize,
}

/// The counters and histograms of one VM.
#[derive(Debug)]
pub struct Meter {
    registry: Registry,
    backend: &'static str,
    /// The begins that are not answered yet: no more than there are open invalidations, which the gate limits for each client.
    begun: BTreeMap<InvalidationId, Begun>,
    /// By performer.
    verdicts: [Histogram; 2],
    /// By verdict, then by the state that was asked for.
    conversions: [[Counter; 3]; 3],
    refusals: [Counter; Cause::ALL.len()],
    /// The histogram of `steps` for unmaps, looked up once.
    unmaps: Histogram,
    steps: Family<Labels<2>, Histogram, fn() -> Histogram>,
    fences: Family<Labels<2>, Counter>,
    wrong_requests: Counter,
    events: Counter,
    dropped_listeners: Counter,
    gauges: Gauges,
}

/// The values that are computed from the gate's state when the text is requested.
#[derive(Debug, Default)]
struct Gauges {
    mappings: Gauge,
    limit: Gauge,
    forecast: Gauge,
    pinned: Gauge,
    quarantined: Gauge,
    open: Gauge,
    clients: Gauge,
    devices: Gauge,
    fenced: Gauge,
    unwritten: Gauge,
    inconsistencies: Gauge,
    bytes: Family<Labels<1>, Gauge>,
}

impl Meter {
    /// Returns a meter with all counters at zero. `backend` is the kind of the domain.
    pub fn new(backend: &'static str) -> Self {
        let mut registry = Registry::with_prefix("passgate");
        let daemon = Info::new([("version", env!("CARGO_PKG_VERSION")), ("backend", backend)]);
        registry.register("daemon", "Version and backend of this daemon", daemon);

        let verdicts = Family::<Labels<1>, Histogram, fn() -> Histogram>::new_with_constructor(latency);
        let steps = Family::<Labels<2>, Histogram, fn() -> Histogram>::new_with_constructor(latency);
        let conversions = Family::<Labels<2>, Counter>::default();
        let refusals = Family::<Labels<1>, Counter>::default();
        let (fences, gauges) = (Family::<Labels<2>, Counter>::default(), Gauges::default());
        let (wrong_requests, events, dropped_listeners) =
            (Counter::default(), Counter::default(), Counter::default());
        let help = "Time from the arrival of a begin to its verdict";
        registry.register_with_unit("verdict", help, Unit::Seconds, verdicts.clone());
        let help = "Time that the kernel took for one step of the evidence";
        registry.register_with_unit("step", help, Unit::Seconds, steps.clone());
        registry.register("conversions", "Begins that were answered", conversions.clone());
        registry.register("refusals", "Begins that were not granted, by cause", refusals.clone());
        registry.register("fences", "Steps that acted on a device", fences.clone());
        let help = "Requests that made no sense or came too early";
        registry.register("requests_wrong", help, wrong_requests.clone());
        registry.register("events", "Events that were reported", events.clone());
        let help = "Listeners dropped because they did not read";
        registry.register("listeners_dropped", help, dropped_listeners.clone());
        gauges.register(&mut registry);

        let by_target = |verdict| {
            PageState::REQUESTABLE
                .map(|to| conversions.get_or_create_owned(&[("verdict", verdict), ("to", to.word())]))
        };
        // Every series of a fixed set exists from the start, with the value 0.
        Self {
            backend,
            begun: BTreeMap::new(),
            verdicts: PERFORMERS.map(|by| verdicts.get_or_create_owned(&[("performer", by)])),
            conversions: VERDICTS.map(by_target),
            refusals: Cause::ALL.map(|cause| refusals.get_or_create_owned(&[("cause", cause.word())])),
            unmaps: steps.get_or_create_owned(&step_labels(Rung::Unmap, backend)),
            steps,
            fences,
            wrong_requests,
            events,
            dropped_listeners,
            gauges,
            registry,
        }
    }

    /// Records a begin, if there is one; `effects` are those by which the gate responds to it.
    pub fn begun(&mut self, begun: Option<Begun>, effects: &[Effect]) {
        let Some(begun) = begun else { return };
        // The first alarm is that of the new invalidation; one that is answered at once has no alarm.
        let id = effects.iter().find_map(|effect| match effect {
            Effect::Arm { invalidation, .. } => Some(*invalidation),
            Effect::Answer { answer: Answer::Verdict { invalidation, .. }, .. } => Some(*invalidation),
            _ => None,
        });
        if let Some(id) = id {
            self.begun.insert(id, begun);
        }
    }

    /// Records the verdict on a begin.
    pub fn answered(&mut self, invalidation: InvalidationId, verdict: Verdict) {
        let Some(Begun { since, to, performer }) = self.begun.remove(&invalidation) else { return };
        self.verdicts[performer].observe(since.elapsed().as_secs_f64());
        if let Some(counter) = self.conversions[verdict_index(verdict)].get(to as usize) {
            counter.inc();
        }
        // Causes are numbered from 1.
        if let Verdict::Refused { reason, .. } | Verdict::Unknown { reason, .. } = verdict
            && let Some(counter) = self.refusals.get((reason.cause as usize).wrapping_sub(1))
        {
            counter.inc();
        }
    }

    /// Records the evidence of an invalidation that is over.
    pub fn receipt(&mut self, receipt: &Receipt) {
        if receipt.verdict.is_none() {
            self.begun.remove(&receipt.invalidation);
        }
        for evidence in &receipt.steps {
            let took = evidence.took_ns as f64 * 1e-9;
            match evidence.step {
                Rung::Unmap => self.unmaps.observe(took),
                rung => self.steps.get_or_create(&step_labels(rung, self.backend)).observe(took),
            }
        }
    }

    /// Counts a notice that is reported to listeners.
    pub fn count_notice(&self, notice: &Notice) {
        self.events.inc();
        if let Notice::DeviceFenced { step, errno, .. } = notice {
            let result = if *errno == 0 { "done" } else { "failed" };
            self.fences.get_or_create(&[("step", step.word()), ("result", result)]).inc();
        }
    }

    /// Counts a wrong request.
    pub fn wrong(&self) {
        self.wrong_requests.inc();
    }

    /// Returns the number of wrong requests since the start.
    pub fn requests_wrong(&self) -> u64 {
        self.wrong_requests.get()
    }

    /// Counts a listener that was dropped because it did not read.
    pub fn dropped(&self) {
        self.dropped_listeners.inc();
    }

    /// Returns all series as OpenMetrics text, with `# EOF` at its end. `unwritten` is the number of lines that the audit log had no
    /// room for, `disk` the counters of a disk that is served besides.
    pub fn text(&self, snapshot: &Snapshot, clients: u64, unwritten: u64, disk: Option<Disk>) -> String {
        self.gauges.set(snapshot, clients);
        self.gauges.unwritten.set(unwritten);
        let mut text = String::with_capacity(16 << 10);
        let registries = encode_registry(&mut text, &self.registry)
            .and_then(|()| disk.map_or(Ok(()), |disk| encode_registry(&mut text, &disk.registry())));
        if registries.and_then(|()| encode_eof(&mut text)).is_err() {
            // Writing to a String cannot fail. If it did, a part of the text must not be taken for the whole.
            text.clear();
        }
        text
    }
}

impl Gauges {
    fn register(&self, registry: &mut Registry) {
        let mut gauge = |name: &str, help: &str, unit: Option<Unit>, gauge: &Gauge| match unit {
            Some(unit) => registry.register_with_unit(name, help, unit, gauge.clone()),
            None => registry.register(name, help, gauge.clone()),
        };
        let bytes = || Some(Unit::Bytes);
        gauge("mappings", "Kernel mappings in use", None, &self.mappings);
        gauge("mappings_limit", "Maximum of kernel mappings", None, &self.limit);
        let help = "Kernel mappings at the worst that conversions can make of the regions";
        gauge("mappings_forecast", help, None, &self.forecast);
        gauge("pinned", "Guest memory that devices may reach", bytes(), &self.pinned);
        gauge("quarantined", "Guest memory that must not be handed out", bytes(), &self.quarantined);
        gauge("open_invalidations", "Invalidations begun and not ended", None, &self.open);
        gauge("clients", "Connections", None, &self.clients);
        gauge("devices", "Devices", None, &self.devices);
        gauge("devices_fenced", "Devices whose DMA is stopped", None, &self.fenced);
        gauge("audit_lines_unwritten", "Lines that the audit log had no room for", None, &self.unwritten);
        let help = "Contradictions in the gate's own records, each a fault of passgate's";
        gauge("gate_inconsistencies", help, None, &self.inconsistencies);
        let help = "Guest memory by the state of its pages";
        registry.register_with_unit("region", help, Unit::Bytes, self.bytes.clone());
    }

    fn set(&self, snapshot: &Snapshot, clients: u64) {
        let (mappings, limit) = mappings(snapshot);
        self.mappings.set(mappings);
        self.limit.set(limit);
        self.forecast.set(forecast(snapshot));
        self.pinned.set(snapshot.pinned);
        self.quarantined.set(quarantined(snapshot));
        self.open.set(snapshot.open);
        self.inconsistencies.set(snapshot.inconsistencies);
        self.clients.set(clients);
        self.devices.set(snapshot.devices.len() as u64);
        self.fenced
            .set(snapshot.devices.iter().filter(|device| device.fenced.is_some() || device.lost).count()
                as u64);
        for (state, word) in ["shared", "private", "hole", "unknown"].into_iter().enumerate() {
            let bytes = snapshot.regions.iter().map(|region| region.bytes[state]).sum();
            self.bytes.get_or_create(&[("state", word)]).set(bytes);
        }
    }
}

/// Returns the number of kernel mappings in use and their maximum, summed over all domains.
pub fn mappings(snapshot: &Snapshot) -> (u64, u64) {
    snapshot.mappings.iter().fold((0, 0), |sum, one| (sum.0 + one.used, sum.1.saturating_add(one.limit)))
}

/// Returns the number of kernel mappings at the worst that conversions can make of the regions, summed over all domains.
pub fn forecast(snapshot: &Snapshot) -> u64 {
    snapshot.mappings.iter().map(|one| one.worst).sum()
}

/// Returns the number of bytes in quarantine.
pub fn quarantined(snapshot: &Snapshot) -> u64 {
    snapshot.quarantine.iter().map(|range| range.range.len()).sum()
}

/// Returns the begin that an event is, with its time of arrival: now. None for any other event.
pub fn begun(event: &Event) -> Option<Begun> {
    match event {
        Event::Begin { to, performer, .. } => {
            Some(Begun { since: Instant::now(), to: *to, performer: performer_index(*performer) })
        }
        _ => None,
    }
}

fn step_labels(rung: Rung, backend: &'static str) -> Labels<2> {
    [("step", rung.word()), ("backend", backend)]
}

fn performer_index(performer: Performer) -> usize {
    match performer {
        Performer::Client => 0,
        Performer::Passgate => 1,
    }
}

fn verdict_index(verdict: Verdict) -> usize {
    match verdict {
        Verdict::Done => 0,
        Verdict::Refused { .. } => 1,
        Verdict::Unknown { .. } => 2,
    }
}
