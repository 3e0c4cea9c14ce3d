use std::any::{Any, TypeId};
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use foldhash::{HashMap, HashMapExt};

/// A shared object that is equal only to itself: part of a [`Memo`]'s key.
///
/// It keeps the object alive, so that its address means nothing else later.
pub struct Same<T: ?Sized>(pub Arc<T>);

impl<T: ?Sized> Clone for Same<T> {
    fn clone(&self) -> Self {
        Same(self.0.clone())
    }
}

impl<T: ?Sized> fmt::Debug for Same<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Same({:p})", self.0)
    }
}

impl<T: ?Sized> PartialEq for Same<T> {
    fn eq(&self, other: &Self) -> bool {
        Arc::as_ptr(&self.0).cast::<()>() == Arc::as_ptr(&other.0).cast::<()>()
    }
}

impl<T: ?Sized> Eq for Same<T> {}

impl<T: ?Sized> Hash for Same<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).cast::<()>().hash(state);
    }
}

/// Results by their inputs, kept from one snapshot to the next while they are used.
///
/// Keys hold everything that a result depends on beyond MeshConfig and [`crate::Settings`]: with others of those
/// there is another memo. So it does not matter which snapshot's proxies ask.
#[derive(Debug, Default)]
pub struct Memo {
    /// Tables of one key and value type each. The lock covers look-ups, not the making of values: two who want
    /// the same at once both make it, which costs time but is right.
    tables: Mutex<HashMap<TypeId, Erased>>,
    /// Failures of generation, for metrics.
    failures: Mutex<BTreeMap<&'static str, u64>>,
}

/// A table with more values than this forgets them all: proxies may ask for what names they like.
const MOST: usize = 1 << 18;

/// After so many snapshots with proxies that ask, what none of them asked for is forgotten.
const KEPT: u64 = 1;

struct Table<K, V> {
    /// Values and the epoch of their last use.
    values: HashMap<K, (V, u64)>,
    /// Snapshots that the table was used with.
    epoch: u64,
    used: bool,
}

impl Memo {
    /// The value for `key`, made if it is not known yet.
    pub fn get<K, V>(&self, key: K, make: impl FnOnce() -> V) -> V
    where
        K: Eq + Hash + Send + 'static,
        V: Clone + Send + 'static,
    {
        self.get_of(MOST, key, make)
    }

    /// Notes that something which is made could not be made as it was wished.
    pub fn failed(&self, what: &'static str) {
        *self.failures.lock().unwrap_or_else(PoisonError::into_inner).entry(what).or_default() += 1;
    }

    /// What failed, and how often.
    pub fn failures(&self) -> BTreeMap<&'static str, u64> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// As [`Memo::get`] for big values, of which at most so many are kept.
    pub fn get_of<K, V>(&self, most: usize, key: K, make: impl FnOnce() -> V) -> V
    where
        K: Eq + Hash + Send + 'static,
        V: Clone + Send + 'static,
    {
        let known = self.with(|table: &mut Table<K, V>| {
            table.used = true;
            let (value, last) = table.values.get_mut(&key)?;
            *last = table.epoch;
            Some(value.clone())
        });
        if let Some(value) = known {
            return value;
        }
        let value = make();
        self.with(|table: &mut Table<K, V>| {
            let epoch = table.epoch;
            if table.values.len() >= most {
                table.values.clear();
            }
            table.values.insert(key, (value.clone(), epoch));
            Some(())
        });
        value
    }

    /// A value that follows what it is made of: `refresh` gets the one that was made last and gives the one that holds now,
    /// which must not depend on the last but for the time it takes. At most so many are kept.
    pub fn follow<K, V>(&self, most: usize, key: K, refresh: impl FnOnce(Option<V>) -> V) -> V
    where
        K: Eq + Hash + Send + 'static,
        V: Clone + Send + 'static,
    {
        let last = self.with(|table: &mut Table<K, V>| {
            table.used = true;
            table.values.get(&key).map(|(value, _)| value.clone())
        });
        let value = refresh(last);
        self.with(|table: &mut Table<K, V>| {
            let epoch = table.epoch;
            if table.values.len() >= most && !table.values.contains_key(&key) {
                table.values.clear();
            }
            table.values.insert(key, (value.clone(), epoch));
            Some(())
        });
        value
    }

