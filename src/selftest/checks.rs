//! The checks of one device. Each is judged by the contents of memory: a page with a *canary*, a pattern that the device
//! does not write, must not change while DMA cannot reach it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_backends::{Device, Domain, Error as Backend, Step, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};

use super::dma_load::{DMA_BYTES, DmaLoad};
use super::{CheckError, CheckResult};
use crate::error::{Error, Result};

/// The number of pages of the test's memory.
const PAGES: u64 = 8;
/// The IOVA of the first page: low enough for a device with 32 address bits, and not in the range of MSI addresses.
const BASE_IOVA: u64 = 0x4000_0000;
/// The duration of the check that unmaps pages under DMA.
const UNMAP_UNDER_DMA_TIME: Duration = Duration::from_secs(2);
/// The time for which memory must not change after a fence.
const FENCE_OBSERVATION_TIME: Duration = Duration::from_millis(250);
/// The maximum duration of one operation of the device.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(15);

/// The fences with their names in the table, weakest first.
pub(super) const FENCES: [(&str, Step); 5] = [
    ("drain", Step::Drain),
    ("migration STOP", Step::Stop),
    ("bus master off", Step::Master),
    ("detach", Step::Detach),
    ("reset", Step::Reset),
];

/// The device, its domain, and the memory that is mapped for it page by page.
pub(super) struct DeviceTest {
    device: Arc<dyn Device>,
    domain: Arc<dyn Domain>,
    memory: Arc<GuestFile>,
}

/// Returns the IOVA range of a page.
fn range(page: u64) -> std::result::Result<PageRange<Iova>, passgate_bindings::RangeError> {
    PageRange::new(BASE_IOVA + page * PAGE, PAGE)
}

/// Returns the canary of a page: bytes that [`Device::touch`] does not write.
fn canary(page: u64) -> Vec<u8> {
    (0..DMA_BYTES as u64).map(|nth| ((nth.wrapping_mul(37) ^ page) as u8) & 0xfe).collect()
}

fn failed(observation: impl Into<String>) -> CheckError {
    CheckError::Failed(observation.into())
}

impl DeviceTest {
    pub(super) fn new(device: Arc<dyn Device>, domain: Arc<dyn Domain>) -> Result<Self> {
        let memory = GuestFile::memfd("passgate-selftest", PAGES * PAGE).map_err(Error::Memory)?;
        Ok(Self { device, domain, memory: Arc::new(memory) })
    }

