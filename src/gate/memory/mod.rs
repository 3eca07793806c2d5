//! Guest memory: the regions, the files behind them, the state of every page, and what is excluded from mapping.
//!
//! Pages are kept by file identity and offset, so that every alias of a page is one page here. Nothing here knows what is
//! mapped ([`super::mappings`]).

mod region;

use std::collections::BTreeMap;

use passgate_bindings::units::{Address, LIMIT, Offset};
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

use super::effect::FilePages;
use super::event::{Caller, MapResult, RegionSpec};
use super::ids::{ClientId, DomainId, FileId, InvalidationId, RegionId};
use super::ledger::exclusions::gaps;
use super::ledger::{Arena, ExcludedBy, Exclusions, Mapped, PageMap, PageState, Store};
use super::policy::Policy;
use super::verdict::{Reason, Refusal, within_budget};

pub(super) use region::Region;
use region::Stage;

/// One file: the state of its pages, what of it is excluded from mapping, and the regions that show it.
#[derive(Debug)]
struct File {
    pages: PageMap,
    excluded: Exclusions,
    regions: Vec<RegionId>,
}

/// Guest memory, over all clients.
#[derive(Debug)]
pub(super) struct Memory {
    /// The source of memory for page states and mappings that end with this process.
    arena: Arena,
    files: BTreeMap<FileId, File>,
    regions: BTreeMap<RegionId, Region>,
    /// The regions by guest-physical address.
    layout: BTreeMap<Gpa, RegionId>,
    last_region: u32,
    /// Set where page states outlive this gate.
    store: Option<Store>,
}

/// Regions: their addresses, owners and stages.
impl Memory {
    /// Returns no memory. The states of its pages will lie in memory of `arena`, unless they are kept elsewhere
    /// ([`Memory::use_store`]).
    pub(super) fn new(arena: Arena) -> Self {
        let (files, regions, layout) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { arena, files, regions, layout, last_region: 0, store: None }
    }

    pub(super) fn region(&self, id: RegionId) -> Option<&Region> {
        self.regions.get(&id)
    }

    /// Returns all regions, in the order of their numbers.
    pub(super) fn regions(&self) -> impl Iterator<Item = (RegionId, &Region)> {
        self.regions.iter().map(|(id, region)| (*id, region))
    }

