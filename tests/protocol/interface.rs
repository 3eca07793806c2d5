//! The documentation of the protocol matches the code: the varlink description, and the C struct in docs/protocol.md.

use std::collections::BTreeSet;
use std::process::Command;

use passgate_client::PageState;
use passgate_client::protocol::record::Record;
use passgate_client::protocol::verbs::*;
use serde::Serialize;
use serde_json::{Value, json};

/// Returns the names of the fields that the varlink description lists in parentheses after `section`.
fn described_fields(section: &str) -> BTreeSet<String> {
    let text: String =
        DESCRIPTION.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join(" ");
    let after = text.split_once(section).unwrap_or_else(|| panic!("{section} is not described")).1;
    let inside = after.split_once('(').unwrap().1.split_once(')').unwrap().0;
    inside
        .split(',')
        .filter_map(|field| field.split_once(':'))
        .map(|(name, _)| name.trim().to_owned())
        .collect()
}

/// Returns the names of the fields as serde writes them; every `Option` of the value must be `Some`.
fn serialized_fields(value: &impl Serialize) -> BTreeSet<String> {
    match serde_json::to_value(value).unwrap() {
        Value::Object(fields) => fields.into_iter().map(|(name, _)| name).collect(),
        other => panic!("{other}"),
    }
}

#[test]
fn varlink_description_matches_serialized_fields() {
    let failure = Failure {
        gpa: 0,
        length: 1,
        cause: String::new(),
        device: Some(String::new()),
        rung: String::new(),
        errno: 1,
    };
    let region = Region {
        region: 1,
        gpa: 0,
        length: 1,
        piece: 1,
        writable: true,
        shared: 1,
        private: 1,
        hole: 1,
        unknown: 1,
        closing: true,
    };
    let device = Device {
        device: String::new(),
        stop: vec![],
        ats: true,
        tdi: true,
        fenced: Some(String::new()),
        lost: true,
    };
    let refused = Refused {
        invalidation: 1,
        gpa: 0,
        length: 1,
        cause: String::new(),
        device: Some(String::new()),
        errno: 1,
        seconds_ago: 1,
    };
    let subscribe = Subscribe { after: Some(1), instance: Some(String::new()) };
    let quarantined =
        Quarantined { gpa: Some(1), offset: 0, length: 1, cause: String::new(), invalidation: 1 };
    let region_adopted = AdoptedRegion {
        device: 1,
        inode: 2,
        region: 1,
        gpa: 0,
        length: 1,
        offset: 0,
        piece: 1,
        writable: true,
        shared: 0,
        private: 0,
        hole: 0,
        unknown: 0,
    };
    let unended = Unended { invalidation: 1, gpa: 0, length: 1 };
    let status = Status {
        version: String::new(),
        iommu: String::new(),
        instance: String::new(),
        sequence: 0,
        on_stuck_dma: String::new(),
        platform: String::new(),
        hitless: String::new(),
        mappings: 0,
        reserved: 0,
        max_mappings: 0,
        forecast: 0,
        pinned: 0,
        quarantined: 0,
        open: 0,
        clients: 0,
        regions: vec![],
        devices: vec![],
        disk: Some(Disk::default()),
        quarantine: vec![],
        refused: vec![],
        totals: Totals::default(),
    };
    let converted = Converted { verdict: String::new(), invalidation: 1, failure: Some(failure.clone()) };
    let dma = Dma { device: String::new(), iova: 0, write: Some(String::new()), read: Some(1) };
    let convert = Convert { gpa: 0, length: 1, to: PageState::Hole, deadline_ms: 1 };
    let reply =
        |verb: &str| format!("{verb}{}", DESCRIPTION.split_once(verb).unwrap().1.split_once("->").unwrap().0);
    for (section, fields) in [
        ("type Failure", serialized_fields(&failure)),
        ("type Region", serialized_fields(&region)),
        ("type Device", serialized_fields(&device)),
        ("type Quarantined", serialized_fields(&quarantined)),
        ("type Refused", serialized_fields(&refused)),
        ("type Totals", serialized_fields(&Totals::default())),
        ("type Disk", serialized_fields(&Disk::default())),
        ("type AdoptedRegion", serialized_fields(&region_adopted)),
        ("type Unended", serialized_fields(&unended)),
        ("method AddMemory", serialized_fields(&AddMemory::shared(0, 1))),
        ("method RemoveMemory", serialized_fields(&RemoveMemory { region: 1 })),
        ("method Convert", serialized_fields(&convert)),
        ("method Explain", serialized_fields(&Explain { invalidation: 1 })),
        ("method Subscribe", serialized_fields(&subscribe)),
        ("method Release", serialized_fields(&Release { invalidation: 1, to: PageState::Hole })),
        ("method Dma", serialized_fields(&dma)),
        ("error Refused", serialized_fields(&json!({"message": "", "errno": 1}))),
    ] {
        assert_eq!(described_fields(section), fields, "{section}");
    }
    for (verb, fields) in [
        ("method AddMemory", serialized_fields(&MemoryAdded { region: 1, mapped: 1 })),
        ("method Convert", serialized_fields(&converted)),
        ("method Status", serialized_fields(&status)),
        (
            "method Subscribe",
            serialized_fields(&json!({"sequence": 1, "time_ms": 1, "event": "", "details": {}})),
        ),
        ("method Release", serialized_fields(&Released { bytes: 1 })),
        ("method Adopt", serialized_fields(&Adopted { regions: vec![], unended: vec![], more_unended: 0 })),
        ("method Metrics", serialized_fields(&Metrics { text: String::new() })),
        ("method Dma", serialized_fields(&DmaDone { read: Some(String::new()) })),
    ] {
        // `described_fields` removes the comments, so the text up to the reply must not contain them either.
        let call = reply(verb).lines().collect::<Vec<_>>().join(" ");
        assert_eq!(described_fields(&call), fields, "{verb}, its reply");
    }
}

#[test]
fn manual_c_struct_matches_record_layout() {
    // Serialized, because other tests count this process's open files and the child processes here add pipes.
    let _exclusive = crate::common::exclusive();
    if Command::new("cc").arg("--version").output().is_err() {
        return crate::common::skip::skip("there is no C compiler");
    }
    let manual = include_str!("../../docs/protocol.md");
    let code = manual.split_once("```c\n").unwrap().1.split_once("```").unwrap().0;
    let offsets = [
        ("kind", std::mem::offset_of!(Record, kind)),
        ("version", std::mem::offset_of!(Record, version)),
        ("flags", std::mem::offset_of!(Record, flags)),
        ("to", std::mem::offset_of!(Record, to)),
        ("cookie", std::mem::offset_of!(Record, cookie)),
        ("gpa", std::mem::offset_of!(Record, gpa)),
        ("length", std::mem::offset_of!(Record, length)),
        ("invalidation", std::mem::offset_of!(Record, invalidation)),
        ("outcome", std::mem::offset_of!(Record, outcome)),
        ("cause", std::mem::offset_of!(Record, cause)),
        ("error", std::mem::offset_of!(Record, errno)),
        ("deadline", std::mem::offset_of!(Record, deadline_or_device)),
        ("offset", std::mem::offset_of!(Record, offset)),
    ];
    let mut source = format!("#include <stddef.h>\n{code}\n");
    for (name, offset) in offsets {
        source +=
            &format!("_Static_assert(offsetof(struct passgate_record, {name}) == {offset}, \"{name}\");\n");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("record.c");
    std::fs::write(&file, source).unwrap();
    let output =
        Command::new("cc").args(["-std=c11", "-Wall", "-Werror", "-fsyntax-only"]).arg(file).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
