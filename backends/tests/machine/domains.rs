//! The contract of every domain, checked by DMA.

use std::sync::Arc;

use libtest_mimic::Failed;
use passgate_backends::handover::DomainIds;
use passgate_backends::{Error, Kind, Tables, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};
use passgate_exercise::edu::POISON;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::bench::{Bench, at, bytes, check, fresh, guest_memfd, memfd, range, same};

type Outcome = Result<(), Failed>;

pub fn dma_moves_the_right_bytes_of_a_memfd(bench: &Bench) -> Outcome {
    dma_moves_the_right_bytes(bench, &memfd(4)?)
}

pub fn dma_moves_the_right_bytes_of_a_guest_memfd(bench: &Bench) -> Outcome {
    dma_moves_the_right_bytes(bench, &guest_memfd(4)?)
}

pub fn dma_moves_the_right_bytes_of_huge_pages(bench: &Bench) -> Outcome {
    const HUGE: u64 = 2 << 20;
    dma_moves_the_right_bytes(bench, &Arc::new(GuestFile::memfd_huge("huge", 2 * HUGE, HUGE)?))
}

/// Maps three of four pages, from the second on, in pieces of two, so that errors in offsets, pieces or page borders
/// show.
fn dma_moves_the_right_bytes(bench: &Bench, file: &Arc<GuestFile>) -> Outcome {
    let engine = bench.engine()?;
    engine.domain.map(range(0, 3), 2 * PAGE, file, Offset(PAGE), true)?;
    let written = fresh(5000);
    file.write(PAGE + 2000, &written)?;
    let start = Iova(at(0).0 + 2000);
    same("the device reads", engine.device.dma_read(start, 5000)?, written)?;
    let sent = fresh(3000);
    engine.device.dma_write(Iova(at(1).0 + 3000), &sent)?;
    same("the content of memory", bytes(file, 2 * PAGE + 3000, 3000)?, sent)?;
    same("unmapped", engine.unmap(0, 3), Unmap::Gone { bytes: 3 * PAGE })
}

pub fn unmapped_memory_is_out_of_reach(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(1)?);
    engine.map(0, 1, &file)?;
    check("DMA works while the page is mapped", engine.reaches(0, &file)?)?;
    same("unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })?;
    let content = fresh(64);
    file.write(0, &content)?;
    same("a read returns poison", engine.sees(0, 64)?, vec![POISON; 64])?;
    engine.device.dma_write(at(0), &fresh(64))?;
    same("a write changes nothing", bytes(&file, 0, 64)?, content)
}

pub fn read_only_mapping_takes_no_write(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(1)?);
    engine.domain.map(range(0, 1), PAGE, &file, Offset(0), false)?;
    let content = fresh(64);
    file.write(0, &content)?;
    same("the device reads", engine.sees(0, 64)?, content.clone())?;
    engine.device.dma_write(at(0), &fresh(64))?;
    same("a write changes nothing", bytes(&file, 0, 64)?, content)
}

pub fn unmap_counts_bytes_and_leaves_holes_alone(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(8)?);
    engine.map(0, 2, &file)?;
    engine.map(4, 1, &file)?;
    engine.map(8, 2, &file)?;
    same("a superset with holes", engine.unmap(0, 6), Unmap::Gone { bytes: 3 * PAGE })?;
    same("the same again", engine.unmap(0, 6), Unmap::Gone { bytes: 0 })?;
    check("the page outside is still reached", engine.reaches(8, &file)?)?;
    same("the rest", engine.unmap(0, 100), Unmap::Gone { bytes: 2 * PAGE })
}

pub fn unmap_that_would_cut_changes_nothing(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.whole()?, memfd(4)?);
    engine.map(0, 4, &file)?;
    let refused = if bench.kind == Kind::Type1 { Errno::INVAL } else { Errno::NOENT };
    for (page, pages) in [(0, 1), (1, 2), (3, 1)] {
        let failed = Unmap::Failed { errno: refused, bytes: 0 };
        same("an unmap of a part", engine.unmap(page, pages), failed)?;
    }
    check("all of it is still reached", engine.reaches(0, &file)?)?;
    same("the whole", engine.unmap(0, 4), Unmap::Gone { bytes: 4 * PAGE })
}

/// type1 checks both ends of the range first, and so does a standby domain in its records; iommufd removes mappings
/// until it would cut one, and reports the bytes removed before.
pub fn partial_unmap_reports_the_bytes_removed(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.whole()?, memfd(4)?);
    engine.map(0, 2, &file)?;
    engine.map(4, 4, &file)?;
    let (failed, remaining) = match bench.kind {
        Kind::Type1 => (Unmap::Failed { errno: Errno::INVAL, bytes: 0 }, 6 * PAGE),
        _ if bench.tables == Tables::Standby => (Unmap::Failed { errno: Errno::NOENT, bytes: 0 }, 6 * PAGE),
        _ => (Unmap::Failed { errno: Errno::NOENT, bytes: 2 * PAGE }, 4 * PAGE),
    };
    same("an unmap that cuts at its end", engine.unmap(0, 6), failed)?;
    check("the mapping that it would cut is still reached", engine.reaches(4, &file)?)?;
    same("the rest", engine.unmap(0, 8), Unmap::Gone { bytes: remaining })
}

