//! Whatever bytes a peer sends as header blocks: no panic, and its fields are the same after a way through our encoder.

use super::{Decoder, Encoder};

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

fn fields(decoder: &mut Decoder, block: &[u8]) -> (Fields, bool) {
    let mut fields = Vec::new();
    let taken = decoder.decode(block, |name, value| fields.push((name.to_vec(), value.to_vec()))).is_ok();
    (fields, taken)
}

#[test]
fn hpack() {
    const SEEDS: [&[u8]; 6] = [
        b"\x82\x86\x84\x41\x0fwww.example.com",
        b"\x82\x87\x85\xbf\x40\x0acustom-key\x0ccustom-value\xbe\x7e\x01a",
        b"\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff\x58\x86\xa8\xeb\x10\x64\x9c\xbf",
        b"\x20\x3f\xe1\x1f\x10\x08password\x06secret\x0f\x0d\x03xyz",
        b"\x3f\x21\x40\x01a\x01b\x40\x01c\x01d\xbf\xbe\x7f\x00\x01e",
        b"\x00\x83\xff\xff\xff\x7f\xff\xff\xff\xff\x0f",
    ];
    const WORDS: [&str; 8] =
        ["\x20", "\x3f\x01", "\x40\x01a\x01b", "\x7f\x00\x01v", "\x7f\x01", "\0\0\0", "\x0f\x2f\0", "\x10"];
    fuzz::run("hpack", &SEEDS, &WORDS, |bytes| {
        let mut from_peer = Decoder::new(if bytes.len() & 1 == 0 { 4096 } else { 100 });
        if bytes.len() & 2 == 0 {
            from_peer.acknowledged();
        }
        let (mut encoder, mut to_us) = (Encoder::new(), Decoder::new(4096));
        let mut how = Vec::new();
        // Several blocks: bytes that none of them holds alone stand in the dynamic table.
        for block in bytes.split_inclusive(|&byte| byte == b'\x85') {
            let (received, taken) = fields(&mut from_peer, block);
            how.push((received.len(), taken));
            // Twice: the second time, fields may come from the encoder's dynamic table.
            for size in [64 * block.len() as u32, 4096] {
                encoder.set_max_size(size);
                let mut sent = Vec::new();
                encoder.begin(&mut sent);
                for (name, value) in &received {
                    encoder.field(name, value, &mut sent);
                }
                assert_eq!(fields(&mut to_us, &sent), (received.clone(), true));
            }
            if !taken {
                break;
            }
        }
        how
    });
}
