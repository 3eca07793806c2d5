//! Privileges of a daemon once it has opened its devices: only those that it still needs.

use passgate_bindings::Failed;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};

use crate::error::Result;

/// Drops every capability but `CAP_IPC_LOCK` (pinning memory beyond `RLIMIT_MEMLOCK`) and sets `no_new_privs`, for the calling
/// thread and those that it starts (capabilities(7), `PR_SET_NO_NEW_PRIVS` in prctl(2)). The devices' descriptors stay open
/// and need no capability.
///
/// The guardian needs none either; it is started by a thread that has called this.
pub fn give_up() -> Result<()> {
    set_no_new_privs(true).map_err(|errno| Failed::new("PR_SET_NO_NEW_PRIVS", errno))?;
    let now = capabilities(None).map_err(|errno| Failed::new("capget", errno))?;
    let allowed = CapabilitySet::IPC_LOCK;
    let sets = CapabilitySets {
        effective: now.effective & allowed,
        permitted: now.permitted & allowed,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(|errno| Failed::new("capset", errno))?;
    Ok(())
}
