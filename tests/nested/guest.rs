//! A Linux guest under a stock QEMU, whose only disk is served by a vhost-user back-end.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use passgate_bindings::memory::{FileKind, GuestFile};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::cpio::Archive;
use super::qmp::Qmp;
use super::{QEMU, wait};

/// The time without a message after which a guest is asked for one.
const SILENCE: Duration = Duration::from_secs(5);

/// The longest time that QEMU and its kernel may take: usually seconds, but the machine is emulated.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// The guest's memory at boot, in MiB.
pub const MEMORY_MIB: u64 = 256;

/// A part of that memory that the guest's kernel does not use (`memmap=`): guest-physical address and length in bytes.
pub const RESERVED: (u64, u64) = (192 << 20, 32 << 20);

/// The size of a DIMM that is added while the guest runs, in bytes: the least that Linux accepts (one memory block).
pub const DIMM_BYTES: u64 = 128 << 20;

/// A running guest. Dropping it kills QEMU.
#[derive(Debug)]
pub struct Guest {
    qemu: Child,
    pub qmp: Qmp,
    line: UnixStream,
    messages: Receiver<Value>,
    dir: TempDir,
    /// The guest's first message.
    pub ready: Value,
}

impl Guest {
    /// Boots a guest with the disk that is served at `socket`, with `queues` virtqueues.
    pub fn boot(socket: &Path, queues: u32) -> Self {
        Self::boot_with(socket, queues, "")
    }

