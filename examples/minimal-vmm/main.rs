//! A VMM that does no more than convert memory, in the right order. The guest (`guest.rs`) asks for one conversion
//! after the other, the VMM (`machine.rs`) relays each to passgate (`relay.rs`) and carries out what is granted,
//! and a device (`device.rs`) does DMA to the same pages all the while. docs/guide/vmm.md walks through it.
//!
//! ```text
//! cargo run --example minimal-vmm -- --conversions 10000
//! ```
//!
//! Exits with 0 if all was well, 1 if a single DMA was stale or anything failed, 3 if this host cannot run a VM.

#![forbid(unsafe_code)]

mod device;
mod drill;
mod guest;
mod machine;
mod pages;
mod relay;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Parser, ValueEnum};
use kvm_ioctls::VcpuFd;
use passgate::client::Client;
use passgate::serve::{Handle, Options, Server};
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::guest_memfd::Unavailable;
use passgate_bindings::kvm::VmType;
use serde_json::json;

use device::{Device, Tally};
use guest::{ASK, REFUSED, Request, STAMPED};
use machine::{Exit, Machine};
use pages::Pages;
use relay::Relay;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// The device of the daemon that this program starts itself.
const OWN_DEVICE: &str = "soft:0";

/// A VM whose guest converts its memory all the time, through passgate, under a device's DMA
#[derive(Parser)]
struct Args {
    /// Conversions after which to end
    #[arg(long, default_value_t = 2000)]
    conversions: u64,
    /// The daemon (`passgate serve --allow-dma`); one inside this process where none is named
    #[arg(long)]
    socket_path: Option<PathBuf>,
    /// The daemon's device that does the DMA
    #[arg(long, default_value = OWN_DEVICE)]
    device: String,
    /// The type of VM; the best that this kernel has where none is named
    #[arg(long)]
    vm_type: Option<Type>,
    /// First have KVM refuse two conversions, and check what comes of their pages
    #[arg(long)]
    fail_attributes: bool,
    /// The summary as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    Default,
    SwProtected,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("minimal-vmm: {error}");
            ExitCode::from(if error.is::<Unavailable>() { 3 } else { 1 })
        }
    }
}

/// Runs the whole; whether no DMA was stale.
fn run(args: &Args) -> Result<bool> {
    let vm_type = args.vm_type.map(|vm_type| match vm_type {
        Type::Default => VmType::Default,
        Type::SwProtected => VmType::SwProtected,
    });
    let (machine, processor) = Machine::new(vm_type)?;

    let directory = tempfile::tempdir()?;
    let (path, _daemon) = match &args.socket_path {
        Some(path) => (path.clone(), None),
        None => {
            let path = directory.path().join("passgate.sock");
            (path.clone(), Some(serve(&path)?))
        }
    };
    let mut client = Client::connect(&path)?;
    let mut device = Device::new(Client::connect(&path)?, &args.device);
    machine.add_to(&mut client)?;
    let mut channel = client.open_channel()?;

    let pages = Pages::new();
    if args.fail_attributes {
        drill::run(&machine, &pages, &mut client, &mut channel, &mut device)?;
    }
    let mut relay = Relay::new(&machine, &pages, channel);
    let tally = beside(&mut device, &machine, &pages, || convert(processor, &mut relay, args.conversions))?;
    let checked = device.check(&pages);

    let stale = tally.stale + relay.stale;
    let (vm_type, kind) = (machine.vm_type().word(), machine.kind());
    if args.json {
        let summary = json!({
            "vm_type": vm_type, "kind": kind, "conversions": relay.conversions, "refused": relay.refused,
            "dma_ops": tally.ops, "dma_faults": tally.faults, "stale": stale,
            "failed_attributes": args.fail_attributes,
        });
        println!("{summary}");
    } else {
        println!(
            "{vm_type} VM, by {kind}: {} conversions, {} refused; {} DMA operations, {} of them faulted, {stale} stale",
            relay.conversions, relay.refused, tally.ops, tally.faults,
        );
    }
    checked?;
    Ok(stale == 0)
}

/// A daemon in this process, with a software device.
fn serve(path: &Path) -> Result<Handle> {
    let domain = SoftDomain::open()?;
    let device = domain.device(OWN_DEVICE)?;
    let options = Options { allow_dma: true, ..Options::at(path) };
    Ok(Server::bind(options, domain, vec![device])?.spawn()?)
}

/// Runs `work` with the device at work beside it.
fn beside(
    device: &mut Device,
    machine: &Machine,
    pages: &Pages,
    work: impl FnOnce() -> Result<()>,
) -> Result<Tally> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let beside = scope.spawn(|| device.work(machine, pages, &stop));
        let worked = work();
        stop.store(true, Ordering::Release);
        let tally = beside.join().unwrap_or_else(|_| Err("the device's thread panicked".into()));
        // Where the guest's side failed, that is the news.
        worked.and(tally)
    })
}

/// Runs the guest until it has had so many conversions.
fn convert(mut processor: VcpuFd, relay: &mut Relay<'_>, conversions: u64) -> Result<()> {
    let mut answer = REFUSED;
    while relay.conversions < conversions || relay.is_stamping() {
        match machine::run(&mut processor)? {
            None => {}
            Some(Exit::Out(ASK, bytes)) => {
                let request = Request::parse(bytes).ok_or_else(|| format!("{bytes:x?} is no request"))?;
                answer = relay.ask(request)?;
            }
            Some(Exit::In(ASK, bytes)) => match <&mut [u8; 4]>::try_from(bytes) {
                Ok(bytes) => *bytes = answer.to_le_bytes(),
                Err(_) => return Err("the guest wants an answer of another length".into()),
            },
            Some(Exit::Out(STAMPED, _)) => relay.stamped(),
            Some(Exit::Out(port, _) | Exit::In(port, _)) => {
                return Err(format!("the guest used port {port:#x}, where nothing is").into());
            }
        }
        if relay.refused > conversions + 1000 {
            return Err(format!("passgate refuses nearly everything: {} times", relay.refused).into());
        }
    }
    Ok(())
}
