//! What is done to the device. Memory is the witness: a page in which something is written that the device does not
//! know must stay as it is for as long as no DMA can reach it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_backends::{Device, Domain, Error as Backend, FenceStep, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::pump::{LEN, Pump};
use super::{Checked, Trouble};
use crate::error::{Error, Result};

/// Pages of the test's memory.
const PAGES: u64 = 8;
/// Where the device sees them: low enough for a device with 32 address bits, and no interrupt window near.
const BASE: u64 = 0x4000_0000;
/// How long unmaps under DMA go on.
const UNDER_DMA: Duration = Duration::from_secs(2);
/// How long to look at memory behind a fence.
const LOOK: Duration = Duration::from_millis(250);
/// How long an operation may take.
const LONG: Duration = Duration::from_secs(15);

/// The fences, weakest first, as the table names them.
pub(super) const FENCES: [(&str, FenceStep); 5] = [
    ("drain", FenceStep::Drain),
    ("migration STOP", FenceStep::Stop),
    ("bus master off", FenceStep::Master),
    ("detach", FenceStep::Detach),
    ("reset", FenceStep::Reset),
];

/// The device and some memory that it sees.
pub(super) struct Bench {
    device: Arc<dyn Device>,
    domain: Arc<dyn Domain>,
    memory: Arc<GuestFile>,
}

fn range(page: u64) -> std::result::Result<PageRange<Iova>, passgate_bindings::RangeError> {
    PageRange::new(BASE + page * PAGE, PAGE)
}

/// Bytes that no device writes when it is only asked to touch memory.
fn canary(page: u64) -> Vec<u8> {
    (0..LEN as u64).map(|nth| ((nth.wrapping_mul(37) ^ page) as u8) & 0xfe).collect()
}

fn wrong(instead: impl Into<String>) -> Trouble {
    Trouble::Failed(instead.into())
}

impl Bench {
    pub(super) fn new(device: Arc<dyn Device>, domain: Arc<dyn Domain>) -> Result<Self> {
        let memory = GuestFile::memfd("passgate-selftest", PAGES * PAGE).map_err(Error::Memory)?;
        Ok(Self { device, domain, memory: Arc::new(memory) })
    }

