//! Two page tables, and a kernel that fails at the Nth call: whatever comes of it, no device loses a page that was to
//! stay or keeps one that is said to be gone, and the same call made again puts everything right.

use std::collections::BTreeMap;

use passgate_bindings::PAGE;
use passgate_bindings::iommufd::HwptId;

use super::*;

const PAGES: u64 = 16;
const ONE: IoasId = IoasId(1);
const TWO: IoasId = IoasId(2);

/// Mappings of two IOASes, first page and pages, and the calls left until one fails.
#[derive(Debug, Default)]
struct Fake {
    areas: Mutex<BTreeMap<(IoasId, u64), u64>>,
    left: Mutex<Option<u32>>,
    /// True where the call after that fails as well.
    twice: Mutex<bool>,
    /// True where an unmap of several mappings removes the first alone, and says so.
    short: Mutex<bool>,
    /// True once a copy was made that may be written to.
    copied_writable: Mutex<bool>,
}

impl Fake {
    /// Whether this call goes well.
    fn goes(&self) -> Result<(), Errno> {
        let mut left = self.left.lock().unwrap();
        match &mut *left {
            Some(0) => {
                *left = std::mem::take(&mut *self.twice.lock().unwrap()).then_some(0);
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
        self.goes().map_err(|errno| Failed::new("map", errno))?;
        let first = iova.start().0 / PAGE;
        let here = self.pages(ioas);
        assert!((first..first + iova.pages()).all(|page| !here.contains(&page)), "mapped twice");
        self.areas.lock().unwrap().insert((ioas, first), iova.pages());
        Ok(())
    }
}

impl Kernel for Fake {
    /// One that fails has removed the first mapping all the same, and does not say so.
    fn unmap(&self, ioas: IoasId, iova: PageRange<Iova>) -> Result<u64, Errno> {
        let goes = self.goes();
        let (first, end) = (iova.start().0 / PAGE, iova.end().0 / PAGE);
        let mut areas = self.areas.lock().unwrap();
        let over: Vec<_> = areas
            .iter()
            .map(|((of, at), pages)| (*of, *at, at + pages))
            .filter(|(of, at, to)| *of == ioas && *at < end && first < *to)
            .collect();
        assert!(
            over.iter().all(|(_, at, to)| first <= *at && *to <= end),
            "the book would have cut a mapping"
        );
        let count = if goes.is_ok() && !*self.short.lock().unwrap() { over.len() } else { 1 };
        let gone = over.iter().take(count).map(|(of, at, _)| areas.remove(&(*of, *at)).unwrap());
        let pages: u64 = gone.sum();
        goes?;
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

    /// An HWPT has the number of its IOAS.
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
    /// One that fails leaves the device out.
    fn attach(&self, to: HwptId) -> Result<(), Failed> {
        *self.at.lock().unwrap() = None;
        self.kernel.goes().map_err(|errno| Failed::new("attach", errno))?;
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
    /// Two devices, and [`PAGES`] pages in two mappings.
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

    /// The Nth call from now on fails.
    fn fail(&self, nth: u32) {
        *self.kernel.left.lock().unwrap() = Some(nth);
    }

    /// Whether that call came; no other fails.
    fn failed(&self) -> bool {
        self.kernel.left.lock().unwrap().take().is_none()
    }

    /// The pages that a device reaches, if it is attached.
    fn sees(&self, device: &Device) -> Option<Vec<u64>> {
        device.at.lock().unwrap().map(|hwpt| self.kernel.pages(IoasId(hwpt.0)))
    }

    /// Both tables have exactly these pages, and every device is in the one that is used.
    fn is(&self, pages: &[u64]) {
        assert_eq!((self.kernel.pages(ONE), self.kernel.pages(TWO)), (pages.to_vec(), pages.to_vec()));
        let used = HwptId(self.standby.ioases()[0].0);
        self.devices.iter().for_each(|device| assert_eq!(*device.at.lock().unwrap(), Some(used)));
    }
}

/// Runs `call` with each of its kernel calls failing in turn; returns how many it makes.
fn each(call: impl Fn(&Scene), after: impl Fn(&Scene)) -> u32 {
    for nth in 0.. {
        let scene = Scene::new();
        scene.fail(nth);
        call(&scene);
        if !scene.failed() {
            return nth;
        }
        after(&scene);
    }
    unreachable!("it makes fewer calls than that")
}

const GONE: [(u64, u64); 3] = [(1, 1), (3, 2), (7, 2)];

fn gone() -> Vec<PageRange<Iova>> {
    GONE.iter().map(|(page, pages)| range(*page, *pages)).collect()
}

fn left() -> Vec<u64> {
    (0..PAGES).filter(|page| !GONE.iter().any(|(at, pages)| (*at..at + pages).contains(page))).collect()
}

#[test]
fn whichever_call_of_a_replace_fails_the_next_one_puts_it_right() {
    let replace = |scene: &Scene| scene.standby.replace(&*scene.kernel, &gone());
    let calls = each(
        |scene| match replace(scene) {
            Unmap::Gone { bytes } => {
                assert_eq!(bytes, 5 * PAGE);
                scene.is(&left());
            }
            went => assert_eq!(went, Unmap::Failed { errno: Errno::NOMEM, bytes: 0 }),
        },
        |scene| {
            let seen: Vec<_> = scene.devices.iter().filter_map(|device| scene.sees(device)).collect();
            let mut at = scene.devices.iter().filter_map(|device| *device.at.lock().unwrap());
            assert!(at.all(|hwpt| hwpt.0 == scene.standby.ioases()[0].0), "all in one table");
            assert_eq!(seen.len(), scene.devices.len(), "a device that did not move is back where it was");
            for pages in seen {
                assert!(
                    left().iter().all(|page| pages.contains(page)),
                    "a page that stays was lost: {pages:?}"
                );
            }
            for device in &scene.devices {
                scene.standby.detach(device).unwrap();
                scene.standby.attach(&*scene.kernel, device).unwrap();
            }
            assert_eq!(replace(scene), Unmap::Gone { bytes: 5 * PAGE });
            scene.is(&left());
        },
    );
    // Two unmaps and four copies in each table, two moves.
    assert_eq!(calls, 14);
}

#[test]
fn whichever_call_of_an_unmap_fails_nothing_is_gone_until_it_is_gone_from_both() {
    let unmap = |scene: &Scene| scene.standby.unmap(&*scene.kernel, range(0, PAGES));
    let calls = each(
        |scene| match unmap(scene) {
            Unmap::Gone { bytes } => {
                assert_eq!(bytes, PAGES * PAGE);
                scene.is(&[]);
            }
            went => assert_eq!(went, Unmap::Failed { errno: Errno::NOMEM, bytes: 0 }),
        },
        |scene| {
            // The first, the second, or neither of the two mappings is there: the book does not know, and asks.
            assert_eq!(unmap(scene), Unmap::Gone { bytes: PAGES * PAGE });
            scene.is(&[]);
        },
    );
    assert_eq!(calls, 2);
}

#[test]
fn whichever_call_of_a_map_fails_nothing_is_left_of_it() {
    let calls = each(
        |scene| {
            if scene.map(PAGES, PAGES).is_ok() {
                scene.is(&(0..2 * PAGES).collect::<Vec<_>>());
            }
        },
        |scene| {
            scene.is(&(0..PAGES).collect::<Vec<_>>());
            scene.map(PAGES, PAGES).unwrap();
        },
    );
    assert_eq!(calls, 4);
}

#[test]
fn a_map_that_cannot_be_taken_back_is_said_to_be_half_made() {
    let scene = Scene::new();
    let iova = range(PAGES, PAGES);
    // The second of two mappings fails, and so does the next call, which takes the first one back.
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
    scene.is(&(0..PAGES).collect::<Vec<_>>());
}

#[test]
fn a_detached_device_stays_so_and_an_unmap_that_would_cut_changes_nothing() {
    let scene = Scene::new();
    scene.standby.detach(&scene.devices[0]).unwrap();
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone()), Unmap::Gone { bytes: 5 * PAGE });
    assert_eq!((scene.sees(&scene.devices[0]), scene.sees(&scene.devices[1])), (None, Some(left())));
    scene.standby.attach(&*scene.kernel, &scene.devices[0]).unwrap();
    let cut = scene.standby.unmap(&*scene.kernel, range(5, 1));
    assert_eq!(cut, Unmap::Failed { errno: Errno::NOENT, bytes: 0 });
    scene.is(&left());
    assert_eq!(scene.standby.unmap(&*scene.kernel, range(5, 2)), Unmap::Gone { bytes: 2 * PAGE });
}

#[test]
fn what_is_left_of_a_read_only_mapping_stays_read_only() {
    let scene = Scene::new();
    let (iova, one) = (range(PAGES, PAGES), |ioas, iova, _: Offset| scene.kernel.map(ioas, iova));
    *scene.kernel.copied_writable.lock().unwrap() = false;
    scene.standby.map(&*scene.kernel, (iova, PAGES * PAGE), Offset(0), false, one).unwrap();
    let gone = [range(PAGES + 1, 1), range(PAGES + 4, 2)];
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone), Unmap::Gone { bytes: 3 * PAGE });
    assert!(!*scene.kernel.copied_writable.lock().unwrap());
}

