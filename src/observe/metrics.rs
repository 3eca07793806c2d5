//! What is counted and timed, and its OpenMetrics text (docs/guide/metrics.md names every series).
//!
//! On the way of a conversion only numbers change: a counter, and a histogram for the wait and for each step.
//! What can be read off the session (mappings, bytes, quarantine) is, when somebody asks.

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
    Answer, Cause, Effect, Event, InvalidationId, Notice, PageState, Performer, Receipt, Snapshot, Step,
    Verdict,
};
use crate::observe::disk::Disk;

/// What [`Meter::text`] is: the content type of an answer that carries it.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels<const N: usize> = [(&'static str, &'static str); N];
type Gauge = SignedGauge<u64, AtomicU64>;

/// Directions of a conversion, in the order of [`PageState`]'s numbers.
const TO: [PageState; 3] = [PageState::Shared, PageState::Private, PageState::Hole];
/// Who performs it, in the order in which [`by`] numbers them.
const PERFORMERS: [&str; 2] = ["client", "passgate"];
/// What is answered, in the order in which [`number`] numbers it.
const VERDICTS: [&str; 3] = ["done", "refused", "unknown"];

/// 1 µs to some 8 s, each bucket twice the one before.
fn latency() -> Histogram {
    Histogram::new(exponential_buckets(1e-6, 2.0, 24))
}

/// A begin that is not answered yet.
#[derive(Debug, Clone, Copy)]
pub struct Begun {
    since: Instant,
    to: PageState,
    performer: usize,
}

/// What is counted and timed of one VM.
#[derive(Debug)]
pub struct Meter {
    registry: Registry,
    backend: &'static str,
    /// As many as invalidations are open at most, which the gate bounds for each client.
    begun: BTreeMap<InvalidationId, Begun>,
    verdicts: [Histogram; 2],
    conversions: [[Counter; 3]; 3],
    refusals: [Counter; Cause::ALL.len()],
    unmaps: Histogram,
    steps: Family<Labels<2>, Histogram, fn() -> Histogram>,
    fences: Family<Labels<2>, Counter>,
    wrong: Counter,
    events: Counter,
    dropped: Counter,
    now: Now,
}

/// What is read off the session when somebody asks.
#[derive(Debug, Default)]
struct Now {
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
    bytes: Family<Labels<1>, Gauge>,
}

impl Meter {
    /// Everything at zero, for a domain of this kind.
    pub fn new(backend: &'static str) -> Self {
        let mut registry = Registry::with_prefix("passgate");
        let daemon = Info::new([("version", env!("CARGO_PKG_VERSION")), ("backend", backend)]);
        registry.register("daemon", "What this daemon is", daemon);

        let verdicts = Family::<Labels<1>, Histogram, fn() -> Histogram>::new_with_constructor(latency);
        let steps = Family::<Labels<2>, Histogram, fn() -> Histogram>::new_with_constructor(latency);
        let conversions = Family::<Labels<2>, Counter>::default();
        let refusals = Family::<Labels<1>, Counter>::default();
        let (fences, now) = (Family::<Labels<2>, Counter>::default(), Now::default());
        let (wrong, events, dropped) = (Counter::default(), Counter::default(), Counter::default());
        let help = "From a begin's arrival to its verdict";
        registry.register_with_unit("verdict", help, Unit::Seconds, verdicts.clone());
        let help = "How long the kernel took for one step of the evidence";
        registry.register_with_unit("step", help, Unit::Seconds, steps.clone());
        registry.register("conversions", "Begins that were answered", conversions.clone());
        registry.register("refusals", "Begins that were not granted, by cause", refusals.clone());
        registry.register("fences", "Steps that acted on a device", fences.clone());
        registry.register("requests_wrong", "Requests that made no sense or came too early", wrong.clone());
        registry.register("events", "Events told", events.clone());
        let help = "Listeners dropped because they did not read";
        registry.register("listeners_dropped", help, dropped.clone());
        now.register(&mut registry);

        let to = |verdict| {
            TO.map(|to| conversions.get_or_create_owned(&[("verdict", verdict), ("to", to.word())]))
        };
        Self {
            backend,
            begun: BTreeMap::new(),
            verdicts: PERFORMERS.map(|by| verdicts.get_or_create_owned(&[("performer", by)])),
            conversions: VERDICTS.map(to),
            refusals: Cause::ALL.map(|cause| refusals.get_or_create_owned(&[("cause", cause.word())])),
            unmaps: steps.get_or_create_owned(&step_of(Step::Unmap, backend)),
            steps,
            fences,
            wrong,
            events,
            dropped,
            now,
            registry,
        }
    }

    /// Takes down a begin; `effects` are what the gate answered to it.
    pub fn begun(&mut self, begun: Option<Begun>, effects: &[Effect]) {
        let Some(begun) = begun else { return };
        // The gate sets the clock of what it has begun first, unless it answers at once.
        let id = effects.iter().find_map(|effect| match effect {
            Effect::Arm { invalidation, .. } => Some(*invalidation),
            Effect::Answer { answer: Answer::Verdict { invalidation, .. }, .. } => Some(*invalidation),
            _ => None,
        });
        if let Some(id) = id {
            self.begun.insert(id, begun);
        }
    }

