//! From a header block to its fields (RFC 7541 3).

use super::huffman;
use super::table::{DEFAULT_SIZE, STATIC, Table};
use std::ops::Range;

/// Bytes that a name or a value may take in a block. nghttp2's limit, which is Envoy's (`NGHTTP2_HD_MAX_NV`).
const MAX_STRING: u32 = 65536;
/// Bytes of decoded strings that are kept from one block to the next.
const MAX_SCRATCH: usize = 8192;

/// What is wrong with a header block: COMPRESSION_ERROR of the connection (RFC 9113 4.3). The decoder is of no use
/// afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Decodes the header blocks of one connection, in the order they arrive in.
pub(crate) struct Decoder {
    table: Table,
    /// What we announced, bytes.
    announced: u32,
    /// What the peer may make of its table now.
    limit: u32,
    /// We made the table smaller: the next block must begin with a size update (RFC 7541 4.2).
    update_required: bool,
    /// Names and values that do not lie in the block as they are.
    scratch: Vec<u8>,
}

impl Decoder {
    /// `max_size`: SETTINGS_HEADER_TABLE_SIZE that we announced, bytes. It is the default size that counts until the
    /// peer has [acknowledged](Self::acknowledged) that.
    pub(crate) fn new(max_size: u32) -> Self {
        Self {
            table: Table::new(DEFAULT_SIZE),
            announced: max_size,
            limit: DEFAULT_SIZE,
            update_required: false,
            scratch: Vec::new(),
        }
    }

    /// The peer acknowledged our SETTINGS: blocks that follow keep to the size in it.
    pub(crate) fn acknowledged(&mut self) {
        self.limit = self.announced;
        if self.table.max() > self.limit as usize {
            self.table.set_max(self.limit);
            self.update_required = true;
        }
    }

    /// Decodes one whole header block; calls `each(name, value)` for each field, in order. Nothing is checked about
    /// names and values; they may be empty. The table is right afterwards, whatever `each` makes of the fields.
    pub(crate) fn decode(&mut self, block: &[u8], mut each: impl FnMut(&[u8], &[u8])) -> Result<(), Malformed> {
        let mut input = Input(block);
        self.size_updates(&mut input)?;
        while let Some(&first) = input.0.first() {
            if first & 0x80 != 0 {
                let (name, value) = self.field(input.integer(7)?)?;
                each(name, value);
            } else if first & 0x40 != 0 {
                self.literal(&mut input, 6, |table, name, value| {
                    each(name, value);
                    table.insert(name, value);
                })?;
            } else if first & 0x20 != 0 {
                // A size update that does not stand at the beginning (RFC 7541 4.2).
                return Err(Malformed);
            } else {
                // Without indexing, or never indexed.
                self.literal(&mut input, 4, |_, name, value| each(name, value))?;
            }
        }
        if self.scratch.capacity() > MAX_SCRATCH {
            self.scratch = Vec::new();
        }
        Ok(())
    }

    /// RFC 7541 6.3. nghttp2 takes any number of them.
    fn size_updates(&mut self, input: &mut Input<'_>) -> Result<(), Malformed> {
        while input.0.first().is_some_and(|first| first & 0xe0 == 0x20) {
            let size = input.integer(5)?;
            if size > self.limit {
                return Err(Malformed);
            }
            self.table.set_max(size);
            self.update_required = false;
        }
        if self.update_required { Err(Malformed) } else { Ok(()) }
    }

    /// The field of an index (RFC 7541 2.3.3).
    fn field(&self, index: u32) -> Result<(&[u8], &[u8]), Malformed> {
        let index = (index as usize).checked_sub(1).ok_or(Malformed)?;
        match STATIC.get(index) {
            Some(&field) => Ok(field),
            None => self.table.get(index - STATIC.len()).ok_or(Malformed),
        }
    }

    /// A literal field (RFC 7541 6.2) whose index of the name has a prefix of `prefix` bits.
    fn literal(
        &mut self,
        input: &mut Input<'_>,
        prefix: u32,
        take: impl FnOnce(&mut Table, &[u8], &[u8]),
    ) -> Result<(), Malformed> {
        self.scratch.clear();
        let name = match input.integer(prefix)? {
            0 => input.string(&mut self.scratch)?,
            index => match STATIC.get(index as usize - 1) {
                Some((name, _)) => Text::Plain(name),
                None => {
                    // The entry may be evicted to make room for the one that uses its name.
                    let (name, _) = self.table.get(index as usize - 1 - STATIC.len()).ok_or(Malformed)?;
                    self.scratch.extend_from_slice(name);
                    Text::Scratch(0..name.len())
                }
            },
        };
        let value = input.string(&mut self.scratch)?;
        take(&mut self.table, name.bytes(&self.scratch), value.bytes(&self.scratch));
        Ok(())
    }
}