    /// Returns the ranges of all regions, ascending.
    pub(super) fn layout(&self) -> impl Iterator<Item = PageRange<Iova>> + '_ {
        self.layout.values().filter_map(|id| Some(self.regions.get(id)?.iova()))
    }

    /// Returns the region at `gpa`.
    pub(super) fn region_at(&self, gpa: Gpa) -> Option<&Region> {
        self.region_id_at(gpa).and_then(|id| self.regions.get(&id))
    }

    /// Returns the number of the region at `gpa`.
    pub(super) fn region_id_at(&self, gpa: Gpa) -> Option<RegionId> {
        let (_, id) = self.layout.range(..=gpa).next_back()?;
        self.regions.get(id).filter(|region| region.spec.gpa.contains(gpa)).map(|_| *id)
    }

    /// Returns the first region that begins at `gpa` or above.
    pub(super) fn first_region_from(&self, gpa: Gpa) -> Option<RegionId> {
        self.layout.range(gpa..).next().map(|(_, id)| *id)
    }

    /// Returns the regions that show pages of `file`, in the order in which they came.
    pub(super) fn regions_of(&self, file: FileId) -> &[RegionId] {
        self.files.get(&file).map_or(&[], |file| &file.regions)
    }

    /// Returns every IOVA range at which `range` of `file` shows, over all regions.
    pub(super) fn aliases(
        &self,
        file: FileId,
        range: PageRange<Offset>,
    ) -> impl Iterator<Item = PageRange<Iova>> + '_ {
        self.regions_of(file).iter().filter_map(move |id| self.regions.get(id)?.iova_of(range))
    }

    /// Returns the pages of files at an IOVA range, which may cross regions.
    pub(super) fn pages_at(&self, iova: PageRange<Iova>) -> Vec<FilePages> {
        let mut pages = Vec::new();
        let before = self.layout.range(..=Gpa(iova.start().raw())).next_back();
        let from = before.map_or(Gpa(iova.start().raw()), |(gpa, _)| *gpa);
        for (_, id) in self.layout.range(from..Gpa(iova.end().raw())) {
            if let Some(region) = self.regions.get(id)
                && let Some(part) = region.iova().intersection(iova)
            {
                pages.push(region.pages_at(part));
            }
        }
        pages
    }

    /// Checks that a region of this shape may be added at its place.
    pub(super) fn check_new(&self, spec: &RegionSpec, policy: &Policy) -> Result<(), Refusal> {
        let bad = |size: u64| !size.is_power_of_two() || size < PAGE;
        if let Some(piece) = [spec.piece, spec.page].into_iter().find(|size| *size != 0 && bad(*size)) {
            return Err(Refusal::BadPiece { piece });
        }
        let before = self.layout.range(..=spec.gpa.start()).next_back();
        let within = self.layout.range(spec.gpa.start()..spec.gpa.end()).next();
        for (_, id) in before.into_iter().chain(within) {
            let other = self.regions.get(id).and_then(|region| region.spec.gpa.intersection(spec.gpa));
            if let Some(shared) = other {
                return Err(Refusal::Overlaps { region: *id, gpa: shared.start() });
            }
        }
        within_budget("regions", self.regions.len() as u64 + 1, policy.max_regions.into())?;
        let memory: u64 = self.regions.values().map(|region| region.spec.gpa.len()).sum();
        within_budget("bytes of guest memory", memory + spec.gpa.len(), policy.max_memory)
    }

    /// Adds a region that [`Memory::check_new`] has admitted. `lasts` tells of a quarantine whether no proof ends it: such
    /// pages stay unknown, for what their last owner could not say, the next cannot either.
    pub(super) fn add_region(
        &mut self,
        caller: Caller,
        spec: RegionSpec,
        lasts: impl Fn(InvalidationId, Reason) -> bool,
    ) -> RegionId {
        self.last_region += 1;
        let id = RegionId(self.last_region);
        let stage = Stage::Adding(caller);
        let region =
            Region { owner: caller.client, spec, stage, maps_pending: 0, mapped_bytes: 0, failed: None };
        self.learn_states(region.file_pages(), spec.initial);
        self.exclude_unknown(region.file_pages(), lasts);
        self.insert(id, region);
        id
    }

    /// Adds a region as an earlier gate had it.
    pub(super) fn restore_region(&mut self, id: RegionId, spec: RegionSpec, owner: ClientId, closing: bool) {
        let stage = if closing { Stage::Closing } else { Stage::Present };
        self.insert(id, Region { owner, spec, stage, maps_pending: 0, mapped_bytes: 0, failed: None });
    }

    fn insert(&mut self, id: RegionId, region: Region) {
        self.file(region.spec.backing.file).regions.push(id);
        self.layout.insert(region.spec.gpa.start(), id);
        self.regions.insert(id, region);
    }

    /// Forgets a region. The caller has proof that nothing of it is mapped.
    pub(super) fn remove_region(&mut self, id: RegionId) -> Option<Region> {
        let region = self.regions.remove(&id)?;
        self.layout.remove(&region.spec.gpa.start());
        if let Some(file) = self.files.get_mut(&region.spec.backing.file) {
            file.regions.retain(|other| *other != id);
        }
        Some(region)
    }

    /// Marks a region as one that is being closed: nothing of it is mapped from now on. Returns the caller that waited for it
    /// to be added.
    pub(super) fn start_closing(&mut self, id: RegionId) -> Option<Caller> {
        let region = self.regions.get_mut(&id)?;
        match std::mem::replace(&mut region.stage, Stage::Closing) {
            Stage::Adding(caller) => Some(caller),
            Stage::Present | Stage::Closing => None,
        }
    }

    /// Makes `to` the owner of every region of `from` that is not being closed.
    pub(super) fn change_owner(&mut self, from: ClientId, to: ClientId) {
        let owned = self.regions.values_mut().filter(|region| region.owner == from && !region.is_closing());
        owned.for_each(|region| region.owner = to);
    }

    pub(super) fn is_closing_any(&self) -> bool {
        self.regions.values().any(Region::is_closing)
    }

    /// A map effect of the region has been asked for.
    pub(super) fn map_started(&mut self, id: RegionId) {
        if let Some(region) = self.regions.get_mut(&id) {
            region.maps_pending += 1;
        }
    }

    /// A map effect of `bytes` of the region has returned. Returns true if it failed and has to be reported by itself: nobody waits
    /// for the region to be added, and it stays.
    pub(super) fn map_ended(&mut self, id: RegionId, bytes: u64, result: MapResult) -> bool {
        let Some(region) = self.regions.get_mut(&id) else { return false };
        region.maps_pending = region.maps_pending.saturating_sub(1);
        let failed = match result {
            MapResult::Mapped => {
                region.mapped_bytes += bytes;
                return false;
            }
            MapResult::Refused { errno } => Refusal::MapFailed { errno },
            MapResult::Unknown { errno } => Refusal::HalfMapped { errno },
        };
        if region.is_being_added() {
            region.failed = Some(failed);
            return false;
        }
        !region.is_closing()
    }

    /// Ends the addition of a region once no map of it is in progress. Returns who waits for it, and the bytes that were mapped
    /// or the reason why it could not be added.
    pub(super) fn added(&mut self, id: RegionId) -> Option<(Caller, Result<u64, Refusal>)> {
        let region = self.regions.get_mut(&id).filter(|region| !region.is_being_mapped())?;
        let Stage::Adding(caller) = region.stage else { return None };
        region.stage = Stage::Present;
        Some((caller, region.failed.map_or(Ok(region.mapped_bytes), Err)))
    }

    pub(super) fn last_region(&self) -> u32 {
        self.last_region
    }

    /// Numbers of regions count on from `last`.
    pub(super) fn count_regions_from(&mut self, last: u32) {
        self.last_region = last;
    }
}

