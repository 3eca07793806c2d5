//! The drill (`--fail-attributes`): KVM refuses two conversions that passgate has granted.
//!
//! For the first the VMM reports *not committed*: the page is mapped for its devices again. For the second it reports
//! *unknown*: the page is quarantined.

use passgate_bindings::{Gpa, PageRange};
use passgate_client::{Answer, Channel, Client, Outcome, PageState};

use crate::Result;
use crate::device::Device;
use crate::guest::{FIRST_GENERATION, gpa};
use crate::machine::{Machine, outcome};
use crate::pages::Pages;

/// The page whose conversion is reported as not committed.
const NOT_COMMITTED_PAGE: u64 = 5;
/// The page whose conversion is reported as unknown.
const UNKNOWN_PAGE: u64 = 9;

/// Runs the drill before the guest starts. Returns the first check that failed as an error.
pub(crate) fn run(
    machine: &Machine,
    pages: &Pages,
    client: &mut Client,
    channel: &mut Channel,
    device: &mut Device,
) -> Result<()> {
    let failed = begin_and_fail(machine, channel, device, NOT_COMMITTED_PAGE, |failed| outcome(Err(failed)))?;
    must(failed == Outcome::NotCommitted, "KVM's refusal was not reported as `not committed`")?;
    must(
        device.reads_stamp(NOT_COMMITTED_PAGE, FIRST_GENERATION)?,
        "the page that was not converted was not mapped again",
    )?;

    let unknown = |failed: passgate_bindings::Failed| Outcome::Unknown {
        errno: failed.errno.raw_os_error(),
        offset: 0,
    };
    begin_and_fail(machine, channel, device, UNKNOWN_PAGE, unknown)?;
    pages.quarantine(UNKNOWN_PAGE);
    let range = gpa(UNKNOWN_PAGE)?;
    let quarantine = client.status()?.quarantine;
    let listed = quarantine
        .iter()
        .any(|q| q.gpa == Some(range.start().0) && q.length == range.len() && q.cause == "owner-unknown");
    must(listed, "`Status` does not list the page with the unknown outcome in the quarantine")?;
    must(device.read(UNKNOWN_PAGE)?.is_none(), "the device can access the page with the unknown outcome")?;
    let refused = is_refused(channel, range)?;
    must(refused, "the page with the unknown outcome was granted again")
}

/// Begins a conversion of a page, lets KVM refuse it, and ends it with the outcome that `report` returns.
fn begin_and_fail(
    machine: &Machine,
    channel: &mut Channel,
    device: &mut Device,
    page: u64,
    report: impl FnOnce(passgate_bindings::Failed) -> Outcome,
) -> Result<Outcome> {
    must(
        device.reads_stamp(page, FIRST_GENERATION)?,
        "the device cannot access a page that was never converted",
    )?;
    let Answer::Granted { invalidation } = channel.begin(gpa(page)?, PageState::Private, None)? else {
        return Err("the drill: passgate refused a page that was never converted".into());
    };
    must(device.read(page)?.is_none(), "the device can access a page between begin and end")?;
    let failed = machine
        .fail_to_convert(gpa(page)?)
        .ok_or("the drill: KVM accepted a length that is not whole pages")?;
    let outcome = report(failed);
    channel.end(invalidation, outcome)?;
    Ok(outcome)
}

/// Returns true where passgate refuses to begin because the range is in quarantine.
fn is_refused(channel: &mut Channel, range: PageRange<Gpa>) -> Result<bool> {
    let answer = channel.begin(range, PageState::Private, None)?;
    Ok(matches!(answer, Answer::Quarantined { .. }))
}

/// Returns an error with `message` unless `condition` is true.
fn must(condition: bool, message: &str) -> Result<()> {
    if condition { Ok(()) } else { Err(format!("the drill: {message}").into()) }
}
