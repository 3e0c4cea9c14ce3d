//! The loop behind every fuzz target.
//!
//! A target is a test that gives [`run`] its seeds and a function of bytes. The function must not panic, whatever the
//! bytes are, and asserts what it knows of its parser (pieces read as the whole, what is written can be read). What it
//! returns says how the input was taken; inputs that are taken in a new way are kept and changed further, which leads
//! the search into a parser on stable Rust, without instrumented code.
//!
//! As a plain test a target takes some thousand inputs, the same each time. `cargo xtask fuzz` sets `FUZZ_SECONDS`,
//! which makes it run that long from a seed that it prints; `FUZZ_SEED` repeats such a run.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Inputs of a plain test.
const FEW: u64 = 3000;
/// Inputs kept because they were taken in a new way.
const MAX_CORPUS: usize = 4096;
/// Bytes of one input.
const MAX_INPUT: usize = 64 * 1024;

/// Runs `target` on changed seeds. `words` are pieces that mean something to the parser.
///
/// # Panics
/// When the target does, after the input was printed.
pub fn run<T: Hash>(name: &str, seeds: &[&[u8]], words: &[&str], mut target: impl FnMut(&[u8]) -> T) {
    let seconds = number("FUZZ_SECONDS");
    let fresh = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
    let seed = number("FUZZ_SEED").unwrap_or_else(|| if seconds.is_some() { fresh() } else { 1 });
    let end = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut random = Random::new(seed);
    let mut corpus: Vec<Vec<u8>> = seeds.iter().map(|seed| seed.to_vec()).collect();
    let mut seen = HashSet::new();
    for seed in seeds {
        seen.insert(taken(name, seed, &mut target));
    }
    let mut count = 0u64;
    // The clock is looked at now and then: many targets take less time than it does.
    while count < FEW || end.is_some_and(|end| !count.is_multiple_of(64) || Instant::now() < end) {
        count += 1;
        let input = random.changed(&corpus, words);
        if seen.insert(taken(name, &input, &mut target)) && corpus.len() < MAX_CORPUS {
            corpus.push(input);
        }
    }
    println!("{name}: {count} inputs, taken in {} ways, seed {seed}", seen.len());
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn taken<T: Hash>(name: &str, input: &[u8], target: &mut impl FnMut(&[u8]) -> T) -> u64 {
    match catch_unwind(AssertUnwindSafe(|| target(input))) {
        Ok(how) => {
            let mut hasher = DefaultHasher::new();
            how.hash(&mut hasher);
            hasher.finish()
        }
        Err(panic) => {
            println!("{name} panicked on b\"{}\"", input.escape_ascii());
            resume_unwind(panic)
        }
    }
}

/// xorshift64*: good enough to choose changes.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Zero would stay zero, and seeds that are close must not begin alike.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        high as usize % limit.max(1)
    }

    /// One of the corpus with one to eight changes.
    fn changed(&mut self, corpus: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
        let mut input = corpus.get(self.below(corpus.len())).cloned().unwrap_or_default();
        for _ in 0..1 << self.below(4) {
            self.change(&mut input, corpus, words);
        }
        input.truncate(MAX_INPUT);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, corpus: &[Vec<u8>], words: &[&str]) {
        const BYTES: &[u8] = b"\0\x01\x7f\x80\xff\r\n\t :;,./%\"'{}[]()=+-_#?*\\09aZ";
        let at = self.below(input.len() + 1);
        let some = |random: &mut Self| (random.below(24) + 1).min(input.len() - at);
        match self.below(10) {
            0 if at < input.len() => input[at] ^= 1 << self.below(8),
            1 if at < input.len() => input[at] = BYTES[self.below(BYTES.len())],
            2 => input.insert(at, BYTES[self.below(BYTES.len())]),
            3 => {
                let end = at + some(self);
                input.drain(at..end);
            }
            4 => {
                // A piece again, somewhere else.
                let end = at + some(self);
                let piece = input[at..end].to_vec();
                let to = self.below(input.len() + 1);
                input.splice(to..to, piece);
            }
            5 => input.truncate(at),
            6 if at < input.len() => input[at] = self.below(256) as u8,
            7 => {
                // The rest of another one.
                let other = &corpus[self.below(corpus.len())];
                input.truncate(at);
                input.extend_from_slice(&other[self.below(other.len() + 1)..]);
            }
            8 if at < input.len() => {
                // A length that is off by a little, or by a lot.
                input[at] = input[at].wrapping_add([1, 255, 128, 2][self.below(4)]);
            }
            _ if !words.is_empty() => {
                let word = words[self.below(words.len())].bytes();
                let end = if self.below(2) == 0 { at } else { at + some(self) };
                input.splice(at..end, word);
            }
            _ => input.push(self.below(256) as u8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_lead_deeper_and_a_panic_is_found() {
        let deep = |input: &[u8]| {
            let depth = input.iter().zip(b"deep bug").take_while(|(a, b)| a == b).count();
            assert!(depth < 8, "found");
            depth
        };
        // Chance alone would need 2^64 inputs.
        assert!(catch_unwind(|| run("deep", &[b"d"], &["eep", " bug"], deep)).is_err());
    }

    #[test]
    fn runs_repeat() {
        let inputs = || {
            let mut random = Random::new(7);
            (0..100).map(|_| random.changed(&[b"a seed".to_vec()], &["word"])).collect::<Vec<_>>()
        };
        assert_eq!(inputs(), inputs());
    }
}
