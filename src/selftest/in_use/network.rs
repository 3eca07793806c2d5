//! Network interfaces.

use std::collections::BTreeSet;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

use super::descendants::{Descendants, Entry};
use super::{Host, list_dir, read_optional, read_required};

/// `IFF_UP`, include/uapi/linux/if.h.
const IFF_UP: u32 = 1;

/// Refuses a network interface that is up, has a route or an address, is a part of another interface, or is in another
/// network namespace.
pub(super) fn check(host: Host<'_>, descendants: &Descendants) -> Result<(), String> {
    // While an interface is in another network namespace, its directory is empty here.
    for dir in &descendants.net_dirs {
        if list_dir(dir)?.is_empty() {
            return Err(in_other_namespace("its network interface"));
        }
    }
    if descendants.of_subsystem("net").next().is_none() {
        return Ok(());
    }
    let net = host.proc.join("self/net");
    let list = |name: &str| Ok::<_, String>(read_optional(&net.join(name))?.unwrap_or_default());
    let (routes, routes6, here) = (list("route")?, list("ipv6_route")?, read_required(&net.join("dev"))?);
    let addressed_interfaces = addressed_interfaces()
        .map_err(|errno| format!("whether it has addresses cannot be found out: {errno}"))?;
    for interface in descendants.of_subsystem("net") {
        let name = interface.name.as_str();
        // sysfs may show another network namespace than that of this process: then the lists read above do not cover it.
        if !here.lines().any(|line| line.trim_start().split(':').next() == Some(name)) {
            return Err(in_other_namespace(&format!("network interface {name}")));
        }
        if let Some(why) = use_of(interface, &routes, &routes6, &addressed_interfaces)? {
            return Err(format!(
                "network interface {name} {why}: ip link set {name} down; ip address flush dev {name}"
            ));
        }
    }
    Ok(())
}

fn in_other_namespace(what: &str) -> String {
    format!("{what} is in another network namespace: move it back first")
}

/// Returns the use of an interface; none if it is not in use.
fn use_of(
    interface: &Entry,
    routes: &str,
    routes6: &str,
    addressed_interfaces: &BTreeSet<u32>,
) -> Result<Option<&'static str>, String> {
    // An interface is the first word of a line in /proc/net/route, and the last in /proc/net/ipv6_route.
    let name = Some(interface.name.as_str());
    let has_route = routes.lines().any(|line| line.split_whitespace().next() == name)
        || routes6.lines().any(|line| line.split_whitespace().next_back() == name);
    let upper = list_dir(&interface.dir)?.into_iter().find(|entry| entry.starts_with("upper_"));
    let flags = read_optional(&interface.dir.join("flags"))?.unwrap_or_default();
    let flags = flags.trim().strip_prefix("0x").and_then(|hex| u32::from_str_radix(hex, 16).ok());
    let index = read_required(&interface.dir.join("ifindex"))?.trim().parse().ok();
    Ok(if has_route {
        Some("has a route")
    } else if index.is_none_or(|index| addressed_interfaces.contains(&index)) {
        Some("has an address")
    } else if upper.is_some() || interface.dir.join("master").exists() {
        Some("is a part of another interface")
    } else if flags.is_none_or(|flags| flags & IFF_UP != 0) {
        Some("is up")
    } else {
        None
    })
}

// include/uapi/linux/netlink.h and rtnetlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP_REQUEST: u16 = 0x301;
/// The size of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// The size of `struct ifaddrmsg`: family, prefix length, flags, scope, and the index of the interface.
const ADDRESS_BYTES: usize = 8;
const INDEX_OFFSET: usize = HEADER_BYTES + 4;
/// The maximum length of a datagram, with a factor of two to spare: the kernel sends a dump in parts of `NLMSG_GOODSIZE`,
/// or of 32 KiB if the reader has room.
const DATAGRAM_BYTES: usize = 64 << 10;

/// Returns the indices of the interfaces in this network namespace, up or down, that have an address of any family.
fn addressed_interfaces() -> Result<BTreeSet<u32>, Errno> {
    // `NETLINK_ROUTE` is protocol 0.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    let mut request = Vec::new();
    request.extend(((HEADER_BYTES + ADDRESS_BYTES) as u32).to_ne_bytes()); // 24
    request.extend(RTM_GETADDR.to_ne_bytes());
    request.extend(DUMP_REQUEST.to_ne_bytes());
    request.resize(HEADER_BYTES + ADDRESS_BYTES, 0);
    send(&socket, &request, SendFlags::empty())?;
    let (mut found, mut datagram) = (BTreeSet::new(), vec![0; DATAGRAM_BYTES]);
    loop {
        // With MSG_TRUNC the true length is returned, so that a datagram that does not fit is an error and not a shorter
        // list.
        let (_, len) = recv(&socket, &mut datagram[..], RecvFlags::TRUNC)?;
        let part = datagram.get(..len).filter(|part| !part.is_empty()).ok_or(Errno::MSGSIZE)?;
        if parse_addresses(part, &mut found)? {
            return Ok(found);
        }
    }
}

