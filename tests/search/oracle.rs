//! The oracle: the true state, independent of the session: the content of each page, and the requests that wait for an answer.
//!
//! It is derived from what clients do and from the answers and notices they get, never from the gate, and it judges each
//! promise.

use std::time::Instant;

use passgate::gate::{
    Answer, Caller, Cause, ClientId, InvalidationId, Notice, Outcome, PageState, QuarantineStatus, RegionId,
    Verdict,
};
use passgate_bindings::{PAGE, PageRange};

use crate::action::Ending;
use crate::kernel::State;

/// A broken promise, as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokenPromise(pub String);

pub type CheckResult<T = ()> = Result<T, BrokenPromise>;

/// Returns from the function with a broken promise.
macro_rules! broken {
    ($($how:tt)*) => { return Err($crate::oracle::BrokenPromise(format!($($how)*))) };
}
pub(crate) use broken;

/// The content of a page, as far as it can be known.
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
    /// The invalidation since which it is in quarantine, and the cause.
    pub quarantine: Option<(InvalidationId, Cause)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    Add,
    Remove(RegionId),
    Begin { pages: u64, to: PageState, by_passgate: bool },
    End,
    Release(InvalidationId, PageState),
    Adopt,
}

#[derive(Debug)]
struct Request {
    caller: Caller,
    kind: RequestKind,
    due: Option<Instant>,
}

/// A conversion that its owner, or passgate, may perform now.
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
    /// Set once its owner has requested its removal, or is gone.
    pub closing: bool,
}

#[derive(Debug)]
pub struct Oracle {
    pub pages: Vec<Page>,
    pub regions: Vec<Region>,
    pub granted: Vec<Granted>,
    /// Conversions that passgate performs now.
    pub converting: Vec<Granted>,
    requests: Vec<Request>,
    /// Clients that are gone: their requests may be answered or not.
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

impl Oracle {
    pub fn new(pages: u64) -> Self {
        let page = || Page { content: Content::Shared, quarantine: None };
        Self {
            pages: (0..pages).map(|_| page()).collect(),
            regions: Vec::new(),
            granted: Vec::new(),
            converting: Vec::new(),
            requests: Vec::new(),
            dead: Vec::new(),
            settleable: Vec::new(),
            resuming: false,
        }
    }

    /// True while a client waits for memory to be added.
    pub fn awaits_memory(&self) -> bool {
        self.requests.iter().any(|request| matches!(request.kind, RequestKind::Add))
    }

    pub fn add_request(&mut self, caller: Caller, kind: RequestKind, due: Option<Instant>) {
        self.requests.push(Request { caller, kind, due });
    }

    /// The removals of regions have this deadline now, because there was progress.
    pub fn renew_removals(&mut self, due: Option<Instant>) {
        let removals =
            self.requests.iter_mut().filter(|request| matches!(request.kind, RequestKind::Remove(_)));
        removals.for_each(|request| request.due = due);
    }

    fn set(&mut self, pages: u64, content: Content) {
        for (nth, page) in self.pages.iter_mut().enumerate() {
            if pages >> nth & 1 == 1 {
                page.content = content;
            }
        }
    }

    /// The owner ends a granted conversion.
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
        // A release that it requested takes effect, whether the client gets the answer or not.
        self.requests.retain(|request| {
            request.caller.client != client || matches!(request.kind, RequestKind::Release(..))
        });
        self.dead.push(client);
        self.regions
            .iter_mut()
            .filter(|region| region.owner == client)
            .for_each(|region| region.closing = true);
        for granted in self.granted.extract_if(.., |granted| granted.client == client).collect::<Vec<_>>() {
            self.set(granted.pages, Content::Unknown);
        }
    }

    /// The daemon is killed: no request will be answered.
    pub fn daemon_dies(&mut self) {
        self.requests.clear();
        let open: Vec<_> = self.granted.drain(..).chain(self.converting.drain(..)).collect();
        for granted in open {
            self.set(granted.pages, Content::Unknown);
            self.settleable.push(granted.id);
        }
        self.resuming = true;
    }

    /// The next daemon has resumed with this quarantine. If `was_pending`, the earlier daemon had made changes that it had not
    /// reported, and the quarantine is taken as it is.
    pub fn resume(&mut self, quarantine: &[QuarantineStatus], was_pending: bool) -> CheckResult {
        for (nth, page) in self.pages.iter_mut().enumerate() {
            let quarantined = quarantine.iter().find(|quarantined| mask(quarantined.range) >> nth & 1 == 1);
            match (page.quarantine, quarantined) {
                (Some(before), None) if !was_pending => {
                    broken!(
                        "page {nth}, in quarantine since {before:?}, is not in quarantine after the restart"
                    );
                }
                (Some(_), Some(_)) if !was_pending => {}
                // What the next daemon quarantines itself is recorded with its notice.
                (None, Some(_)) if !was_pending => {}
                _ => page.quarantine = None,
            }
        }
        Ok(())
    }

    pub fn waits_for_release(&self) -> bool {
        self.requests.iter().any(|request| matches!(request.kind, RequestKind::Release(..)))
    }

    /// The next daemon has resumed from the persistent ledger.
    pub fn resumed(&mut self) {
        self.resuming = false;
    }

    /// Records what the next daemon has in quarantine although no notice reported it before the kill.
    pub fn learn(&mut self, quarantine: &[QuarantineStatus]) {
        for (nth, page) in self.pages.iter_mut().enumerate() {
            if let Some(quarantined) =
                quarantine.iter().find(|quarantined| mask(quarantined.range) >> nth & 1 == 1)
            {
                page.quarantine.get_or_insert((quarantined.invalidation, quarantined.reason.cause));
            }
        }
    }

