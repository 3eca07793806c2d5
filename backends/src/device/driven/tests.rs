//! The rules about fences, with a device that notes what is asked of it.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;

type Log = Arc<Mutex<Vec<&'static str>>>;

/// A device that notes what is asked of it, and an engine for it whose transfers go as they are told.
#[derive(Debug)]
struct Noted(Log);

#[derive(Debug)]
struct Told {
    log: Log,
    begun: Sender<usize>,
    goes: Receiver<bool>,
    starts: bool,
}

impl Device for Noted {
    fn name(&self) -> &str {
        "noted"
    }
    fn stop_class(&self) -> StopClass {
        StopClass::DETACH | StopClass::RESET
    }
    fn fence(&self, step: FenceStep) -> Result<()> {
        self.0.lock().unwrap().push("fence");
        let failed = Failed::new("fence", Errno::IO);
        match step {
            FenceStep::Detach => Ok(()),
            FenceStep::Reset => Err(Error::Device { device: String::new(), source: failed, mend: "" }),
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

impl Told {
    fn note(&self, what: &'static str) -> Result<()> {
        self.log.lock().unwrap().push(what);
        Ok(())
    }
    fn go(&self, iova: Iova, len: usize) -> Result<()> {
        self.begun.send(len).unwrap();
        if self.goes.recv().unwrap() {
            return Ok(());
        }
        self.note("failed")?;
        Err(Error::Fault { device: String::new(), iova })
    }
}

impl Engine for Told {
    const CHUNK: usize = 100;
    fn reset(&mut self) -> Result<()> {
        self.note("reset")
    }
    fn start(&mut self) -> Result<()> {
        self.note("start")?;
        if self.starts { Ok(()) } else { Err(Error::Fault { device: String::new(), iova: Iova(0) }) }
    }
    fn stop(&mut self) -> Result<()> {
        self.note("stop")
    }
    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(7);
        self.go(iova, bytes.len())
    }
    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
        self.go(iova, bytes.len())
    }
}

/// A device, what was asked of it since last time, the lengths of its transfers, and how the next ones go.
struct Scene {
    device: Driven<Told>,
    log: Log,
    begun: Receiver<usize>,
    goes: Sender<bool>,
}

impl Scene {
    fn new() -> Self {
        let (log, (begin, begun), (goes, go)) = (Log::default(), channel(), channel());
        let engine = Told { log: Arc::clone(&log), begun: begin, goes: go, starts: true };
        let device = Driven::new(Arc::new(Noted(Arc::clone(&log))), engine).unwrap();
        let scene = Self { device, log, begun, goes };
        assert_eq!(scene.since(), ["reset", "start"], "whoever had it before");
        scene
    }
    fn since(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
    /// Returns once a transfer waits for the device.
    fn waits_for_one(&self) {
        let begun = Instant::now();
        while self.device.0.pause.waiting() == 0 {
            assert!(begun.elapsed() < pause::PATIENCE, "nothing waits");
            thread::yield_now();
        }
    }
    fn moves(&self) -> bool {
        self.goes.send(true).unwrap();
        let moved = self.device.dma_write(Iova(0), &[1]);
        match &moved {
            Ok(()) => drop(self.begun.recv().unwrap()),
            Err(error) => {
                assert_eq!(error.errno(), Some(Errno::SHUTDOWN));
                self.device.0.engine.lock().unwrap().goes.recv().unwrap();
            }
        }
        moved.is_ok()
    }
}

#[test]
fn long_transfers_are_made_in_chunks() {
    let scene = Scene::new();
    (0..3).for_each(|_| scene.goes.send(true).unwrap());
    assert_eq!(scene.device.dma_read(Iova(0), 250).unwrap(), [7; 250]);
    assert_eq!(scene.begun.try_iter().collect::<Vec<_>>(), [100, 100, 50]);
    assert_eq!(scene.device.dma_read(Iova(0), 0).unwrap(), []);
}

#[test]
fn a_device_is_brought_up_anew_after_a_transfer_that_failed() {
    let scene = Scene::new();
    scene.goes.send(false).unwrap();
    assert_eq!(scene.device.dma_read(Iova(0), 1).unwrap_err().errno(), Some(Errno::FAULT));
    assert_eq!(scene.since(), ["failed", "reset", "start"]);
    assert_eq!(scene.begun.recv(), Ok(1));
    assert!(scene.moves());
}

#[test]
fn a_device_that_does_not_come_up_waits_for_its_attach() {
    let scene = Scene::new();
    scene.device.0.engine.lock().unwrap().starts = false;
    scene.goes.send(false).unwrap();
    assert_eq!(scene.device.dma_read(Iova(0), 1).unwrap_err().errno(), Some(Errno::FAULT));
    assert!(!scene.moves());
    assert!(scene.device.attach().is_err());
    scene.device.0.engine.lock().unwrap().starts = true;
    assert!(!scene.moves(), "the attach failed");
    scene.device.attach().unwrap();
    scene.begun.try_iter().for_each(drop);
    assert!(scene.moves());
}

#[test]
fn from_a_fence_to_the_attach_nothing_moves() {
    let scene = Scene::new();
    for (step, works) in [
        (FenceStep::Detach, true),
        (FenceStep::Reset, false), // who knows how far it came
    ] {
        assert_eq!(scene.device.fence(step).is_ok(), works);
        assert_eq!(scene.since(), ["fence"]);
        assert!(!scene.moves());
        scene.device.attach().unwrap();
        assert_eq!(scene.since(), ["reset", "attach", "start"], "old transfers go before it can do any");
        assert!(scene.moves());
    }
}

#[test]
fn what_is_asked_of_a_drained_device_waits_for_the_attach_and_is_made() {
    let scene = Scene::new();
    for _ in 0..3 {
        scene.device.fence(FenceStep::Drain).unwrap();
        assert_eq!(scene.since(), ["stop"]);
        scene.goes.send(true).unwrap();
        thread::scope(|scope| {
            let asked = scope.spawn(|| scene.device.dma_write(Iova(0), &[1]));
            scene.waits_for_one();
            assert!(scene.begun.try_recv().is_err(), "nothing moves");
            scene.device.attach().unwrap();
            asked.join().unwrap().unwrap();
        });
        assert_eq!(scene.begun.recv(), Ok(1));
        assert_eq!(scene.since(), ["reset", "attach", "start"], "not failed, not brought up anew");
    }
}

#[test]
fn a_stronger_fence_refuses_what_waits_for_a_drained_device() {
    let scene = Scene::new();
    scene.device.fence(FenceStep::Drain).unwrap();
    thread::scope(|scope| {
        let asked = scope.spawn(|| scene.device.dma_write(Iova(0), &[1]));
        scene.waits_for_one();
        let begun = Instant::now();
        scene.device.fence(FenceStep::Detach).unwrap();
        assert_eq!(asked.join().unwrap().unwrap_err().errno(), Some(Errno::SHUTDOWN));
        assert!(begun.elapsed() < pause::PATIENCE / 2, "at once");
    });
    // A drain after it does not turn that back into waiting.
    scene.device.fence(FenceStep::Drain).unwrap();
    let begun = Instant::now();
    assert!(!scene.moves());
    assert!(begun.elapsed() < pause::PATIENCE / 2, "at once");
}

#[test]
fn a_drained_device_that_nobody_attaches_refuses_in_its_time() {
    let scene = Scene::new();
    scene.device.fence(FenceStep::Drain).unwrap();
    let begun = Instant::now();
    assert!(!scene.moves());
    assert!(begun.elapsed() >= pause::PATIENCE);
}

#[test]
fn a_fence_that_the_device_lacks_stops_nothing() {
    let scene = Scene::new();
    assert_eq!(scene.device.fence(FenceStep::Stop).unwrap_err().errno(), Some(Errno::OPNOTSUPP));
    assert!(scene.moves());
}

#[test]
fn a_strong_fence_does_not_wait_for_a_transfer_and_a_drain_does() {
    let scene = Scene::new();
    thread::scope(|scope| {
        let hangs = scope.spawn(|| scene.device.dma_write(Iova(0), &[1]));
        scene.begun.recv().unwrap();
        let (fenced, asked) = (scene.device.fence(FenceStep::Detach), scene.since());
        let drained = scope.spawn(|| scene.device.fence(FenceStep::Drain));
        scene.goes.send(false).unwrap(); // before any assertion: a thread that waits would never end
        assert!(hangs.join().unwrap().is_err() && drained.join().unwrap().is_ok());
        assert!(fenced.is_ok());
        assert_eq!(asked, ["fence"]);
        assert_eq!(scene.since(), ["failed", "stop"], "and under a fence nothing is brought up");
    });
}