/// Files, and the state of their pages.
impl Memory {
    /// Keeps page states and mappings in `store`, where they outlive this gate.
    pub(super) fn use_store(&mut self, store: Store) {
        self.store = Some(store);
    }

    /// Returns the mappings of a domain as the store has them; none where there is no store, or no room in it.
    pub(super) fn stored_mappings(&self, domain: DomainId) -> Mapped {
        let stored = self.store.as_ref().and_then(|store| Mapped::in_store(store, domain).ok());
        stored.unwrap_or_else(|| Mapped::new(self.arena))
    }

    fn file(&mut self, file: FileId) -> &mut File {
        let (arena, store) = (self.arena, &self.store);
        self.files.entry(file).or_insert_with(|| {
            // If the store has no room, the states of its pages end with this process.
            let stored = store.as_ref().and_then(|store| PageMap::in_store(store, file).ok());
            let pages = stored.unwrap_or_else(|| PageMap::new(arena));
            File { pages, excluded: Exclusions::default(), regions: Vec::new() }
        })
    }

    pub(super) fn knows(&self, file: FileId) -> bool {
        self.files.contains_key(&file)
    }

    /// Forgets a file that no region shows and of which nothing is excluded. Returns true if it was forgotten. A quarantined
    /// file stays: its identity must not come back as another file's.
    pub(super) fn forget_unused(&mut self, file: FileId) -> bool {
        let unused = |file: &File| file.regions.is_empty() && file.excluded.is_empty();
        if !self.files.get(&file).is_some_and(unused) {
            return false;
        }
        if let Some(file) = self.files.remove(&file) {
            file.pages.discard();
        }
        true
    }

    /// Sets the state of pages that no region of the file has described before.
    fn learn_states(&mut self, pages: FilePages, initial: PageState) {
        let shown = self.regions_of(pages.file).iter().filter_map(|id| self.regions.get(id));
        let shown = shown.map(|region| region.file_pages().range);
        let mut known: Vec<_> = shown.filter(|range| range.overlaps(pages.range)).collect();
        known.sort_unstable();
        let file = self.file(pages.file);
        for new in gaps(pages.range, known.into_iter()) {
            // Also what is excluded: once it may be mapped, its state must be what its owner says now.
            file.pages.set(new, initial);
        }
    }

    fn exclude_unknown(&mut self, pages: FilePages, lasts: impl Fn(InvalidationId, Reason) -> bool) {
        let Some(file) = self.files.get_mut(&pages.file) else { return };
        let lasting = |by: ExcludedBy| matches!(by, ExcludedBy::Quarantine(since, why) if lasts(since, why));
        let unknown: Vec<_> = file
            .excluded
            .overlapping(pages.range)
            .filter(|(_, by)| lasting(*by))
            .filter_map(|(range, _)| range.intersection(pages.range))
            .collect();
        unknown.into_iter().for_each(|part| file.pages.set(part, PageState::Unknown));
    }

    /// Sets the state of pages of a known file.
    pub(super) fn set_state(&mut self, file: FileId, range: PageRange<Offset>, state: PageState) {
        if let Some(file) = self.files.get_mut(&file) {
            file.pages.set(range, state);
        }
    }

