//! Two page tables with a simulated kernel that fails at the Nth call: in every case no device loses a page that stays
//! mapped or reaches one that was reported gone, and repeating the call restores a consistent state.

use std::collections::BTreeMap;

use passgate_bindings::PAGE;
use passgate_bindings::iommufd::HwptId;

use super::*;

const PAGES: u64 = 16;
const ONE: IoasId = IoasId(1);
const TWO: IoasId = IoasId(2);

/// A simulated kernel with two IOASes.
#[derive(Debug, Default)]
struct Fake {
    /// The number of pages of each mapping, by IOAS and first page.
    areas: Mutex<BTreeMap<(IoasId, u64), u64>>,
    /// The number of calls that succeed before one fails.
    remaining: Mutex<Option<u32>>,
    /// Set if the call after the one that fails is to fail as well.
    fail_twice: Mutex<bool>,
    /// Set if an unmap of several mappings is to remove only the first, and to report that.
    short: Mutex<bool>,
    /// Set once a writable copy was made.
    copied_writable: Mutex<bool>,
}

impl Fake {
    /// Counts a call and returns its error, if it is the one that fails.
    fn count_call(&self) -> Result<(), Errno> {
        let mut remaining = self.remaining.lock().unwrap();
        match &mut *remaining {
            Some(0) => {
                *remaining = std::mem::take(&mut *self.fail_twice.lock().unwrap()).then_some(0);
                Err(Errno::NOMEM)
            }
            Some(more) => {
                *more -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn pages(&self, ioas: IoasId) -> Vec<u64> {
        let areas = self.areas.lock().unwrap();
        let mine = areas.iter().filter(|((of, _), _)| *of == ioas);
        mine.flat_map(|((_, first), pages)| *first..first + pages).collect()
    }

    fn map(&self, ioas: IoasId, iova: PageRange<Iova>) -> Result<(), Failed> {
        self.count_call().map_err(|errno| Failed::new("map", errno))?;
        let first = iova.start().0 / PAGE;
        let here = self.pages(ioas);
        assert!((first..first + iova.pages()).all(|page| !here.contains(&page)), "mapped twice");
        self.areas.lock().unwrap().insert((ioas, first), iova.pages());
        Ok(())
    }
}

impl Kernel for Fake {
    /// An unmap that fails removes the first mapping, without reporting it.
    fn unmap(&self, ioas: IoasId, iova: PageRange<Iova>) -> Result<u64, Errno> {
        let counted = self.count_call();
        let (first, end) = (iova.start().0 / PAGE, iova.end().0 / PAGE);
        let mut areas = self.areas.lock().unwrap();
        let over: Vec<_> = areas
            .iter()
            .map(|((of, at), pages)| (*of, *at, at + pages))
            .filter(|(of, at, to)| *of == ioas && *at < end && first < *to)
            .collect();
        assert!(over.iter().all(|(_, at, to)| first <= *at && *to <= end), "the unmap would cut a mapping");
        let count = if counted.is_ok() && !*self.short.lock().unwrap() { over.len() } else { 1 };
        let gone = over.iter().take(count).map(|(of, at, _)| areas.remove(&(*of, *at)).unwrap());
        let pages: u64 = gone.sum();
        counted?;
        if pages == 0 { Err(Errno::NOENT) } else { Ok(pages * PAGE) }
    }

    fn copy(&self, from: IoasId, to: IoasId, iova: PageRange<Iova>, writable: bool) -> Result<(), Failed> {
        *self.copied_writable.lock().unwrap() |= writable;
        let there = self.pages(from);
        let first = iova.start().0 / PAGE;
        if !(first..first + iova.pages()).all(|page| there.contains(&page)) {
            return Err(Failed::new("copy", Errno::NOENT));
        }
        self.map(to, iova)
    }

    /// The id of an HWPT is that of its IOAS.
    fn hwpt_alloc(&self, _: DeviceId, ioas: IoasId) -> Result<HwptId, Failed> {
        Ok(HwptId(ioas.0))
    }

    fn hwpt_destroy(&self, _: HwptId) -> Result<(), Failed> {
        Ok(())
    }
}

#[derive(Debug)]
struct Device {
    kernel: Arc<Fake>,
    at: Mutex<Option<HwptId>>,
}

impl Movable for Device {
    /// An attach that fails leaves the device detached.
    fn attach(&self, to: HwptId) -> Result<(), Failed> {
        *self.at.lock().unwrap() = None;
        self.kernel.count_call().map_err(|errno| Failed::new("attach", errno))?;
        *self.at.lock().unwrap() = Some(to);
        Ok(())
    }

    fn detach(&self) -> Result<(), Failed> {
        *self.at.lock().unwrap() = None;
        Ok(())
    }
}

struct Scene {
    kernel: Arc<Fake>,
    standby: Standby<Device>,
    devices: Vec<Arc<Device>>,
}

fn range(page: u64, pages: u64) -> PageRange<Iova> {
    PageRange::new(page * PAGE, pages * PAGE).unwrap()
}

impl Scene {
    /// Makes a domain with two attached devices, and [`PAGES`] pages in two mappings.
    fn new() -> Self {
        let (kernel, standby) = (Arc::new(Fake::default()), Standby::new([ONE, TWO]));
        let device = || Arc::new(Device { kernel: Arc::clone(&kernel), at: Mutex::default() });
        let devices = vec![device(), device()];
        for (n, device) in (1..).zip(&devices) {
            standby.add(device, DeviceId(n));
            standby.attach(&*kernel, device).unwrap();
        }
        let scene = Self { kernel, standby, devices };
        scene.map(0, PAGES).unwrap();
        scene
    }

    fn map(&self, page: u64, pages: u64) -> Result<()> {
        let one = |ioas, iova, _| self.kernel.map(ioas, iova);
        self.standby.map(&*self.kernel, (range(page, pages), PAGES / 2 * PAGE), Offset(0), true, one)
    }

    /// Makes the call after `nth` further calls fail.
    fn fail(&self, nth: u32) {
        *self.kernel.remaining.lock().unwrap() = Some(nth);
    }

    /// Returns true if that call was made. No other call fails afterwards.
    fn failed(&self) -> bool {
        self.kernel.remaining.lock().unwrap().take().is_none()
    }

    /// Returns the pages that a device reaches, if it is attached.
    fn reachable(&self, device: &Device) -> Option<Vec<u64>> {
        device.at.lock().unwrap().map(|hwpt| self.kernel.pages(IoasId(hwpt.0)))
    }

    /// Checks that both tables have exactly these pages, and that every device is attached to the active one.
    fn assert_pages(&self, pages: &[u64]) {
        assert_eq!((self.kernel.pages(ONE), self.kernel.pages(TWO)), (pages.to_vec(), pages.to_vec()));
        let used = HwptId(self.standby.ioases()[0].0);
        self.devices.iter().for_each(|device| assert_eq!(*device.at.lock().unwrap(), Some(used)));
    }
}

/// Runs `call` with each of its kernel calls failing in turn, and `after` behind each; returns the number of its kernel
/// calls.
fn fail_each_call(call: impl Fn(&Scene), after: impl Fn(&Scene)) -> u32 {
    for nth in 0.. {
        let scene = Scene::new();
        scene.fail(nth);
        call(&scene);
        if !scene.failed() {
            return nth;
        }
        after(&scene);
    }
    unreachable!("a call makes fewer kernel calls")
}

const GONE: [(u64, u64); 3] = [(1, 1), (3, 2), (7, 2)];

fn gone() -> Vec<PageRange<Iova>> {
    GONE.iter().map(|(page, pages)| range(*page, *pages)).collect()
}

/// Returns the pages that are not in [`GONE`].
fn remaining_pages() -> Vec<u64> {
    (0..PAGES).filter(|page| !GONE.iter().any(|(at, pages)| (*at..at + pages).contains(page))).collect()
}

#[test]
fn failed_replace_is_completed_by_the_next_one() {
    let replace = |scene: &Scene| scene.standby.replace(&*scene.kernel, &gone());
    let calls = fail_each_call(
        |scene| match replace(scene) {
            Unmap::Gone { bytes } => {
                assert_eq!(bytes, 5 * PAGE);
                scene.assert_pages(&remaining_pages());
            }
            failed => assert_eq!(failed, Unmap::Failed { errno: Errno::NOMEM, bytes: 0 }),
        },
        |scene| {
            let seen: Vec<_> = scene.devices.iter().filter_map(|device| scene.reachable(device)).collect();
            let mut at = scene.devices.iter().filter_map(|device| *device.at.lock().unwrap());
            assert!(at.all(|hwpt| hwpt.0 == scene.standby.ioases()[0].0), "all in one table");
            assert_eq!(seen.len(), scene.devices.len(), "a device that did not move was moved back");
            for pages in seen {
                assert!(
                    remaining_pages().iter().all(|page| pages.contains(page)),
                    "a page that stays mapped was lost: {pages:?}"
                );
            }
            for device in &scene.devices {
                scene.standby.detach(device).unwrap();
                scene.standby.attach(&*scene.kernel, device).unwrap();
            }
            assert_eq!(replace(scene), Unmap::Gone { bytes: 5 * PAGE });
            scene.assert_pages(&remaining_pages());
        },
    );
    // Two unmaps and four copies in each table, two moves.
    assert_eq!(calls, 14);
}

#[test]
fn failed_unmap_reports_nothing_gone_until_gone_from_both_tables() {
    let unmap = |scene: &Scene| scene.standby.unmap(&*scene.kernel, range(0, PAGES));
    let calls = fail_each_call(
        |scene| match unmap(scene) {
            Unmap::Gone { bytes } => {
                assert_eq!(bytes, PAGES * PAGE);
                scene.assert_pages(&[]);
            }
            failed => assert_eq!(failed, Unmap::Failed { errno: Errno::NOMEM, bytes: 0 }),
        },
        |scene| {
            // The first, the second, or none of the two mappings remains, and the record of both is uncertain.
            assert_eq!(unmap(scene), Unmap::Gone { bytes: PAGES * PAGE });
            scene.assert_pages(&[]);
        },
    );
    assert_eq!(calls, 2);
}

#[test]
fn failed_map_leaves_no_mapping() {
    let calls = fail_each_call(
        |scene| {
            if scene.map(PAGES, PAGES).is_ok() {
                scene.assert_pages(&(0..2 * PAGES).collect::<Vec<_>>());
            }
        },
        |scene| {
            scene.assert_pages(&(0..PAGES).collect::<Vec<_>>());
            scene.map(PAGES, PAGES).unwrap();
        },
    );
    assert_eq!(calls, 4);
}

#[test]
fn map_with_failed_roll_back_is_half_mapped() {
    let scene = Scene::new();
    let iova = range(PAGES, PAGES);
    // The second of two mappings fails, and so does the next call, which rolls the first one back.
    let one = |ioas, iova: PageRange<Iova>, _| {
        if iova.start().0 / PAGE == PAGES {
            return scene.kernel.map(ioas, iova);
        }
        scene.fail(0);
        Err(Failed::new("map", Errno::NOSPC))
    };
    let made = scene.standby.map(&*scene.kernel, (iova, PAGES / 2 * PAGE), Offset(0), true, one);
    assert!(matches!(made, Err(Error::HalfMapped { .. })), "{made:?}");
    assert_eq!(scene.standby.unmap(&*scene.kernel, iova), Unmap::Gone { bytes: PAGES / 2 * PAGE });
    scene.assert_pages(&(0..PAGES).collect::<Vec<_>>());
}

#[test]
fn detached_device_stays_detached_and_cutting_unmap_changes_nothing() {
    let scene = Scene::new();
    scene.standby.detach(&scene.devices[0]).unwrap();
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone()), Unmap::Gone { bytes: 5 * PAGE });
    assert_eq!(
        (scene.reachable(&scene.devices[0]), scene.reachable(&scene.devices[1])),
        (None, Some(remaining_pages()))
    );
    scene.standby.attach(&*scene.kernel, &scene.devices[0]).unwrap();
    let cut = scene.standby.unmap(&*scene.kernel, range(5, 1));
    assert_eq!(cut, Unmap::Failed { errno: Errno::NOENT, bytes: 0 });
    scene.assert_pages(&remaining_pages());
    assert_eq!(scene.standby.unmap(&*scene.kernel, range(5, 2)), Unmap::Gone { bytes: 2 * PAGE });
}

#[test]
fn remainder_of_a_read_only_mapping_stays_read_only() {
    let scene = Scene::new();
    let (iova, one) = (range(PAGES, PAGES), |ioas, iova, _: Offset| scene.kernel.map(ioas, iova));
    *scene.kernel.copied_writable.lock().unwrap() = false;
    scene.standby.map(&*scene.kernel, (iova, PAGES * PAGE), Offset(0), false, one).unwrap();
    let gone = [range(PAGES + 1, 1), range(PAGES + 4, 2)];
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone), Unmap::Gone { bytes: 3 * PAGE });
    assert!(!*scene.kernel.copied_writable.lock().unwrap());
}