    /// Returns the steps that stop the device, as its driver announces them, with its ATS and TDI state.
    pub(super) fn stop_class(&self) -> String {
        let has = |(name, step): &(&'static str, Step)| self.device.stop_class().has(*step).then_some(*name);
        let mut steps = vec!["unmap"];
        steps.extend(FENCES.iter().filter_map(has));
        let traits = self.device.traits();
        let ats = if traits.ats { "; ATS is on" } else { "" };
        let tdi = if traits.tdi { "; a TDI that is locked or runs" } else { "" };
        format!("{}{ats}{tdi}", steps.join(", "))
    }

    fn map(&self, page: u64) -> std::result::Result<(), CheckError> {
        Ok(self.domain.map(range(page)?, PAGE, &self.memory, Offset(page * PAGE), true)?)
    }

    /// Unmaps a page. Returns true if operations on it were in flight and had to end first.
    fn unmap(&self, page: u64) -> std::result::Result<bool, CheckError> {
        let started = Instant::now();
        match self.domain.unmap(range(page)?) {
            Unmap::Gone { bytes: PAGE } => Ok(false),
            Unmap::InFlight { bytes: PAGE, ticket } => {
                let mut ended = Vec::new();
                while !ended.contains(&ticket) {
                    if started.elapsed() > OPERATION_TIMEOUT {
                        return Err(failed("what was in flight over an unmapped page does not end"));
                    }
                    std::thread::sleep(Duration::from_millis(1));
                    self.domain.poll(&mut ended);
                }
                Ok(true)
            }
            other => Err(failed(format!("the unmap of one page returned {other:?}"))),
        }
    }

    /// Maps all pages, runs `body`, and unmaps them again whether it succeeds or not.
    fn with_pages_mapped(&self, body: impl FnOnce() -> CheckResult) -> CheckResult {
        let mut mapped = 0;
        let mut result = (0..PAGES).try_for_each(|page| {
            self.map(page)?;
            mapped = page + 1;
            Ok(())
        });
        let mut observation = String::new();
        if result.is_ok() {
            result = body().map(|text| observation = text);
        }
        for page in 0..mapped {
            let unmapped = self.unmap(page).map(drop);
            result = result.and(unmapped);
        }
        result.map(|()| observation)
    }

    pub(super) fn map_and_unmap(&self) -> CheckResult {
        self.with_pages_mapped(|| Ok(format!("{PAGES} pages")))
    }

    /// Has the device write to memory and read from it, and compares the bytes.
    pub(super) fn dma(&self) -> CheckResult {
        self.with_pages_mapped(|| {
            self.check_dma_write(0)?;
            let pattern = canary(1);
            self.memory.write(PAGE, &pattern)?;
            let read = match self.device.dma_read(Iova(BASE_IOVA + PAGE), DMA_BYTES) {
                Ok(bytes) if bytes == pattern => "and reads it",
                Ok(_) => return Err(failed("the device read other bytes than memory contains")),
                Err(Backend::Unsupported { .. }) => "(it cannot show what it reads)",
                Err(error) => return Err(error.into()),
            };
            Ok(format!("the device writes memory {read}"))
        })
    }

    /// Has the device write to a page, and checks that memory contains the bytes.
    fn check_dma_write(&self, page: u64) -> std::result::Result<(), CheckError> {
        let written = match self.device.touch(Iova(BASE_IOVA + page * PAGE)) {
            Err(Backend::Unsupported { .. }) => {
                let reason = "passgate has no driver that makes this kind of device do DMA";
                return Err(CheckError::Skipped(reason.to_owned()));
            }
            touched => touched?,
        };
        let mut seen = vec![0; written.len()];
        self.memory.read(page * PAGE, &mut seen)?;
        if seen == written { Ok(()) } else { Err(failed("the device wrote, and memory has not changed")) }
    }

    /// Starts DMA to all pages, if the device can do DMA at all.
    fn start_dma_load(&self) -> std::result::Result<DmaLoad, CheckError> {
        self.check_dma_write(0)?;
        let iovas = (0..PAGES).map(|page| Iova(BASE_IOVA + page * PAGE)).collect();
        Ok(DmaLoad::start(Arc::clone(&self.device), iovas)?)
    }

    fn write_canary(&self, page: u64) -> std::result::Result<(), CheckError> {
        Ok(self.memory.write(page * PAGE, &canary(page))?)
    }

    /// Returns an error if the page no longer contains its canary.
    fn check_canary(&self, page: u64, when: &str) -> std::result::Result<(), CheckError> {
        let mut seen = vec![0; DMA_BYTES];
        self.memory.read(page * PAGE, &mut seen)?;
        if seen == canary(page) { Ok(()) } else { Err(failed(format!("the device wrote to memory {when}"))) }
    }

    /// Unmaps and maps pages in turn while the device writes to all of them.
    pub(super) fn unmap_under_dma(&self) -> CheckResult {
        self.with_pages_mapped(|| {
            let (load, started) = (self.start_dma_load()?, Instant::now());
            let (mut unmaps, mut waited) = (0, 0);
            while started.elapsed() < UNMAP_UNDER_DMA_TIME {
                let page = unmaps % PAGES;
                waited += u32::from(self.unmap(page)?);
                // At least as many operations as there are pages, so that one of them is to this page.
                let unchanged = self.write_canary(page).and_then(|()| {
                    load.wait(PAGES, OPERATION_TIMEOUT);
                    self.check_canary(page, "that was unmapped")
                });
                self.map(page)?;
                unchanged?;
                unmaps += 1;
            }
            let writes = load.succeeded();
            Ok(format!("{unmaps} unmaps during {writes} DMA writes; {waited} waited for DMA in flight"))
        })
    }

    /// Fences the device under DMA, checks that memory does not change, and attaches the device again.
    pub(super) fn fence(&self, name: &str, step: Step) -> CheckResult {
        if !self.device.stop_class().has(step) {
            return Err(CheckError::Skipped("the device does not support it".to_owned()));
        }
        self.with_pages_mapped(|| match self.start_dma_load() {
            Ok(load) => self.fence_under_dma(name, step, &load),
            Err(CheckError::Skipped(_)) => {
                let took = self.timed_fence(step)?;
                self.device.attach()?;
                Ok(format!("{took}; attached again; not tried under DMA"))
            }
            Err(error) => Err(error),
        })
    }

    /// Fences the device. Returns the duration as text. A fence that fails may have stopped the device all the same: then it is
    /// attached again, for the checks that follow.
    fn timed_fence(&self, step: Step) -> std::result::Result<String, CheckError> {
        let started = Instant::now();
        if let Err(error) = self.device.fence(step) {
            if let Err(left_stopped) = self.device.attach() {
                log::warn!("{}: stays stopped: {left_stopped}", self.device.name());
            }
            return Err(error.into());
        }
        Ok(format!("{:.1} ms", started.elapsed().as_secs_f64() * 1e3))
    }

    fn fence_under_dma(&self, name: &str, step: Step, load: &DmaLoad) -> CheckResult {
        load.wait(2, OPERATION_TIMEOUT);
        let took = self.timed_fence(step)?;
        let unchanged = (0..PAGES).try_for_each(|page| self.write_canary(page)).and_then(|()| {
            // For an operation issued behind the fence, if it ends at all; then for one that was on its way to memory.
            load.wait(1, FENCE_OBSERVATION_TIME);
            std::thread::sleep(FENCE_OBSERVATION_TIME);
            (0..PAGES).try_for_each(|page| self.check_canary(page, &format!("behind the fence {name}")))
        });
        // An operation issued to a drained device ends only after its attach.
        let idle = step == Step::Drain || load.pause(OPERATION_TIMEOUT);
        self.device.attach()?;
        let idle = idle && load.pause(OPERATION_TIMEOUT);
        unchanged?;
        if !idle {
            return Err(failed("an operation does not end behind the fence"));
        }
        self.wait_for_dma()?;
        Ok(format!("{took}; no DMA after it; attached again with its mappings"))
    }

    /// Retries a DMA operation until it succeeds: after a fence a device may need time to work again.
    fn wait_for_dma(&self) -> std::result::Result<(), CheckError> {
        let started = Instant::now();
        loop {
            match self.check_dma_write(PAGES - 1) {
                Err(error) if started.elapsed() > OPERATION_TIMEOUT => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
                Ok(()) => return Ok(()),
            }
        }
    }
}
