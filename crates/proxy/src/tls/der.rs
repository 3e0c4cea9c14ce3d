//! As much DER (X.690) as is needed for what x509-parser does not read.

pub(super) const INTEGER: u8 = 0x02;
pub(super) const OCTETS: u8 = 0x04;
pub(super) const OID: u8 = 0x06;
pub(super) const ENUMERATED: u8 = 0x0a;
pub(super) const TIME: u8 = 0x18;
pub(super) const SEQUENCE: u8 = 0x30;

/// The tag of a constructed value that stands under a number.
pub(super) const fn under(number: u8) -> u8 {
    0xa0 | number
}

/// Values one after the other.
#[derive(Clone, Copy)]
pub(super) struct Der<'a>(pub(super) &'a [u8]);

impl<'a> Der<'a> {
    /// What the next value holds, if it has this tag.
    pub(super) fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        let (found, held, rest) = self.split()?;
        (found == tag).then(|| {
            self.0 = rest;
            held
        })
    }

    pub(super) fn sequence(&mut self) -> Option<Der<'a>> {
        self.take(SEQUENCE).map(Der)
    }

    /// Passes over the next value.
    pub(super) fn skip(&mut self) -> Option<()> {
        self.0 = self.split()?.2;
        Some(())
    }

    /// The next value's tag and contents, and what is behind it.
    fn split(&self) -> Option<(u8, &'a [u8], &'a [u8])> {
        let [tag, first, rest @ ..] = self.0 else { return None };
        let (length, rest) = match first {
            0..=0x7f => (usize::from(*first), rest),
            0x81..=0x84 => {
                let (length, rest) = rest.split_at_checked(usize::from(first - 0x80))?;
                (length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)), rest)
            }
            _ => return None,
        };
        let (held, rest) = rest.split_at_checked(length)?;
        Some((*tag, held, rest))
    }

    /// The whole of it is one sequence.
    pub(super) fn is_sequence(mut self) -> bool {
        self.take(SEQUENCE).is_some() && self.0.is_empty()
    }
}

/// A number that is not negative.
pub(super) fn unsigned(bytes: &[u8]) -> Option<u32> {
    let digits = bytes.strip_prefix(&[0]).unwrap_or(bytes);
    (digits.len() <= 4).then(|| digits.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
}
