use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An object that there are many of and that is rarely looked at, kept as JSON: Kubernetes' types have so many fields, most
/// of them empty, that they take ten times the memory.
#[derive(Clone, Eq, PartialEq)]
pub struct Compact<T> {
    json: Box<[u8]>,
    of: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned + Default> Compact<T> {
    /// The object itself.
    pub fn get(&self) -> T {
        // What `T` has written `T` can read; the type of this crate's making is proof enough to need no error.
        serde_json::from_slice(&self.json).unwrap_or_default()
    }
}

impl<T: Serialize> Compact<T> {
    /// Writes an object down.
    ///
    /// # Errors
    /// When JSON cannot say it.
    pub fn of(object: &T) -> Result<Self, serde_json::Error> {
        Ok(Compact { json: serde_json::to_vec(object)?.into(), of: PhantomData })
    }
}

impl<T: Serialize + Default> Default for Compact<T> {
    fn default() -> Self {
        // An object without any value always has a JSON form.
        Compact::of(&T::default()).unwrap_or(Compact { json: Box::default(), of: PhantomData })
    }
}

impl<T> fmt::Debug for Compact<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.json))
    }
}

impl<'de, T: DeserializeOwned + Serialize> Deserialize<'de> for Compact<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Compact::of(&T::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl<T: DeserializeOwned + Serialize + Default> Serialize for Compact<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.get().serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;

    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        let text = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"},"status":{"podIP":"10.0.0.1"}}"#;
        let compact: Compact<Pod> = serde_json::from_str(text).unwrap();
        let pod: Pod = serde_json::from_str(text).unwrap();
        assert_eq!(compact.get(), pod);
        assert_eq!(compact, Compact::of(&pod).unwrap());
        assert_ne!(compact, Compact::default());
        assert_eq!(Compact::<Pod>::default().get(), Pod::default());
        assert_eq!(serde_json::to_value(&compact).unwrap(), serde_json::to_value(&pod).unwrap());
    }
}
