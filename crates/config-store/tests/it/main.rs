//! Integration tests of the store.

mod reference;
mod samples;