    /// How it says that it can be stopped.
    pub(super) fn described(&self) -> String {
        let has =
            |(name, step): &(&'static str, FenceStep)| self.device.stop_class().has(*step).then_some(*name);
        let mut words = vec!["unmap"];
        words.extend(FENCES.iter().filter_map(has));
        let nature = self.device.nature();
        let ats = if nature.ats { "; ATS is on" } else { "" };
        let tdi = if nature.tdi { "; a TDI that is locked or runs" } else { "" };
        format!("{}{ats}{tdi}", words.join(", "))
    }

    fn map(&self, page: u64) -> std::result::Result<(), Trouble> {
        Ok(self.domain.map(range(page)?, PAGE, &self.memory, Offset(page * PAGE), true)?)
    }

    /// Unmaps a page; true where operations over it had to end first.
    fn unmap(&self, page: u64) -> std::result::Result<bool, Trouble> {
        let begun = Instant::now();
        match self.domain.unmap(range(page)?) {
            Unmap::Gone { bytes: PAGE } => Ok(false),
            Unmap::InFlight { bytes: PAGE, ticket } => {
                let mut ended = Vec::new();
                while !ended.contains(&ticket) {
                    if begun.elapsed() > LONG {
                        return Err(wrong("what was in flight over an unmapped page does not end"));
                    }
                    std::thread::sleep(Duration::from_millis(1));
                    self.domain.poll(&mut ended);
                }
                Ok(true)
            }
            other => Err(wrong(format!("the unmap of one page said {other:?}"))),
        }
    }

    /// Maps all pages, does something, and unmaps them again whatever came of it.
    fn mapped(&self, does: impl FnOnce() -> Checked) -> Checked {
        let mut mapped = 0;
        let mut result = (0..PAGES).try_for_each(|page| {
            self.map(page)?;
            mapped = page + 1;
            Ok(())
        });
        let mut seen = String::new();
        if result.is_ok() {
            result = does().map(|said| seen = said);
        }
        for page in 0..mapped {
            let unmapped = self.unmap(page).map(drop);
            result = result.and(unmapped);
        }
        result.map(|()| seen)
    }

    pub(super) fn maps(&self) -> Checked {
        self.mapped(|| Ok(format!("{PAGES} pages")))
    }

    /// One DMA each way, and what came of it in memory.
    pub(super) fn dma(&self) -> Checked {
        self.mapped(|| {
            self.written(0)?;
            let stamp = canary(1);
            self.memory.write(PAGE, &stamp)?;
            let read = match self.device.dma_read(Iova(BASE + PAGE), LEN) {
                Ok(bytes) if bytes == stamp => "and reads it",
                Ok(_) => return Err(wrong("the device read something else than what is in memory")),
                Err(Backend::Unsupported { .. }) => "(it cannot show what it reads)",
                Err(error) => return Err(error.into()),
            };
            Ok(format!("the device writes memory {read}"))
        })
    }

    /// Has the device write to a page, and looks.
    fn written(&self, page: u64) -> std::result::Result<(), Trouble> {
        let stamp = match self.device.touch(Iova(BASE + page * PAGE)) {
            Err(Backend::Unsupported { .. }) => {
                let what = "there is no driver here that has this kind of device do DMA";
                return Err(Trouble::Skipped(what.to_owned()));
            }
            touched => touched?,
        };
        let mut seen = vec![0; stamp.len()];
        self.memory.read(page * PAGE, &mut seen)?;
        if seen == stamp { Ok(()) } else { Err(wrong("the device wrote, and memory has not changed")) }
    }

    /// A pump over all pages, once it is known that there is something to pump with.
    fn pump(&self) -> std::result::Result<Pump, Trouble> {
        self.written(0)?;
        let places = (0..PAGES).map(|page| Iova(BASE + page * PAGE)).collect();
        Ok(Pump::start(Arc::clone(&self.device), places)?)
    }

    fn put_canary(&self, page: u64) -> std::result::Result<(), Trouble> {
        Ok(self.memory.write(page * PAGE, &canary(page))?)
    }

    fn look(&self, page: u64, when: &str) -> std::result::Result<(), Trouble> {
        let mut seen = vec![0; LEN];
        self.memory.read(page * PAGE, &mut seen)?;
        if seen == canary(page) { Ok(()) } else { Err(wrong(format!("the device wrote to memory {when}"))) }
    }

    pub(super) fn unmaps_under_dma(&self) -> Checked {
        self.mapped(|| {
            let (pump, begun) = (self.pump()?, Instant::now());
            let (mut unmaps, mut late) = (0, 0);
            while begun.elapsed() < UNDER_DMA {
                let page = unmaps % PAGES;
                late += u32::from(self.unmap(page)?);
                let look = self.put_canary(page).and_then(|()| {
                    pump.wait(PAGES, LONG);
                    self.look(page, "that was unmapped")
                });
                self.map(page)?;
                look?;
                unmaps += 1;
            }
            let went = pump.went();
            Ok(format!("{unmaps} unmaps beside {went} DMA writes; {late} waited for DMA in flight"))
        })
    }

    /// Stops the device by this fence under DMA, looks, and brings it back.
    pub(super) fn fence(&self, name: &str, step: FenceStep) -> Checked {
        if !self.device.stop_class().has(step) {
            return Err(Trouble::Skipped("the device has none".to_owned()));
        }
        self.mapped(|| match self.pump() {
            Ok(pump) => self.fence_under_dma(name, step, &pump),
            Err(Trouble::Skipped(_)) => {
                let took = self.stop(step)?;
                self.device.attach()?;
                Ok(format!("{took}, and back; not tried under DMA"))
            }
            Err(trouble) => Err(trouble),
        })
    }

    fn stop(&self, step: FenceStep) -> std::result::Result<String, Trouble> {
        let begun = Instant::now();
        self.device.fence(step)?;
        Ok(format!("{:.1} ms", begun.elapsed().as_secs_f64() * 1e3))
    }

    fn fence_under_dma(&self, name: &str, step: FenceStep, pump: &Pump) -> Checked {
        pump.wait(2, LONG);
        let took = self.stop(step)?;
        let looked = (0..PAGES).try_for_each(|page| self.put_canary(page)).and_then(|()| {
            pump.wait(1, LOOK);
            std::thread::sleep(LOOK);
            (0..PAGES).try_for_each(|page| self.look(page, &format!("behind the fence {name}")))
        });
        // What is asked of a drained device waits for its attach.
        let still = step == FenceStep::Drain || pump.pause(LONG);
        self.device.attach()?;
        let still = still && pump.pause(LONG);
        looked?;
        if !still {
            return Err(wrong("an operation does not end behind the fence"));
        }
        self.comes_back()?;
        Ok(format!("{took}; no DMA behind it; back with its mappings"))
    }

    /// DMA goes again, once the device has come to itself.
    fn comes_back(&self) -> std::result::Result<(), Trouble> {
        let begun = Instant::now();
        loop {
            match self.written(PAGES - 1) {
                Err(trouble) if begun.elapsed() > LONG => return Err(trouble),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
                Ok(()) => return Ok(()),
            }
        }
    }
}
