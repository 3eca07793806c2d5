//! The sockets' files: paths that are too long, what is at the path already, and who may connect from the first moment on.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use passgate::Error;
use passgate::client::Client;
use passgate::serve::{Options, Server};
use passgate_backends::iommu::soft::SoftDomain;
use rustix::fs::{Mode, inotify};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use rustix::process::umask;

use crate::common::alone;
use crate::daemon::{LONG, serve_fails, until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_passgate");

fn server(options: Options) -> passgate::Result<Server> {
    Server::bind(options, SoftDomain::open().unwrap(), vec![])
}

#[test]
fn path_too_long_for_a_socket_is_refused_by_every_command_with_limit_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("x".repeat(120));
    let (long, short) = (long.to_str().unwrap(), dir.path().join("s"));
    let short = short.to_str().unwrap();
    let device = ["--device", "ffff:ff:1f.7", "--wait", "0"];
    let daemons = [
        [&["serve", "--socket-path", long], &device[..]].concat(),
        [&["serve", "--socket-path", short, "--metrics-path", long], &device[..]].concat(),
        [&["vhost-user-blk", "--socket-path", long], &device[..]].concat(),
        [&["vhost-user-blk", "--socket-path", short, "--control-path", long], &device[..]].concat(),
        [&["vhost-user-blk", "--socket-path", short, "--metrics-path", long], &device[..]].concat(),
    ];
    let convert = ["--gpa", "0", "--length", "4096", "--to", "hole"];
    let clients: [&[&str]; 7] = [
        &["status"],
        &["events"],
        &["metrics"],
        &["top"],
        &["explain", "--invalidation", "1"],
        &["release", "--invalidation", "1", "--as", "hole"],
        &[&["convert"][..], &convert].concat(),
    ];
    let clients = clients.map(|client| [client, &["--socket-path", long]].concat());
    for arguments in daemons.iter().chain(&clients) {
        let said = Command::new(PROGRAM).args(arguments).output().unwrap();
        let error = String::from_utf8(said.stderr).unwrap();
        let limit =
            error.contains(long) && error.contains("at most 107") && error.contains("choose a shorter one");
        assert!(limit && error.lines().count() == 1, "{arguments:?}: {error}");
        assert_eq!(said.status.code(), Some(2), "{arguments:?}: {error}");
    }
    assert!(!Path::new(short).exists(), "nothing was made before the paths were known to be good");
    let library = Client::connect(long).map(drop).unwrap_err();
    assert!(matches!(library, Error::SocketPath { .. }), "{library}");
}

/// A listener whose queue of connections is full, and the connections that are in it.
fn full(path: &Path) -> (OwnedFd, Vec<OwnedFd>) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = || socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let (listener, address) = (socket(), SocketAddrUnix::new(path).unwrap());
    bind(&listener, &address).unwrap();
    listen(&listener, 0).unwrap();
    let mut waiting = Vec::new();
    loop {
        let socket = socket();
        match connect(&socket, &address) {
            Ok(()) => waiting.push(socket),
            Err(Errno::AGAIN) => return (listener, waiting),
            Err(errno) => panic!("{errno}"),
        }
    }
}

#[test]
fn start_does_not_wait_for_a_listener_that_accepts_nobody() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _full = full(&path);
    let (code, said) = serve_fails(Path::new(PROGRAM), &path, &["--device", "soft:0", "--no-guardian"]);
    assert!(said.contains("who listens there accepts nobody; end that process"), "{said}");
    assert_eq!(code, Some(1), "{said}");
    assert!(path.exists(), "it is not replaced");
    let free = dir.path().join("free");
    let free = free.to_str().unwrap();
    let metrics = ["--device", "soft:0", "--no-guardian", "--metrics-path", path.to_str().unwrap()];
    let (code, said) = serve_fails(Path::new(PROGRAM), Path::new(free), &metrics);
    assert!(said.contains("choose another --metrics-path"), "{said}");
    assert_eq!(code, Some(1), "{said}");
}

/// What happens to files in a directory.
struct Watched(OwnedFd);

impl Watched {
    fn new(dir: &Path) -> Self {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).unwrap();
        let flags = inotify::WatchFlags::CREATE | inotify::WatchFlags::ATTRIB;
        inotify::add_watch(&watch, dir, flags).unwrap();
        Self(watch)
    }

    fn events(&self) -> Vec<inotify::ReadFlags> {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.0, &mut space);
        let mut events = Vec::new();
        while let Ok(event) = reader.next() {
            events.push(event.events());
        }
        events
    }
}

#[test]
fn socket_is_private_from_its_creation_whatever_the_umask() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    for (nth, mask) in [0, 0o002, 0o077, 0o777].into_iter().enumerate() {
        let path = dir.path().join(nth.to_string());
        let metrics = dir.path().join(format!("{nth}.metrics"));
        let watched = Watched::new(dir.path());
        let before = umask(Mode::from_raw_mode(mask));
        let made = server(Options { metrics_path: Some(metrics.clone()), ..Options::at(&path) });
        umask(before);
        let events = watched.events();
        let server = made.unwrap().spawn().unwrap();
        for path in [&path, &metrics] {
            assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600, "{mask:o}");
        }
        if mask != 0o777 {
            // Its mode was never another, because it never changed.
            assert_eq!(events, [inotify::ReadFlags::CREATE; 2], "{mask:o}");
        }
        Client::connect(&path).unwrap().status().unwrap();
        server.stop().unwrap();
        assert!(!path.exists() && !metrics.exists());
    }
}

#[test]
fn daemon_that_ends_removes_no_socket_of_another() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let first = server(Options::at(&path)).unwrap().spawn().unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = server(Options::at(&path)).unwrap().spawn().unwrap();
    first.stop().unwrap();
    assert!(path.exists(), "it is the second one's");
    Client::connect(&path).unwrap().status().unwrap();
    second.stop().unwrap();
    assert!(!path.exists());
    assert!(until(LONG, || Client::connect(&path).is_err()));
}
