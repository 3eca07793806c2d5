//! Records of 64 bytes that are written and cleared one by one, in tables of a store.
//!
//! A record exists while its first word is not 0. That word is written last and cleared first, so a process that ends at any
//! instruction leaves either the whole record or none.

use std::sync::atomic::Ordering::{Relaxed, Release};

use crate::gate::ledger::{Full, Key, Store, Table};

/// A record; its first word is not 0.
pub(super) type Record = [u64; 8];

/// The place of a record among those of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(u32);

/// The records of one kind.
#[derive(Debug)]
pub(super) struct Slots {
    store: Store,
    kind: u64,
    /// Tables of [`RECORDS_PER_TABLE`] records each.
    tables: Vec<Table>,
    /// The slots without a record; the next to be used is the last.
    free: Vec<u32>,
}

/// The number of records in one table of 64 KiB.
const RECORDS_PER_TABLE: u32 = 1024;

impl Slots {
    /// Opens the tables of this kind in the store, if there are any. Returns the records that are in them, too.
    pub(super) fn open(store: &Store, kind: u64) -> (Self, Vec<(Slot, Record)>) {
        let key = |nth| Key { kind, a: nth, b: 0 };
        let tables = (0..).map_while(|nth| {
            store.table(key(nth)).filter(|table| table.lines() == RECORDS_PER_TABLE as usize)
        });
        let tables: Vec<Table> = tables.collect();
        let (mut found, mut free) = (Vec::new(), Vec::new());
        for at in 0..tables.len() as u32 * RECORDS_PER_TABLE {
            match read(&tables, at) {
                Some(record) => found.push((Slot(at), record)),
                None => free.push(at),
            }
        }
        // The lowest is used first: pages that are never written take no memory.
        free.reverse();
        (Self { store: store.clone(), kind, tables, free }, found)
    }

    /// Writes a record into a free slot. Returns an error if the store has no room for another table.
    pub(super) fn put(&mut self, record: Record) -> Result<Slot, Full> {
        let at = match self.free.pop() {
            Some(at) => at,
            None => self.grow()?,
        };
        self.write(at, record);
        Ok(Slot(at))
    }

    /// Clears a record and frees its slot.
    pub(super) fn clear(&mut self, Slot(at): Slot) {
        if let Some(words) = words(&self.tables, at) {
            words[0].store(0, Release);
            self.free.push(at);
        }
    }

    fn write(&self, at: u32, record: Record) {
        let Some(words) = words(&self.tables, at) else { return };
        for (word, value) in words.iter().zip(record).skip(1) {
            word.store(value, Relaxed);
        }
        // Last, and not before the others: with this word the record exists.
        words[0].store(record[0], Release);
    }

    fn grow(&mut self) -> Result<u32, Full> {
        let nth = self.tables.len() as u32;
        let key = Key { kind: self.kind, a: nth.into(), b: 0 };
        self.tables.push(self.store.reserve(key, RECORDS_PER_TABLE)?);
        let first = nth * RECORDS_PER_TABLE;
        self.free.extend((first + 1..first + RECORDS_PER_TABLE).rev());
        Ok(first)
    }
}

fn words(tables: &[Table], at: u32) -> Option<&[std::sync::atomic::AtomicU64; 8]> {
    tables.get((at / RECORDS_PER_TABLE) as usize)?.line((at % RECORDS_PER_TABLE) as usize)
}

fn read(tables: &[Table], at: u32) -> Option<Record> {
    let words = words(tables, at)?;
    let record = std::array::from_fn(|nth| words[nth].load(Relaxed));
    (record[0] != 0).then_some(record)
}

#[cfg(test)]
mod tests {
    use passgate_bindings::words::Words;

    use super::*;

    #[test]
    fn records_are_found_after_reopening_and_slots_are_reused() {
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
        assert_eq!(store.footprint(), footprint, "cleared slots are reused");
        drop((slots, store));
        let store = Store::open(Words::from_fd(fd).unwrap()).unwrap();
        let (_, found) = Slots::open(&store, 77);
        let mut remaining: Vec<_> = found.iter().map(|(_, record)| record[0]).filter(|n| *n < 9000).collect();
        remaining.sort_unstable();
        assert_eq!(remaining, (1..3000).filter(|n| n % 3 != 0).collect::<Vec<_>>());
        assert_eq!(found.iter().filter(|(_, record)| record[0] == 9000).count(), 500);
        assert!(found.iter().all(|(_, record)| record[0] == 9000 || record[7] == 8 * record[0]));
    }
}
