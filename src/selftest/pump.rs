//! DMA all the time, until told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use passgate_backends::Device;
use passgate_bindings::Iova;

/// Bytes of one DMA that is looked at: a block of a drive, a frame of a network card.
pub(super) const LEN: usize = 512;

/// A device that writes to some places in turn, again and again.
pub(super) struct Pump {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    pause: AtomicBool,
    /// Whether it stands still.
    still: AtomicBool,
    /// Operations that are over, well or not.
    tried: AtomicU64,
    went: AtomicU64,
}

impl Pump {
    pub(super) fn start(device: Arc<dyn Device>, places: Vec<Iova>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("pump".into()).spawn(move || {
            for place in places.iter().cycle() {
                if theirs.stop.load(Relaxed) {
                    return;
                }
                let pause = theirs.pause.load(Relaxed);
                theirs.still.store(pause, Relaxed);
                if pause {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                let went = device.touch(*place).is_ok();
                theirs.went.fetch_add(went.into(), Relaxed);
                theirs.tried.fetch_add(1, Relaxed);
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Issues nothing more; whether the last operation was over within `limit`.
    pub(super) fn pause(&self, limit: Duration) -> bool {
        self.shared.pause.store(true, Relaxed);
        let begun = Instant::now();
        while !self.shared.still.load(Relaxed) {
            if begun.elapsed() > limit {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Operations that went.
    pub(super) fn went(&self) -> u64 {
        self.shared.went.load(Relaxed)
    }

    /// Waits until `more` operations have been tried, for `limit` at most; how many were.
    pub(super) fn wait(&self, more: u64, limit: Duration) -> u64 {
        let (from, begun) = (self.shared.tried.load(Relaxed), Instant::now());
        loop {
            let tried = self.shared.tried.load(Relaxed) - from;
            if tried >= more || begun.elapsed() > limit {
                return tried;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that did DMA panicked");
        }
    }
}
