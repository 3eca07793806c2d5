//! The fences of [`Driven`], with a device that records the calls to it.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;

type Log = Arc<Mutex<Vec<&'static str>>>;

/// A device that records the calls to it.
#[derive(Debug)]
struct RecordingDevice(Log);

/// An engine that records the calls to it.
#[derive(Debug)]
struct ScriptedEngine {
    log: Log,
    /// Sends the length of each transfer that begins.
    begun: Sender<usize>,
    /// Receives the result of each transfer: true for success.
    results: Receiver<bool>,
    /// True if [`Engine::start`] succeeds.
    starts: bool,
}

impl Device for RecordingDevice {
    fn name(&self) -> &str {
        "noted"
    }
    fn stop_class(&self) -> Steps {
        Steps::DETACH | Steps::RESET
    }
    fn fence(&self, step: Step) -> Result<()> {
        self.0.lock().unwrap().push("fence");
        let failed = Failed::new("fence", Errno::IO);
        match step {
            Step::Detach => Ok(()),
            Step::Reset => Err(Error::Device { device: String::new(), source: failed, remedy: "" }),
            _ => Err(self.no_dma()),
        }
    }
    fn attach(&self) -> Result<()> {
        self.0.lock().unwrap().push("attach");
        Ok(())
    }
    fn guard(&self) -> Guard<'_> {
        Guard::None
    }
}

impl ScriptedEngine {
    fn record(&self, call: &'static str) -> Result<()> {
        self.log.lock().unwrap().push(call);
        Ok(())
    }
    fn transfer(&self, iova: Iova, len: usize) -> Result<()> {
        self.begun.send(len).unwrap();
        if self.results.recv().unwrap() {
            return Ok(());
        }
        self.record("failed")?;
        Err(Error::Fault { device: String::new(), iova })
    }
}

impl Engine for ScriptedEngine {
    const CHUNK: usize = 100;
    fn reset(&mut self) -> Result<()> {
        self.record("reset")
    }
    fn start(&mut self) -> Result<()> {
        self.record("start")?;
        if self.starts { Ok(()) } else { Err(Error::Fault { device: String::new(), iova: Iova(0) }) }
    }
    fn stop(&mut self) -> Result<()> {
        self.record("stop")
    }
    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(7);
        self.transfer(iova, bytes.len())
    }
    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
        self.transfer(iova, bytes.len())
    }
}

/// A driven device, the log of the calls to it, the lengths of its transfers, and the results of the next ones.
struct Scene {
    device: Driven<ScriptedEngine>,
    log: Log,
    begun: Receiver<usize>,
    results: Sender<bool>,
}

