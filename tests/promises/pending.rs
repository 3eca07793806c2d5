//! What this harness has found and the gate does not do yet. Each is to become true, and then to go.

/// A conversion by passgate itself that hangs is answered in time.
pub const CONVERT_HAS_DEADLINE: bool = false;
/// Memory of a dead client whose closing took too long is closed when the calls come back after all.
pub const LATE_CLOSE_GOES_ON: bool = false;