    /// A begin is answered.
    pub fn answered(&mut self, invalidation: InvalidationId, verdict: Verdict) {
        let Some(Begun { since, to, performer }) = self.begun.remove(&invalidation) else { return };
        self.verdicts[performer].observe(since.elapsed().as_secs_f64());
        if let Some(counter) = self.conversions[number(verdict)].get(to as usize) {
            counter.inc();
        }
        if let Verdict::Refused { reason, .. } | Verdict::Unknown { reason, .. } = verdict
            && let Some(counter) = self.refusals.get((reason.cause as usize).wrapping_sub(1))
        {
            counter.inc();
        }
    }

    /// The evidence of an invalidation is complete.
    pub fn receipt(&mut self, receipt: &Receipt) {
        if receipt.verdict.is_none() {
            self.begun.remove(&receipt.invalidation);
        }
        for evidence in &receipt.steps {
            let took = evidence.took_ns as f64 * 1e-9;
            match evidence.step {
                Step::Unmap => self.unmaps.observe(took),
                step => self.steps.get_or_create(&step_of(step, self.backend)).observe(took),
            }
        }
    }

    /// Something is told.
    pub fn told(&self, notice: &Notice) {
        self.events.inc();
        if let Notice::DeviceFenced { step, errno, .. } = notice {
            let result = if *errno == 0 { "done" } else { "failed" };
            self.fences.get_or_create(&[("step", step.word()), ("result", result)]).inc();
        }
    }

    /// A request was wrong.
    pub fn wrong(&self) {
        self.wrong.inc();
    }

    /// Requests that were wrong, since the start.
    pub fn requests_wrong(&self) -> u64 {
        self.wrong.get()
    }

    /// A listener did not read and was dropped.
    pub fn dropped(&self) {
        self.dropped.inc();
    }

    /// Everything in OpenMetrics text, `# EOF` at its end. Costs by regions and runs of equal state, not by pages.
    /// `unwritten` are the lines that the audit log had no room for, `disk` is what is served besides.
    pub fn text(&self, snapshot: &Snapshot, clients: u64, unwritten: u64, disk: Option<Disk>) -> String {
        self.now.set(snapshot, clients);
        self.now.unwritten.set(unwritten);
        let mut text = String::with_capacity(16 << 10);
        let registries = encode_registry(&mut text, &self.registry)
            .and_then(|()| disk.map_or(Ok(()), |disk| encode_registry(&mut text, &disk.registry())));
        if registries.and_then(|()| encode_eof(&mut text)).is_err() {
            // A String takes everything; so does nobody get half a text for a whole one.
            text.clear();
        }
        text
    }
}

impl Now {
    fn register(&self, registry: &mut Registry) {
        let mut gauge = |name: &str, help: &str, unit: Option<Unit>, gauge: &Gauge| match unit {
            Some(unit) => registry.register_with_unit(name, help, unit, gauge.clone()),
            None => registry.register(name, help, gauge.clone()),
        };
        let bytes = || Some(Unit::Bytes);
        gauge("mappings", "Kernel mappings in use", None, &self.mappings);
        gauge("mappings_limit", "Kernel mappings that there can be", None, &self.limit);
        let help = "Kernel mappings if every page of every region were shared, and mapped by itself";
        gauge("mappings_forecast", help, None, &self.forecast);
        gauge("pinned", "Guest memory that devices may reach", bytes(), &self.pinned);
        gauge("quarantined", "Guest memory that must not be handed out", bytes(), &self.quarantined);
        gauge("open_invalidations", "Invalidations begun and not ended", None, &self.open);
        gauge("clients", "Connections", None, &self.clients);
        gauge("devices", "Devices", None, &self.devices);
        gauge("devices_fenced", "Devices whose DMA is stopped", None, &self.fenced);
        gauge("audit_lines_unwritten", "Lines that the audit log had no room for", None, &self.unwritten);
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

/// Kernel mappings in use, and their limit, over all domains.
pub fn mappings(snapshot: &Snapshot) -> (u64, u64) {
    snapshot.mappings.iter().fold((0, 0), |sum, one| (sum.0 + one.used, sum.1.saturating_add(one.limit)))
}

/// Kernel mappings at the worst that conversions can make of the regions, over all domains.
pub fn forecast(snapshot: &Snapshot) -> u64 {
    snapshot.mappings.iter().map(|one| one.worst).sum()
}

/// Bytes in quarantine.
pub fn quarantined(snapshot: &Snapshot) -> u64 {
    snapshot.quarantine.iter().map(|range| range.range.len()).sum()
}

/// What of a begin is to be known when it is answered; none for any other event.
pub fn begun(event: &Event) -> Option<Begun> {
    match event {
        Event::Begin { to, performer, .. } => {
            Some(Begun { since: Instant::now(), to: *to, performer: by(*performer) })
        }
        _ => None,
    }
}

fn step_of(step: Step, backend: &'static str) -> Labels<2> {
    [("step", step.word()), ("backend", backend)]
}

fn by(performer: Performer) -> usize {
    match performer {
        Performer::Client => 0,
        Performer::Passgate => 1,
    }
}

fn number(verdict: Verdict) -> usize {
    match verdict {
        Verdict::Done => 0,
        Verdict::Refused { .. } => 1,
        Verdict::Unknown { .. } => 2,
    }
}
