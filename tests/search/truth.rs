//! What is true whatever the session believes: what the pages are, who was told what, and who waits for an answer.
//!
//! It hears what clients do and what they are told, and judges each promise. It never looks into the gate.

use std::time::Instant;

use passgate::gate::{
    Answer, Caller, Cause, ClientId, InvalidationId, Notice, Outcome, PageState, QuarantineStatus, RegionId,
    Verdict,
};
use passgate_bindings::{PAGE, PageRange};

use crate::action::Ending;
use crate::kernel::State;

/// A promise that was broken, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken(pub String);

pub type Kept<T = ()> = Result<T, Broken>;

/// Returns from the function with a broken promise.
macro_rules! broken {
    ($($how:tt)*) => { return Err($crate::truth::Broken(format!($($how)*))) };
}
pub(crate) use broken;

/// What a page is, as far as anybody can know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    Shared,
    Private,
    /// Its owner may have converted it.
    Unknown,
}

#[derive(Debug)]
pub struct Page {
    pub content: Content,
    /// The invalidation since which it is in quarantine, and why.
    pub quarantine: Option<(InvalidationId, Cause)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Add,
    Remove(RegionId),
    Begin { pages: u64, to: PageState, by_passgate: bool },
    End,
    Release(InvalidationId, PageState),
    Adopt,
}

#[derive(Debug)]
struct Asked {
    caller: Caller,
    what: What,
    due: Option<Instant>,
}

/// A conversion that its owner, or passgate, may carry out now.
#[derive(Debug)]
pub struct Granted {
    pub id: InvalidationId,
    pub client: ClientId,
    pub pages: u64,
    pub to: PageState,
}

#[derive(Debug)]
pub struct Region {
    pub id: RegionId,
    pub owner: ClientId,
    /// The IOVA of its first page, in pages. It shows the whole file.
    pub start: u64,
    /// Whether its owner has asked for it to go, or is gone.
    pub going: bool,
}

#[derive(Debug)]
pub struct Truth {
    pub pages: Vec<Page>,
    pub regions: Vec<Region>,
    pub granted: Vec<Granted>,
    /// Conversions that passgate carries out now.
    pub converting: Vec<Granted>,
    asked: Vec<Asked>,
    /// Clients that are gone: an answer to them may come or not.
    dead: Vec<ClientId>,
    /// Invalidations that were open when a daemon was killed.
    settleable: Vec<InvalidationId>,
    resuming: bool,
}

impl Granted {
    fn content(&self) -> Content {
        if self.to == PageState::Shared { Content::Shared } else { Content::Private }
    }
}

fn mask(range: PageRange<passgate_bindings::units::Offset>) -> u64 {
    ((1 << range.pages()) - 1) << (range.start().0 / PAGE)
}

impl Truth {
    pub fn new(pages: u64) -> Self {
        let page = || Page { content: Content::Shared, quarantine: None };
        Self {
            pages: (0..pages).map(|_| page()).collect(),
            regions: Vec::new(),
            granted: Vec::new(),
            converting: Vec::new(),
            asked: Vec::new(),
            dead: Vec::new(),
            settleable: Vec::new(),
            resuming: false,
        }
    }

    /// True while somebody waits for memory to be added.
    pub fn awaits_memory(&self) -> bool {
        self.asked.iter().any(|asked| matches!(asked.what, What::Add))
    }

    pub fn ask(&mut self, caller: Caller, what: What, due: Option<Instant>) {
        self.asked.push(Asked { caller, what, due });
    }

    fn set(&mut self, pages: u64, content: Content) {
        for (nth, page) in self.pages.iter_mut().enumerate() {
            if pages >> nth & 1 == 1 {
                page.content = content;
            }
        }
    }

    /// The owner of a granted conversion has done with it.
    pub fn end(&mut self, nth: usize, ending: Ending) -> Granted {
        let granted = self.granted.remove(nth);
        match ending {
            Ending::Committed => self.set(granted.pages, granted.content()),
            Ending::NotCommitted => {}
            Ending::Unknown => self.set(granted.pages, Content::Unknown),
        }
        granted
    }

    pub fn client_dies(&mut self, client: ClientId) {
        // What it has released is released, whether it hears so or not.
        self.asked.retain(|asked| asked.caller.client != client || matches!(asked.what, What::Release(..)));
        self.dead.push(client);
        self.regions
            .iter_mut()
            .filter(|region| region.owner == client)
            .for_each(|region| region.going = true);
        for granted in self.granted.extract_if(.., |granted| granted.client == client).collect::<Vec<_>>() {
            self.set(granted.pages, Content::Unknown);
        }
    }

    /// The daemon is killed: nobody hears anything more of it.
    pub fn daemon_dies(&mut self) {
        self.asked.clear();
        let open: Vec<_> = self.granted.drain(..).chain(self.converting.drain(..)).collect();
        for granted in open {
            self.set(granted.pages, Content::Unknown);
            self.settleable.push(granted.id);
        }
        self.resuming = true;
    }

