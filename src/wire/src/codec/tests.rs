use super::*;

#[test]
fn reads_what_was_written() {
    let mut bytes = Vec::new();
    Writer::new(&mut bytes).u8(1).u16(0x0203).u32(0x04050607).u64(8).zeros(3).string("grüße", 64);
    let mut r = Reader::new(&bytes);
    assert_eq!((r.u8(), r.u16(), r.u32(), r.u64()), (Ok(1), Ok(0x0203), Ok(0x04050607), Ok(8)));
    r.zeros(3).unwrap();
    assert_eq!(r.string(64).unwrap(), "grüße");
    r.finish().unwrap();
}

#[test]
fn refuses_missing_left_over_and_reserved_bytes() {
    assert_eq!(Reader::new(&[1, 2, 3]).u32(), Err(Malformed::Truncated { missing: 1 }));
    assert_eq!(Reader::new(&[1]).bytes(usize::MAX), Err(Malformed::Truncated { missing: usize::MAX - 1 }));
    assert_eq!(Reader::new(&[1]).finish(), Err(Malformed::TrailingBytes { extra: 1 }));
    assert_eq!(Reader::new(&[0, 1]).zeros(2), Err(Malformed::ReservedNotZero));
}

#[test]
fn refuses_strings_too_long_or_not_utf8_before_reading_them() {
    assert_eq!(
        Reader::new(&[0xFF, 0xFF]).string(64),
        Err(Malformed::StringTooLong { length: 65535, max: 64 })
    );
    assert_eq!(Reader::new(&[2, 0, 0xC3, 0x28]).string(64), Err(Malformed::NotUtf8));
}

#[test]
fn a_peers_name_cannot_move_the_cursor_or_turn_the_text_around() {
    assert_eq!(printable("a\u{1b}[2Jb\u{202e}c\nd\u{9b}e"), "a\u{FFFD}[2Jb\u{FFFD}c\u{FFFD}d\u{FFFD}e");
    assert_eq!(printable("Zoë's 電話 📱"), "Zoë's 電話 📱");
}

#[test]
fn a_name_too_long_is_cut_at_a_character() {
    let mut bytes = Vec::new();
    Writer::new(&mut bytes).string("äää", 5);
    assert_eq!(bytes, [4, 0, 0xC3, 0xA4, 0xC3, 0xA4]);
}