/// A string, and where its bytes are.
enum Text<'a> {
    Plain(&'a [u8]),
    Scratch(Range<usize>),
}

impl<'a> Text<'a> {
    fn bytes(self, scratch: &'a [u8]) -> &'a [u8] {
        match self {
            Text::Plain(bytes) => bytes,
            Text::Scratch(range) => &scratch[range],
        }
    }
}

/// What is left of a block.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Result<u8, Malformed> {
        let (&byte, rest) = self.0.split_first().ok_or(Malformed)?;
        self.0 = rest;
        Ok(byte)
    }

    /// An integer that begins in the low `prefix` bits of a byte (RFC 7541 5.1). At most 32 bits in at most five bytes
    /// more, as nghttp2 has it.
    fn integer(&mut self, prefix: u32) -> Result<u32, Malformed> {
        let mask = (1 << prefix) - 1;
        let start = u32::from(self.byte()?) & mask;
        if start < mask {
            return Ok(start);
        }
        let mut value = u64::from(start);
        for shift in (0..32).step_by(7) {
            let byte = self.byte()?;
            value += u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return u32::try_from(value).map_err(|_| Malformed);
            }
        }
        Err(Malformed)
    }

    /// A string (RFC 7541 5.2); what was Huffman coded is appended to `scratch`.
    fn string(&mut self, scratch: &mut Vec<u8>) -> Result<Text<'a>, Malformed> {
        let coded = self.0.first().is_some_and(|first| first & 0x80 != 0);
        let length = self.integer(7)?;
        if length > MAX_STRING {
            return Err(Malformed);
        }
        let (bytes, rest) = self.0.split_at_checked(length as usize).ok_or(Malformed)?;
        self.0 = rest;
        if !coded {
            return Ok(Text::Plain(bytes));
        }
        let start = scratch.len();
        huffman::decode(bytes, scratch).ok_or(Malformed)?;
        Ok(Text::Scratch(start..scratch.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hpack::huffman::encode;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: String = hex.split_whitespace().collect();
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    }

    fn fields(decoder: &mut Decoder, block: &[u8]) -> Result<Vec<String>, Malformed> {
        let mut fields = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        decoder.decode(block, |name, value| fields.push(format!("{}: {}", text(name), text(value))))?;
        Ok(fields)
    }

    /// Blocks in the order of one connection, each with its fields.
    fn check(decoder: &mut Decoder, blocks: &[(&str, &[&str])]) {
        for (block, expected) in blocks {
            assert_eq!(fields(decoder, &bytes(block)).unwrap(), *expected, "{block}");
        }
    }

    fn refused(block: &[u8]) -> bool {
        fields(&mut Decoder::new(4096), block).is_err()
    }

    /// RFC 7541 C.2.
    #[test]
    fn single_fields() {
        let cases: [(&str, &[&str]); 4] = [
            ("400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572", &["custom-key: custom-header"]),
            ("040c 2f73 616d 706c 652f 7061 7468", &[":path: /sample/path"]),
            ("1008 7061 7373 776f 7264 0673 6563 7265 74", &["password: secret"]),
            ("82", &[":method: GET"]),
        ];
        for (case, entries) in cases.into_iter().zip([1, 0, 0, 0]) {
            let mut decoder = Decoder::new(4096);
            check(&mut decoder, &[case]);
            assert_eq!(decoder.table.len(), entries);
        }
    }

    /// RFC 7541 C.3 and C.4, the same without and with Huffman coding.
    #[test]
    fn requests() {
        let expected: [&[&str]; 3] = [
            &[":method: GET", ":scheme: http", ":path: /", ":authority: www.example.com"],
            &[":method: GET", ":scheme: http", ":path: /", ":authority: www.example.com", "cache-control: no-cache"],
            &[
                ":method: GET",
                ":scheme: https",
                ":path: /index.html",
                ":authority: www.example.com",
                "custom-key: custom-value",
            ],
        ];
        let plain = [
            "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "8286 84be 5808 6e6f 2d63 6163 6865",
            "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
        ];
        let coded = [
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            "8286 84be 5886 a8eb 1064 9cbf",
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
        ];
        for blocks in [plain, coded] {
            let mut decoder = Decoder::new(4096);
            for (block, expected) in blocks.into_iter().zip(expected) {
                check(&mut decoder, &[(block, expected)]);
            }
            assert_eq!(decoder.table.get(0), Some((&b"custom-key"[..], &b"custom-value"[..])));
            assert_eq!(decoder.table.get(2), Some((&b":authority"[..], &b"www.example.com"[..])));
            assert_eq!(decoder.table.len(), 3);
        }
    }

    /// RFC 7541 C.5 and C.6: a table of 256 bytes, so that entries are evicted.
    #[test]
    fn responses() {
        let expected: [&[&str]; 3] = [
            &[
                ":status: 302",
                "cache-control: private",
                "date: Mon, 21 Oct 2013 20:13:21 GMT",
                "location: https://www.example.com",
            ],
            &[
                ":status: 307",
                "cache-control: private",
                "date: Mon, 21 Oct 2013 20:13:21 GMT",
                "location: https://www.example.com",
            ],
            &[
                ":status: 200",
                "cache-control: private",
                "date: Mon, 21 Oct 2013 20:13:22 GMT",
                "location: https://www.example.com",
                "content-encoding: gzip",
                "set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
            ],
        ];
        let plain = [
            "4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3120 \
             474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "4803 3330 37c1 c0bf",
            "88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d 54c0 5a04 677a 6970 7738 \
             666f 6f3d 4153 444a 4b48 514b 425a 584f 5157 454f 5049 5541 5851 5745 4f49 553b 206d 6178 2d61 6765 3d33 \
             3630 303b 2076 6572 7369 6f6e 3d31",
        ];
        let coded = [
            "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad 1718 \
             63c7 8f0b 97c8 e9ae 82ae 43d3",
            "4883 640e ffc1 c0bf",
            "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 e6c7 \
             b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
        ];
        for blocks in [plain, coded] {
            let mut decoder = Decoder::new(256);
            decoder.acknowledged();
            check(&mut decoder, &[("3fe1 01", &[])]);
            for ((block, expected), entries) in blocks.into_iter().zip(expected).zip([4, 4, 3]) {
                check(&mut decoder, &[(block, expected)]);
                assert_eq!(decoder.table.len(), entries);
            }
        }
    }

    #[test]
    fn indices_out_of_range_are_refused() {
        for block in [&b"\x80"[..], b"\xbe", b"\x7e\x01v", b"\x0f\x2f\x01v", b"\xff\xff\xff\xff\xff\x0f"] {
            assert!(refused(block), "{block:x?}");
        }
        assert!(!refused(b"\x40\x01n\x01v\xbe\x7e\x01w\xbf"));
        assert!(refused(b"\x40\x01n\x01v\xbf"));
    }

    #[test]
    fn integers_have_32_bits_and_five_bytes_more() {
        let integer = |bytes: &'static [u8]| Input(bytes).integer(5);
        assert_eq!(integer(b"\x0a"), Ok(10)); // RFC 7541 C.1.1
        assert_eq!(integer(b"\xff\x9a\x0a"), Ok(1337)); // C.1.2
        assert_eq!(integer(b"\x1f\x00"), Ok(31));
        assert_eq!(integer(b"\x1f\x80\x80\x80\x80\x00"), Ok(31));
        assert_eq!(integer(b"\x1f\xe0\xff\xff\xff\x0f"), Ok(u32::MAX));
        for bad in [&b""[..], b"\x1f", b"\x1f\x80", b"\x1f\x80\x80\x80\x80\x80\x00", b"\x1f\xe1\xff\xff\xff\x0f"] {
            assert_eq!(Input(bad).integer(5), Err(Malformed), "{bad:x?}");
        }
    }

    #[test]
    fn a_block_cut_short_is_refused() {
        let block = b"\x40\x85\x25\xa8\x49\xe9\x5f\x03abc\x00\x01n\x01v\x7e\x00\x1f\x20\x02vv";
        let ends: Vec<_> = (0..=block.len()).filter(|&end| !refused(&block[..end])).collect();
        assert_eq!(ends, [0, 11, 16, 18, block.len()]);
    }

    #[test]
    fn strings_take_at_most_64_kilobytes_of_a_block() {
        for (length, refuse) in [(65536u32, false), (65537, true)] {
            let mut block = b"\x00\x01n\x7f".to_vec();
            let mut rest = length - 127;
            while rest >= 128 {
                block.push(0x80 | rest as u8);
                rest >>= 7;
            }
            block.push(rest as u8);
            block.resize(block.len() + length as usize, b'v');
            assert_eq!(refused(&block), refuse);
            block[3] = 0xff;
            // Huffman codes of zeros only: bytes `0`. What it needed is not kept.
            let start = block.len() - length as usize;
            block[start..].fill(0);
            let end = block.len();
            block[end - 1] = 0b0000_0111;
            let mut decoder = Decoder::new(4096);
            let mut count = 0;
            assert_eq!(decoder.decode(&block, |_, value| count += value.len()).is_err(), refuse);
            assert_eq!(count, if refuse { 0 } else { 65536 * 8 / 5 });
            assert!(refuse || decoder.scratch.capacity() == 0);
        }
    }

    #[test]
    fn size_updates_stand_at_the_beginning_and_keep_to_what_we_announced() {
        for (block, refuse) in [
            (&b"\x20"[..], false),
            (b"\x3f\xe1\x1f", false),
            (b"\x3f\xe2\x1f", true),
            (b"\x20\x3f\xe1\x1f\x20\x82", false),
            (b"\x82\x20", true),
            (b"\x3f", true),
        ] {
            assert_eq!(refused(block), refuse, "{block:x?}");
        }
        let mut decoder = Decoder::new(4096);
        assert!(fields(&mut decoder, b"\x40\x01n\x01v\xbe").is_ok());
        assert_eq!(fields(&mut decoder, b"\x20\xbe"), Err(Malformed));
    }

    #[test]
    fn a_smaller_table_must_be_confirmed() {
        let decoder = || {
            let mut decoder = Decoder::new(100);
            // Before the peer knows.
            assert!(fields(&mut decoder, b"\x3f\xe1\x1f\x40\x01n\x01v\xbe").is_ok());
            decoder.acknowledged();
            decoder
        };
        for (block, refuse) in
            [(&b""[..], true), (b"\x82", true), (b"\xbe", true), (b"\x3f\x46\x82", true), (b"\x3f\x45\xbe", false)]
        {
            let mut decoder = decoder();
            assert_eq!(fields(&mut decoder, block).is_err(), refuse, "{block:x?}");
            assert!(refuse || fields(&mut decoder, b"\xbe").is_ok());
        }
        // A larger one need not be.
        let mut decoder = Decoder::new(8192);
        decoder.acknowledged();
        assert!(fields(&mut decoder, b"\x82").is_ok());
        assert!(fields(&mut decoder, b"\x3f\xe1\x3f\x82").is_ok());
        assert!(fields(&mut decoder, b"\x3f\xe2\x3f\x82").is_err());
    }

    #[test]
    fn the_name_of_an_evicted_entry_can_be_used() {
        let mut decoder = Decoder::new(4096);
        assert_eq!(fields(&mut decoder, b"\x3f\x29\x40\x04name\x04long").unwrap(), ["name: long"]);
        // 72 bytes: both do not fit.
        assert_eq!(fields(&mut decoder, b"\x7e\x05other\xbe").unwrap(), ["name: other", "name: other"]);
        assert_eq!(decoder.table.len(), 1);
    }

    #[test]
    fn huffman_padding_is_up_to_seven_ones() {
        let refused = |coded: &[u8]| huffman::decode(coded, &mut Vec::new()).is_none();
        assert!(!refused(b""));
        // `0` is 00000, `&` 11111000 and `?` 1111111100.
        for (coded, refuse) in [
            (&[0b0000_0111][..], false),
            (&[0b0000_0110], true),
            (&[0b0000_0011], true),
            (&[0b1111_1000], false),
            (&[0b1111_1000, 0xff], true),
            (&[0b0000_0111, 0xff], true),
            (&[0xff], true),
            (&[0b1111_1111, 0b0011_1111], false),
            (&[0b1111_1111, 0b0000_0000], true),
            // EOS, with the rest of the byte.
            (&[0xff; 4], true),
            (&[0xff, 0xff, 0xff, 0xff, 0], true),
            (&[0xff; 100], true),
        ] {
            assert_eq!(refused(coded), refuse, "{coded:x?}");
        }
    }

    #[test]
    fn huffman_codes_of_all_bytes() {
        let all: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
        for from in 0..all.len() {
            for to in [from, from + 1, from + 2, from + 7, all.len()] {
                let text = &all[from..to.min(all.len())];
                let (mut coded, mut decoded) = (Vec::new(), Vec::new());
                encode(text, &mut coded);
                assert_eq!(huffman::decode(&coded, &mut decoded), Some(()));
                assert_eq!(decoded, text);
            }
        }
    }
}
