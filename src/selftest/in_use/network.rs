//! Network interfaces.

use super::below::Below;
use super::{Host, names, text};

/// `IFF_UP`, include/uapi/linux/if.h.
const IFF_UP: u32 = 1;

/// An interface that is up, has a route or an address, is a part of another, or cannot be seen.
pub(super) fn check(host: Host<'_>, below: &Below) -> Result<(), String> {
    // An interface in another network namespace leaves its directory here empty.
    for dir in &below.net_dirs {
        if names(dir)?.is_empty() {
            return Err(
                "its network interface is in another network namespace: move it back first".to_owned()
            );
        }
    }
    let list =
        |name: &str| Ok::<_, String>(text(&host.proc.join("self/net").join(name))?.unwrap_or_default());
    // The name of an interface is the first word of a line, or the last.
    let (routes, routes6, addresses6) = (list("route")?, list("ipv6_route")?, list("if_inet6")?);
    for interface in below.of("net") {
        let name = interface.name.as_str();
        let first = |text: &str| text.lines().any(|line| line.split_whitespace().next() == Some(name));
        let last = |text: &str| text.lines().any(|line| line.split_whitespace().next_back() == Some(name));
        let upper = names(&interface.dir)?.into_iter().find(|entry| entry.starts_with("upper_"));
        let flags = text(&interface.dir.join("flags"))?.unwrap_or_default();
        let flags = flags.trim().strip_prefix("0x").and_then(|hex| u32::from_str_radix(hex, 16).ok());
        let why = if first(&routes) || last(&routes6) {
            "has a route"
        } else if last(&addresses6) {
            "has an address"
        } else if upper.is_some() || interface.dir.join("master").exists() {
            "is a part of another interface"
        } else if flags.is_none_or(|flags| flags & IFF_UP != 0) {
            "is up"
        } else {
            continue;
        };
        return Err(format!("network interface {name} {why}: ip link set {name} down"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::fake::Fake;

    #[test]
    fn an_interface_that_is_up_or_has_a_route_or_an_address_is_in_use() {
        let fake = Fake::new();
        let entry = fake.entry("net", "net/eth7", None);
        assert!(fake.says().unwrap().contains("eth7 is up"), "without its flags");
        fs::write(entry.join("flags"), "0x1002\n").unwrap();
        assert_eq!(fake.says(), None);
        fs::write(entry.join("flags"), "0x1003\n").unwrap();
        assert!(fake.says().unwrap().contains("eth7 is up"));
        fs::write(entry.join("flags"), "0x1002\n").unwrap();
        for (list, text, why) in [
            ("route", "Iface Destination\neth7 0000A8C0 0 0\n", "has a route"),
            ("ipv6_route", "fe800000 40 0 0 0 0 0 0 eth7\n", "has a route"),
            ("if_inet6", "fe80 02 40 20 80 eth7\n", "has an address"),
        ] {
            fake.net(list, text);
            assert!(fake.says().unwrap().contains(why), "{list}");
            fake.net(list, "");
        }
        fs::create_dir(entry.join("upper_br0")).unwrap();
        assert!(fake.says().unwrap().contains("is a part of another interface"));
    }

    #[test]
    fn an_interface_of_another_namespace_is_in_use() {
        let fake = Fake::new();
        fs::create_dir_all(fake.device().join("virtio3/net")).unwrap();
        assert!(fake.says().unwrap().contains("is in another network namespace"));
    }
}
