//! The crate through the program: what it prints is what is judged.

mod simulation;
