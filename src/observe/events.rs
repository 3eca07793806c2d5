//! Notices and receipts in words: what `Subscribe`, `Explain` and the log say.

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, PageRange};
use serde_json::{Map, Value, json};

use crate::gate::{DeviceId, Evidence, Notice, Outcome, Reason, Receipt, Verdict};
use crate::protocol::verbs::Failure;

/// What has names: the session.
pub trait Names {
    /// The name of a device.
    fn device(&self, id: DeviceId) -> &str;
}

impl Names for crate::session::Session {
    fn device(&self, id: DeviceId) -> &str {
        self.device_name(id)
    }
}

/// A notice as the event's name and its details.
pub fn describe(notice: &Notice, names: &dyn Names) -> (&'static str, Value) {
    match notice {
        Notice::Refused { invalidation, range, reason } => {
            let mut details = why(*reason, names);
            details.insert("invalidation".into(), invalidation.0.into());
            details.extend(place(*range));
            ("range.refused", details.into())
        }
        Notice::Quarantined { invalidation, file: _, range, gpa, reason } => {
            let mut details = why(*reason, names);
            details.insert("invalidation".into(), invalidation.0.into());
            details.extend(pages(*range, *gpa));
            ("range.quarantined", details.into())
        }
        Notice::Freed { file: _, range, gpa } => ("range.freed", pages(*range, *gpa).into()),
        Notice::Released { client, invalidation, file: _, range, gpa, to } => {
            let mut details = pages(*range, *gpa);
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
        Notice::MapFailed { domain: _, iova, errno } => {
            ("map.failed", json!({ "iova": iova.start().raw(), "length": iova.len(), "errno": errno }))
        }
        Notice::RegionClosed { region } => ("region.closed", json!({ "region": region.0 })),
        Notice::SessionClosed { client } => ("session.closed", json!({ "client": client.0 })),
    }
}

fn why(reason: Reason, names: &dyn Names) -> Map<String, Value> {
    let mut details = Map::new();
    details.insert("cause".into(), reason.cause.word().into());
    details.insert("rung".into(), reason.rung.word().into());
    details.insert("errno".into(), reason.errno.into());
    if let Some(device) = reason.device {
        details.insert("device".into(), names.device(device).into());
    }
    details
}

fn place(range: PageRange<Gpa>) -> [(String, Value); 2] {
    [("gpa".into(), range.start().0.into()), ("length".into(), range.len().into())]
}

fn pages<A: Address>(range: PageRange<A>, gpa: Option<Gpa>) -> Map<String, Value> {
    let mut details = Map::new();
    details.insert("offset".into(), range.start().raw().into());
    details.insert("length".into(), range.len().into());
    if let Some(gpa) = gpa {
        details.insert("gpa".into(), gpa.0.into());
    }
    details
}

/// What failed, as a reply says it.
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

/// A verdict as a word, and what failed.
pub fn verdict(verdict: Verdict, names: &dyn Names) -> (&'static str, Option<Failure>) {
    match verdict {
        Verdict::Done => ("done", None),
        Verdict::Refused { range, reason } => ("refused", Some(failure(range, reason, names))),
        Verdict::Unknown { range, reason } => ("unknown", Some(failure(range, reason, names))),
    }
}

/// A receipt, whole.
pub fn receipt(receipt: &Receipt, names: &dyn Names) -> Value {
    let (word, failure) = receipt.verdict.map_or(("none", None), |said| verdict(said, names));
    let outcome = match receipt.outcome {
        None => json!(null),
        Some(Outcome::Committed) => json!("committed"),
        Some(Outcome::NotCommitted) => json!("not-committed"),
        Some(Outcome::Unknown { errno, offset }) => {
            json!({ "unknown": { "errno": errno, "offset": offset } })
        }
    };
    let step = |step: &Evidence| {
        let mut said = json!({
            "step": step.step.word(), "errno": step.errno, "took_ns": step.took_ns,
        });
        if let Some(device) = step.device {
            said["device"] = names.device(device).into();
        }
        if let Some(iova) = step.iova {
            said["iova"] = iova.start().0.into();
            said["asked"] = step.asked.into();
            said["gone"] = step.gone.into();
            said["in_flight"] = step.in_flight.into();
        }
        said
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
