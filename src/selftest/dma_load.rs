//! DMA without a break, on a thread of its own, until it is paused or dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use passgate_backends::Device;
use passgate_bindings::Iova;

/// The number of bytes that are compared after one DMA operation: no more than a block of a drive or a frame of a NIC.
pub(super) const DMA_BYTES: usize = 512;

/// A thread that has a device write to IOVAs in turn. It stops when this is dropped.
pub(super) struct DmaLoad {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// Set to end the thread.
    stop: AtomicBool,
    /// Set to have the thread issue no more operations.
    pause: AtomicBool,
    /// Set by the thread once it has seen `pause`: no operation of its is in progress.
    paused: AtomicBool,
    /// The number of operations that have ended, with success or not.
    attempted: AtomicU64,
    /// The number of operations that have succeeded.
    succeeded: AtomicU64,
}

impl DmaLoad {
    /// Starts DMA to `iovas`, in turn.
    pub(super) fn start(device: Arc<dyn Device>, iovas: Vec<Iova>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread_shared = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("dma-load".into()).spawn(move || {
            for iova in iovas.iter().cycle() {
                if thread_shared.stop.load(Relaxed) {
                    return;
                }
                let pause = thread_shared.pause.load(Relaxed);
                thread_shared.paused.store(pause, Relaxed);
                if pause {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                let succeeded = device.touch(*iova).is_ok();
                thread_shared.succeeded.fetch_add(succeeded.into(), Relaxed);
                thread_shared.attempted.fetch_add(1, Relaxed);
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Stops issuing operations, for good. Returns true if the last one ended within `limit`.
    pub(super) fn pause(&self, limit: Duration) -> bool {
        self.shared.pause.store(true, Relaxed);
        let started = Instant::now();
        while !self.shared.paused.load(Relaxed) {
            if started.elapsed() > limit {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Returns the number of operations that have succeeded.
    pub(super) fn succeeded(&self) -> u64 {
        self.shared.succeeded.load(Relaxed)
    }

    /// Waits until `more` operations have ended, or until `limit` is over. Returns the number that have ended meanwhile.
    pub(super) fn wait(&self, more: u64, limit: Duration) -> u64 {
        let (from, started) = (self.shared.attempted.load(Relaxed), Instant::now());
        loop {
            let attempted = self.shared.attempted.load(Relaxed) - from;
            if attempted >= more || started.elapsed() > limit {
                return attempted;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for DmaLoad {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that did DMA panicked");
        }
    }
}
