//! What this harness has found and the gate does not do yet. Each is to become true, and then to go.

/// A conversion by passgate itself that hangs is answered in time.
pub const CONVERT_HAS_DEADLINE: bool = true;
/// Memory of a dead client whose closing took too long is closed when the calls come back after all.
pub const LATE_CLOSE_GOES_ON: bool = true;
/// When a client dies, every device is stopped as surely as it can be, not each domain by one step.
pub const STOPS_EACH_DEVICE: bool = true;
/// Quarantine is lifted also when the proof is that the region is closed after all.
pub const CLOSING_FREES: bool = true;
/// An unmap that comes up short and leaves operations in flight is not proved by the removal of the rest.
pub const SHORT_AND_LATE: bool = true;
/// What is in doubt when the client that began dies is quarantined and told.
pub const ABANDONED_IS_TOLD: bool = true;
