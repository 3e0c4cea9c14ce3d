use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

/// Results by their inputs, kept from one snapshot to the next while they are used.
///
/// Keys hold everything a result depends on. A key that holds an address must have a value that keeps the
/// object there alive, so that the address means nothing else later.
///
/// Two generations: what the snapshot before used, and what this one has used so far. What one snapshot
/// does not use is gone with the next.
#[derive(Debug, Default)]
pub struct Memo {
    /// Tables of one key and value type each. The lock covers look-ups, not the making of values: two who want
    /// the same at once both make it, which costs time but is right.
    tables: Mutex<HashMap<TypeId, Erased>>,
}

struct Table<K, V> {
    now: HashMap<K, V>,
    before: HashMap<K, V>,
}

impl Memo {
    /// The value for `key`, made if it is not known yet.
    pub fn get<K, V>(&self, key: K, make: impl FnOnce() -> V) -> V
    where
        K: Eq + Hash + Send + 'static,
        V: Clone + Send + 'static,
    {
        if let Some(value) = self.with(|table: &mut Table<K, V>| {
            if let Some(value) = table.now.get(&key) {
                return Some(value.clone());
            }
            let (key, value) = table.before.remove_entry(&key)?;
            table.now.insert(key, value.clone());
            Some(value)
        }) {
            return value;
        }
        let value = make();
        self.with(|table: &mut Table<K, V>| table.now.insert(key, value.clone()));
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

    /// The memo of the next snapshot. This one keeps nothing: its own snapshot is about to go.
    pub(crate) fn next(&self) -> Memo {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let mut moved = std::mem::take(&mut *tables);
        for erased in moved.values_mut() {
            (erased.age)(&mut erased.table);
        }
        Memo { tables: Mutex::new(moved) }
    }
}

/// A table whose types are forgotten, with the way to age it.
#[derive(Debug)]
struct Erased {
    table: Box<dyn Any + Send>,
    age: fn(&mut Box<dyn Any + Send>),
}

impl Erased {
    fn new<K: Send + 'static, V: Send + 'static>() -> Erased {
        fn age<K: 'static, V: 'static>(table: &mut Box<dyn Any + Send>) {
            if let Some(table) = table.downcast_mut::<Table<K, V>>() {
                table.before = std::mem::take(&mut table.now);
            }
        }
        let table = Table::<K, V> { now: HashMap::new(), before: HashMap::new() };
        Erased { table: Box::new(table), age: age::<K, V> }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_snapshots_do_not_use_is_made_again() {
        let made = std::cell::Cell::new(0);
        let get = |memo: &Memo| {
            memo.get("key", || {
                made.set(made.get() + 1);
                7
            })
        };
        let first = Memo::default();
        assert_eq!((get(&first), get(&first), made.get()), (7, 7, 1));
        let second = first.next();
        assert_eq!((get(&second), made.get()), (7, 1));
        let fourth = second.next().next();
        assert_eq!((get(&fourth), made.get()), (7, 2));
    }
}
