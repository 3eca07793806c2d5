//! Taking over a container that an earlier process made, with its groups and mappings.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use passgate_bindings::vfio::{Container, Group};

use super::Type1Domain;
use crate::handover::{DomainIds, Handover};
use crate::{Error, Result};

const REMEDY: &str = "start without what the service manager has: stop the service for good, then start it";

impl Type1Domain {
    /// Takes over the container of an earlier process, and the groups that are in it. Nothing is mapped, unmapped,
    /// added or removed.
    pub fn resume(container: OwnedFd, groups: Vec<(u32, OwnedFd)>, ids: DomainIds) -> Result<Arc<Self>> {
        let DomainIds::Type1 { entries } = ids else {
            return Err(Error::Host {
                what: "the ledger is not of a type1 container".to_owned(),
                remedy: REMEDY,
            });
        };
        let container = Container::from_fd(container);
        container.info().map_err(|failed| Error::Host {
            what: format!(
                "what was kept as the VFIO container is none, or has no group in it any more ({failed})"
            ),
            remedy: REMEDY,
        })?;
        let groups: Vec<_> = groups.into_iter().map(|(id, fd)| Arc::new(Group::from_fd(id, fd))).collect();
        for group in &groups {
            group.viable().map_err(|failed| Error::Host {
                what: format!("the file stored as VFIO group {} is not one ({failed})", group.id()),
                remedy: REMEDY,
            })?;
        }
        Ok(Arc::new(Self { groups: Mutex::new(groups), entries, container }))
    }

    /// Returns what [`Type1Domain::resume`] needs.
    pub(super) fn hand_over(&self) -> io::Result<(Handover, DomainIds)> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let groups = groups.iter().map(|group| Ok((group.id(), group.as_fd().try_clone_to_owned()?)));
        let groups = groups.collect::<io::Result<Vec<_>>>()?;
        let domain = Some(self.container.as_fd().try_clone_to_owned()?);
        Ok((Handover { domain, groups, ..Handover::default() }, DomainIds::Type1 { entries: self.entries }))
    }
}

#[cfg(test)]
mod tests {
    use passgate_bindings::PAGE;
    use passgate_bindings::memory::GuestFile;

    use super::*;

    #[test]
    fn resume_with_a_file_that_is_no_container_is_refused_in_one_line() {
        let file = GuestFile::memfd("not-vfio", PAGE).unwrap().as_fd().try_clone_to_owned().unwrap();
        let error =
            Type1Domain::resume(file, Vec::new(), DomainIds::Type1 { entries: 9 }).unwrap_err().to_string();
        assert!(error.contains("kept as the VFIO container is none") && !error.contains('\n'), "{error}");
    }
}
