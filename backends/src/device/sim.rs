//! A simulated device: attached to a [`crate::iommu::sim::Sim`] domain, stopped by its fences, never by itself.
//!
//! Each fence does what its name promises and no more: cancel ends what is in flight unless it is stuck, detach
//! moves the device to the blocking domain, reset ends everything in flight but leaves the device attached.

use std::sync::Arc;

use passgate_bindings::{Failed, Iova, PAGE};
use rustix::io::Errno;

use super::{Device, FenceStep, Guard, StopClass};
use crate::iommu::sim::{Call, Fault, Seen, Shared};
use crate::{Error, Result};

/// A simulated device.
#[derive(Debug)]
pub struct SimDevice {
    name: String,
    stop_class: StopClass,
    domain: Arc<Shared>,
    port: usize,
}

impl SimDevice {
    pub(crate) fn new(name: &str, stop_class: StopClass, domain: Arc<Shared>, port: usize) -> Self {
        Self { name: name.to_owned(), stop_class, domain, port }
    }

    /// What this device's DMA meets at `iova`; none where it faults.
    pub fn dma(&self, iova: Iova) -> Option<Seen> {
        self.domain.translate(self.port, iova).map(|(seen, _)| seen)
    }

    fn fail(&self, call: &'static str, errno: Errno) -> Error {
        Error::Device { device: self.name.clone(), source: Failed::new(call, errno), mend: "" }
    }

    /// Does one DMA of `len` bytes page by page: `touch` gets the file, the offset in it and the bytes' place.
    fn each_page(
        &self,
        iova: Iova,
        len: usize,
        writes: bool,
        mut touch: impl FnMut(
            &passgate_bindings::memory::GuestFile,
            u64,
            std::ops::Range<usize>,
        ) -> Result<(), Failed>,
    ) -> Result<()> {
        let mut done = 0;
        while done < len {
            let at = iova.0.checked_add(done as u64).ok_or_else(|| self.fail("DMA", Errno::FAULT))?;
            let within = at % PAGE;
            let page = self.domain.translate(self.port, Iova(at - within));
            let (seen, file) = page.ok_or_else(|| self.fail("DMA", Errno::FAULT))?;
            if writes && !seen.writable {
                return Err(self.fail("DMA", Errno::ACCESS));
            }
            let step = (len - done).min((PAGE - within) as usize);
            touch(&file, seen.offset.0 + within, done..done + step)
                .map_err(|source| self.fail("DMA", source.errno))?;
            done += step;
        }
        Ok(())
    }
}

impl Device for SimDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn stop_class(&self) -> StopClass {
        self.stop_class
    }

    fn fence(&self, step: FenceStep) -> Result<()> {
        let fault = self.domain.enter(Call::Fence);
        if !self.stop_class.has(step) {
            return Err(Error::Unsupported { device: self.name.clone(), what: "this fence" });
        }
        if let Some(Fault::Errno(errno)) = fault {
            return Err(self.fail("sim fence", errno));
        }
        if step == FenceStep::Detach {
            self.domain.set_attached(self.port, false);
        }
        self.domain.end_flight(self.port, step != FenceStep::Drain);
        Ok(())
    }

    fn attach(&self) -> Result<()> {
        if let Some(Fault::Errno(errno)) = self.domain.enter(Call::Attach) {
            self.domain.set_attached(self.port, false);
            return Err(self.fail("sim attach", errno));
        }
        self.domain.set_attached(self.port, true);
        Ok(())
    }

    fn guard(&self) -> Guard<'_> {
        Guard::None
    }

    fn dma_read(&self, iova: Iova, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.each_page(iova, len, false, |file, offset, part| file.read(offset, &mut bytes[part]))?;
        Ok(bytes)
    }

    fn dma_write(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        self.each_page(iova, bytes.len(), true, |file, offset, part| file.write(offset, &bytes[part]))
    }
}
