//! A simulated device in a simulated domain ([`Sim`](super::Sim)), which only its fences stop.
//!
//! Each fence has exactly the effect that its name promises. Drain ends operations in flight unless they are stuck.
//! Migration STOP and bus mastering off do so too, and the device issues nothing until it is attached again; stuck
//! operations make them fail, though the device is quiesced nevertheless. Detach moves the device to the blocking
//! domain. Reset ends everything in flight and leaves the device attached, to do DMA again. Only detach and reset clear
//! the device's own translation cache (ATS).

use std::sync::Arc;

use passgate_backends::device::Guard;
use passgate_backends::{Device, DeviceTraits, Error, Result, Step, Steps};
use passgate_bindings::{Failed, Iova, PAGE};
use rustix::io::Errno;

use super::{Call, DmaTarget, Fault, Shared, StaleUntil};

/// A simulated device.
#[derive(Debug)]
pub struct SimDevice {
    name: String,
    stop_class: Steps,
    traits: DeviceTraits,
    domain: Arc<Shared>,
    port: usize,
}

impl SimDevice {
    pub(crate) fn new(
        name: &str,
        stop_class: Steps,
        traits: DeviceTraits,
        domain: Arc<Shared>,
        port: usize,
    ) -> Self {
        Self { name: name.to_owned(), stop_class, traits, domain, port }
    }

    /// Returns true while the device is attached and issues requests.
    pub fn runs(&self) -> bool {
        self.domain.runs(self.port)
    }

    /// Returns the memory that a DMA of this device accesses at `iova`; none if it faults.
    pub fn dma(&self, iova: Iova) -> Option<DmaTarget> {
        self.domain.translate(self.port, iova).map(|(target, _)| target)
    }

    /// Reads the naturally aligned word at `iova` in one access.
    pub fn dma_load(&self, iova: Iova) -> Result<u64> {
        let mut word = 0;
        self.each_page(iova, size_of::<u64>(), false, |file, offset, _| {
            word = file.load(offset)?;
            Ok(())
        })?;
        Ok(word)
    }

    /// Writes the naturally aligned word at `iova` in one access.
    pub fn dma_store(&self, iova: Iova, word: u64) -> Result<()> {
        self.each_page(iova, size_of::<u64>(), true, |file, offset, _| file.store(offset, word))
    }

    /// Returns false while it is detached.
    pub(crate) fn is_attached(&self) -> bool {
        self.domain.is_attached(self.port)
    }

    fn fail(&self, call: &'static str, errno: Errno) -> Error {
        Error::Device { device: self.name.clone(), source: Failed::new(call, errno), remedy: "" }
    }

    /// Does one DMA of `len` bytes page by page: `touch` gets the file, the offset in it, and the range of the bytes.
    /// The domain is locked meanwhile, so no unmap and no fence returns while a page that it affects is copied.
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
            let step = (len - done).min((PAGE - within) as usize);
            let page = self.domain.with_page(self.port, Iova(at - within), |target, file| {
                if writes && !target.writable {
                    return Err(Errno::ACCESS);
                }
                touch(file, target.offset.0 + within, done..done + step).map_err(|source| source.errno)
            });
            page.unwrap_or(Err(Errno::FAULT)).map_err(|errno| self.fail("DMA", errno))?;
            done += step;
        }
        Ok(())
    }
}

impl Device for SimDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn stop_class(&self) -> Steps {
        self.stop_class
    }

    fn traits(&self) -> DeviceTraits {
        self.traits
    }

    fn fence(&self, step: Step) -> Result<()> {
        let fault = self.domain.enter(Call::Fence);
        if !self.stop_class.has(step) {
            return Err(Error::Unsupported { device: self.name.clone(), what: "this fence" });
        }
        if let Some(Fault::Errno(errno)) = fault {
            return Err(self.fail("sim fence", errno));
        }
        let failed = if let Some(Fault::HalfDone(errno)) = fault { Some(errno) } else { None };
        match step {
            Step::Drain => {
                self.domain.end_stale(self.port, StaleUntil::Flush);
            }
            Step::Stop | Step::Master => {
                self.domain.set_quiesced(self.port, true);
                if !self.domain.end_stale(self.port, StaleUntil::Flush) {
                    return Err(self.fail("sim fence", Errno::TIMEDOUT));
                }
            }
            Step::Detach => {
                self.domain.set_attached(self.port, false);
                self.domain.end_stale(self.port, StaleUntil::CacheCleared);
            }
            Step::Reset => {
                self.domain.set_quiesced(self.port, false);
                self.domain.end_stale(self.port, StaleUntil::CacheCleared);
            }
        }
        failed.map_or(Ok(()), |errno| Err(self.fail("sim fence", errno)))
    }

    fn attach(&self) -> Result<()> {
        let fault = self.domain.enter(Call::Attach);
        if let Some(Fault::Errno(errno)) = fault {
            self.domain.set_attached(self.port, false);
            return Err(self.fail("sim attach", errno));
        }
        self.domain.set_attached(self.port, true);
        self.domain.set_quiesced(self.port, false);
        match fault {
            Some(Fault::HalfDone(errno)) => Err(self.fail("sim attach", errno)),
            _ => Ok(()),
        }
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