    fn with<K, V, R>(&self, work: impl FnOnce(&mut Table<K, V>) -> Option<R>) -> Option<R>
    where
        K: Send + 'static,
        V: Send + 'static,
    {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let erased = tables.entry(TypeId::of::<Table<K, V>>()).or_insert_with(Erased::new::<K, V>);
        work(erased.table.downcast_mut()?)
    }

    /// Shows every value to `look`, with the name of its key's type. For people: makers wait meanwhile.
    pub fn each(&self, mut look: impl FnMut(&'static str, &dyn Any)) {
        let tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        for erased in tables.values() {
            (erased.each)(&*erased.table, &mut |value| look(erased.keys, value));
        }
    }

    /// Forgets everything, which costs time but is right.
    pub fn clear(&self) {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// A new snapshot begins: forgets what has not been used for some.
    pub(crate) fn age(&self) {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        for erased in tables.values_mut() {
            (erased.age)(&mut *erased.table);
        }
    }
}

/// Shows each value of a table.
type Each = fn(&(dyn Any + Send), &mut dyn FnMut(&dyn Any));

/// A table whose types are forgotten, with the ways to age it and to see what is in it.
struct Erased {
    table: Box<dyn Any + Send>,
    age: fn(&mut (dyn Any + Send)),
    each: Each,
    keys: &'static str,
}

impl fmt::Debug for Erased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Erased").finish_non_exhaustive()
    }
}

impl Erased {
    fn new<K: Send + 'static, V: Send + 'static>() -> Erased {
        fn age<K: 'static, V: 'static>(table: &mut (dyn Any + Send)) {
            let Some(table) = table.downcast_mut::<Table<K, V>>() else { return };
            // Snapshots that come faster than proxies ask do not count.
            if std::mem::take(&mut table.used) {
                table.epoch += 1;
                let oldest = table.epoch.saturating_sub(KEPT);
                table.values.retain(|_, (_, last)| *last >= oldest);
            }
        }
        fn each<K: 'static, V: 'static>(table: &(dyn Any + Send), look: &mut dyn FnMut(&dyn Any)) {
            let Some(table) = table.downcast_ref::<Table<K, V>>() else { return };
            table.values.values().for_each(|(value, _)| look(value));
        }
        let table = Table::<K, V> { values: HashMap::new(), epoch: 0, used: false };
        Erased { table: Box::new(table), age: age::<K, V>, each: each::<K, V>, keys: std::any::type_name::<K>() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_snapshots_do_not_use_is_made_again() {
        let made = std::cell::Cell::new(0);
        let get = |memo: &Memo, key: &'static str| {
            memo.get(key, || {
                made.set(made.get() + 1);
                7
            })
        };
        let memo = Memo::default();
        assert_eq!((get(&memo, "a"), get(&memo, "a"), made.get()), (7, 7, 1));
        (0..9).for_each(|_| memo.age());
        assert_eq!((get(&memo, "a"), made.get()), (7, 1), "nobody asked for anything in between");
        for _ in 0..=KEPT {
            memo.age();
            get(&memo, "b");
        }
        memo.age();
        assert_eq!((get(&memo, "a"), made.get()), (7, 3));
    }

    #[test]
    fn everything_can_be_seen_and_forgotten() {
        let memo = Memo::default();
        memo.get("a", || 7);
        memo.get(1, || "x");
        let mut seen = Vec::new();
        memo.each(|keys, value| {
            seen.push((keys, value.downcast_ref::<i32>().copied(), value.downcast_ref::<&str>().copied()));
        });
        seen.sort();
        assert_eq!(seen, [("&str", Some(7), None), ("i32", None, Some("x"))]);
        memo.clear();
        memo.each(|_, _| panic!("nothing is left"));
    }

    #[test]
    fn a_followed_value_is_made_from_the_last() {
        let memo = Memo::default();
        let next = |key: &'static str| memo.follow(2, key, |last: Option<u32>| last.map_or(1, |last| last + 1));
        assert_eq!((next("a"), next("a"), next("b"), next("a")), (1, 2, 1, 3));
        assert_eq!((next("c"), next("a")), (1, 1), "no more than two are kept");
    }

    #[test]
    fn equal_objects_are_not_the_same() {
        let one = Arc::new(1);
        assert_eq!(Same(one.clone()), Same(one));
        assert_ne!(Same(Arc::new(1)), Same(Arc::new(1)));
    }
}
