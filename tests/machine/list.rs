//! `passgate list` in a machine whose devices are known.

use std::process::Command;

use serde_json::{Value, json};

use super::rig::{PASSGATE, Rig};
use crate::daemon::{TIMEOUT, wait_until};

fn list() -> Vec<Value> {
    let output = Command::new(PASSGATE).args(["list", "--json"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn find<'a>(devices: &'a [Value], address: &str) -> &'a Value {
    devices.iter().find(|device| device["address"] == address).unwrap_or_else(|| panic!("no {address}"))
}

/// Checks both stop classes of every device, and the processes that own the served device.
pub fn every_device(rig: &Rig) {
    let daemon = rig.serve();
    // The guardian process exists before it is given the device.
    let guardian_has_device = || find(&list(), &rig.edu)["owner"].as_array().unwrap().len() == 2;
    assert!(wait_until(TIMEOUT, guardian_has_device), "the guardian was not given the device");
    let devices = list();
    let addresses = |variable: &str| std::env::var(variable).unwrap();
    let pci_express_device =
        (json!(["unmap", "bus-master-off", "detach", "reset"]), json!(["unmap", "bus-master-off", "reset"]));
    let conventional_device = (json!(["unmap", "detach"]), json!(["unmap"]));
    for (variable, ids, class, stop) in [
        ("PASSGATE_EDU", "1234:11e8", "other device", &conventional_device),
        ("PASSGATE_NVME", "1b36:0010", "NVMe drive", &pci_express_device),
        ("PASSGATE_IGB", "8086:10c9", "Ethernet controller", &pci_express_device),
        ("PASSGATE_VIRTIO_NET", "1af4:1041", "Ethernet controller", &pci_express_device),
        ("PASSGATE_VIRTIO_GPU", "1af4:1050", "display controller", &conventional_device),
    ] {
        for address in addresses(variable).split_whitespace() {
            let device = find(&devices, address);
            assert_eq!((&device["ids"], &device["class"]), (&json!(ids), &json!(class)), "{address}");
            assert_eq!(
                (&device["stop"]["iommufd"], &device["stop"]["type1"]),
                (&stop.0, &stop.1),
                "{address}"
            );
            assert_eq!(device["driver"], "vfio-pci");
            let ats = variable == "PASSGATE_VIRTIO_NET";
            assert_eq!((&device["ats"], &device["pri"]), (&json!(ats), &json!(false)), "{address}");
            assert_eq!(
                (&device["refused"], &device["owner_known"]),
                (&Value::Null, &json!(true)),
                "{address}"
            );
            assert_eq!(device["group"]["isolated"], true);
            let unstoppable = device["unstoppable"].is_string();
            let cdev = addresses("PASSGATE_RIG") == "iommufd";
            assert_eq!(unstoppable, !cdev && stop.1 == json!(["unmap"]), "{address}: {device}");
            assert_eq!(device["owner"].as_array().unwrap().is_empty(), address != rig.edu, "{address}");
        }
    }
    let pids = [daemon.pid(), daemon.guardian().unwrap()].map(|pid| i64::from(pid.as_raw_nonzero().get()));
    let owners = find(&devices, &rig.edu)["owner"].as_array().unwrap();
    let mut owner_pids: Vec<_> = owners.iter().map(|owner| owner["pid"].as_i64().unwrap()).collect();
    owner_pids.sort_unstable();
    assert_eq!(owner_pids, pids, "{owners:?}");
    let commands: Vec<_> = owners.iter().map(|owner| owner["command"].as_str().unwrap()).collect();
    assert!(commands.iter().any(|command| command.contains("serve --socket-path")), "{commands:?}");
    assert!(commands.contains(&"passgate guardian"), "{commands:?}");

    let (sata, smbus) = (find(&devices, "0000:00:1f.2"), find(&devices, "0000:00:1f.3"));
    assert_eq!(
        sata["group"]["companions"],
        json!(["0000:00:1f.3"]),
        "the bridge of the group is no companion"
    );
    assert_eq!(sata["group"]["isolated"], false);
    assert_eq!(
        sata["stop"]["iommufd"],
        json!(["unmap"]),
        "a detach of one device of a group does not stop it"
    );
    assert!(smbus["refused"].as_str().unwrap().contains("is bound to no driver, not to vfio-pci; bind it:"));
    assert!(find(&devices, "0000:00:07.0")["refused"].as_str().unwrap().contains("is a bridge"));
}

/// An unprivileged user gets what any user may read, and the list marks the owner as unknown.
pub fn unprivileged(rig: &Rig) {
    use std::os::unix::process::CommandExt;
    let _daemon = rig.serve();
    let output = Command::new(PASSGATE).args(["list", "--json"]).uid(65534).gid(65534).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let devices: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let engine = find(&devices, &rig.edu);
    assert_eq!((&engine["owner"], &engine["owner_known"]), (&json!([]), &json!(false)));
    let nvme = find(&devices, &std::env::var("PASSGATE_NVME").unwrap());
    assert_eq!(
        (&nvme["ats"], &nvme["unstoppable"]),
        (&Value::Null, &Value::Null),
        "an unprivileged user can read 64 bytes of configuration space only"
    );
    assert_eq!(nvme["stop"]["iommufd"], json!(["unmap", "detach", "reset"]));
}
