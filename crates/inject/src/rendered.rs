//! What rendered templates say, kept: the pods of one workload differ in nothing that templates see.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

/// More texts than this are all forgotten.
const MOST: usize = 256;

/// A template's text as a pod, and that laid over an empty pod.
#[derive(Debug)]
pub(crate) struct Overlay {
    pub(crate) patch: Value,
    pub(crate) alone: Value,
}

/// Overlays by the text that they are made from.
#[derive(Debug, Default)]
pub(crate) struct Rendered(Mutex<HashMap<String, Arc<Overlay>>>);

impl Rendered {
    /// The overlay of a text; made if it is not known, and kept if that succeeds.
    pub(crate) fn get<E>(
        &self,
        text: String,
        make: impl FnOnce(&str) -> Result<Overlay, E>,
    ) -> Result<Arc<Overlay>, E> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&text) {
            return Ok(known.clone());
        }
        let overlay = Arc::new(make(&text)?);
        let mut kept = lock();
        if kept.len() >= MOST {
            kept.clear();
        }
        kept.insert(text, overlay.clone());
        Ok(overlay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_read_once_and_a_bad_one_each_time() {
        let (rendered, made) = (Rendered::default(), std::cell::Cell::new(0));
        let get = |text: &str| {
            rendered.get(text.to_owned(), |text| {
                made.set(made.get() + 1);
                let patch = Value::from(text);
                if text == "bad" { Err(()) } else { Ok(Overlay { patch, alone: Value::Null }) }
            })
        };
        assert_eq!(get("a").unwrap().patch, "a");
        assert_eq!((get("a").unwrap().patch.clone(), made.get()), (Value::from("a"), 1));
        assert!(get("bad").is_err() && get("bad").is_err());
        assert_eq!(made.get(), 3);
        for n in 0..MOST {
            get(&n.to_string()).unwrap();
        }
        assert!(rendered.0.lock().unwrap().len() <= MOST);
    }
}
