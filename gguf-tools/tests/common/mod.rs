//! What the tests share: a writer of GGUF bytes that is free to be wrong, and a random number generator.
#![allow(dead_code, missing_docs)]

#[cfg(all(unix, feature = "engine"))]
pub(crate) mod child;
pub(crate) mod memory;

use std::path::Path;

use gguf_tools::{
    gguf::{
        Gguf, Value,
        write::{GgufWriter, TensorSpec},
    },
    synth::Spec,
};

/// A file with the tensors of another and this metadata, laid out by it.
pub(crate) fn write_with<K: AsRef<str>>(tensors_of: &Gguf, to: &Path, metadata: &[(K, Value<'_>)]) {
    write_with_more(tensors_of, to, metadata, &[]);
}

/// The same with further tensors, of zeros, behind the others.
fn write_with_more<K: AsRef<str>>(
    tensors_of: &Gguf,
    to: &Path,
    metadata: &[(K, Value<'_>)],
    more: &[TensorSpec],
) {
    let tensors = tensors_of.tensors();
    let mut specs: Vec<_> = tensors.map(|t| TensorSpec::new(t.name(), t.tensor_type(), t.dims())).collect();
    specs.extend_from_slice(more);
    let mut writer = GgufWriter::create(to, metadata, &specs).unwrap();
    tensors_of.tensors().for_each(|t| writer.write(t.data().unwrap()).unwrap());
    more.iter().for_each(|spec| writer.write(&vec![0; spec.n_bytes().unwrap() as usize]).unwrap());
    writer.finish().unwrap();
}

/// A copy of `from` in which `key` is `value`, with further tensors.
pub(crate) fn with_key(from: &Path, to: &Path, key: &str, value: Value<'_>, more: &[TensorSpec]) {
    let gguf = Gguf::open(from).unwrap();
    let mut metadata: Vec<(String, Value<'_>)> =
        gguf.metadata().filter(|e| e.key != key).map(|e| (e.key.to_owned(), e.value)).collect();
    metadata.push((key.to_owned(), value));
    write_with_more(&gguf, to, &metadata, more);
}

/// Bytes of a GGUF, put together by hand: nothing is checked, every field can be a lie.
#[derive(Clone)]
pub(crate) struct Raw {
    pub magic: [u8; 4],
    pub version: u32,
    pub n_tensors: Option<u64>,
    pub n_keys: Option<u64>,
    pub keys: Vec<(Vec<u8>, u32, Vec<u8>)>,
    pub tensors: Vec<RawTensor>,
    pub alignment: usize,
    pub data: Vec<u8>,
}

#[derive(Clone)]
pub(crate) struct RawTensor {
    pub name: Vec<u8>,
    pub n_dims: Option<u32>,
    pub dims: Vec<u64>,
    pub ty: u32,
    pub offset: u64,
}

pub(crate) const U8: u32 = 0;
pub(crate) const U32: u32 = 4;
pub(crate) const I32: u32 = 5;
pub(crate) const F32: u32 = 6;
pub(crate) const BOOL: u32 = 7;
pub(crate) const STRING: u32 = 8;
pub(crate) const ARRAY: u32 = 9;
pub(crate) const U64: u32 = 10;

pub(crate) fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

pub(crate) fn array(element: u32, count: u64, bytes: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &count.to_le_bytes(), bytes].concat()
}

impl Raw {
    pub(crate) fn empty() -> Raw {
        Raw {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_keys: None,
            keys: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
            data: Vec::new(),
        }
    }

    /// The smallest model that passes every check: llama, 3 blocks, width 32, 300 tokens.
    pub(crate) fn model() -> Raw {
        let mut raw = Raw::empty();
        raw.key("general.architecture", STRING, string("llama"));
        raw.key("general.name", STRING, string("raw"));
        for (key, n) in [
            ("llama.block_count", 3u32),
            ("llama.context_length", 64),
            ("llama.embedding_length", 32),
            ("llama.feed_forward_length", 64),
            ("llama.attention.head_count", 4),
            ("llama.attention.head_count_kv", 2),
            ("llama.rope.dimension_count", 8),
        ] {
            raw.key(key, U32, n.to_le_bytes().to_vec());
        }
        raw.key("llama.attention.layer_norm_rms_epsilon", F32, 1e-5f32.to_le_bytes().to_vec());
        raw.key("llama.rope.freq_base", F32, 10000f32.to_le_bytes().to_vec());
        raw.key("tokenizer.ggml.model", STRING, string("gpt2"));
        let tokens: Vec<u8> = (0..N_TOKENS).flat_map(|i| string(format!("t{i}"))).collect();
        raw.key("tokenizer.ggml.tokens", ARRAY, array(STRING, N_TOKENS, &tokens));
        let types: Vec<u8> = (0..N_TOKENS).flat_map(|_| 1i32.to_le_bytes()).collect();
        raw.key("tokenizer.ggml.token_type", ARRAY, array(I32, N_TOKENS, &types));
        raw.key("tokenizer.ggml.merges", ARRAY, array(STRING, 1, &string("t 1")));
        raw.key("tokenizer.ggml.bos_token_id", U32, 1u32.to_le_bytes().to_vec());
        raw.key("tokenizer.ggml.eos_token_id", U32, 2u32.to_le_bytes().to_vec());
        raw.tensor("token_embd.weight", 1, &[32, N_TOKENS]);
        raw.tensor("output_norm.weight", 0, &[32]);
        for block in 0..3 {
            for (name, ty, dims) in [
                ("attn_norm.weight", 0, &[32][..]),
                ("attn_q.weight", 1, &[32, 32]),
                ("attn_k.weight", 1, &[32, 16]),
                ("attn_v.weight", 1, &[32, 16]),
                ("attn_output.weight", 1, &[32, 32]),
                ("ffn_norm.weight", 0, &[32]),
                ("ffn_gate.weight", 1, &[32, 64]),
                ("ffn_up.weight", 1, &[32, 64]),
                ("ffn_down.weight", 1, &[64, 32]),
            ] {
                raw.tensor(&format!("blk.{block}.{name}"), ty, dims);
            }
        }
        raw
    }

    pub(crate) fn key(&mut self, key: impl AsRef<[u8]>, ty: u32, value: Vec<u8>) -> &mut Raw {
        let key = key.as_ref().to_vec();
        match self.keys.iter_mut().find(|(k, ..)| *k == key) {
            Some(entry) => *entry = (key, ty, value),
            None => self.keys.push((key, ty, value)),
        }
        self
    }

    pub(crate) fn without(&mut self, key: &str) -> &mut Raw {
        self.keys.retain(|(k, ..)| k != key.as_bytes());
        self
    }

    /// Adds a tensor of F32 (0) or F16 (1) after the ones there are, with data.
    pub(crate) fn tensor(&mut self, name: &str, ty: u32, dims: &[u64]) -> &mut Raw {
        let offset = self.data.len() as u64;
        let bytes = dims.iter().product::<u64>() * if ty == 0 { 4 } else { 2 };
        self.data.extend((0..bytes).map(|i| (i % 7) as u8 + 1));
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
        let name = name.as_bytes().to_vec();
        self.tensors.push(RawTensor { name, n_dims: None, dims: dims.to_vec(), ty, offset });
        self
    }

    pub(crate) fn tensor_mut(&mut self, name: &str) -> &mut RawTensor {
        self.tensors.iter_mut().find(|t| t.name == name.as_bytes()).expect("a tensor of the model")
    }

    pub(crate) fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, ty, value) in &self.keys {
            out.extend(string(key));
            out.extend(ty.to_le_bytes());
            out.extend(value);
        }
        for t in &self.tensors {
            out.extend(string(&t.name));
            out.extend(t.n_dims.unwrap_or(t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.ty.to_le_bytes());
            out.extend(t.offset.to_le_bytes());
        }
        out
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.data);
        out
    }
}

/// Runs this test program's test `name` on a disk of its own, of `size` as mount(8) takes it, where the system lets a test
/// mount one. The test is told the disk by [`small_disk`], and must print "20 of 20 runs".
#[cfg(target_os = "linux")]
pub(crate) fn on_a_small_disk(size: &str, name: &str) {
    use std::process::{Command, Output};
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        r#"mount -t tmpfs -o size={size} tmpfs "$1" || exit 77
        export {SMALL_DISK}="$1"; shift; exec "$@""#
    );
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script, "sh"])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .output();
    let text =
        |o: &Output| format!("{}{}", String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr));
    match output {
        Ok(o) if o.status.success() => assert!(text(&o).contains("20 of 20 runs"), "{}", text(&o)),
        // no namespaces here: everything but the mount is covered by the tests with a limit on file size
        Ok(o) if o.status.code() == Some(77) || text(&o).starts_with("unshare:") => {
            eprintln!("no mount: {}", text(&o))
        }
        Ok(o) => panic!("{}", text(&o)),
        Err(e) => eprintln!("no unshare: {e}"),
    }
}