#[test]
fn device_that_cannot_be_moved_back_stays_detached_until_attach() {
    let scene = Scene::new();
    // Six calls prepare the idle table; the seventh moves the first device, the eighth moves it back.
    scene.fail(6);
    *scene.kernel.fail_twice.lock().unwrap() = true;
    let failed = Unmap::Failed { errno: Errno::NOMEM, bytes: 0 };
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone()), failed);
    assert!(scene.failed() && scene.reachable(&scene.devices[0]).is_none());
    let attached = || [0, 1].map(|nth| scene.standby.is_attached(&scene.devices[nth]));
    assert_eq!(attached(), [false, true]);
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone()), Unmap::Gone { bytes: 5 * PAGE });
    assert_eq!(
        (scene.reachable(&scene.devices[0]), scene.reachable(&scene.devices[1])),
        (None, Some(remaining_pages()))
    );
    scene.standby.attach(&*scene.kernel, &scene.devices[0]).unwrap();
    assert_eq!(attached(), [true, true]);
    scene.assert_pages(&remaining_pages());
}

#[test]
fn short_unmap_in_one_table_fails() {
    let scene = Scene::new();
    let unmap = || scene.standby.unmap(&*scene.kernel, range(0, PAGES));
    *scene.kernel.short.lock().unwrap() = true;
    assert_eq!(unmap(), Unmap::Failed { errno: Errno::IO, bytes: 0 });
    *scene.kernel.short.lock().unwrap() = false;
    assert_eq!(unmap(), Unmap::Gone { bytes: PAGES * PAGE });
    scene.assert_pages(&[]);
}