pub fn failed_map_leaves_nothing(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(8)?);
    engine.map(5, 1, &file)?;
    match engine.domain.map(range(0, 8), PAGE, &file, Offset(0), true) {
        Err(error @ Error::Map { .. }) => {
            check("the error names the reason", error.to_string().contains("mapped there already"))?;
        }
        other => return Err(format!("a map over another one: {other:?}").into()),
    }
    same("only the first remains", engine.unmap(0, 8), Unmap::Gone { bytes: PAGE })?;
    let beyond = engine.domain.map(range(0, 4), PAGE, &file, Offset(6 * PAGE), true);
    check("a map beyond the file fails", matches!(beyond, Err(Error::Map { .. })))?;
    same("and leaves nothing", engine.unmap(0, 8), Unmap::Gone { bytes: 0 })
}

pub fn alias_is_a_mapping_of_its_own(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(1)?);
    engine.map(0, 1, &file)?;
    engine.map(16, 1, &file)?;
    same("one is unmapped", engine.unmap(0, 1), Unmap::Gone { bytes: PAGE })?;
    check("the page is reached by the other", engine.reaches(16, &file)?)?;
    check("and not by the first", !engine.reaches(0, &file)?)
}

pub fn capabilities_are_probed(bench: &Bench) -> Outcome {
    let engine = bench.engine()?;
    let can = engine.domain.capabilities();
    check("no tickets", !can.tickets)?;
    let iommufd = bench.kind == Kind::Iommufd;
    same("it cuts", can.cut, iommufd && bench.tables == Tables::Small)?;
    same("it replaces", can.replace, iommufd && bench.tables == Tables::Standby)?;
    match bench.kind {
        Kind::Type1 => same("type1's mappings", can.max_mappings, 65_535),
        // A domain with two page tables hands nothing over, and so does not say.
        _ if bench.tables == Tables::Standby => Ok(()),
        _ => {
            let (_, ids) = engine.domain.leave()?;
            check("this iommufd maps by file", matches!(ids, DomainIds::Iommufd { by_file: true, .. }))
        }
    }
}

pub fn two_devices_share_one_domain(bench: &Bench) -> Outcome {
    let (file, sent) = (memfd(1)?, fresh(64));
    let both = bench.assign(&[&bench.edu[0], &bench.edu[1]])?;
    both.domain.map(range(0, 1), PAGE, &file, Offset(0), true)?;
    both.devices[0].dma_write(at(0), &sent)?;
    same("the other device reads", both.devices[1].dma_read(at(0), 64)?, sent)
}

/// The problem that passgate solves: after a punch of a page that is mapped for a device, owner and device access
/// different pages, without any error.
pub fn pinned_page_outlives_its_punch(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, guest_memfd(1)?);
    let (old, late) = (fresh(64), fresh(64));
    engine.map(0, 1, &file)?;
    file.write(0, &old)?;
    file.punch(0, PAGE)?;
    same("the owner sees a fresh page", bytes(&file, 0, 64)?, vec![0; 64])?;
    same("the device the old one", engine.sees(0, 64)?, old)?;
    engine.device.dma_write(at(0), &late)?;
    same("its writes never arrive", bytes(&file, 0, 64)?, vec![0; 64])?;
    same("they are in the old page", engine.sees(0, 64)?, late)
}

pub fn full_container_is_reported(bench: &Bench) -> Outcome {
    const LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    let before = std::fs::read_to_string(LIMIT)?;
    std::fs::write(LIMIT, "4")?; // applies to containers made from now on
    let engine = bench.engine();
    std::fs::write(LIMIT, before.trim())?;
    let (engine, file) = (engine?, memfd(5)?);
    same("the limit", engine.domain.capabilities().max_mappings, 4)?;
    let error = engine.domain.map(range(0, 5), PAGE, &file, Offset(0), true).expect_err("one too many");
    same("the errno", error.errno(), Some(Errno::NOSPC))?;
    check("the remedy", error.to_string().contains("raise vfio_iommu_type1.dma_entry_limit"))?;
    same("nothing is mapped", engine.unmap(0, 5), Unmap::Gone { bytes: 0 })?;
    engine.domain.map(range(0, 4), PAGE, &file, Offset(0), true)?;
    same("four fit", engine.unmap(0, 4), Unmap::Gone { bytes: 4 * PAGE })
}

/// The limit applies to processes without CAP_IPC_LOCK, like the daemon.
pub fn map_beyond_the_memlock_limit_is_reported(bench: &Bench) -> Outcome {
    let (engine, file) = (bench.engine()?, memfd(64)?);
    let (limit, root) = (getrlimit(Resource::Memlock), capabilities(None)?);
    let mut less = root;
    less.effective.remove(CapabilitySet::IPC_LOCK);
    setrlimit(Resource::Memlock, Rlimit { current: Some(16 * PAGE), ..limit })?;
    set_capabilities(None, less)?;
    let result = engine.domain.map(range(0, 64), 8 * PAGE, &file, Offset(0), true);
    set_capabilities(None, root)?;
    setrlimit(Resource::Memlock, limit)?;
    let error = result.expect_err("beyond the limit");
    same("the errno", error.errno(), Some(Errno::NOMEM))?;
    check("the remedy", error.to_string().contains("RLIMIT_MEMLOCK"))?;
    same("nothing is mapped", engine.unmap(0, 64), Unmap::Gone { bytes: 0 })
}

pub fn addresses_beyond_4_gib_reach_the_engine(bench: &Bench) -> Outcome {
    let (engine, file, sent) = (bench.engine()?, memfd(1)?, fresh(64));
    let high = PageRange::new(0x12_3456_7000, PAGE)?;
    engine.domain.map(high, PAGE, &file, Offset(0), true)?;
    engine.device.dma_write(high.start(), &sent)?;
    same("the content of memory", bytes(&file, 0, 64)?, sent.clone())?;
    same("the device reads", engine.device.dma_read(high.start(), 64)?, sent)
}
