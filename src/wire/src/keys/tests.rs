use super::code::{ALPHABET, CODE};
use super::*;

fn key(n: u8) -> Key {
    Key::from_bytes([n; 32])
}

#[test]
fn a_key_file_is_one_line_of_64_digits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    fs::write(&path, "0f".repeat(32) + "\n").unwrap();
    assert_eq!(Key::from_file(&path).unwrap().bytes(), &[0x0F; 32]);
    for (text, problem) in [
        ("", BadKey::Length { digits: 0 }),
        (&"0".repeat(63), BadKey::Length { digits: 63 }),
        (&("0".repeat(64) + "\n00"), BadKey::Length { digits: 67 }),
        (&("0".repeat(40) + "g" + &"0".repeat(23)), BadKey::Digit { at: 40 }),
    ] {
        fs::write(&path, text).unwrap();
        match Key::from_file(&path) {
            Err(KeyError::BadFile { problem: found, .. }) => assert_eq!(found, problem),
            other => panic!("{text:?}: {other:?}"),
        }
    }
}

#[test]
fn debug_output_does_not_show_secrets() {
    let code = PairingCode::random().unwrap();
    assert!(!format!("{:?}", key(0xAB)).contains("abab"));
    assert!(!format!("{code:?}").contains(&code.to_string()[..5]));
    assert!(!format!("{:?}", PairingWindow::open(&code, 0)).contains(&code.key().to_hex()));
}

#[test]
fn a_code_survives_how_people_type() {
    for _ in 0..100 {
        let code = PairingCode::random().unwrap();
        let shown = code.to_string();
        assert_eq!(shown.len(), 24);
        let typed = [
            shown.to_lowercase(),
            shown.replace('-', ""),
            shown.replace('-', " "),
            format!("  {}\n", shown.replace('0', "o").replace('1', "l")),
            shown.replace('0', "O").replace('1', "I"),
        ];
        for t in typed {
            assert_eq!(PairingCode::parse(&t).unwrap(), code, "{t}");
        }
    }
}

#[test]
fn every_single_typing_error_is_found_before_it_costs_a_try() {
    let code = PairingCode::random().unwrap().to_string().replace('-', "");
    for at in 0..code.len() {
        for &wrong in ALPHABET {
            let mut typed = code.clone().into_bytes();
            if typed[at] == wrong {
                continue;
            }
            typed[at] = wrong;
            let typed = String::from_utf8(typed).unwrap();
            assert_eq!(PairingCode::parse(&typed), Err(BadCode::Check), "{typed}");
        }
    }
    assert_eq!(PairingCode::parse(&code[1..]), Err(BadCode::Length { length: 20 }));
    assert_eq!(PairingCode::parse(""), Err(BadCode::Length { length: 0 }));
    assert_eq!(PairingCode::parse("U"), Err(BadCode::Character { character: 'U' }));
}

#[test]
fn a_window_closes_after_five_minutes_or_one_use() {
    let code = PairingCode::random().unwrap();
    let mut w = PairingWindow::open(&code, 1000);
    assert!(w.key(300_999).is_some_and(|key| key == code.key()));
    assert!(w.key(301_000).is_none() && !w.is_open(301_000), "5 minutes");
    w.close();
    assert!(w.key(1003).is_none(), "used");
}

#[test]
fn a_million_guesses_open_nothing() {
    // guesses that pass the check character
    let code = PairingCode::random().unwrap();
    let w = PairingWindow::open(&code, 0);
    let mut opened = 0;
    for n in 0..1_000_000u32 {
        let mut characters = [b'0'; CODE];
        for (i, c) in characters.iter_mut().enumerate().take(6) {
            *c = ALPHABET[(n >> (5 * i)) as usize % 32];
        }
        if w.key(1).is_some_and(|k| *k.bytes() == *PairingCode { characters }.key().bytes()) {
            opened += 1;
        }
    }
    assert_eq!(opened, 0);
    assert!(w.is_open(1), "who guesses takes nothing from who knows");
}

#[cfg(unix)]
#[test]
fn keys_are_kept_where_only_the_user_can_read_them() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::at(dir.path().join("dim/keys"));
    assert!(store.list().unwrap().is_empty());
    assert!(matches!(store.for_address("a:1"), Err(KeyError::NotPaired { .. })));

    let peer = |address: &str, paired_at| Peer { name: "x".into(), address: address.into(), paired_at };
    store.add(&key(1), &peer("phone:4646", 1)).unwrap();
    let tried =
        |address: &str| -> Vec<KeyId> { store.for_address(address).unwrap().iter().map(Key::id).collect() };
    assert_eq!(tried("elsewhere:1"), [key(1).id()]);
    store.add(&key(2), &peer("phone:4646", 2)).unwrap();
    store.add(&key(3), &peer("pad:4646", 3)).unwrap();
    // those of the address first, then the others: a worker may have moved
    assert_eq!(tried("phone:4646"), [key(2).id(), key(1).id(), key(3).id()]);
    assert_eq!(tried("elsewhere:1"), [key(3).id(), key(2).id(), key(1).id()]);
    assert_eq!(store.list().unwrap().len(), 3);

    let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(store.directory()), 0o700);
    for entry in fs::read_dir(store.directory()).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o600);
    }
    let path = store.path(key(1).id(), "key");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(store.find(key(1).id()), Err(KeyError::Permissions { .. })));

    assert!(store.remove(key(2).id()).unwrap());
    assert!(store.find(key(2).id()).unwrap().is_none());
}

#[test]
fn a_peers_name_never_becomes_a_file_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = KeyStore::at(dir.path().join("keys"));
    let name = "../../../etc/passwd\0\n".to_owned();
    store.add(&key(7), &Peer { name: name.clone(), ..Peer::default() }).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(fs::read_dir(store.directory()).unwrap().count(), 2);
    assert_eq!(store.list().unwrap()[0].1.name, name);
}
