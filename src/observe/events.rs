//! Notices and receipts as JSON, for `Subscribe`, `Explain` and the log.

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, PageRange};
use serde_json::{Map, Value, json};

use crate::gate::{DeviceId, Evidence, Notice, Outcome, Reason, Receipt, Verdict};
use crate::protocol::verbs::Failure;

/// The names of devices, by their numbers.
pub trait Names {
    /// Returns the name of a device.
    fn device(&self, id: DeviceId) -> &str;
}

/// Returns the name of a notice's event, and its details.
pub fn describe(notice: &Notice, names: &dyn Names) -> (&'static str, Value) {
    match notice {
        Notice::Refused { invalidation, range, reason } => {
            let mut details = reason_details(*reason, names);
            details.insert("invalidation".into(), invalidation.0.into());
            details.extend(guest_range(*range));
            ("range.refused", details.into())
        }
        Notice::Quarantined { invalidation, file: _, range, gpa, reason } => {
            let mut details = reason_details(*reason, names);
            details.insert("invalidation".into(), invalidation.0.into());
            details.extend(file_range(*range, *gpa));
            ("range.quarantined", details.into())
        }
        Notice::Freed { file: _, range, gpa } => ("range.freed", file_range(*range, *gpa).into()),
        Notice::Released { client, invalidation, file: _, range, gpa, to } => {
            let mut details = file_range(*range, *gpa);
            details.insert("client".into(), client.0.into());
            details.insert("invalidation".into(), invalidation.0.into());
            details.insert("to".into(), to.word().into());
            ("range.released", details.into())
        }
        Notice::TdiEnded { device, step } => {
            ("device.tdi-ended", json!({ "device": names.device(*device), "step": step.word() }))
        }
        Notice::DeviceFenced { device, step, errno } => (
            if *errno == 0 { "device.fenced" } else { "device.fence-failed" },
            json!({ "device": names.device(*device), "step": step.word(), "errno": errno }),
        ),
        Notice::DeviceAttached { device, errno } => (
            if *errno == 0 { "device.attached" } else { "device.lost" },
            json!({ "device": names.device(*device), "errno": errno }),
        ),
        Notice::DeviceWanted { device } => ("device.wanted", json!({ "device": names.device(*device) })),
        Notice::Inconsistent { what, iova } => {
            let mut details = json!({ "what": what });
            if let Some(iova) = iova {
                details["iova"] = iova.start().raw().into();
                details["length"] = iova.len().into();
            }
            ("gate.inconsistent", details)
        }
        Notice::MapFailed { domain: _, iova, errno } => {
            ("map.failed", json!({ "iova": iova.start().raw(), "length": iova.len(), "errno": errno }))
        }
        Notice::RegionClosed { region } => ("region.closed", json!({ "region": region.0 })),
        Notice::SessionClosed { client } => ("session.closed", json!({ "client": client.0 })),
    }
}

fn reason_details(reason: Reason, names: &dyn Names) -> Map<String, Value> {
    let mut details = Map::new();
    details.insert("cause".into(), reason.cause.word().into());
    details.insert("rung".into(), reason.rung.word().into());
    details.insert("errno".into(), reason.errno.into());
    if let Some(device) = reason.device {
        details.insert("device".into(), names.device(device).into());
    }
    details
}

fn guest_range(range: PageRange<Gpa>) -> [(String, Value); 2] {
    [("gpa".into(), range.start().0.into()), ("length".into(), range.len().into())]
}

/// Returns a range of a file, and the guest-physical address of its first page while a region covers it.
fn file_range<A: Address>(range: PageRange<A>, gpa: Option<Gpa>) -> Map<String, Value> {
    let mut details = Map::new();
    details.insert("offset".into(), range.start().raw().into());
    details.insert("length".into(), range.len().into());
    if let Some(gpa) = gpa {
        details.insert("gpa".into(), gpa.0.into());
    }
    details
}

/// Returns a failed range and the reason as a reply has them.
pub fn failure(range: PageRange<Gpa>, reason: Reason, names: &dyn Names) -> Failure {
    Failure {
        gpa: range.start().0,
        length: range.len(),
        cause: reason.cause.word().into(),
        device: reason.device.map(|device| names.device(device).to_owned()),
        rung: reason.rung.word().into(),
        errno: reason.errno,
    }
}

/// Returns a verdict as a word, and the failure if it is not `done`.
pub fn verdict(verdict: Verdict, names: &dyn Names) -> (&'static str, Option<Failure>) {
    let failure = match verdict {
        Verdict::Done => None,
        Verdict::Refused { range, reason } | Verdict::Unknown { range, reason } => {
            Some(failure(range, reason, names))
        }
    };
    (verdict.kind().word(), failure)
}

/// Returns a receipt with all of its steps.
pub fn receipt(receipt: &Receipt, names: &dyn Names) -> Value {
    let (word, failure) = receipt.verdict.map_or(("none", None), |given| verdict(given, names));
    let outcome = match receipt.outcome {
        None => json!(null),
        Some(Outcome::Committed) => json!("committed"),
        Some(Outcome::NotCommitted) => json!("not-committed"),
        Some(Outcome::Unknown { errno, offset }) => {
            json!({ "unknown": { "errno": errno, "offset": offset } })
        }
    };
    let step = |step: &Evidence| {
        let mut value = json!({
            "step": step.step.word(), "errno": step.errno, "took_ns": step.took_ns,
        });
        if let Some(device) = step.device {
            value["device"] = names.device(device).into();
        }
        if let Some(iova) = step.iova {
            value["iova"] = iova.start().0.into();
            value["asked"] = step.asked.into();
            value["gone"] = step.gone.into();
            value["in_flight"] = step.in_flight.into();
        }
        value
    };
    json!({
        "invalidation": receipt.invalidation.0,
        "client": receipt.caller.client.0,
        "gpa": receipt.ranges.first().start().0,
        "length": receipt.ranges.len(),
        "ranges": receipt.ranges.as_slice().len(),
        "to": receipt.to.word(),
        "steps": receipt.steps.iter().map(step).collect::<Vec<_>>(),
        "more_steps": receipt.more_steps,
        "verdict": word,
        "failure": failure,
        "outcome": outcome,
    })
}
