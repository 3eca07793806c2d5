//! The drill (`--fail-attributes`): KVM really refuses a conversion that passgate has granted, twice.
//!
//! The first time the VMM knows that nothing changed and says so: the page goes back to its devices. The second time
//! it says that it cannot know: nobody gets the page any more.

use passgate::client::{Answer, Channel, Client, Outcome, PageState};
use passgate_bindings::{Gpa, PageRange};
use rustix::io::Errno;

use crate::Result;
use crate::device::Device;
use crate::guest::{FIRST, gpa};
use crate::machine::{Machine, outcome};
use crate::pages::Pages;

/// The page whose conversion certainly did not happen, and the one of which nobody knows.
const RESTORED: u64 = 5;
const LOST: u64 = 9;

/// Runs the drill before the guest does; an error says what was not as it must be.
pub(crate) fn run(
    machine: &Machine,
    pages: &Pages,
    client: &mut Client,
    channel: &mut Channel,
    device: &mut Device,
) -> Result<()> {
    let failed = begin_and_fail(machine, channel, device, RESTORED, |failed| outcome(Err(failed)))?;
    must(failed == Outcome::NotCommitted, "KVM's refusal was not taken for `not committed`")?;
    must(device.sees(RESTORED, FIRST)?, "the page that was not converted did not go back to the device")?;

    let cannot_say = |failed: passgate_bindings::Failed| Outcome::Unknown {
        errno: failed.errno.raw_os_error(),
        offset: 0,
    };
    begin_and_fail(machine, channel, device, LOST, cannot_say)?;
    pages.quarantine(LOST);
    let lost = gpa(LOST)?;
    let quarantine = client.status()?.quarantine;
    let told = quarantine
        .iter()
        .any(|q| q.gpa == Some(lost.start().0) && q.length == lost.len() && q.cause == "owner-unknown");
    must(told, "the page of which nobody knows is not in the quarantine that `Status` lists")?;
    must(device.read(LOST)?.is_none(), "the device sees the page of which nobody knows")?;
    let refused = is_refused(channel, lost)?;
    must(refused, "the page of which nobody knows was granted again")
}

/// Begins, fails, and ends with what `say` makes of the failure.
fn begin_and_fail(
    machine: &Machine,
    channel: &mut Channel,
    device: &mut Device,
    page: u64,
    say: impl FnOnce(passgate_bindings::Failed) -> Outcome,
) -> Result<Outcome> {
    must(device.sees(page, FIRST)?, "the device does not see a page that was never converted")?;
    let Answer::Granted { invalidation } = channel.begin(gpa(page)?, PageState::Private, None)? else {
        return Err("the drill: passgate refused a page that nothing holds".into());
    };
    must(device.read(page)?.is_none(), "the device sees a page between begin and end")?;
    let failed = machine.fail_to_convert(gpa(page)?).ok_or("KVM took a length that is not of whole pages")?;
    let outcome = say(failed);
    channel.end(invalidation, outcome)?;
    Ok(outcome)
}

/// Whether passgate refuses to begin because of quarantine.
fn is_refused(channel: &mut Channel, range: PageRange<Gpa>) -> Result<bool> {
    match channel.begin(range, PageState::Private, None) {
        Ok(_) => Ok(false),
        Err(passgate::Error::Refused { errno, .. }) => Ok(errno == Errno::IO.raw_os_error()),
        Err(other) => Err(other.into()),
    }
}

fn must(holds: bool, else_: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(format!("the drill: {else_}").into()) }
}
