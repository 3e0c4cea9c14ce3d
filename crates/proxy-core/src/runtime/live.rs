use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use mesh_types::ArcStr;

use super::Entry;

/// What a runtime can hold.
pub trait RuntimeValue: Copy + Debug + PartialEq {
    /// Which of the kinds it is: equal bits of different kinds are different values.
    const KIND: u8;
    /// What an entry means as such a value.
    fn of_entry(entry: &Entry) -> Option<Self>;
    /// For an atomic.
    fn to_bits(self) -> u64;
    /// From an atomic.
    fn of_bits(bits: u64) -> Self;
}

/// A value that follows the runtime, or never changes.
#[derive(Clone, Debug)]
pub struct Live<T> {
    default: T,
    cell: Option<Arc<Cell>>,
}

/// The state of one key for all who share its default.
#[derive(Debug)]
struct Cell {
    key: ArcStr,
    kind: u8,
    default: u64,
    read: fn(&Entry) -> Option<u64>,
    now: AtomicU64,
}

impl<T> Live<T> {
    /// Always this.
    pub const fn fixed(value: T) -> Self {
        Self { default: value, cell: None }
    }
}

impl<T: RuntimeValue> Live<T> {
    /// What holds now.
    #[inline]
    pub fn get(&self) -> T {
        match &self.cell {
            None => self.default,
            Some(cell) => T::of_bits(cell.now.load(Ordering::Relaxed)),
        }
    }
}

impl<T: PartialEq> PartialEq for Live<T> {
    fn eq(&self, other: &Self) -> bool {
        let key = |live: &Self| live.cell.as_ref().map(|cell| cell.key.clone());
        self.default == other.default && key(self) == key(other)
    }
}

/// All that is bound to keys.
#[derive(Debug, Default)]
pub(super) struct Cells {
    by_key: HashMap<ArcStr, Vec<Weak<Cell>>>,
    /// With so many keys, those that nobody follows any more are looked for.
    sweep_at: usize,
}

/// Keys that may be left over.
const FEW: usize = 64;

impl Cells {
    pub(super) fn bind<T: RuntimeValue>(&mut self, key: &str, default: T, now: T) -> Live<T> {
        if self.by_key.len() >= self.sweep_at.max(FEW) && !self.by_key.contains_key(key) {
            // Listeners have keys with their names in them, and come and go.
            self.by_key.retain(|_, bound| bound.iter().any(|cell| cell.strong_count() > 0));
            self.sweep_at = 2 * self.by_key.len();
        }
        let bound = match self.by_key.get_mut(key) {
            Some(bound) => bound,
            None => self.by_key.entry(key.into()).or_default(),
        };
        let same = |cell: &Arc<Cell>| cell.kind == T::KIND && cell.default == default.to_bits();
        if let Some(cell) = bound.iter().filter_map(Weak::upgrade).find(same) {
            return Live { default, cell: Some(cell) };
        }
        bound.retain(|cell| cell.strong_count() > 0);
        let cell = Arc::new(Cell {
            key: key.into(),
            kind: T::KIND,
            default: default.to_bits(),
            read: |entry| T::of_entry(entry).map(T::to_bits),
            now: AtomicU64::new(now.to_bits()),
        });
        bound.push(Arc::downgrade(&cell));
        Live { default, cell: Some(cell) }
    }

    /// The values are these now.
    pub(super) fn refresh<'a>(&mut self, entry: impl Fn(&str) -> Option<&'a Entry>) {
        self.by_key.retain(|key, bound| {
            bound.retain(|cell| cell.strong_count() > 0);
            for cell in bound.iter().filter_map(Weak::upgrade) {
                let now = entry(key).and_then(cell.read).unwrap_or(cell.default);
                cell.now.store(now, Ordering::Relaxed);
            }
            !bound.is_empty()
        });
    }
}

impl RuntimeValue for u64 {
    const KIND: u8 = 0;

    fn of_entry(entry: &Entry) -> Option<Self> {
        entry.whole()
    }

    fn to_bits(self) -> u64 {
        self
    }

    fn of_bits(bits: u64) -> Self {
        bits
    }
}

impl RuntimeValue for f64 {
    const KIND: u8 = 1;

    fn of_entry(entry: &Entry) -> Option<Self> {
        entry.number()
    }

    fn to_bits(self) -> u64 {
        f64::to_bits(self)
    }

    fn of_bits(bits: u64) -> Self {
        f64::from_bits(bits)
    }
}

impl RuntimeValue for bool {
    const KIND: u8 = 2;

    fn of_entry(entry: &Entry) -> Option<Self> {
        entry.flag()
    }

    fn to_bits(self) -> u64 {
        self.into()
    }

    fn of_bits(bits: u64) -> Self {
        bits != 0
    }
}

/// Parts and whole of a share.
impl RuntimeValue for (u32, u32) {
    const KIND: u8 = 3;

    fn of_entry(entry: &Entry) -> Option<Self> {
        entry.share()
    }

    fn to_bits(self) -> u64 {
        u64::from(self.0) << 32 | u64::from(self.1)
    }

    fn of_bits(bits: u64) -> Self {
        ((bits >> 32) as u32, bits as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_nobody_follows_are_forgotten() {
        let mut cells = Cells::default();
        let kept = cells.bind("kept", 1_u64, 1);
        for n in 0..1000 {
            cells.bind(&format!("listener-{n}"), 1_u64, 1);
        }
        assert!(cells.by_key.len() <= 2 * FEW, "{}", cells.by_key.len());
        cells.refresh(|_| None);
        assert_eq!((kept.get(), cells.by_key.len()), (1, 1));
    }
}
