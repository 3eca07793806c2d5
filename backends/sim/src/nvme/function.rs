//! The simulated controller as a device: the effect of fences on it.

use std::sync::Arc;

use passgate_backends::device::Guard;
use passgate_backends::{Device, DeviceTraits, Result, Step, Steps};
use passgate_bindings::Iova;

use super::Core;

/// The PCI function of a simulated controller.
#[derive(Debug)]
pub(super) struct Function {
    core: Arc<Core>,
}

impl Function {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }
}

impl Device for Function {
    fn name(&self) -> &str {
        &self.core.options.name
    }

    fn stop_class(&self) -> Steps {
        self.core.options.stop_class
    }

    fn traits(&self) -> DeviceTraits {
        self.core.options.traits
    }

    /// Fences the port to the domain; a reset also resets the registers.
    fn fence(&self, step: Step) -> Result<()> {
        self.core.port.fence(step)?;
        if step == Step::Reset {
            self.core.lock().reset_function();
            self.core.changed.notify_all();
        }
        Ok(())
    }

    fn attach(&self) -> Result<()> {
        self.core.port.attach()
    }

    fn guard(&self) -> Guard<'_> {
        self.core.port.guard()
    }

    fn dma_read(&self, iova: Iova, len: usize) -> Result<Vec<u8>> {
        self.core.port.dma_read(iova, len)
    }

    fn dma_write(&self, iova: Iova, bytes: &[u8]) -> Result<()> {
        self.core.port.dma_write(iova, bytes)
    }
}