#[test]
fn a_device_that_neither_moves_nor_comes_back_stays_out_until_it_is_attached() {
    let scene = Scene::new();
    // Six calls make the idle table ready; the seventh moves the first device, the eighth is to bring it back.
    scene.fail(6);
    *scene.kernel.twice.lock().unwrap() = true;
    let failed = Unmap::Failed { errno: Errno::NOMEM, bytes: 0 };
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone()), failed);
    assert!(scene.failed() && scene.sees(&scene.devices[0]).is_none());
    let attached = || [0, 1].map(|nth| scene.standby.is_attached(&scene.devices[nth]));
    assert_eq!(attached(), [false, true]);
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone()), Unmap::Gone { bytes: 5 * PAGE });
    assert_eq!((scene.sees(&scene.devices[0]), scene.sees(&scene.devices[1])), (None, Some(left())));
    scene.standby.attach(&*scene.kernel, &scene.devices[0]).unwrap();
    assert_eq!(attached(), [true, true]);
    scene.is(&left());
}

#[test]
fn an_unmap_that_came_up_short_in_one_table_is_not_whole() {
    let scene = Scene::new();
    let unmap = || scene.standby.unmap(&*scene.kernel, range(0, PAGES));
    *scene.kernel.short.lock().unwrap() = true;
    assert_eq!(unmap(), Unmap::Failed { errno: Errno::IO, bytes: 0 });
    *scene.kernel.short.lock().unwrap() = false;
    assert_eq!(unmap(), Unmap::Gone { bytes: PAGES * PAGE });
    scene.is(&[]);
}

