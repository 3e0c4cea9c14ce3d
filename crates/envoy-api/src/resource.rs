use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use bytes::Bytes;
use prost::{Message, Name};

use crate::canonical;

/// One encoded xDS resource, as it travels: name, version and bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Resource {
    /// The name a client subscribes to.
    pub name: Arc<str>,
    /// A hash of `body`, so that equal content has an equal version across rebuilds and restarts.
    pub version: Arc<str>,
    /// The encoded message, without the `Any` around it.
    pub body: Bytes,
}

impl Resource {
    /// Encodes `message` with sorted map entries, so that equal messages give equal bytes.
    pub fn new<M: Message + Name>(name: impl Into<Arc<str>>, message: &M) -> Resource {
        Resource::from_bytes(name, canonical::sort_maps(&M::full_name(), &message.encode_to_vec()))
    }

    /// A resource whose message is already encoded.
    pub fn from_bytes(name: impl Into<Arc<str>>, body: Vec<u8>) -> Resource {
        // `DefaultHasher::new` has fixed keys; a collision would hide one change of one resource, at 2^-64.
        let mut hasher = DefaultHasher::new();
        hasher.write(&body);
        Resource { name: name.into(), version: format!("{:016x}", hasher.finish()).into(), body: body.into() }
    }
}
