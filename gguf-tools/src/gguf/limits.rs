//! Numbers of the format, and how far this reader follows it.

/// Most metadata entries a file may have. Real models have about fifty.
pub const MAX_KEYS: u64 = 1 << 16;
/// Deepest nesting of arrays. The format sets no limit; nothing known uses more than two.
pub const MAX_DEPTH: u32 = 4;
/// Largest `general.alignment`. Real files use 32.
pub const MAX_ALIGNMENT: u32 = 1 << 20;
/// What tensor data is aligned to where the file does not say.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Most bytes of a key.
pub const MAX_KEY_BYTES: u64 = 0xffff;
/// Most bytes of a tensor's name: ggml keeps it in 64 bytes, with a NUL.
pub const MAX_NAME_BYTES: u64 = 63;
/// Most blocks of a model: llama.cpp's `LLAMA_MAX_LAYERS`.
pub const MAX_BLOCKS: u32 = 512;
/// Most dimensions of a tensor.
pub const MAX_DIMS: usize = 4;
/// Bytes before the metadata: magic, version, tensor count, metadata count.
pub const HEADER_BYTES: u64 = 4 + 4 + 8 + 8;
/// The first bytes of a file.
pub const MAGIC: [u8; 4] = *b"GGUF";
