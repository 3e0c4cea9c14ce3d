//! How Istio's resources are written as JSON.
//!
//! istiod reads them with golang/protobuf v1.5's `jsonpb`, which is not canonical protobuf JSON: durations are
//! what Go's `time.ParseDuration` takes, enums are names or numbers, fields have their camelCase or their
//! proto name, `null` means unset everywhere, and unknown fields are ignored.

mod duration;

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::{Map, Value};

pub use duration::{Duration, InvalidDuration};

/// Declares messages: structs whose fields all default to unset.
///
/// `name "jsonName" "other name": Type,` is read under any of the names and written under the first in quotes,
/// and not written at all while it has its default.
macro_rules! message {
    ($(
        $(#[$meta:meta])*
        $name:ident {
            $( $(#[$field_meta:meta])* $field:ident $($json:literal $($other:literal)*)?: $type:ty, )*
        }
    )+) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
        pub struct $name {
            $(
                $(#[$field_meta])*
                #[serde(
                    $(rename(serialize = $json), alias = $json, $(alias = $other,)*)?
                    skip_serializing_if = "crate::wire::is_default",
                    deserialize_with = "crate::wire::field"
                )]
                pub $field: $type,
            )*
        }

        impl crate::wire::Json for $name {
            fn read<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                crate::wire::object(deserializer)
            }
        }
    )+};
}
pub(crate) use message;

/// Declares enums, `Variant = NUMBER "NAME",`; the first variant is the default.
macro_rules! enumeration {
    ($(
        $(#[$meta:meta])*
        $name:ident {
            $first:ident = $first_number:literal $first_text:literal,
            $( $variant:ident = $number:literal $text:literal, )*
        }
    )+) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub enum $name {
            #[default]
            #[doc = concat!("`", $first_text, "`")]
            $first = $first_number,
            $(
                #[doc = concat!("`", $text, "`")]
                $variant = $number,
            )*
        }

        impl $name {
            /// The name as it is written in configuration.
            pub fn as_str(self) -> &'static str {
                match self {
                    Self::$first => $first_text,
                    $( Self::$variant => $text, )*
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl crate::wire::Json for $name {
            fn read<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                const VALUES: &[(&str, i64, $name)] = &[
                    ($first_text, $first_number, $name::$first),
                    $( ($text, $number, $name::$variant), )*
                ];
                crate::wire::enum_value(deserializer, VALUES)
            }
        }
    )+};
}
pub(crate) use enumeration;

/// A type that can be a field of a message.
pub(crate) trait Json: Sized {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error>;
}

/// Reads a message, which is an object only: what serde derives takes lists too.
pub(crate) fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct ObjectVisitor<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }
    deserializer.deserialize_map(ObjectVisitor(PhantomData))
}

/// Lets serde's own collections hold what only we can read.
struct Wrap<T>(T);

impl<'de, T: Json> Deserialize<'de> for Wrap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::read(deserializer).map(Wrap)
    }
}

/// Reads one field; `null` is the default.
pub(crate) fn field<'de, D: Deserializer<'de>, T: Json + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::<Wrap<T>>::deserialize(deserializer)?.map(|wrap| wrap.0).unwrap_or_default())
}

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl<T: Json> Json for Option<T> {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::read(deserializer).map(Some)
    }
}

/// `null` elements are empty, as jsonpb makes them.
impl<T: Json + Default> Json for Vec<T> {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let list = Vec::<Option<Wrap<T>>>::deserialize(deserializer)?;
        Ok(list.into_iter().map(|item| item.map(|wrap| wrap.0).unwrap_or_default()).collect())
    }
}

impl<K: Ord + for<'k> Deserialize<'k>, T: Json + Default> Json for BTreeMap<K, T> {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = BTreeMap::<K, Option<Wrap<T>>>::deserialize(deserializer)?;
        Ok(map.into_iter().map(|(key, item)| (key, item.map(|wrap| wrap.0).unwrap_or_default())).collect())
    }
}

impl Json for String {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)
    }
}

impl Json for bool {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bool::deserialize(deserializer)
    }
}

impl Json for Value {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer)
    }
}