    /// No region showed the file, and one was added whose owner states that its pages are shared.
    pub fn reset_to_shared(&mut self) {
        let is_known =
            |page: &&mut Page| !matches!(page.quarantine, Some((_, Cause::ClientGone | Cause::OwnerUnknown)));
        self.pages.iter_mut().filter(is_known).for_each(|page| page.content = Content::Shared);
        // The owner's statement overrides a release that is not answered yet.
        for request in &mut self.requests {
            if let RequestKind::Release(_, to) = &mut request.kind {
                *to = PageState::Shared;
            }
        }
    }

    /// True if a begin over these pages waits for its answer, or a conversion of them is granted.
    pub fn is_begun(&self, pages: u64) -> bool {
        let waits = |request: &Request| matches!(request.kind, RequestKind::Begin { pages: over, .. } if over & pages != 0);
        self.requests.iter().any(waits) || self.granted.iter().any(|granted| granted.pages & pages != 0)
    }

    pub fn may_be_settled(&self, invalidation: InvalidationId) -> bool {
        self.settleable.contains(&invalidation)
    }

    pub fn waiting(&self) -> Option<String> {
        self.requests.first().map(|request| format!("{request:?}"))
    }

    /// True if a page is in quarantine because it may still be mapped.
    pub fn is_in_doubt(&self) -> bool {
        let in_doubt = |(_, cause): (_, Cause)| !matches!(cause, Cause::ClientGone | Cause::OwnerUnknown);
        self.pages.iter().filter_map(|page| page.quarantine).any(in_doubt)
    }

    /// Returns the invalidations that have pages in quarantine, in order.
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

    /// Judges an answer to a client.
    pub fn answered(&mut self, caller: Caller, answer: &Answer, kernel: &State) -> CheckResult {
        let Some(at) = self.requests.iter().position(|request| request.caller == caller) else {
            if self.dead.contains(&caller.client) {
                return Ok(());
            }
            broken!("{caller:?} is answered, but no request waits: {answer:?}");
        };
        let kind = self.requests.remove(at).kind;
        match (kind, answer) {
            (RequestKind::Begin { pages, to, by_passgate }, Answer::Verdict { invalidation, verdict }) => {
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
            (
                RequestKind::Begin { .. }
                | RequestKind::Remove(_)
                | RequestKind::Adopt
                | RequestKind::Release(..),
                Answer::Refused(_),
            ) => {}
            (RequestKind::Add, Answer::RegionAdded { .. } | Answer::Refused(_)) => {}
            (RequestKind::Remove(_), Answer::RegionRemoved { .. } | Answer::Verdict { .. }) => {}
            (RequestKind::End, Answer::Ended { .. }) => {}
            (RequestKind::Release(id, to), Answer::Released { .. }) => self.released(id, to),
            (RequestKind::Adopt, Answer::Adopted { regions, unended }) => {
                for region in &mut self.regions {
                    if regions.iter().any(|adopted| adopted.region == region.id) {
                        region.owner = caller.client;
                    }
                }
                if let Some(one) = unended.iter().find(|one| !self.may_be_settled(one.invalidation)) {
                    broken!("{one:?} is reported as unended, but was not open at the restart");
                }
            }
            (kind, answer) => broken!("{kind:?} is answered {answer:?}"),
        }
        Ok(())
    }

    /// An operator's release of a quarantine is answered: its pages are what the operator states.
    fn released(&mut self, id: InvalidationId, to: PageState) {
        let pages = self.quarantined_by(id);
        self.set(pages, if to == PageState::Shared { Content::Shared } else { Content::Private });
    }

    /// Judges a notice.
    pub fn noticed(&mut self, notice: &Notice, kernel: &State) -> CheckResult {
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
                            broken!("page {nth} leaves quarantine, although its state is unknown");
                        }
                        Some(_) => {}
                        None => broken!("page {nth} leaves quarantine, but was not in it"),
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
                    broken!("{client:?} is closed, but still has {region:?}");
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Judges a map request over these pages.
    pub fn maps(&self, pages: u64) -> CheckResult {
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

    /// Judges passgate's own conversion of these pages at its start.
    pub fn converts(&mut self, id: InvalidationId, pages: u64, to: PageState, kernel: &State) -> CheckResult {
        let reachable = kernel.reachable() & pages;
        if reachable != 0 {
            broken!("{id:?} is converted while devices reach pages {reachable:#b}");
        }
        self.converting.push(Granted { id, client: ClientId(0), pages, to });
        Ok(())
    }

    /// The result of passgate's own conversion is delivered to the session.
    pub fn converted(&mut self, id: InvalidationId, outcome: Outcome) {
        for granted in self.converting.extract_if(.., |granted| granted.id == id).collect::<Vec<_>>() {
            match outcome {
                Outcome::Committed => self.set(granted.pages, granted.content()),
                Outcome::NotCommitted => {}
                Outcome::Unknown { .. } => self.set(granted.pages, Content::Unknown),
            }
        }
    }

    /// Checks what must be true after every action.
    pub fn check(&mut self, kernel: &State, now: Instant) -> CheckResult {
        if let Some(late) = self.requests.iter().find(|request| request.due.is_some_and(|due| due < now)) {
            broken!("no answer in time to {late:?}");
        }
        if let Some(page) = kernel.mapped_twice {
            broken!("IOVA page {page} is mapped again, but was never unmapped");
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
