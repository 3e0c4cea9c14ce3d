//! The Huffman code of strings (RFC 7541 5.2, appendix B).
//!
//! Only decoding: we never encode so, see [`Encoder`](super::Encoder).

/// How many bits the code of each byte has (RFC 7541 appendix B), EOS last. The code is canonical: shorter codes come
/// first, those of one length in the order of their bytes; so these lengths are all of it.
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, // 0x00
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28, // 0x10
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, // 0x20
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, // 0x30
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, // 0x40
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, // 0x50
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, // 0x60
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, // 0x70
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, // 0x80
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, // 0x90
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, // 0xa0
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, // 0xb0
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, // 0xc0
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, // 0xd0
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, // 0xe0
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, // 0xf0
    30, // EOS
];

const MAX_LENGTH: usize = 30;
const EOS: u16 = 256;
/// Codes of so many bits are decoded by one look at [`SHORT`]: nearly all bytes of header fields.
const SHORT_BITS: usize = 10;

/// For each ten bits, the byte that they begin with and its code's length; the length is 0 if it is longer.
static SHORT: [(u8, u8); 1 << SHORT_BITS] = {
    let mut short = [(0, 0); 1 << SHORT_BITS];
    let mut rank = 0;
    let mut next = 0;
    while rank < CODE.symbols.len() {
        let symbol = CODE.symbols[rank];
        let length = LENGTHS[symbol as usize];
        if length as usize > SHORT_BITS {
            break;
        }
        let end = next + (1 << (SHORT_BITS - length as usize));
        while next < end {
            short[next] = (symbol as u8, length);
            next += 1;
        }
        rank += 1;
    }
    short
};

struct Code {
    /// In the order of their codes.
    symbols: [u16; 257],
    /// Of each length: the first code that is longer, as if it had 32 bits.
    limits: [u32; MAX_LENGTH + 1],
    /// Of each length: what its first code (of that many bits) is more than its rank in `symbols`.
    offsets: [u32; MAX_LENGTH + 1],
}

static CODE_TABLE: Code = CODE;
const CODE: Code = {
    let mut code = Code { symbols: [0; 257], limits: [0; MAX_LENGTH + 1], offsets: [0; MAX_LENGTH + 1] };
    let mut rank = 0;
    let mut next = 0u32;
    let mut length = 1;
    while length <= MAX_LENGTH {
        next <<= 1;
        code.offsets[length] = next.wrapping_sub(rank as u32);
        let mut symbol = 0;
        while symbol < LENGTHS.len() {
            if LENGTHS[symbol] as usize == length {
                code.symbols[rank] = symbol as u16;
                rank += 1;
                next += 1;
            }
            symbol += 1;
        }
        // All ones, which only EOS has, ends beyond 32 bits.
        code.limits[length] = ((next as u64) << (32 - length)) as u32;
        length += 1;
    }
    code
};

/// Appends what `coded` stands for. None if it holds EOS, or ends in anything but up to seven ones.
pub(super) fn decode(coded: &[u8], out: &mut Vec<u8>) -> Option<()> {
    // No code is shorter than five bits.
    out.reserve(coded.len() * 8 / 5);
    let mut rest = coded;
    // The next bits are the highest ones of `bits`; behind the `count` that are there, it is zero.
    let (mut bits, mut count) = (0u64, 0usize);
    loop {
        if count < 32 {
            match rest.split_first_chunk() {
                Some((word, after)) => {
                    bits |= u64::from(u32::from_be_bytes(*word)) << (32 - count);
                    count += 32;
                    rest = after;
                }
                None => {
                    for &byte in rest {
                        count += 8;
                        bits |= u64::from(byte) << (64 - count);
                    }
                    rest = &[];
                }
            }
        }
        let (symbol, length) = match SHORT[(bits >> (64 - SHORT_BITS)) as usize] {
            (_, 0) => long((bits >> 32) as u32)?,
            (symbol, length) => (symbol, usize::from(length)),
        };
        if length > count {
            break;
        }
        bits <<= length;
        count -= length;
        out.push(symbol);
    }
    let padding = u64::MAX.checked_shl(64 - count as u32).unwrap_or(0);
    (count < 8 && bits == padding).then_some(())
}

/// The byte whose code of more than [`SHORT_BITS`] the bits begin with, and its length.
#[cold]
fn long(bits: u32) -> Option<(u8, usize)> {
    let code = &CODE_TABLE;
    let length = (SHORT_BITS + 1..MAX_LENGTH).find(|&length| bits < code.limits[length]).unwrap_or(MAX_LENGTH);
    let rank = (bits >> (32 - length)).wrapping_sub(code.offsets[length]);
    let symbol = *code.symbols.get(rank as usize)?;
    if symbol == EOS { None } else { Some((symbol as u8, length)) }
}

#[cfg(test)]
pub(super) fn encode(bytes: &[u8], out: &mut Vec<u8>) {
    let (mut bits, mut count) = (0u64, 0);
    for &byte in bytes {
        let length = usize::from(LENGTHS[usize::from(byte)]);
        let rank = CODE.symbols.iter().position(|&symbol| symbol == u16::from(byte)).unwrap();
        bits = bits << length | u64::from((rank as u32).wrapping_add(CODE.offsets[length]));
        count += length;
        while count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    if count > 0 {
        out.push((bits << (8 - count)) as u8 | (0xff >> count));
    }
}