/// Adds the interface indices in one datagram of the answer. Returns true if it is the last one.
fn parse_addresses(mut datagram: &[u8], found: &mut BTreeSet<u32>) -> Result<bool, Errno> {
    let word =
        |at: usize, message: &[u8]| Some(u32::from_ne_bytes(message.get(at..at + 4)?.try_into().ok()?));
    while !datagram.is_empty() {
        let len = word(0, datagram).ok_or(Errno::BADMSG)? as usize; // `usize` has 32 bits or more on Linux
        let message =
            datagram.get(..len).filter(|message| message.len() >= HEADER_BYTES).ok_or(Errno::BADMSG)?;
        match u16::from_ne_bytes([message[4], message[5]]) {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => return Err(Errno::IO),
            RTM_NEWADDR => found.extend(Some(word(INDEX_OFFSET, message).ok_or(Errno::BADMSG)?)),
            _ => {}
        }
        // Messages begin at multiples of four: `NLMSG_ALIGN`.
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::fake::FakeHost;
    use super::*;

    /// An index that no interface here has.
    const INDEX: &str = "2000000000\n";

    #[test]
    fn interface_that_is_up_or_has_route_is_in_use() {
        let fake = FakeHost::new();
        let entry = fake.entry("net", "net/eth7", None);
        fs::write(entry.join("ifindex"), INDEX).unwrap();
        assert!(fake.user().unwrap().contains("there is no "), "the interfaces of this namespace");
        fake.net("dev", "Inter-| Receive\n  eth70: 0 0\n");
        assert!(fake.user().unwrap().contains("eth7 is in another network namespace"));
        fake.net("dev", "Inter-| Receive\n  eth7: 0 0\n");
        assert!(fake.user().unwrap().contains("eth7 is up"), "without its flags");
        fs::write(entry.join("flags"), "0x1002\n").unwrap();
        assert_eq!(fake.user(), None);
        fs::write(entry.join("flags"), "0x1003\n").unwrap();
        assert!(fake.user().unwrap().contains("eth7 is up"));
        fs::write(entry.join("flags"), "0x1002\n").unwrap();
        for (list, text) in [
            ("route", "Iface Destination\neth7 0000A8C0 0 0\n"),
            ("ipv6_route", "fe800000 40 0 0 0 0 0 0 eth7\n"),
        ] {
            fake.net(list, text);
            assert!(fake.user().unwrap().contains("has a route"), "{list}");
            fake.net(list, "");
        }
        fs::create_dir(entry.join("upper_br0")).unwrap();
        assert!(fake.user().unwrap().contains("is a part of another interface"));
        fs::remove_file(entry.join("ifindex")).unwrap();
        assert!(
            fake.user().unwrap().contains("cannot be found out"),
            "without an index its addresses are unknown"
        );
    }

    /// A datagram as the kernel makes it, with addresses of interfaces 2 and 513, the second with padding.
    #[test]
    fn rtnetlink_address_dump_yields_interface_indices() {
        let message = |len: u32, kind: u16, index: u32, more: usize| {
            let mut bytes =
                [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 14], &index.to_ne_bytes()].concat();
            bytes.resize(bytes.len() + more, 0);
            bytes
        };
        let parts = [message(24, RTM_NEWADDR, 2, 0), message(25, RTM_NEWADDR, 513, 4), message(20, 99, 7, 0)];
        let (mut found, mut datagram) = (BTreeSet::new(), parts[..2].concat());
        assert_eq!(parse_addresses(&datagram, &mut found), Ok(false));
        assert_eq!(found, [2, 513].into());
        datagram.extend(message(20, NLMSG_DONE, 0, 0));
        assert_eq!(parse_addresses(&datagram, &mut found), Ok(true));
        assert_eq!(parse_addresses(&message(20, NLMSG_ERROR, 0, 0), &mut found), Err(Errno::IO));
        for broken in [&[24, 0, 0][..], &[15; 16], &message(40, RTM_NEWADDR, 2, 0)] {
            assert_eq!(parse_addresses(broken, &mut found), Err(Errno::BADMSG));
        }
        assert!(addressed_interfaces().is_ok());
    }

    #[test]
    fn interface_in_other_network_namespace_is_in_use() {
        let fake = FakeHost::new();
        fs::create_dir_all(fake.device().join("virtio3/net")).unwrap();
        assert!(fake.user().unwrap().contains("is in another network namespace"));
    }
}