    /// Returns the runs of equal state in these pages, in order; nothing where the file is not known.
    pub(super) fn states(
        &self,
        file: FileId,
        range: PageRange<Offset>,
    ) -> impl Iterator<Item = (PageRange<Offset>, PageState)> + '_ {
        self.files.get(&file).into_iter().flat_map(move |file| file.pages.runs(range))
    }

    /// Returns the number of pages shared, private, hole and unknown.
    pub(super) fn state_counts(&self, pages: FilePages) -> [u64; 4] {
        self.files.get(&pages.file).map_or([0; 4], |file| file.pages.counts(pages.range))
    }

    /// Returns the parts of these pages that are shared and not excluded, in order: what devices may see.
    pub(super) fn mappable(&self, pages: FilePages) -> impl Iterator<Item = PageRange<Offset>> + '_ {
        self.files.get(&pages.file).into_iter().flat_map(move |file| {
            let shared = file.pages.runs(pages.range).filter(|(_, state)| *state == PageState::Shared);
            shared.flat_map(|(run, _)| file.excluded.gaps(run))
        })
    }
}

/// Exclusions from mapping: ranges under an open invalidation or in quarantine.
impl Memory {
    /// Returns the exclusions of a file.
    pub(super) fn excluded(&self, file: FileId) -> Option<&Exclusions> {
        self.files.get(&file).map(|file| &file.excluded)
    }

    /// Returns all exclusions by file.
    pub(super) fn exclusions(&self) -> impl Iterator<Item = (FileId, &Exclusions)> {
        self.files.iter().map(|(id, file)| (*id, &file.excluded))
    }

    pub(super) fn is_quarantined_any(&self) -> bool {
        self.files.values().any(|file| file.excluded.quarantined())
    }

    /// Excludes what of a known file's range is not excluded yet.
    pub(super) fn exclude(&mut self, file: FileId, range: PageRange<Offset>, by: ExcludedBy) {
        if let Some(file) = self.files.get_mut(&file) {
            file.excluded.exclude(range, by);
        }
    }

    /// As [`Memory::exclude`], of a file that may be new.
    pub(super) fn restore_excluded(&mut self, file: FileId, range: PageRange<Offset>, by: ExcludedBy) {
        self.file(file).excluded.exclude(range, by);
    }

    /// As [`Memory::set_state`], of a file that may be new.
    pub(super) fn restore_state(&mut self, file: FileId, range: PageRange<Offset>, state: PageState) {
        self.file(file).pages.set(range, state);
    }

    /// Ends the exclusion of these pages by an open invalidation.
    pub(super) fn end_exclusion(&mut self, pages: &[FilePages], id: InvalidationId) {
        for part in pages {
            if let Some(file) = self.files.get_mut(&part.file) {
                file.excluded.end(part.range, id);
            }
        }
    }

    /// Puts what of a range is not excluded yet into quarantine. Returns the parts.
    pub(super) fn quarantine(
        &mut self,
        file: FileId,
        range: PageRange<Offset>,
        since: InvalidationId,
        reason: Reason,
    ) -> Vec<PageRange<Offset>> {
        let Some(file) = self.files.get_mut(&file) else { return Vec::new() };
        let fresh: Vec<_> = file.excluded.gaps(range).collect();
        for range in &fresh {
            file.excluded.exclude(*range, ExcludedBy::Quarantine(since, reason));
        }
        fresh
    }

    /// Ends the quarantine that starts at `start`. The caller has proof.
    pub(super) fn lift(&mut self, file: FileId, start: Offset) {
        if let Some(file) = self.files.get_mut(&file) {
            file.excluded.lift(start);
        }
    }

    /// Ends every quarantine that dates from `since`, and sets the pages to `state`. Returns what was in quarantine.
    pub(super) fn lift_all(
        &mut self,
        since: InvalidationId,
        state: PageState,
    ) -> Vec<(FileId, PageRange<Offset>)> {
        let mut lifted = Vec::new();
        for (id, file) in &mut self.files {
            for range in file.excluded.lift_all(since) {
                file.pages.set(range, state);
                lifted.push((*id, range));
            }
        }
        lifted
    }
}

impl Memory {
    /// Adds its state to `text` ([`super::Gate::canonical`]).
    pub(super) fn canonical(&self, text: &mut String) {
        use std::fmt::Write;
        let Self { arena: _, files, regions, layout: _, last_region, store: _ } = self;
        for (id, file) in files {
            let File { pages, excluded, regions } = file;
            let states = PageRange::<Offset>::new(0, LIMIT);
            let states = states.map(|everywhere| pages.runs(everywhere).collect::<Vec<_>>());
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{id:?} {excluded:?} {regions:?} {states:?}");
        }
        let _ = writeln!(text, "{regions:?} {last_region}");
    }
}