#[test]
fn mapping_missing_in_the_kernel_is_not_reported_gone() {
    let scene = Scene::new();
    scene.kernel.areas.lock().unwrap().remove(&(TWO, 0));
    let replace = || scene.standby.replace(&*scene.kernel, &[range(1, 1)]);
    assert_eq!(replace(), Unmap::Failed { errno: Errno::NOENT, bytes: 0 });
    // It is uncertain from then on, and the next replace makes the tables the same.
    assert_eq!(replace(), Unmap::Gone { bytes: PAGE });
    scene.assert_pages(&(0..PAGES).filter(|page| *page != 1).collect::<Vec<_>>());
}

#[test]
fn unmap_that_would_cut_in_the_idle_table_changes_nothing() {
    let scene = Scene::new();
    // Eight calls prepare the idle table and move both devices there; the ninth is the first on the other table.
    scene.fail(8);
    let failed = Unmap::Failed { errno: Errno::NOMEM, bytes: 0 };
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone()), failed);
    assert!(scene.failed());
    let one = scene.standby.unmap(&*scene.kernel, range(9, PAGES - 9));
    assert_eq!(one, Unmap::Failed { errno: Errno::NOENT, bytes: 0 });
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone()), Unmap::Gone { bytes: 5 * PAGE });
    scene.assert_pages(&remaining_pages());
}