    /// The next daemon has gone on, and has this in quarantine. Of what the one before had done and `was_pending` nobody
    /// was told, and it is taken as it is.
    pub fn resume(&mut self, quarantine: &[QuarantineStatus], was_pending: bool) -> Kept {
        for (nth, page) in self.pages.iter_mut().enumerate() {
            let held = quarantine.iter().find(|held| mask(held.range) >> nth & 1 == 1);
            match (page.quarantine, held) {
                (Some(before), None) if !was_pending => {
                    broken!("page {nth}, in quarantine since {before:?}, is not so after the restart");
                }
                (Some(_), Some(_)) if !was_pending => {}
                // What the next daemon announces itself is taken down when it does.
                (None, Some(_)) if !was_pending => {}
                _ => page.quarantine = None,
            }
        }
        Ok(())
    }

    pub fn waits_for_release(&self) -> bool {
        self.asked.iter().any(|asked| matches!(asked.what, What::Release(..)))
    }

    /// The next daemon has gone on from what was written down.
    pub fn resumed(&mut self) {
        self.resuming = false;
    }

    /// What the next daemon has in quarantine although nobody was told before the kill.
    pub fn learn(&mut self, quarantine: &[QuarantineStatus]) {
        for (nth, page) in self.pages.iter_mut().enumerate() {
            if let Some(held) = quarantine.iter().find(|held| mask(held.range) >> nth & 1 == 1) {
                page.quarantine.get_or_insert((held.invalidation, held.reason.cause));
            }
        }
    }

    /// No region shows the file any more, and one comes whose owner says that its pages are shared.
    pub fn start_anew(&mut self) {
        let is_known =
            |page: &&mut Page| !matches!(page.quarantine, Some((_, Cause::ClientGone | Cause::OwnerUnknown)));
        self.pages.iter_mut().filter(is_known).for_each(|page| page.content = Content::Shared);
        // Of what an operator had released before, whoever adds it now says what it is.
        for asked in &mut self.asked {
            if let What::Release(_, to) = &mut asked.what {
                *to = PageState::Shared;
            }
        }
    }

    /// Whether a request over these pages waits for its answer, or a conversion of them is granted.
    pub fn is_begun(&self, pages: u64) -> bool {
        let waits =
            |asked: &Asked| matches!(asked.what, What::Begin { pages: over, .. } if over & pages != 0);
        self.asked.iter().any(waits) || self.granted.iter().any(|granted| granted.pages & pages != 0)
    }

    pub fn may_be_settled(&self, invalidation: InvalidationId) -> bool {
        self.settleable.contains(&invalidation)
    }

    pub fn waiting(&self) -> Option<String> {
        self.asked.first().map(|asked| format!("{asked:?}"))
    }

    /// Whether something is in quarantine because it may still be mapped.
    pub fn is_in_doubt(&self) -> bool {
        let in_doubt = |(_, cause): (_, Cause)| !matches!(cause, Cause::ClientGone | Cause::OwnerUnknown);
        self.pages.iter().filter_map(|page| page.quarantine).any(in_doubt)
    }