    /// Boots a guest as [`Guest::boot`] does, with `options` appended to QEMU's `-device` for the disk.
    pub fn boot_with(socket: &Path, queues: u32, options: &str) -> Self {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut archive = Archive::new();
        archive.program(Path::new("/bin/blk-guest"), "init");
        archive.program(Path::new("/bin/mke2fs"), "bin/mke2fs");
        std::fs::write(at("initrd"), archive.finish()).unwrap();
        let (from, len) = RESERVED;
        let kernel = format!(
            "console=ttyS0 panic=-1 loglevel=4 memhp_default_state=online_movable memmap={}M${}M",
            len >> 20,
            from >> 20
        );
        let mut command = Command::new(QEMU);
        // On an emulated processor KVM's TSC deadline timer fires late, by half a minute, or never: the guest must use the
        // other timer.
        let machine = ["-machine", "q35,memory-backend=m", "-cpu", "host,-tsc-deadline", "-smp", "2"];
        command.args(["-accel", "kvm"]).args(machine);
        command.args(["-m", &format!("{MEMORY_MIB}M,slots=4,maxmem=2G"), "-object"]);
        command.arg(format!("memory-backend-memfd,id=m,size={MEMORY_MIB}M,share=on"));
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.arg("-serial").arg(format!("file:{}", at("console").display()));
        command
            .arg("-chardev")
            .arg(format!("socket,id=line,path={},server=on,wait=off", at("line").display()));
        command.args(["-serial", "chardev:line"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", at("qmp").display()));
        command.arg("-chardev").arg(format!("socket,id=disk,path={},reconnect-ms=100", socket.display()));
        command.args(["-device", &format!("vhost-user-blk-pci,chardev=disk,num-queues={queues}{options}")]);
        command.args(["-kernel", "/rig/kernel", "-append", &kernel, "-initrd"]).arg(at("initrd"));
        let qemu_stderr = File::create(at("complaints")).unwrap();
        let mut qemu =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(qemu_stderr).spawn().unwrap();

        let connect_when_up = |awaited: &str, qemu: &mut Child, socket: &str| {
            wait(awaited, BOOT_TIMEOUT, || {
                if let Ok(Some(status)) = qemu.try_wait() {
                    panic!("QEMU has ended: {status}: {}", tail(&at("complaints")));
                }
                UnixStream::connect(at(socket)).ok()
            })
        };
        let line = connect_when_up("the guest's line", &mut qemu, "line");
        drop(connect_when_up("QEMU's control socket", &mut qemu, "qmp"));
        let messages = listen(line.try_clone().unwrap());
        let qmp = Qmp::connect(&at("qmp"));
        let mut guest = Self { qemu, qmp, line, messages, dir, ready: Value::Null };
        guest.ready = guest.wait_for("ready", BOOT_TIMEOUT);
        guest
    }

    /// Returns the PID of QEMU.
    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// Sends a command to the guest.
    pub fn send(&mut self, command: &Value) {
        if let Err(error) = self.line.write_all(format!("{command}\n").as_bytes()) {
            panic!("the guest is gone ({error})\n{}", self.diagnostics());
        }
    }

    /// Returns the guest's next message, or none after `within`. A message `failed` ends the trial. A silent guest is asked for its
    /// memory: the input wakes it also where its own timer is late, as one of an emulated processor may be.
    pub fn next_message(&mut self, within: Duration) -> Option<Value> {
        let started = Instant::now();
        while let Some(remaining) = within.checked_sub(started.elapsed()).filter(|time| *time > SILENCE) {
            match self.messages.recv_timeout(SILENCE.min(remaining)) {
                Err(RecvTimeoutError::Timeout) if !self.ready.is_null() => {
                    self.send(&json!({ "do": "memory" }))
                }
                Err(RecvTimeoutError::Timeout) => {}
                message => return self.received(message),
            }
        }
        let message = self.messages.recv_timeout(within.saturating_sub(started.elapsed()));
        self.received(message)
    }

    fn received(&mut self, message: Result<Value, RecvTimeoutError>) -> Option<Value> {
        match message {
            Ok(message) if message["failed"].is_string() => {
                panic!("the guest: {}\n{}", message["failed"], self.diagnostics())
            }
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the guest is gone\n{}", self.diagnostics()),
        }
    }

    /// Waits for a message with the key `key`, and returns its value.
    pub fn wait_for(&mut self, key: &str, within: Duration) -> Value {
        let started = Instant::now();
        while let Some(remaining) = within.checked_sub(started.elapsed()) {
            if let Some(message) =
                self.next_message(remaining).and_then(|mut message| message.get_mut(key).map(Value::take))
            {
                return message;
            }
        }
        panic!("no message `{key}` of the guest within {within:?}\n{}", self.diagnostics());
    }

    /// Sends a command, and waits for its result.
    pub fn ask(&mut self, command: &Value, within: Duration) -> Value {
        self.send(command);
        let name = command["do"].as_str().unwrap().to_owned();
        self.wait_for(&name, within)
    }

    /// Hot-plugs a DIMM, and waits until the guest uses it.
    pub fn add_memory(&mut self, name: &str) {
        let before = self.ask(&json!({ "do": "memory" }), BOOT_TIMEOUT).as_u64().unwrap();
        let file = format!("{name}-file");
        let backend =
            json!({ "qom-type": "memory-backend-memfd", "id": file, "size": DIMM_BYTES, "share": true });
        self.qmp.execute("object-add", &backend).unwrap();
        self.qmp.execute("device_add", &json!({ "driver": "pc-dimm", "id": name, "memdev": file })).unwrap();
        let started = Instant::now();
        loop {
            let now = self.ask(&json!({ "do": "memory" }), BOOT_TIMEOUT).as_u64().unwrap();
            if now > before {
                return;
            }
            if started.elapsed() > BOOT_TIMEOUT {
                panic!(
                    "{before} KiB in the guest, {now} KiB {BOOT_TIMEOUT:?} after more was added\n{}",
                    self.diagnostics()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Unplugs a DIMM. The guest refuses while it cannot migrate pages of it: the request is repeated.
    pub fn remove_memory(&mut self, name: &str) {
        let final_events = ["DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR"];
        wait("less memory in the guest", BOOT_TIMEOUT, || {
            if let Err(error) = self.qmp.execute("device_del", &json!({ "id": name })) {
                assert!(error.contains("unplug"), "{error}");
            }
            let event = self.qmp.event(&final_events, Duration::from_secs(20))?;
            (event["event"] == "DEVICE_DELETED").then_some(())
        });
        // The guest reports the end of the ejection by _OST. It would take memory that is plugged before that for the memory that
        // it has just ejected.
        wait("the guest's report that the memory is ejected", BOOT_TIMEOUT, || {
            const EJECTED: (u64, u64) = (3, 0); // ACPI 6.5, 6.3.5: the event and its status
            let report = self.qmp.event(&["ACPI_DEVICE_OST"], Duration::from_secs(20))?;
            let info = &report["data"]["info"];
            (info["source"].as_u64().zip(info["status"].as_u64()) == Some(EJECTED)).then_some(())
        });
        self.qmp.execute("object-del", &json!({ "id": format!("{name}-file") })).unwrap();
    }

    /// Returns the file of the guest's memory at boot.
    pub fn memory(&self) -> GuestFile {
        let directory = format!("/proc/{}/fd", self.pid());
        let entries = std::fs::read_dir(&directory).unwrap().filter_map(Result::ok);
        let memory_file = entries.map(|entry| entry.path()).find(|path| {
            let is_memfd = std::fs::read_link(path)
                .is_ok_and(|to| to.to_string_lossy().contains("memfd:memory-backend"));
            is_memfd && std::fs::metadata(path).is_ok_and(|metadata| metadata.len() == MEMORY_MIB << 20)
        });
        let path = memory_file.unwrap_or_else(|| panic!("no file of the guest's memory in {directory}"));
        let file = File::options().read(true).write(true).open(path).unwrap();
        GuestFile::new(file.into(), FileKind::Memfd, MEMORY_MIB << 20, true)
    }

    /// Powers the guest off, and waits until QEMU has ended.
    pub fn off(mut self) {
        self.send(&json!({ "do": "off" }));
        wait("the end of QEMU", BOOT_TIMEOUT, || self.qemu.try_wait().unwrap());
    }

    /// Returns the last lines of the guest's console and of QEMU's standard error.
    fn diagnostics(&mut self) -> String {
        std::thread::sleep(Duration::from_secs(1)); // a QEMU that is ending has closed its sockets first
        let (ended, events) = (self.qemu.try_wait(), self.qmp.drain());
        let file = |name: &str| tail(&self.dir.path().join(name));
        format!("its console:\n{}\nQEMU ({ended:?}, {events}):\n{}", file("console"), file("complaints"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        let console = std::fs::read(self.dir.path().join("console")).unwrap_or_default();
        super::console::examine(&String::from_utf8_lossy(&console));
    }
}

fn listen(line: UnixStream) -> Receiver<Value> {
    let (sender, messages) = channel();
    std::thread::spawn(move || {
        // Lines that are not JSON come from the firmware.
        let lines = BufReader::new(line).lines().map_while(Result::ok);
        for message in lines.filter_map(|line| serde_json::from_str(&line).ok()) {
            if sender.send(message).is_err() {
                return;
            }
        }
    });
    messages
}

/// Returns the last 40 lines of a file.
pub fn tail(path: &PathBuf) -> String {
    let all = std::fs::read(path).unwrap_or_default();
    let all = String::from_utf8_lossy(&all).into_owned();
    let lines: Vec<_> = all.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
