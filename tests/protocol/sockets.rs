//! The socket files: overlong paths, existing files at the path, and the permissions from the creation on.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use passgate::serve::{Options, Server};
use passgate_backends::iommu::soft::SoftDomain;
use passgate_client::Client;
use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::common::exclusive;
use crate::daemon::{TIMEOUT, serve_fails, wait_until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_passgate");

fn server(options: Options) -> passgate::Result<Server> {
    Server::bind(options, SoftDomain::open().unwrap(), vec![])
}

#[test]
fn overlong_socket_path_is_refused_with_limit_and_remedy() {
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
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        let names_limit =
            error.contains(long) && error.contains("at most 107") && error.contains("choose a shorter one");
        assert!(names_limit && error.lines().count() == 1, "{arguments:?}: {error}");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
    }
    assert!(!Path::new(short).exists(), "a socket was created before all paths were checked");
    let library = Client::connect(long).map(drop).unwrap_err();
    assert!(matches!(library, passgate_client::Error::SocketPath { .. }), "{library}");
}

/// Returns a listener whose backlog is full, and the connections in it.
fn listener_with_full_backlog(path: &Path) -> (OwnedFd, Vec<OwnedFd>) {
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
fn start_does_not_wait_for_listener_with_full_backlog() {
    let _exclusive = exclusive();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _listener = listener_with_full_backlog(&path);
    let (code, stderr) = serve_fails(Path::new(PROGRAM), &path, &["--device", "soft:0", "--no-guardian"]);
    assert!(stderr.contains("who listens there accepts nobody; end that process"), "{stderr}");
    assert_eq!(code, Some(1), "{stderr}");
    assert!(path.exists(), "the socket in use was replaced");
    let free = dir.path().join("free");
    let free = free.to_str().unwrap();
    let metrics = ["--device", "soft:0", "--no-guardian", "--metrics-path", path.to_str().unwrap()];
    let (code, stderr) = serve_fails(Path::new(PROGRAM), Path::new(free), &metrics);
    assert!(stderr.contains("choose another --metrics-path"), "{stderr}");
    assert_eq!(code, Some(1), "{stderr}");
}

/// Creations and attribute changes of files in a directory (inotify).
struct DirectoryWatch(OwnedFd);

impl DirectoryWatch {
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

/// In a process of its own: the umask is the whole process's, and other tests create directories meanwhile.
#[test]
fn socket_is_private_from_creation_with_any_umask() {
    let _exclusive = exclusive();
    let dir = tempfile::tempdir().unwrap();
    for mask in ["000", "002", "077", "777"] {
        let path = dir.path().join(mask);
        let metrics = dir.path().join(format!("{mask}.metrics"));
        let directory_watch = DirectoryWatch::new(dir.path());
        let command = format!("umask {mask}; exec \"$0\" \"$@\"");
        let mut daemon = Command::new("sh")
            .args(["-c", &command, PROGRAM, "serve", "--device", "soft:0", "--no-guardian", "--socket-path"])
            .arg(&path)
            .arg("--metrics-path")
            .arg(&metrics)
            .spawn()
            .unwrap();
        assert!(
            wait_until(TIMEOUT, || Client::connect(&path).is_ok_and(|mut client| client.status().is_ok()))
        );
        let events = directory_watch.events();
        for path in [&path, &metrics] {
            assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600, "{mask}");
        }
        if mask != "777" {
            // No attribute event: the sockets had their mode from the creation on.
            assert_eq!(events, [inotify::ReadFlags::CREATE; 2], "{mask}");
        }
        kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
        assert!(daemon.wait().unwrap().success());
        assert!(!path.exists() && !metrics.exists());
    }
}

#[test]
fn ending_daemon_removes_no_foreign_socket() {
    let _exclusive = exclusive();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let first = server(Options::at(&path)).unwrap().spawn().unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = server(Options::at(&path)).unwrap().spawn().unwrap();
    first.stop().unwrap();
    assert!(path.exists(), "the socket of the second daemon was removed");
    Client::connect(&path).unwrap().status().unwrap();
    second.stop().unwrap();
    assert!(!path.exists());
    assert!(wait_until(TIMEOUT, || Client::connect(&path).is_err()));
}