    /// The quarantines, in order.
    pub fn quarantines(&self) -> Vec<InvalidationId> {
        let mut ids: Vec<_> =
            self.pages.iter().filter_map(|page| page.quarantine).map(|(id, _)| id).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    fn quarantined_by(&self, id: InvalidationId) -> u64 {
        let of = |page: &Page| page.quarantine.is_some_and(|(since, _)| since == id);
        self.pages.iter().enumerate().filter(|(_, page)| of(page)).fold(0, |mask, (nth, _)| mask | 1 << nth)
    }

    /// What a client is told.
    pub fn answered(&mut self, caller: Caller, answer: &Answer, kernel: &State) -> Kept {
        let Some(at) = self.asked.iter().position(|asked| asked.caller == caller) else {
            if self.dead.contains(&caller.client) {
                return Ok(());
            }
            broken!("{caller:?} is answered although it waits for nothing: {answer:?}");
        };
        let what = self.asked.remove(at).what;
        match (what, answer) {
            (What::Begin { pages, to, by_passgate }, Answer::Verdict { invalidation, verdict }) => {
                let reachable = kernel.reachable() & pages;
                match (verdict, by_passgate) {
                    (Verdict::Done, _) if reachable != 0 => {
                        broken!("{invalidation:?} is done, but devices reach pages {reachable:#b}");
                    }
                    (Verdict::Done, false) => {
                        self.granted.push(Granted { id: *invalidation, client: caller.client, pages, to });
                    }
                    (Verdict::Done, true) | (Verdict::Refused { .. } | Verdict::Unknown { .. }, _) => {}
                }
            }
            (What::Begin { .. } | What::Remove(_) | What::Adopt | What::Release(..), Answer::Refused(_)) => {}
            (What::Add, Answer::RegionAdded { .. } | Answer::Refused(_)) => {}
            (What::Remove(_), Answer::RegionRemoved { .. } | Answer::Verdict { .. }) => {}
            (What::End, Answer::Ended { .. }) => {}
            (What::Release(id, to), Answer::Released { .. }) => self.released(id, to),
            (What::Adopt, Answer::Adopted { regions, unended }) => {
                for region in &mut self.regions {
                    if regions.iter().any(|adopted| adopted.region == region.id) {
                        region.owner = caller.client;
                    }
                }
                if let Some(one) = unended.iter().find(|one| !self.may_be_settled(one.invalidation)) {
                    broken!("{one:?} is told as unended to whom never began it");
                }
            }
            (what, answer) => broken!("{what:?} is answered {answer:?}"),
        }
        Ok(())
    }

    /// An operator says what the pages of a quarantine are, and the gate lets them go.
    fn released(&mut self, id: InvalidationId, to: PageState) {
        let pages = self.quarantined_by(id);
        self.set(pages, if to == PageState::Shared { Content::Shared } else { Content::Private });
    }

    /// What everybody is told.
    pub fn noticed(&mut self, notice: &Notice, kernel: &State) -> Kept {
        match *notice {
            Notice::Quarantined { invalidation, range, reason, .. } => {
                let pages = mask(range);
                for (nth, page) in self.pages.iter_mut().enumerate().filter(|(nth, _)| pages >> nth & 1 == 1)
                {
                    if let Some((since, _)) = page.quarantine {
                        broken!("page {nth} is quarantined by {invalidation:?} and by {since:?}");
                    }
                    page.quarantine = Some((invalidation, reason.cause));
                }
                if self.resuming {
                    self.settleable.push(invalidation);
                }
            }
            Notice::Freed { range, .. } => {
                let pages = mask(range);
                for (nth, page) in self.pages.iter_mut().enumerate().filter(|(nth, _)| pages >> nth & 1 == 1)
                {
                    match page.quarantine.take() {
                        Some((_, Cause::ClientGone | Cause::OwnerUnknown)) => {
                            broken!("page {nth} comes out of quarantine although nobody knows what it is");
                        }
                        Some(_) => {}
                        None => broken!("page {nth} comes out of a quarantine in which it was not"),
                    }
                }
            }
            Notice::Released { range, .. } => {
                let pages = mask(range);
                for (nth, page) in self.pages.iter_mut().enumerate() {
                    page.quarantine = page.quarantine.filter(|_| pages >> nth & 1 == 0);
                }
            }
            Notice::RegionClosed { region } => {
                if let Some(at) = self.regions.iter().position(|one| one.id == region) {
                    let gone = self.regions.remove(at);
                    let pages = self.pages.len() as u64;
                    if let Some(page) = (gone.start..gone.start + pages).find(|page| kernel.maps(*page)) {
                        broken!("{region:?} is closed while IOVA page {page} is mapped");
                    }
                }
            }
            Notice::SessionClosed { client } => {
                if let Some(region) = self.regions.iter().find(|region| region.owner == client) {
                    broken!("{client:?} is closed, but has {region:?}");
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A map over these pages is asked of the kernel.
    pub fn maps(&self, pages: u64) -> Kept {
        for (nth, page) in self.pages.iter().enumerate().filter(|(nth, _)| pages >> nth & 1 == 1) {
            if let Some((since, cause)) = page.quarantine {
                broken!("page {nth} is mapped again, in quarantine since {since:?} ({cause:?})");
            }
        }
        if let Some(granted) = self.granted.iter().find(|granted| granted.pages & pages != 0) {
            broken!("pages {pages:#b} are mapped between begin and end of {:?}", granted.id);
        }
        Ok(())
    }

    /// passgate converts these pages now.
    pub fn converts(&mut self, id: InvalidationId, pages: u64, to: PageState, kernel: &State) -> Kept {
        let reachable = kernel.reachable() & pages;
        if reachable != 0 {
            broken!("{id:?} is converted while devices reach pages {reachable:#b}");
        }
        self.converting.push(Granted { id, client: ClientId(0), pages, to });
        Ok(())
    }

    /// passgate's conversion has come to its end, and the session hears of it.
    pub fn converted(&mut self, id: InvalidationId, outcome: Outcome) {
        for granted in self.converting.extract_if(.., |granted| granted.id == id).collect::<Vec<_>>() {
            match outcome {
                Outcome::Committed => self.set(granted.pages, granted.content()),
                Outcome::NotCommitted => {}
                Outcome::Unknown { .. } => self.set(granted.pages, Content::Unknown),
            }
        }
    }

    /// What must be so at any moment.
    pub fn check(&mut self, kernel: &State, now: Instant) -> Kept {
        if let Some(late) = self.asked.iter().find(|asked| asked.due.is_some_and(|due| due < now)) {
            broken!("no answer in time to {late:?}");
        }
        if let Some(page) = kernel.mapped_twice {
            broken!("IOVA page {page} is mapped although it was never unmapped");
        }
        let reachable = kernel.reachable();
        let open = self.granted.iter().chain(&self.converting).fold(0, |pages, one| pages | one.pages);
        let is_shown = !self.regions.is_empty();
        for (nth, page) in self.pages.iter_mut().enumerate() {
            let is_reachable = reachable >> nth & 1 == 1;
            let may_be_reached = is_shown && page.content == Content::Shared && open >> nth & 1 == 0;
            if is_reachable && !may_be_reached {
                broken!("devices reach page {nth}, which its owner may have made private: {page:?}");
            }
        }
        Ok(())
    }
}