/// The small disk this process was started for.
pub(crate) fn small_disk() -> Option<std::path::PathBuf> {
    std::env::var_os(SMALL_DISK).map(Into::into)
}

const SMALL_DISK: &str = "DIM_TEST_SMALL_DISK";

/// Somebody else takes all the room that is left on the disk of `filler`.
pub(crate) fn fill(filler: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(filler).unwrap();
    while file.write(&[1; 4096]).is_ok_and(|n| n > 0) {}
}

pub(crate) const N_TOKENS: u64 = 300;

/// Writes a tiny model of this architecture.
pub(crate) fn tiny(arch: &str, path: &Path) {
    Spec::tiny(arch).unwrap().write(path).unwrap();
}

/// Small, fast, repeatable: xorshift64*.
pub(crate) struct Rng(pub u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// Changes bytes of a file as a bad download or an attacker might.
    pub(crate) fn mutate(&mut self, bytes: &mut Vec<u8>, header: usize) {
        for _ in 0..1 + self.below(4) {
            if bytes.len() < 32 {
                return;
            }
            let at = self.below(header.min(bytes.len() - 8) as u64) as usize;
            match self.below(8) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = self.next() as u8,
                2 => bytes[at..at + 4].copy_from_slice(&(self.next() as u32).to_le_bytes()),
                3 => {
                    let edge = [0, 1, 2, 255, 65535, 1 << 31, (1 << 32) - 1, 1 << 63, u64::MAX];
                    let n = edge[self.below(edge.len() as u64) as usize];
                    bytes[at..at + 8].copy_from_slice(&n.to_le_bytes());
                }
                4 => {
                    let small = (bytes[at].wrapping_add(1 + self.below(3) as u8)).wrapping_sub(2);
                    bytes[at] = small;
                }
                5 => {
                    let n = self.below(16) as usize;
                    let end = (at + n).min(bytes.len());
                    bytes.drain(at..end);
                }
                6 => {
                    let from = self.below(header.min(bytes.len() - 8) as u64) as usize;
                    let n = (self.below(64) as usize).min(bytes.len() - from.max(at));
                    let piece = bytes[from..from + n].to_vec();
                    bytes[at..at + n].copy_from_slice(&piece);
                }
                _ => {
                    let keep = self.below(bytes.len() as u64) as usize;
                    if self.below(8) == 0 {
                        bytes.truncate(keep);
                    }
                }
            }
        }
    }
}
