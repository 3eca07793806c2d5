//! Records of 64 bytes that come and go, in tables of a store. A record is there once its first word is, which is
//! written last, and gone as soon as that is zero: a process that dies in between leaves the one or the other.

use std::sync::atomic::Ordering::{Relaxed, Release};

use crate::gate::ledger::{Full, Key, Store, Table};

/// A record; its first word is not 0.
pub(super) type Line = [u64; 8];

/// Where a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(u32);

/// Records of one kind.
#[derive(Debug)]
pub(super) struct Slots {
    store: Store,
    kind: u64,
    /// Each of [`LINES`] records.
    tables: Vec<Table>,
    free: Vec<u32>,
}

/// Records of one table: 64 KiB.
const LINES: u32 = 1024;

impl Slots {
    /// The records of this kind, and those that are there.
    pub(super) fn open(store: &Store, kind: u64) -> (Self, Vec<(Slot, Line)>) {
        let key = |nth| Key { kind, a: nth, b: 0 };
        let tables =
            (0..).map_while(|nth| store.table(key(nth)).filter(|table| table.lines() == LINES as usize));
        let tables: Vec<Table> = tables.collect();
        let (mut found, mut free) = (Vec::new(), Vec::new());
        for at in 0..tables.len() as u32 * LINES {
            match read(&tables, at) {
                Some(line) => found.push((Slot(at), line)),
                None => free.push(at),
            }
        }
        // The lowest first: what is never used takes no memory.
        free.reverse();
        (Self { store: store.clone(), kind, tables, free }, found)
    }

    /// Writes a record down.
    pub(super) fn put(&mut self, line: Line) -> Result<Slot, Full> {
        let at = match self.free.pop() {
            Some(at) => at,
            None => self.grow()?,
        };
        self.write(at, line);
        Ok(Slot(at))
    }

    /// The record is gone.
    pub(super) fn clear(&mut self, Slot(at): Slot) {
        if let Some(words) = line(&self.tables, at) {
            words[0].store(0, Release);
            self.free.push(at);
        }
    }

    fn write(&self, at: u32, line_: Line) {
        let Some(words) = line(&self.tables, at) else { return };
        for (word, value) in words.iter().zip(line_).skip(1) {
            word.store(value, Relaxed);
        }
        words[0].store(line_[0], Release);
    }

    fn grow(&mut self) -> Result<u32, Full> {
        let nth = self.tables.len() as u32;
        self.tables.push(self.store.reserve(Key { kind: self.kind, a: nth.into(), b: 0 }, LINES)?);
        let first = nth * LINES;
        self.free.extend((first + 1..first + LINES).rev());
        Ok(first)
    }
}

fn line(tables: &[Table], at: u32) -> Option<&[std::sync::atomic::AtomicU64; 8]> {
    tables.get((at / LINES) as usize)?.line((at % LINES) as usize)
}

fn read(tables: &[Table], at: u32) -> Option<Line> {
    let words = line(tables, at)?;
    let read = std::array::from_fn(|nth| words[nth].load(Relaxed));
    (read[0] != 0).then_some(read)
}

#[cfg(test)]
mod tests {
    use passgate_bindings::words::Words;

    use super::*;

    #[test]
    fn records_are_found_again_and_room_is_used_again() {
        let words = Words::memfd("slots", 16 << 20).unwrap();
        let fd = words.fd().unwrap().try_clone_to_owned().unwrap();
        let store = Store::new(words).unwrap();
        let (mut slots, found) = Slots::open(&store, 77);
        assert!(found.is_empty());
        let put: Vec<_> =
            (1..3000u64).map(|n| (slots.put([n, 2, 3, 4, 5, 6, 7, 8 * n]).unwrap(), n)).collect();
        for (slot, _) in put.iter().filter(|(_, n)| n % 3 == 0) {
            slots.clear(*slot);
        }
        let footprint = store.footprint();
        for _ in 0..500 {
            slots.put([9000, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        }
        assert_eq!(store.footprint(), footprint, "what was freed is used again");
        drop((slots, store));
        let store = Store::open(Words::from_fd(fd).unwrap()).unwrap();
        let (_, found) = Slots::open(&store, 77);
        let mut left: Vec<_> = found.iter().map(|(_, line)| line[0]).filter(|n| *n < 9000).collect();
        left.sort_unstable();
        assert_eq!(left, (1..3000).filter(|n| n % 3 != 0).collect::<Vec<_>>());
        assert_eq!(found.iter().filter(|(_, line)| line[0] == 9000).count(), 500);
        assert!(found.iter().all(|(_, line)| line[0] == 9000 || line[7] == 8 * line[0]));
    }
}