#[test]
fn repeated_replace_leaves_nothing_unreported() {
    let scene = Scene::new();
    scene.fail(3);
    let replace = || scene.standby.replace(&*scene.kernel, &gone());
    assert_eq!(replace(), Unmap::Failed { errno: Errno::NOMEM, bytes: 0 });
    assert_eq!(replace(), Unmap::Gone { bytes: 5 * PAGE });
    let rest = scene.standby.unmap(&*scene.kernel, range(0, PAGES));
    assert_eq!(rest, Unmap::Gone { bytes: remaining_pages().len() as u64 * PAGE });
}

#[test]
fn map_left_in_one_table_is_half_mapped() {
    let scene = Scene::new();
    let iova = range(PAGES, PAGES);
    let one = |ioas, iova: PageRange<Iova>, _: Offset| scene.kernel.map(ioas, iova);
    // The map in the first table succeeds. The copy into the second fails, and so does the unmap from the first.
    scene.fail(1);
    *scene.kernel.fail_twice.lock().unwrap() = true;
    let made = scene.standby.map(&*scene.kernel, (iova, PAGES * PAGE), Offset(0), true, one);
    assert!(matches!(made, Err(Error::HalfMapped { .. })), "{made:?}");
    assert!(matches!(scene.standby.unmap(&*scene.kernel, iova), Unmap::Gone { .. }));
    scene.assert_pages(&(0..PAGES).collect::<Vec<_>>());
}
