//! A Linux guest under a stock QEMU, whose only disk is a vhost-user back-end's.

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

/// How long QEMU and the kernel in it may take: seconds, but the machine below is emulated.
const BOOTS: Duration = Duration::from_secs(120);

/// How long a guest may say nothing until it is asked something.
const SILENCE: Duration = Duration::from_secs(5);

/// MiB of memory that the guest has from the start.
pub const MEMORY: u64 = 256;

/// A part of that memory which the guest's kernel leaves alone: the address in the guest, and bytes.
pub const RESERVED: (u64, u64) = (192 << 20, 32 << 20);

/// Bytes of a piece of memory that is added while it runs: the least that Linux takes.
pub const DIMM: u64 = 128 << 20;

/// A running guest. When dropped it is killed.
#[derive(Debug)]
pub struct Guest {
    qemu: Child,
    pub qmp: Qmp,
    line: UnixStream,
    said: Receiver<Value>,
    place: TempDir,
    /// What it said first.
    pub ready: Value,
}

impl Guest {
    /// Boots one that has the disk served at `socket`, in so many queues.
    pub fn boot(socket: &Path, queues: u32) -> Self {
        Self::boot_with(socket, queues, "")
    }

    /// The same, with more on the line of QEMU's `-device` for the disk.
    pub fn boot_with(socket: &Path, queues: u32, more: &str) -> Self {
        let place = TempDir::new().unwrap();
        let at = |name: &str| place.path().join(name);
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
        // Under an emulated processor KVM's TSC deadline comes late, by half a minute or for good: the guest uses the other timer.
        let machine = ["-machine", "q35,memory-backend=m", "-cpu", "host,-tsc-deadline", "-smp", "2"];
        command.args(["-accel", "kvm"]).args(machine);
        command.args(["-m", &format!("{MEMORY}M,slots=4,maxmem=2G"), "-object"]);
        command.arg(format!("memory-backend-memfd,id=m,size={MEMORY}M,share=on"));
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.arg("-serial").arg(format!("file:{}", at("console").display()));
        command
            .arg("-chardev")
            .arg(format!("socket,id=line,path={},server=on,wait=off", at("line").display()));
        command.args(["-serial", "chardev:line"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", at("qmp").display()));
        command.arg("-chardev").arg(format!("socket,id=disk,path={},reconnect-ms=100", socket.display()));
        command.args(["-device", &format!("vhost-user-blk-pci,chardev=disk,num-queues={queues}{more}")]);
        command.args(["-kernel", "/rig/kernel", "-append", &kernel, "-initrd"]).arg(at("initrd"));
        let complaints = File::create(at("complaints")).unwrap();
        let mut qemu = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(complaints).spawn().unwrap();

        let runs = |what: &str, qemu: &mut Child, socket: &str| {
            wait(what, BOOTS, || {
                if let Ok(Some(status)) = qemu.try_wait() {
                    panic!("QEMU has ended: {status}: {}", tail(&at("complaints")));
                }
                UnixStream::connect(at(socket)).ok()
            })
        };
        let line = runs("the guest's line", &mut qemu, "line");
        drop(runs("QEMU's control socket", &mut qemu, "qmp"));
        let said = listen(line.try_clone().unwrap());
        let qmp = Qmp::connect(&at("qmp"));
        let mut guest = Self { qemu, qmp, line, said, place, ready: Value::Null };
        guest.ready = guest.hear("ready", BOOTS);
        guest
    }

    /// The process of QEMU.
    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// Tells the guest what to do.
    pub fn tell(&mut self, what: &Value) {
        if let Err(error) = self.line.write_all(format!("{what}\n").as_bytes()) {
            panic!("the guest is gone ({error})\n{}", self.about());
        }
    }

    /// The next thing that it says, if it says anything in this time. A failure ends the trial. A guest that says nothing for a
    /// while is asked something: what comes in wakes it also where its own timer is late, as one of an emulated processor may be.
    pub fn next(&mut self, within: Duration) -> Option<Value> {
        let begun = Instant::now();
        while let Some(left) = within.checked_sub(begun.elapsed()).filter(|left| *left > SILENCE) {
            match self.said.recv_timeout(SILENCE.min(left)) {
                Err(RecvTimeoutError::Timeout) if !self.ready.is_null() => {
                    self.tell(&json!({ "do": "memory" }))
                }
                Err(RecvTimeoutError::Timeout) => {}
                said => return self.heard(said),
            }
        }
        let said = self.said.recv_timeout(within.saturating_sub(begun.elapsed()));
        self.heard(said)
    }

    fn heard(&mut self, said: Result<Value, RecvTimeoutError>) -> Option<Value> {
        match said {
            Ok(said) if said["failed"].is_string() => {
                panic!("the guest: {}\n{}", said["failed"], self.about())
            }
            Ok(said) => Some(said),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the guest is gone\n{}", self.about()),
        }
    }

    /// Waits for this.
    pub fn hear(&mut self, what: &str, within: Duration) -> Value {
        let begun = Instant::now();
        while let Some(left) = within.checked_sub(begun.elapsed()) {
            if let Some(said) = self.next(left).and_then(|mut said| said.get_mut(what).map(Value::take)) {
                return said;
            }
        }
        panic!("the guest has not said `{what}` within {within:?}\n{}", self.about());
    }

    /// Has it do something, and waits for what it says of it.
    pub fn ask(&mut self, what: &Value, within: Duration) -> Value {
        self.tell(what);
        let name = what["do"].as_str().unwrap().to_owned();
        self.hear(&name, within)
    }

    /// Adds a piece of memory while it runs, and waits until the guest uses it.
    pub fn add_memory(&mut self, name: &str) {
        let before = self.ask(&json!({ "do": "memory" }), BOOTS).as_u64().unwrap();
        let file = format!("{name}-file");
        let backend = json!({ "qom-type": "memory-backend-memfd", "id": file, "size": DIMM, "share": true });
        self.qmp.execute("object-add", &backend).unwrap();
        self.qmp.execute("device_add", &json!({ "driver": "pc-dimm", "id": name, "memdev": file })).unwrap();
        let begun = Instant::now();
        loop {
            let now = self.ask(&json!({ "do": "memory" }), BOOTS).as_u64().unwrap();
            if now > before {
                return;
            }
            if begun.elapsed() > BOOTS {
                panic!(
                    "{before} KiB in the guest, {now} KiB {BOOTS:?} after more was added\n{}",
                    self.about()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Takes it away again. The guest may decline while it cannot move what lies there: it is asked again.
    pub fn remove_memory(&mut self, name: &str) {
        let ends = ["DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR"];
        wait("less memory in the guest", BOOTS, || {
            if let Err(complaint) = self.qmp.execute("device_del", &json!({ "id": name })) {
                assert!(complaint.contains("unplug"), "{complaint}");
            }
            let event = self.qmp.event(&ends, Duration::from_secs(20))?;
            (event["event"] == "DEVICE_DELETED").then_some(())
        });
        // Memory that comes before the guest has said how the ejection ended is taken for what it has just ejected.
        wait("the guest's word that the memory is out", BOOTS, || {
            const EJECTED: (u64, u64) = (3, 0); // ACPI 6.5, 6.3.5: the event and its status
            let said = self.qmp.event(&["ACPI_DEVICE_OST"], Duration::from_secs(20))?;
            let info = &said["data"]["info"];
            (info["source"].as_u64().zip(info["status"].as_u64()) == Some(EJECTED)).then_some(())
        });
        self.qmp.execute("object-del", &json!({ "id": format!("{name}-file") })).unwrap();
    }

    /// The file behind the memory that it has from the start.
    pub fn memory(&self) -> GuestFile {
        let folder = format!("/proc/{}/fd", self.pid());
        let entries = std::fs::read_dir(&folder).unwrap().filter_map(Result::ok);
        let ours = entries.map(|entry| entry.path()).find(|path| {
            let is_memfd = std::fs::read_link(path)
                .is_ok_and(|to| to.to_string_lossy().contains("memfd:memory-backend"));
            is_memfd && std::fs::metadata(path).is_ok_and(|about| about.len() == MEMORY << 20)
        });
        let path = ours.unwrap_or_else(|| panic!("no memory of the guest's in {folder}"));
        let file = File::options().read(true).write(true).open(path).unwrap();
        GuestFile::new(file.into(), FileKind::Memfd, MEMORY << 20, true)
    }

    /// Has it end, and waits until QEMU is gone.
    pub fn off(mut self) {
        self.tell(&json!({ "do": "off" }));
        wait("the end of QEMU", BOOTS, || self.qemu.try_wait().unwrap());
    }

    /// The last lines of its console, and QEMU's complaints.
    fn about(&mut self) -> String {
        std::thread::sleep(Duration::from_secs(1)); // a QEMU that is ending has closed its sockets first
        let (ended, events) = (self.qemu.try_wait(), self.qmp.rest());
        let file = |name: &str| tail(&self.place.path().join(name));
        format!("its console:\n{}\nQEMU ({ended:?}, {events}):\n{}", file("console"), file("complaints"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn listen(line: UnixStream) -> Receiver<Value> {
    let (tell, said) = channel();
    std::thread::spawn(move || {
        // What is not JSON is the firmware's.
        let lines = BufReader::new(line).lines().map_while(Result::ok);
        for said in lines.filter_map(|line| serde_json::from_str(&line).ok()) {
            if tell.send(said).is_err() {
                return;
            }
        }
    });
    said
}

/// The last lines of a file.
pub fn tail(path: &PathBuf) -> String {
    let all = std::fs::read(path).unwrap_or_default();
    let all = String::from_utf8_lossy(&all).into_owned();
    let lines: Vec<_> = all.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