impl Scene {
    fn new() -> Self {
        let (log, (begin, begun), (results, script)) = (Log::default(), channel(), channel());
        let engine = ScriptedEngine { log: Arc::clone(&log), begun: begin, results: script, starts: true };
        let device = Driven::new(Arc::new(RecordingDevice(Arc::clone(&log))), engine).unwrap();
        let scene = Self { device, log, begun, results };
        assert_eq!(scene.take_log(), ["reset", "start"], "whatever state it was in");
        scene
    }
    /// Returns the calls since the last call of this.
    fn take_log(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
    /// Returns once a transfer waits for the device.
    fn await_waiting_transfer(&self) {
        let begun = Instant::now();
        while self.device.0.pause.waiting() == 0 {
            assert!(begun.elapsed() < pause::DRAIN_WAIT_TIMEOUT, "no transfer waits");
            thread::yield_now();
        }
    }
    /// Requests a transfer. Returns true if it was made, false if a fence refused it.
    fn transfers(&self) -> bool {
        self.results.send(true).unwrap();
        let moved = self.device.dma_write(Iova(0), &[1]);
        match &moved {
            Ok(()) => drop(self.begun.recv().unwrap()),
            Err(error) => {
                assert_eq!(error.errno(), Some(Errno::SHUTDOWN));
                self.device.0.engine.lock().unwrap().results.recv().unwrap();
            }
        }
        moved.is_ok()
    }
}

#[test]
fn long_transfers_are_made_in_chunks() {
    let scene = Scene::new();
    (0..3).for_each(|_| scene.results.send(true).unwrap());
    assert_eq!(scene.device.dma_read(Iova(0), 250).unwrap(), [7; 250]);
    assert_eq!(scene.begun.try_iter().collect::<Vec<_>>(), [100, 100, 50]);
    assert_eq!(scene.device.dma_read(Iova(0), 0).unwrap(), [0u8; 0]);
}

#[test]
fn device_is_restarted_after_a_failed_transfer() {
    let scene = Scene::new();
    scene.results.send(false).unwrap();
    assert_eq!(scene.device.dma_read(Iova(0), 1).unwrap_err().errno(), Some(Errno::FAULT));
    assert_eq!(scene.take_log(), ["failed", "reset", "start"]);
    assert_eq!(scene.begun.recv(), Ok(1));
    assert!(scene.transfers());
}

#[test]
fn device_that_fails_to_restart_is_stopped_until_attach() {
    let scene = Scene::new();
    scene.device.0.engine.lock().unwrap().starts = false;
    scene.results.send(false).unwrap();
    assert_eq!(scene.device.dma_read(Iova(0), 1).unwrap_err().errno(), Some(Errno::FAULT));
    assert!(!scene.transfers());
    assert!(scene.device.attach().is_err());
    scene.device.0.engine.lock().unwrap().starts = true;
    assert!(!scene.transfers(), "the attach failed");
    scene.device.attach().unwrap();
    scene.begun.try_iter().for_each(drop);
    assert!(scene.transfers());
}

#[test]
fn no_transfer_between_fence_and_attach() {
    let scene = Scene::new();
    for (step, works) in [
        (Step::Detach, true),
        (Step::Reset, false), // a fence that failed may have been effective
    ] {
        assert_eq!(scene.device.fence(step).is_ok(), works);
        assert_eq!(scene.take_log(), ["fence"]);
        assert!(!scene.transfers());
        scene.device.attach().unwrap();
        assert_eq!(scene.take_log(), ["reset", "attach", "start"], "reset before it can do DMA");
        assert!(scene.transfers());
    }
}

#[test]
fn transfer_to_a_drained_device_waits_for_the_attach() {
    let scene = Scene::new();
    for _ in 0..3 {
        scene.device.fence(Step::Drain).unwrap();
        assert_eq!(scene.take_log(), ["stop"]);
        scene.results.send(true).unwrap();
        thread::scope(|scope| {
            let asked = scope.spawn(|| scene.device.dma_write(Iova(0), &[1]));
            scene.await_waiting_transfer();
            assert!(scene.begun.try_recv().is_err(), "no transfer begins");
            scene.device.attach().unwrap();
            asked.join().unwrap().unwrap();
        });
        assert_eq!(scene.begun.recv(), Ok(1));
        assert_eq!(scene.take_log(), ["reset", "attach", "start"], "not failed, not restarted");
    }
}

#[test]
fn stronger_fence_fails_waiting_transfers() {
    let scene = Scene::new();
    scene.device.fence(Step::Drain).unwrap();
    thread::scope(|scope| {
        let asked = scope.spawn(|| scene.device.dma_write(Iova(0), &[1]));
        scene.await_waiting_transfer();
        let begun = Instant::now();
        scene.device.fence(Step::Detach).unwrap();
        assert_eq!(asked.join().unwrap().unwrap_err().errno(), Some(Errno::SHUTDOWN));
        assert!(begun.elapsed() < pause::DRAIN_WAIT_TIMEOUT / 2, "at once");
    });
    // A later drain does not make transfers wait again.
    scene.device.fence(Step::Drain).unwrap();
    let begun = Instant::now();
    assert!(!scene.transfers());
    assert!(begun.elapsed() < pause::DRAIN_WAIT_TIMEOUT / 2, "at once");
}

#[test]
fn transfer_to_a_drained_device_times_out_without_attach() {
    let scene = Scene::new();
    scene.device.fence(Step::Drain).unwrap();
    let begun = Instant::now();
    assert!(!scene.transfers());
    assert!(begun.elapsed() >= pause::DRAIN_WAIT_TIMEOUT);
}

#[test]
fn unsupported_fence_stops_nothing() {
    let scene = Scene::new();
    assert_eq!(scene.device.fence(Step::Stop).unwrap_err().errno(), Some(Errno::OPNOTSUPP));
    assert!(scene.transfers());
}

#[test]
fn strong_fence_does_not_wait_for_a_transfer_but_drain_does() {
    let scene = Scene::new();
    thread::scope(|scope| {
        let hangs = scope.spawn(|| scene.device.dma_write(Iova(0), &[1]));
        scene.begun.recv().unwrap();
        let (fenced, asked) = (scene.device.fence(Step::Detach), scene.take_log());
        let drained = scope.spawn(|| scene.device.fence(Step::Drain));
        scene.results.send(false).unwrap(); // before any assertion: the threads would never end otherwise
        assert!(hangs.join().unwrap().is_err() && drained.join().unwrap().is_ok());
        assert!(fenced.is_ok());
        assert_eq!(asked, ["fence"]);
        assert_eq!(scene.take_log(), ["failed", "stop"], "no restart after a fence");
    });
}
