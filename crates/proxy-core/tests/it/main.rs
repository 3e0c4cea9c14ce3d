//! The tables over whole configurations: the reference data of `conformance`, and bytes nobody vouches for.

mod fields;
mod fuzz;
mod goldens;
mod hostile;
mod proxy_cases;
mod reference;
mod simulation;
