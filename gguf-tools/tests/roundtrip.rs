//! What the writer writes, the reader reads: type, order and bytes.

use std::borrow::Cow;

use gguf_tools::gguf::{
    Array, Gguf, TensorType, Value,
    write::{GgufWriter, TensorSpec, WriteError, remove_stale},
};

fn all_values() -> Vec<(&'static str, Value<'static>)> {
    vec![
        ("general.architecture", Value::string("test")),
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-100)),
        ("u16", Value::U16(60000)),
        ("i16", Value::I16(-30000)),
        ("u32", Value::U32(4_000_000_000)),
        ("i32", Value::I32(-2_000_000_000)),
        ("f32", Value::F32(f32::MIN_POSITIVE)),
        ("bool", Value::Bool(true)),
        ("bytes", Value::String(Cow::Borrowed(b"\xff\x00\xfe"))),
        ("u64", Value::U64(u64::MAX)),
        ("i64", Value::I64(i64::MIN)),
        ("f64", Value::F64(-0.0)),
        ("strings", Value::Array(Array::of_strings([&b"a"[..], b"", b"\x80\x81"]))),
        ("floats", Value::Array(Array::of_f32([1.0, -2.5]))),
        ("flags", Value::Array(Array::of_bool([true, false, true]))),
        ("empty", Value::Array(Array::of_u32([]))),
    ]
}

#[test]
fn metadata_and_data_survive_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    let tensors = [
        TensorSpec::new("a", TensorType::F32, [3, 2]),
        TensorSpec::new("b", TensorType::Q8_0, [64, 3]),
        TensorSpec::new("c", TensorType::BF16, [5]),
    ];
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .enumerate()
        .map(|(i, t)| (0..t.n_bytes().unwrap()).map(|j| (j as u8).wrapping_mul(7) ^ i as u8).collect())
        .collect();
    let mut writer = GgufWriter::create(&path, &all_values(), &tensors).unwrap();
    for bytes in &data {
        // in uneven pieces
        for piece in bytes.chunks(5) {
            writer.write(piece).unwrap();
        }
    }
    let planned = writer.file_bytes();
    assert!(!path.exists(), "nothing under the final name before it is whole");
    writer.finish().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), planned);

    let gguf = Gguf::open(&path).unwrap();
    let read: Vec<_> = gguf.metadata().map(|e| (e.key.to_owned(), e.value.into_owned())).collect();
    let wrote: Vec<_> = all_values().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    assert_eq!(read, wrote);
    for (tensor, bytes) in gguf.tensors().zip(&data) {
        assert_eq!(tensor.data().unwrap(), bytes);
        let mut part = vec![0; bytes.len() - 1];
        tensor.read_at(1, &mut part).unwrap();
        assert_eq!(part, bytes[1..]);
    }
    assert_eq!(gguf.tensors().map(|t| t.name()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(gguf.tensor("b").unwrap().dims(), [64, 3]);
    assert!(gguf.tensor("d").is_none());
    assert_eq!(gguf.get("i8"), Some(Value::I8(-100)));
    assert_eq!(gguf.get("none"), None);
}

#[test]
fn array_elements_decode_and_cut() {
    let array = Array::of_strings(["zero", "one", "two", "three"]);
    let cut = array.slice(1..3).unwrap();
    assert_eq!(cut.strings().collect::<Vec<_>>(), [&b"one"[..], b"two"]);
    assert_eq!(array.slice(3..5), None);
    let numbers = Array::of_u32([5, 6, 7, 8]).slice(2..4).unwrap();
    assert_eq!(numbers.iter().filter_map(|v| v.as_u64()).collect::<Vec<_>>(), [7, 8]);
}

#[test]
fn unfinished_file_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    let tensors = [TensorSpec::new("a", TensorType::F32, [4])];
    let meta: [(&str, Value<'_>); 0] = [];
    let mut writer = GgufWriter::create(&path, &meta, &tensors).unwrap();
    writer.write(&[0; 8]).unwrap();
    assert!(matches!(writer.write(&[0; 9]), Err(WriteError::TooMuchData { left: 8, .. })));
    assert_eq!(remove_stale(&path).unwrap(), 0, "a living writer keeps its file");
    assert!(matches!(writer.finish(), Err(WriteError::Incomplete { missing: 8, .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    std::fs::write(dir.path().join(".t.gguf.4711-0.dim-part"), b"left").unwrap();
    std::fs::write(dir.path().join(".t.gguf.mine.dim-part"), b"somebody else's").unwrap();
    assert_eq!(remove_stale(&path).unwrap(), 1);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn patch_replaces_values_of_the_same_size_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    let meta = [("hash", Value::string("0000")), ("n", Value::U32(1))];
    let mut writer = GgufWriter::create(&path, &meta, &[TensorSpec::new("a", TensorType::I8, [1])]).unwrap();
    writer.write(&[9]).unwrap();
    writer.patch("hash", &Value::string("abcd")).unwrap();
    assert!(matches!(writer.patch("hash", &Value::string("abcde")), Err(WriteError::Patch { .. })));
    assert!(matches!(writer.patch("n", &Value::I32(1)), Err(WriteError::Patch { .. })));
    assert!(matches!(writer.patch("m", &Value::U32(1)), Err(WriteError::Patch { .. })));
    writer.finish().unwrap();
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.get("hash").unwrap().as_str(), Some("abcd"));
    assert_eq!(gguf.tensor("a").unwrap().data().unwrap(), [9]);
}
