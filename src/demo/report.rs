//! What the demo counted, and how it says so.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use serde::Serialize;

use super::memory::Memory;
use super::{COUNT, Options};

/// What is counted while the demo runs.
#[derive(Debug, Default)]
pub struct Counters {
    /// Conversions, begun and ended.
    pub conversions: AtomicU64,
    /// Those answered *done*.
    pub done: AtomicU64,
    /// Those answered *refused*.
    pub refused: AtomicU64,
    /// Those answered *unknown*, and ranges told to be in quarantine.
    pub quarantined: AtomicU64,
    /// DMA operations of the device.
    pub dma_ops: AtomicU64,
    /// Those on pages that were converted at least once.
    pub dma_hits_converted: AtomicU64,
    /// Those that the kernel refused: the page was away.
    pub dma_faulted: AtomicU64,
    /// Conversions that had to wait for DMA in flight.
    pub late_dma_waited: AtomicU64,
    /// Operations that met, or left, an old page. Must be 0.
    pub stale_dma: AtomicU64,
}

impl Counters {
    /// In a line, while it goes on.
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

/// One side's turn: how many rounds in what time, and how long each took.
#[derive(Debug, Default)]
pub(super) struct Turn {
    pub(super) rounds: u64,
    pub(super) time: Duration,
    /// Microseconds of each round.
    pub(super) each: Vec<f32>,
}

impl Turn {
    fn rate(&self) -> f64 {
        self.rounds as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// Turns of passgate and of the raw loop, side by side.
#[derive(Debug, Default)]
pub(super) struct Turns {
    passgate: Option<f64>,
    busy: Duration,
    ratios: Vec<f64>,
    each: Vec<f32>,
}

impl Turns {
    /// Latencies kept at most.
    const KEPT: usize = 1 << 20;

    pub(super) fn passgate(&mut self, turn: Turn) {
        self.passgate = Some(turn.rate());
        self.busy += turn.time;
        let room = Self::KEPT.saturating_sub(self.each.len());
        self.each.extend(turn.each.into_iter().take(room));
    }

    pub(super) fn raw(&mut self, turn: Turn) {
        if let Some(passgate) = self.passgate.take() {
            self.ratios.push(passgate / turn.rate().max(1e-9));
        }
    }
}

/// The demo's last word, as `--json` prints it.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Whether the memory is guest_memfd.
    pub guest_memfd: bool,
    /// Why it is not, where it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instead: Option<String>,
    /// The domain.
    pub backend: &'static str,
    /// How pages are converted.
    pub kind: &'static str,
    /// Whether it was done the old way.
    pub pins: bool,
    /// How long it ran.
    pub seconds: f64,
    /// As in [`Counters`].
    pub conversions: u64,
    /// As in [`Counters`].
    pub done: u64,
    /// As in [`Counters`].
    pub refused: u64,
    /// As in [`Counters`].
    pub quarantined: u64,
    /// As in [`Counters`].
    pub dma_ops: u64,
    /// As in [`Counters`].
    pub dma_hits_converted: u64,
    /// As in [`Counters`].
    pub dma_faulted: u64,
    /// As in [`Counters`].
    pub late_dma_waited: u64,
    /// As in [`Counters`].
    pub stale_dma: u64,
    /// Conversions per second against a loop without passgate (median of turns; 0 with `--pins`).
    pub raw_loop_ratio: f64,
    /// Conversions per second while it was passgate's turn.
    pub conversions_per_second: f64,
    /// Microseconds from begin to the end's answer, median.
    pub p50_us: f64,
    /// The same, 99th percentile.
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
        turns.each.sort_by(f32::total_cmp);
        let at = |share: f64| {
            let index = (turns.each.len() as f64 * share) as usize;
            turns.each.get(index.min(turns.each.len().saturating_sub(1))).map_or(0.0, |us| f64::from(*us))
        };
        let conversions = counters.conversions.load(COUNT);
        Self {
            guest_memfd: memory.guest_memfd,
            instead: memory.instead.clone(),
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
            p50_us: at(0.5),
            p99_us: at(0.99),
        }
    }

    /// Whether the demo showed what it is to show.
    pub fn is_good(&self) -> bool {
        self.pins || self.stale_dma == 0
    }

    /// In plain words.
    pub fn text(&self) -> String {
        let memory = if self.guest_memfd { "guest_memfd" } else { "a memfd" };
        let counted = format!(
            "{} conversions of {memory} pages in {:.1} s under {} DMA operations ({} of them on converted pages, \
             {} faulted)",
            self.conversions, self.seconds, self.dma_ops, self.dma_hits_converted, self.dma_faulted
        );
        if self.pins {
            return format!(
                "{counted}\nThe memory was pinned for the device, the old way, and never taken back.\n\
                 {} operations were STALE: the page had been punched, the owner saw a fresh one, and the device \
                 went on reading and writing the old one. No call failed and nothing was logged: that is the bug \
                 that passgate is for. Run without --pins to see it prevented.",
                self.stale_dma
            );
        }
        format!(
            "{counted}\n{} done, {} refused, {} quarantined; {} stale DMA operations\n\
             {:.0} conversions a second, {:.2} of a loop without passgate; {:.0} µs median, {:.0} µs at p99",
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