/// A `google.protobuf.Struct`.
impl Json for Map<String, Value> {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Map::deserialize(deserializer)
    }
}

/// A number, or a string that holds one.
struct NumberVisitor<T>(PhantomData<T>);

trait Number: Sized + TryFrom<i64> + TryFrom<u64> + std::str::FromStr {
    const NAME: &'static str;
}

impl Number for u32 {
    const NAME: &'static str = "an unsigned 32-bit integer";
}

impl Number for i32 {
    const NAME: &'static str = "a 32-bit integer";
}

impl Number for u64 {
    const NAME: &'static str = "an unsigned 64-bit integer";
}

impl Number for i64 {
    const NAME: &'static str = "a 64-bit integer";
}

impl<T: Number> Visitor<'_> for NumberVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::NAME)
    }

    fn visit_i64<E: Error>(self, v: i64) -> Result<T, E> {
        T::try_from(v).map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(v), &self))
    }

    fn visit_u64<E: Error>(self, v: u64) -> Result<T, E> {
        T::try_from(v).map_err(|_| E::invalid_value(serde::de::Unexpected::Unsigned(v), &self))
    }

    fn visit_f64<E: Error>(self, v: f64) -> Result<T, E> {
        // YAML's `50.0`; beyond 2^53 a float no longer tells which integer was meant.
        if v.fract() == 0.0 && v.abs() < 9e15 {
            return self.visit_i64(v as i64);
        }
        Err(E::invalid_value(serde::de::Unexpected::Float(v), &self))
    }

    fn visit_str<E: Error>(self, v: &str) -> Result<T, E> {
        v.parse().map_err(|_| E::invalid_value(serde::de::Unexpected::Str(v), &self))
    }
}

macro_rules! integers {
    ($($type:ty)*) => {$(
        impl Json for $type {
            fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(NumberVisitor::<$type>(PhantomData))
            }
        }
    )*};
}
integers!(u32 i32 u64 i64);

impl Json for f64 {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FloatVisitor;

        impl Visitor<'_> for FloatVisitor {
            type Value = f64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }

            fn visit_i64<E>(self, v: i64) -> Result<f64, E> {
                Ok(v as f64)
            }

            fn visit_u64<E>(self, v: u64) -> Result<f64, E> {
                Ok(v as f64)
            }

            fn visit_f64<E>(self, v: f64) -> Result<f64, E> {
                Ok(v)
            }

            fn visit_str<E: Error>(self, v: &str) -> Result<f64, E> {
                v.parse().map_err(|_| E::invalid_value(serde::de::Unexpected::Str(v), &self))
            }
        }
        deserializer.deserialize_any(FloatVisitor)
    }
}

impl Json for f32 {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        f64::read(deserializer).map(|v| v as f32)
    }
}

/// Reads an enum by name or number.
pub(crate) fn enum_value<'de, D, T>(deserializer: D, values: &'static [(&'static str, i64, T)]) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Copy,
{
    struct EnumVisitor<T: 'static>(&'static [(&'static str, i64, T)]);

    impl<T: Copy> EnumVisitor<T> {
        fn find<E: Error>(&self, what: &dyn fmt::Display, found: Option<&(&'static str, i64, T)>) -> Result<T, E> {
            found.map(|(_, _, value)| *value).ok_or_else(|| E::custom(format!("{what} is not one of {}", self.names())))
        }

        fn names(&self) -> String {
            self.0.iter().map(|(name, _, _)| *name).collect::<Vec<_>>().join(", ")
        }
    }

    impl<T: Copy> Visitor<'_> for EnumVisitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "one of {}", self.names())
        }

        fn visit_str<E: Error>(self, v: &str) -> Result<T, E> {
            self.find(&v, self.0.iter().find(|(name, _, _)| *name == v))
        }

        fn visit_i64<E: Error>(self, v: i64) -> Result<T, E> {
            self.find(&v, self.0.iter().find(|(_, number, _)| *number == v))
        }

        fn visit_u64<E: Error>(self, v: u64) -> Result<T, E> {
            self.visit_i64(i64::try_from(v).unwrap_or(i64::MAX))
        }
    }
    deserializer.deserialize_any(EnumVisitor(values))
}
