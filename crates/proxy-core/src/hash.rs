//! Hash functions whose values are part of Envoy's behaviour: consistent hashing must agree with it.

const P1: u64 = 0x9e37_79b1_85eb_ca87;
const P2: u64 = 0xc2b2_ae3d_27d4_eb4f;
const P3: u64 = 0x1656_67b1_9e37_79f9;
const P4: u64 = 0x85eb_ca77_c2b2_ae63;
const P5: u64 = 0x27d4_eb2f_1656_67c5;

/// xxHash64 (`HashUtil::xxHash64`).
pub fn xx64(input: &[u8], seed: u64) -> u64 {
    let mut rest = input;
    let mut hash = if input.len() >= 32 {
        let mut lanes = [seed.wrapping_add(P1).wrapping_add(P2), seed.wrapping_add(P2), seed, seed.wrapping_sub(P1)];
        while let Some((block, after)) = rest.split_at_checked(32) {
            for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
                *lane = round(*lane, word64(word));
            }
            rest = after;
        }
        let mut hash = lanes[0]
            .rotate_left(1)
            .wrapping_add(lanes[1].rotate_left(7))
            .wrapping_add(lanes[2].rotate_left(12))
            .wrapping_add(lanes[3].rotate_left(18));
        for lane in lanes {
            hash = (hash ^ round(0, lane)).wrapping_mul(P1).wrapping_add(P4);
        }
        hash
    } else {
        seed.wrapping_add(P5)
    };
    hash = hash.wrapping_add(input.len() as u64);
    while let Some((word, after)) = rest.split_at_checked(8) {
        hash = (hash ^ round(0, word64(word))).rotate_left(27).wrapping_mul(P1).wrapping_add(P4);
        rest = after;
    }
    if let Some((word, after)) = rest.split_at_checked(4) {
        let word = u64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        hash = (hash ^ word.wrapping_mul(P1)).rotate_left(23).wrapping_mul(P2).wrapping_add(P3);
        rest = after;
    }
    for byte in rest {
        hash = (hash ^ u64::from(*byte).wrapping_mul(P5)).rotate_left(11).wrapping_mul(P1);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(P2);
    hash = (hash ^ (hash >> 29)).wrapping_mul(P3);
    hash ^ (hash >> 32)
}

fn round(acc: u64, input: u64) -> u64 {
    acc.wrapping_add(input.wrapping_mul(P2)).rotate_left(31).wrapping_mul(P1)
}

fn word64(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len().min(8)].copy_from_slice(&bytes[..bytes.len().min(8)]);
    u64::from_le_bytes(word)
}

/// MurmurHash2 in 64 bits as libstdc++'s `std::hash` has it (Envoy `MurmurHash::murmurHash2`, its default seed).
pub fn murmur2(input: &[u8]) -> u64 {
    const MUL: u64 = 0xc6a4_a793_5bd1_e995;
    let shift_mix = |v: u64| v ^ (v >> 47);
    let mut hash = 0xc70f_6907u64 ^ (input.len() as u64).wrapping_mul(MUL);
    let mut words = input.chunks_exact(8);
    for word in &mut words {
        hash ^= shift_mix(word64(word).wrapping_mul(MUL)).wrapping_mul(MUL);
        hash = hash.wrapping_mul(MUL);
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        hash = (hash ^ word64(rest)).wrapping_mul(MUL);
    }
    shift_mix(shift_mix(hash).wrapping_mul(MUL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        // The values of the xxHash project's sanity checks and of Envoy's murmur_hash_test.
        assert_eq!(xx64(b"", 0), 0xef46_db37_51d8_e999);
        assert_eq!(xx64(b"foo", 0), 3_728_699_739_546_630_719);
        assert_eq!(xx64(b"bar", 0), 5_234_164_152_756_840_025);
        assert_eq!(murmur2(b"hello"), 2_762_169_579_135_187_400);
    }

    #[test]
    fn long_input_uses_the_lanes() {
        assert_eq!(xx64(b"Nobody inspects the spammish repetition", 0), 0xfbce_a83c_8a37_8bf1);
    }
}
