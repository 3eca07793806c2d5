//! A VMM that does nothing but convert memory, in the right order. The guest (`guest.rs`) requests one conversion after the
//! other; the VMM relays each to passgate (`relay.rs`) and performs those that are granted (`machine.rs`); a device
//! (`device.rs`) does DMA to the same pages meanwhile. docs/guide/vmm.md explains it.
//!
//! ```text
//! cargo run --example minimal-vmm -- --conversions 10000
//! ```
//!
//! Exit codes: 0 for success, 1 if a DMA operation was stale or anything failed, 3 if this host cannot run a VM.

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
use passgate::serve::{Handle, Options, Server};
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::guest_memfd::Unavailable;
use passgate_bindings::kvm::VmType;
use passgate_client::Client;
use serde_json::json;

use device::{Device, Tally};
use guest::{REFUSED, REQUEST_PORT, Request, STAMPED_PORT};
use machine::{Exit, Machine};
use pages::Pages;
use relay::Relay;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// The name of the device of the daemon that this program starts itself.
const OWN_DEVICE: &str = "soft:0";

/// A VM whose guest converts its memory through passgate while a device does DMA to it
#[derive(Parser)]
struct Args {
    /// End after this number of conversions
    #[arg(long, default_value_t = 2000)]
    conversions: u64,
    /// Socket of the daemon (`passgate serve --allow-dma`); by default a daemon inside this process
    #[arg(long)]
    socket_path: Option<PathBuf>,
    /// Device of the daemon that does the DMA
    #[arg(long, default_value = OWN_DEVICE)]
    device: String,
    /// VM type; by default one with private memory if the kernel has one
    #[arg(long)]
    vm_type: Option<Type>,
    /// First make KVM refuse two conversions, and check the state of their pages
    #[arg(long)]
    fail_attributes: bool,
    /// Print the summary as JSON
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

/// Runs the program. Returns true where no DMA was stale.
fn run(args: &Args) -> Result<bool> {
    let vm_type = args.vm_type.map(|vm_type| match vm_type {
        Type::Default => VmType::Default,
        Type::SwProtected => VmType::SwProtected,
    });
    let (machine, vcpu) = Machine::new(vm_type)?;

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
    let tally = with_device(&mut device, &machine, &pages, || convert(vcpu, &mut relay, args.conversions))?;
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

/// Starts a daemon in this process, with a software device.
fn serve(path: &Path) -> Result<Handle> {
    let domain = SoftDomain::open()?;
    let device = domain.device(OWN_DEVICE)?;
    let options = Options { allow_dma: true, ..Options::at(path) };
    Ok(Server::bind(options, domain, vec![device])?.spawn()?)
}

/// Runs `work` while the device does DMA in another thread.
fn with_device(
    device: &mut Device,
    machine: &Machine,
    pages: &Pages,
    work: impl FnOnce() -> Result<()>,
) -> Result<Tally> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let dma = scope.spawn(|| device.work(machine, pages, &stop));
        let result = work();
        stop.store(true, Ordering::Release);
        let tally = dma.join().unwrap_or_else(|_| Err("the device's thread panicked".into()));
        // An error of `work` comes first: it may be the cause of one of the device.
        result.and(tally)
    })
}

/// Runs the guest until it has made `conversions` conversions and stamped the last page.
fn convert(mut vcpu: VcpuFd, relay: &mut Relay<'_>, conversions: u64) -> Result<()> {
    let mut answer = REFUSED;
    while relay.conversions < conversions || relay.is_stamping() {
        match machine::run(&mut vcpu)? {
            None => {}
            Some(Exit::Out(REQUEST_PORT, bytes)) => {
                let request = Request::parse(bytes).ok_or_else(|| format!("{bytes:x?} is not a request"))?;
                answer = relay.request(request)?;
            }
            Some(Exit::In(REQUEST_PORT, bytes)) => match <&mut [u8; 4]>::try_from(bytes) {
                Ok(bytes) => *bytes = answer.to_le_bytes(),
                Err(_) => return Err("the guest reads an answer of another length".into()),
            },
            Some(Exit::Out(STAMPED_PORT, _)) => relay.stamped(),
            Some(Exit::Out(port, _) | Exit::In(port, _)) => {
                return Err(format!("the guest used the unknown port {port:#x}").into());
            }
        }
        // Ends a run in which almost no conversion is granted.
        if relay.refused > conversions + 1000 {
            return Err(format!("passgate refused too many conversions: {}", relay.refused).into());
        }
    }
    Ok(())
}
