//! What a daemon may do once it has its devices: as little as it needs.

use passgate_bindings::Failed;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};

use crate::error::Result;

/// Gives up every capability but that of pinning memory beyond `RLIMIT_MEMLOCK`, and all ways to get one again, for
/// this thread and those that it starts. The devices' descriptors stay open: they need none.
///
/// The guardian needs none either; it is started by a thread that has given them up.
pub fn give_up() -> Result<()> {
    set_no_new_privs(true).map_err(|errno| Failed::new("PR_SET_NO_NEW_PRIVS", errno))?;
    let now = capabilities(None).map_err(|errno| Failed::new("capget", errno))?;
    let kept = CapabilitySet::IPC_LOCK;
    let sets = CapabilitySets {
        effective: now.effective & kept,
        permitted: now.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(|errno| Failed::new("capset", errno))?;
    Ok(())
}
