//! The counters of the demo, and its summary.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use serde::Serialize;

use super::memory::Memory;
use super::{COUNT, Options};

/// The counters of a running demo.
#[derive(Debug, Default)]
pub struct Counters {
    /// The number of conversions that were begun and ended.
    pub conversions: AtomicU64,
    /// The number of begins answered *done*.
    pub done: AtomicU64,
    /// The number of begins answered *refused* or *unknown*.
    pub refused: AtomicU64,
    /// The number of ranges in quarantine at the end.
    pub quarantined: AtomicU64,
    /// The number of DMA operations of the device.
    pub dma_ops: AtomicU64,
    /// The number of DMA operations on pages that had been converted at least once.
    pub dma_hits_converted: AtomicU64,
    /// The number of DMA operations that faulted, because the page was not mapped.
    pub dma_faulted: AtomicU64,
    /// The number of conversions that had to wait for DMA in flight.
    pub late_dma_waited: AtomicU64,
    /// The number of operations that read or wrote a stale page. Must be 0.
    pub stale_dma: AtomicU64,
}

impl Counters {
    /// Returns the progress after `seconds` as one line.
    pub fn line(&self, seconds: f64) -> String {
        let rate = |counter: &AtomicU64| counter.load(COUNT) as f64 / seconds.max(1e-3);
        format!(
            "{:.0} conversions/s, {:.0} DMA/s, {} faulted, {} stale",
            rate(&self.conversions),
            rate(&self.dma_ops),
            self.dma_faulted.load(COUNT),
            self.stale_dma.load(COUNT)
        )
    }
}

/// One turn of passgate or of the raw loop.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// The number of rounds.
    pub(super) rounds: u64,
    /// The duration of the turn.
    pub(super) time: Duration,
    /// The duration of each round in microseconds; empty for the raw loop.
    pub(super) latencies_us: Vec<f32>,
}

impl Turn {
    fn rate(&self) -> f64 {
        self.rounds as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// The turns of passgate and of the raw loop, compared in pairs.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// The rounds per second in the last turn of passgate, until the raw loop has had its turn.
    passgate: Option<f64>,
    /// The total duration of the turns of passgate.
    busy: Duration,
    /// The rate of passgate divided by that of the raw loop, for each pair of turns.
    ratios: Vec<f64>,
    latencies_us: Vec<f32>,
}

impl Turns {
    /// The maximum number of recorded latencies.
    const MAX_LATENCIES: usize = 1 << 20;

    pub(super) fn passgate(&mut self, turn: Turn) {
        self.passgate = Some(turn.rate());
        self.busy += turn.time;
        let remaining = Self::MAX_LATENCIES.saturating_sub(self.latencies_us.len());
        self.latencies_us.extend(turn.latencies_us.into_iter().take(remaining));
    }

    pub(super) fn raw(&mut self, turn: Turn) {
        if let Some(passgate) = self.passgate.take() {
            self.ratios.push(passgate / turn.rate().max(1e-9));
        }
    }
}

/// The result of the demo, as `--json` prints it.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// True if the memory was a guest_memfd.
    pub guest_memfd: bool,
    /// The reason why it was a memfd instead; none if it was a guest_memfd.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instead: Option<String>,
    /// The kind of domain.
    pub backend: &'static str,
    /// The kind of conversion.
    pub kind: &'static str,
    /// True if the memory was mapped once and never unmapped.
    pub pins: bool,
    /// The duration in seconds.
    pub seconds: f64,
    /// The counter [`Counters::conversions`].
    pub conversions: u64,
    /// The counter [`Counters::done`].
    pub done: u64,
    /// The counter [`Counters::refused`].
    pub refused: u64,
    /// The counter [`Counters::quarantined`].
    pub quarantined: u64,
    /// The counter [`Counters::dma_ops`].
    pub dma_ops: u64,
    /// The counter [`Counters::dma_hits_converted`].
    pub dma_hits_converted: u64,
    /// The counter [`Counters::dma_faulted`].
    pub dma_faulted: u64,
    /// The counter [`Counters::late_dma_waited`].
    pub late_dma_waited: u64,
    /// The counter [`Counters::stale_dma`].
    pub stale_dma: u64,
    /// The rate of conversions divided by that of a loop without passgate (median over the turns; 0 with `--pins`).
    pub raw_loop_ratio: f64,
    /// The number of conversions per second during the turns of passgate.
    pub conversions_per_second: f64,
    /// The median time from a begin to the answer of its end, in microseconds.
    pub p50_us: f64,
    /// The 99th percentile of that time, in microseconds.
    pub p99_us: f64,
}

impl Summary {
    pub(super) fn new(
        options: Options,
        memory: &Memory,
        seconds: f64,
        counters: &Counters,
        mut turns: Turns,
    ) -> Self {
        turns.ratios.sort_by(f64::total_cmp);
        turns.latencies_us.sort_by(f32::total_cmp);
        let latency_at = |quantile: f64| {
            let index = (turns.latencies_us.len() as f64 * quantile) as usize;
            turns
                .latencies_us
                .get(index.min(turns.latencies_us.len().saturating_sub(1)))
                .map_or(0.0, |us| f64::from(*us))
        };
        let conversions = counters.conversions.load(COUNT);
        Self {
            guest_memfd: memory.guest_memfd,
            instead: memory.fallback_reason.clone(),
            backend: "soft",
            kind: "punch",
            pins: options.pins,
            seconds,
            conversions,
            done: counters.done.load(COUNT),
            refused: counters.refused.load(COUNT),
            quarantined: counters.quarantined.load(COUNT),
            dma_ops: counters.dma_ops.load(COUNT),
            dma_hits_converted: counters.dma_hits_converted.load(COUNT),
            dma_faulted: counters.dma_faulted.load(COUNT),
            late_dma_waited: counters.late_dma_waited.load(COUNT),
            stale_dma: counters.stale_dma.load(COUNT),
            raw_loop_ratio: turns.ratios.get(turns.ratios.len() / 2).copied().unwrap_or(0.0),
            conversions_per_second: conversions as f64 / turns.busy.as_secs_f64().max(1e-9),
            p50_us: latency_at(0.5),
            p99_us: latency_at(0.99),
        }
    }

    /// Returns true if no DMA was stale, or if that was to be shown (`--pins`).
    pub fn is_good(&self) -> bool {
        self.pins || self.stale_dma == 0
    }

    /// Returns the result as text for the user.
    pub fn text(&self) -> String {
        let memory = if self.guest_memfd { "guest_memfd" } else { "a memfd" };
        let counted = format!(
            "{} conversions of {memory} pages in {:.1} s\n{} DMA operations: {} on converted pages, {} faulted",
            self.conversions, self.seconds, self.dma_ops, self.dma_hits_converted, self.dma_faulted
        );
        if self.pins {
            return format!(
                "{counted}\n\
                 The memory was pinned for the device and never unmapped, as without passgate.\n\
                 {} DMA operations were STALE: the page had been punched and the owner saw a\n\
                 fresh one, but the device read and wrote the old one. No call failed and\n\
                 nothing was logged. Run without --pins to see how passgate prevents this.",
                self.stale_dma
            );
        }
        format!(
            "{counted}\n{} done, {} refused, {} quarantined; {} stale DMA operations\n\
             {:.0} conversions/s ({:.2} of a loop without passgate); {:.0} µs median, {:.0} µs p99",
            self.done,
            self.refused,
            self.quarantined,
            self.stale_dma,
            self.conversions_per_second,
            self.raw_loop_ratio,
            self.p50_us,
            self.p99_us
        )
    }
}
