use std::hash::BuildHasher;
use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;
use foldhash::quality::FixedState;
use prost::{Message, Name};

use crate::canonical;

/// One encoded xDS resource, as it travels: name, version and bytes. Shared: a clone is one pointer, so that lists for many
/// proxies cost little.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Resource(Arc<Parts>);

/// What a [`Resource`] is made of.
#[derive(Debug, Eq, PartialEq)]
pub struct Parts {
    /// The name a client subscribes to.
    pub name: Arc<str>,
    /// A hash of `body`, so that equal content has an equal version across rebuilds and restarts.
    pub version: Arc<str>,
    /// The encoded message, without the `Any` around it.
    pub body: Bytes,
}

/// Encodes `message` with sorted map entries.
pub fn encode<M: Message + Name>(message: &M) -> Vec<u8> {
    let mut body = message.encode_to_vec();
    canonical::sort_maps(&M::full_name(), &mut body);
    body
}

impl Deref for Resource {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl Resource {
    /// Encodes `message` with sorted map entries, so that equal messages give equal bytes.
    pub fn new<M: Message + Name>(name: impl Into<Arc<str>>, message: &M) -> Resource {
        Resource::from_bytes(name, encode(message))
    }

    /// A resource whose message is already encoded.
    pub fn from_bytes(name: impl Into<Arc<str>>, body: Vec<u8>) -> Resource {
        // With a fixed seed; a collision would hide one change of one resource, at 2^-64.
        let hash = FixedState::with_seed(0).hash_one(&body[..]);
        // Buffers grow by doubling, and resources stay.
        let body = Bytes::from(body.into_boxed_slice());
        let digits: [u8; 16] =
            std::array::from_fn(|place| b"0123456789abcdef"[(hash >> (60 - 4 * place) & 15) as usize]);
        Resource::with_version(name, std::str::from_utf8(&digits).unwrap_or_default(), body)
    }

    /// A resource whose version somebody else has chosen.
    pub fn with_version(name: impl Into<Arc<str>>, version: impl Into<Arc<str>>, body: impl Into<Bytes>) -> Resource {
        Resource(Arc::new(Parts { name: name.into(), version: version.into(), body: body.into() }))
    }

    /// Whether it is the same object, which needs no comparison.
    pub fn is(&self, other: &Resource) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
