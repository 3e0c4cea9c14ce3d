use std::cell::RefCell;

/// What several resources of one proxy have in common, made when it is first needed. For few keys.
pub(crate) struct Kept<K, V>(RefCell<Vec<(K, V)>>);

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Kept(RefCell::default())
    }
}

impl<K: PartialEq, V: Clone> Kept<K, V> {
    pub(crate) fn get(&self, key: K, make: impl FnOnce() -> V) -> V {
        if let Some((_, value)) = self.0.borrow().iter().find(|(known, _)| *known == key) {
            return value.clone();
        }
        let value = make();
        self.0.borrow_mut().push((key, value.clone()));
        value
    }
}