#[test]
fn a_mapping_that_the_kernel_does_not_find_is_not_gone() {
    let scene = Scene::new();
    scene.kernel.areas.lock().unwrap().remove(&(TWO, 0));
    let replace = || scene.standby.replace(&*scene.kernel, &[range(1, 1)]);
    assert_eq!(replace(), Unmap::Failed { errno: Errno::NOENT, bytes: 0 });
    // It is in doubt from then on, and the next replace makes the tables alike.
    assert_eq!(replace(), Unmap::Gone { bytes: PAGE });
    scene.is(&(0..PAGES).filter(|page| *page != 1).collect::<Vec<_>>());
}

#[test]
fn an_unmap_that_would_cut_in_the_idle_table_alone_changes_nothing() {
    let scene = Scene::new();
    // Eight calls make the idle table ready and move both devices there; the ninth is the first of the other table.
    scene.fail(8);
    let failed = Unmap::Failed { errno: Errno::NOMEM, bytes: 0 };
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone()), failed);
    assert!(scene.failed());
    let one = scene.standby.unmap(&*scene.kernel, range(9, PAGES - 9));
    assert_eq!(one, Unmap::Failed { errno: Errno::NOENT, bytes: 0 });
    assert_eq!(scene.standby.replace(&*scene.kernel, &gone()), Unmap::Gone { bytes: 5 * PAGE });
    scene.is(&left());
}

#[test]
fn after_a_replace_that_was_made_again_nothing_is_owed() {
    let scene = Scene::new();
    scene.fail(3);
    let replace = || scene.standby.replace(&*scene.kernel, &gone());
    assert_eq!(replace(), Unmap::Failed { errno: Errno::NOMEM, bytes: 0 });
    assert_eq!(replace(), Unmap::Gone { bytes: 5 * PAGE });
    let rest = scene.standby.unmap(&*scene.kernel, range(0, PAGES));
    assert_eq!(rest, Unmap::Gone { bytes: left().len() as u64 * PAGE });
}

#[test]
fn a_map_that_stays_in_one_table_is_said_to_be_half_made() {
    let scene = Scene::new();
    let iova = range(PAGES, PAGES);
    let one = |ioas, iova: PageRange<Iova>, _: Offset| scene.kernel.map(ioas, iova);
    // The first table takes it. The copy into the second fails, and so does taking it out of the first.
    scene.fail(1);
    *scene.kernel.twice.lock().unwrap() = true;
    let made = scene.standby.map(&*scene.kernel, (iova, PAGES * PAGE), Offset(0), true, one);
    assert!(matches!(made, Err(Error::HalfMapped { .. })), "{made:?}");
    assert!(matches!(scene.standby.unmap(&*scene.kernel, iova), Unmap::Gone { .. }));
    scene.is(&(0..PAGES).collect::<Vec<_>>());
}
