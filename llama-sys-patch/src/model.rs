//! Models, the devices they can be put on, their tokenizer, and llama.cpp's log.

use std::ffi::{CStr, CString, c_char, c_void};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_2::model::LlamaModel;

use crate::Error;
use crate::error::{check, check_status};
use crate::{ffi, stack};

/// A GGUF loaded by llama.cpp. Cloning is cheap and shares the weights.
///
/// A slice is the whole model with weights for [`blocks`](Model::blocks) only; its blocks keep the model's numbers.
///
/// Methods: [`load`](Model::load); what the file says ([`arch`](Model::arch), [`n_blocks`](Model::n_blocks),
/// [`meta`](Model::meta), ...); text to tokens and back; [`offload`](Model::offload), where the weights are;
/// [`inner`](Model::inner) for llama-cpp-2's samplers.
#[derive(Clone)]
pub struct Model(Arc<Loaded>);

struct Loaded {
    handle: NonNull<ffi::dim_model>,
    model: ManuallyDrop<LlamaModel>, // `handle`'s own, for llama-cpp-2: never dropped here
    info: ffi::dim_model_info,
    arch: String,
}

// SAFETY: a dim_model belongs to no thread, and of a loaded one only the switch `no_alloc` changes, which whoever lets
// llama.cpp look at it does under allocation_lock(): everything that takes one is "Thread: any" in layer_eval.h. Freeing it
// waits for the last Arc.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, stages and contexts made from it hold an Arc of us, and `model` is not used again.
        unsafe { ffi::dim_model_free(self.handle.as_ptr()) };
    }
}

/// What of a file is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ModelPart {
    /// Everything.
    #[default]
    Whole,
    /// The tokenizer alone: text to tokens and back. No weights, no dimensions, and no [`Stage`](crate::Stage) of it.
    Tokenizer,
    /// Everything but the tokenizer, whose texts take some 50 MB of memory where a vocabulary has 150,000.
    Weights,
}

/// How to load a model.
#[derive(Default)]
pub struct ModelParams<'a> {
    /// What of it.
    pub part: ModelPart,
    /// Blocks of the file put on the GPU, counted from its last one: `None` for all (nothing, where there is no GPU),
    /// `Some(0)` for a CPU run that touches no GPU. In llama.cpp's own count, which has the output as one more layer, it is
    /// one more.
    pub gpu_layers: Option<u32>,
    /// Map the file instead of reading it. A file truncated under a map kills the process (SIGBUS): for files that nobody
    /// else writes to.
    pub use_mmap: bool,
    /// The output matrix of this file will never be used (a head or a middle): it then is on no GPU and takes no second
    /// copy in host memory.
    pub no_lm_head: bool,
    /// Leave all weights where the file has them: no quantised matrix is put in an order of the CPU's own, which would be a
    /// second copy of it. Slower; with [`use_mmap`](Self::use_mmap) the weights take no memory but the map's.
    pub no_repack: bool,
    /// One GPU by its name in [`devices`]; `None` for all there are.
    pub device: Option<String>,
    /// Called with 0..1 while loading; `false` stops the load with [`Error::Cancelled`].
    pub progress: Option<&'a mut dyn FnMut(f32) -> bool>,
}

/// Where a model's weights are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offload {
    /// Blocks that are on a GPU with all their tensors.
    pub blocks_on_device: u32,
    /// The output matrix is on a GPU.
    pub lm_head_on_device: bool,
    /// Weights on GPUs.
    pub device_bytes: u64,
    /// Weights in host memory.
    pub host_bytes: u64,
}

impl Model {
    /// Loads one GGUF, or the parts of a split one in order.
    ///
    /// The file should have been through gguf-tools' reader before: llama.cpp aborts on some malformed ones.
    ///
    /// # Errors
    /// [`Error::LoadFailed`] with llama.cpp's own error line; [`Error::Cancelled`]; [`Error::BadSlice`] for a slice whose
    /// description of what it lacks is wrong; [`Error::InvalidArgument`] for no paths, paths with a NUL byte and unknown devices.
    pub fn load<P: AsRef<Path>>(paths: &[P], params: ModelParams) -> Result<Model, Error> {
        let names = c_paths(paths)?;
        let pointers: Vec<*const c_char> = names.iter().map(|n| n.as_ptr()).collect();
        let device = params.device.map(CString::new).transpose().map_err(|_| nul("the device's name"))?;
        let mut progress = params.progress;
        let c_params = ffi::dim_model_params {
            part: match params.part {
                ModelPart::Whole => ffi::DIM_MODEL_WHOLE,
                ModelPart::Tokenizer => ffi::DIM_MODEL_TOKENIZER,
                ModelPart::Weights => ffi::DIM_MODEL_WEIGHTS,
            },
            gpu_blocks: match params.gpu_layers {
                None => -1,
                Some(n) => i32::try_from(n).map_err(|_| Error::InvalidArgument(format!("{n} GPU layers")))?,
            },
            use_mmap: params.use_mmap,
            lm_head: !params.no_lm_head,
            repack: !params.no_repack,
            device: device.as_ref().map_or(std::ptr::null(), |name| name.as_ptr()),
            progress: progress.is_some().then_some(on_progress),
            progress_user: (&raw mut progress).cast(),
        };
        let mut model = std::ptr::null_mut();
        let mut fault = ffi::dim_fault::default();
        // SAFETY: `pointers` and `c_params` are valid for the call, which copies what it keeps; on_progress gets the
        // address of `progress`, which outlives the call, on this thread.
        let status = unsafe {
            ffi::dim_model_load(
                pointers.as_ptr(),
                pointers.len(),
                &raw const c_params,
                &raw mut model,
                &raw mut fault,
            )
        };
        check(status, &fault)?;
        // SAFETY: dim_model_load() gave us the model to own.
        unsafe { Model::of(model) }
    }

    /// A model that was just loaded.
    ///
    /// # Safety
    /// The caller owns the model, and gives it up.
    pub(crate) unsafe fn of(handle: *mut ffi::dim_model) -> Result<Model, Error> {
        let handle = NonNull::new(handle).ok_or_else(|| Error::Internal("a model that is NULL".into()))?;
        // SAFETY: the model is alive; what is in it lives as long, and Loaded never drops this view of it.
        let model =
            NonNull::new(unsafe { ffi::dim_model_llama(handle.as_ptr()) }).map(|m| unsafe { view(m) });
        let Some(model) = model else {
            // SAFETY: ours, and used by nobody.
            unsafe { ffi::dim_model_free(handle.as_ptr()) };
            return Err(Error::Internal("a model that is NULL".into()));
        };
        // from here on it is freed whatever happens
        let mut loaded = Loaded { handle, model, info: ffi::dim_model_info::default(), arch: String::new() };
        // SAFETY: the model is alive; `info` is written.
        check_status(unsafe { ffi::dim_model_describe(handle.as_ptr(), &raw mut loaded.info) })?;
        // SAFETY: the model is alive.
        loaded.arch = unsafe { arch(handle.as_ptr()) }?;
        Ok(Model(Arc::new(loaded)))
    }

    /// llama.cpp's name of the architecture, as `qwen2`.
    pub fn arch(&self) -> &str {
        &self.0.arch
    }

    /// Width of a hidden row.
    pub fn n_embd(&self) -> usize {
        self.0.info.n_embd as usize
    }

    /// Blocks of the model: of the whole one, also where this is a slice of it.
    pub fn n_blocks(&self) -> u32 {
        self.0.info.n_blocks
    }

    /// The blocks that have weights here, numbered as in the whole model: all of them, or a slice's.
    pub fn blocks(&self) -> Range<u32> {
        self.0.info.first_block..self.0.info.last_block
    }

    /// Only a part of the model has weights. `false` also for slices cut in the old way, which are models of their own.
    pub fn is_slice(&self) -> bool {
        self.0.info.is_slice
    }

    /// Width of a row of logits; 1 for a middle slice.
    pub fn n_vocab(&self) -> usize {
        self.0.info.n_vocab as usize
    }

    /// Positions the model was trained on.
    pub fn n_ctx_train(&self) -> u32 {
        self.0.info.n_ctx_train
    }

    /// Bytes of all tensors as stored in the file.
    pub fn weights_bytes(&self) -> u64 {
        self.0.info.weights_bytes
    }

    /// A metadata value as text; `None` for a key the file does not have, and for arrays.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a key with a NUL byte.
    pub fn meta(&self, key: &str) -> Result<Option<String>, Error> {
        let key = CString::new(key).map_err(|_| nul("a metadata key"))?;
        let value = text(|buffer, capacity, length| {
            // SAFETY: the model is alive, the key NUL-terminated, `buffer` has room for `capacity` bytes.
            unsafe { ffi::dim_model_meta(self.raw(), key.as_ptr(), buffer, capacity, length) }
        })?;
        Ok(value.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The model's chat template (Jinja), if it has one.
    pub fn chat_template(&self) -> Option<String> {
        let template = text(|buffer, capacity, length| {
            // SAFETY: the model is alive, NULL asks for the default, `buffer` has room for `capacity` bytes.
            unsafe { ffi::dim_model_chat_template(self.raw(), std::ptr::null(), buffer, capacity, length) }
        });
        template.ok().flatten().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The file has a vocabulary: text can be turned into tokens and back.
    pub fn has_tokenizer(&self) -> bool {
        self.0.info.has_tokenizer
    }

    /// The token that begins a text, if there is one.
    pub fn bos(&self) -> Option<i32> {
        (self.0.info.bos >= 0).then_some(self.0.info.bos)
    }

    /// The token that ends a text, if there is one.
    pub fn eos(&self) -> Option<i32> {
        (self.0.info.eos >= 0).then_some(self.0.info.eos)
    }

    /// [`tokenize`](Model::tokenize) with `add_special` puts [`bos`](Model::bos) first.
    pub fn adds_bos(&self) -> bool {
        self.0.info.add_bos
    }

    /// [`tokenize`](Model::tokenize) with `add_special` puts [`eos`](Model::eos) last.
    pub fn adds_eos(&self) -> bool {
        self.0.info.add_eos
    }

    /// Text to tokens. `add_special` adds what the model wants at the ends; `parse_special` reads special tokens'
    /// texts (as `<|im_end|>`) as the tokens: for templates only, never for what a user typed.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`]; [`Error::InvalidArgument`] for texts beyond 1 GiB and lines beyond a million
    /// characters.
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<i32>, Error> {
        stack::with_room_for(text, || self.tokenize_here(text, add_special, parse_special))?
    }

    fn tokenize_here(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<i32>, Error> {
        let mut tokens: Vec<i32> = Vec::with_capacity(text.len() / 2 + 8);
        loop {
            let mut n = 0;
            // SAFETY: `text` is valid for its length, `tokens` has room for its capacity.
            let status = unsafe {
                ffi::dim_model_tokenize(
                    self.raw(),
                    text.as_ptr().cast(),
                    text.len(),
                    add_special,
                    parse_special,
                    tokens.as_mut_ptr(),
                    tokens.capacity(),
                    &raw mut n,
                )
            };
            check_status(status)?;
            let n = usize::try_from(n).unwrap_or(0);
            if n <= tokens.capacity() {
                // SAFETY: the call wrote all n tokens.
                unsafe { tokens.set_len(n) };
                return Ok(tokens);
            }
            tokens.reserve(n);
        }
    }

    /// The bytes a token stands for, which need not be UTF-8 by themselves. Special tokens give nothing.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`]; [`Error::UnknownToken`].
    pub fn token_bytes(&self, token: i32) -> Result<Vec<u8>, Error> {
        self.token_text(token, false)
    }

    /// As [`token_bytes`](Model::token_bytes), but special tokens give their names.
    ///
    /// # Errors
    /// As [`token_bytes`](Model::token_bytes).
    pub fn token_name(&self, token: i32) -> Result<Vec<u8>, Error> {
        self.token_text(token, true)
    }

    fn token_text(&self, token: i32, special: bool) -> Result<Vec<u8>, Error> {
        if self.has_tokenizer() && !(0..self.n_vocab() as i64).contains(&i64::from(token)) {
            return Err(Error::UnknownToken { token: token.into(), n_vocab: self.n_vocab() as i64 });
        }
        let bytes = text(|buffer, capacity, length| {
            // SAFETY: the model is alive; `buffer` has room for `capacity` bytes.
            unsafe { ffi::dim_model_token_bytes(self.raw(), token, special, buffer, capacity, length) }
        })?;
        Ok(bytes.unwrap_or_default())
    }

    /// The token ends a generation. `false` outside the vocabulary.
    pub fn is_eog(&self, token: i32) -> bool {
        let mut is_eog = false;
        // SAFETY: the model is alive; `is_eog` is written.
        let status = unsafe { ffi::dim_model_is_eog(self.raw(), token, &raw mut is_eog) };
        status == ffi::DIM_OK && is_eog
    }

    /// Where the weights are, seen from the loaded tensors themselves.
    pub fn offload(&self) -> Offload {
        let mut offload = ffi::dim_offload::default();
        // SAFETY: the model is alive; `offload` is written.
        let status = unsafe { ffi::dim_model_offload(self.raw(), &raw mut offload) };
        debug_assert_eq!(status, ffi::DIM_OK);
        Offload {
            blocks_on_device: offload.blocks_on_device,
            lm_head_on_device: offload.lm_head_on_device,
            device_bytes: offload.device_bytes,
            host_bytes: offload.host_bytes,
        }
    }

    /// llama-cpp-2's view of the same model, for its samplers and templates.
    pub fn inner(&self) -> &LlamaModel {
        &self.0.model
    }

    /// The pointer the C functions take. Alive as long as `self`.
    pub(crate) fn raw(&self) -> *mut ffi::dim_model {
        self.0.handle.as_ptr()
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Model({}, {} blocks, n_embd {})", self.arch(), self.n_blocks(), self.n_embd())
    }
}

/// A device that llama.cpp was built for and found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// What [`ModelParams::device`] takes, as `Vulkan0`.
    pub name: String,
    /// For people, as `llvmpipe (LLVM 15.0.6, 256 bits)`.
    pub description: String,
    /// Blocks can be put on it.
    pub is_gpu: bool,
    /// Free memory, as the driver says.
    pub memory_free_bytes: u64,
    /// All memory, as the driver says.
    pub memory_total_bytes: u64,
}

/// All devices, the CPU included.
pub fn devices() -> Vec<Device> {
    let mut found = Vec::new();
    // SAFETY: no pointers.
    let count = unsafe { ffi::dim_device_count() };
    for index in 0..count {
        let mut device = ffi::dim_device {
            name: std::ptr::null(),
            description: std::ptr::null(),
            is_gpu: false,
            memory_free_bytes: 0,
            memory_total_bytes: 0,
        };
        // SAFETY: `device` is written.
        if unsafe { ffi::dim_device_describe(index, &raw mut device) } != ffi::DIM_OK {
            continue;
        }
        // SAFETY: on DIM_OK both texts are NUL-terminated and live as long as the process.
        let text = |from: *const c_char| unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned();
        found.push(Device {
            name: text(device.name),
            description: text(device.description),
            is_gpu: device.is_gpu,
            memory_free_bytes: device.memory_free_bytes,
            memory_total_bytes: device.memory_total_bytes,
        });
    }
    found
}

/// What of llama.cpp's own log goes to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogLevel {
    /// Nothing; error lines still end up in [`Error`]s.
    #[default]
    Silent,
    /// Warnings and errors.
    Warnings,
    /// Everything: device names, buffer sizes, tokenizer remarks.
    Everything,
}

/// Sets the log level of the process.
pub fn set_log(level: LogLevel) {
    let level = match level {
        LogLevel::Silent => ffi::DIM_LOG_SILENT,
        LogLevel::Warnings => ffi::DIM_LOG_WARNINGS,
        LogLevel::Everything => ffi::DIM_LOG_EVERYTHING,
    };
    // SAFETY: no pointers.
    unsafe { ffi::dim_log_set(level) };
}

/// Ends the process at once, with nothing destroyed and nothing flushed: for a signal that comes while other threads are
/// in llama.cpp. [`std::process::exit`] runs the destructors of C++ objects that those threads are using.
pub fn end_process(code: i32) -> ! {
    // SAFETY: no pointers.
    unsafe { ffi::dim_end_process(code) };
    unreachable!("the process has ended")
}

// ---- the one place that knows what LlamaModel is made of

// llama-cpp-2 keeps the pointer private, and llama-sys-patch needs both it and a LlamaModel for the samplers. LlamaModel
// is `repr(transparent)` over a transparent NonNull<llama_model> in the version pinned in the root Cargo.toml; the
// assertions below and tests/model.rs fail if that changes.
const _: () = assert!(size_of::<LlamaModel>() == size_of::<*mut ffi::llama_model>());
const _: () = assert!(align_of::<LlamaModel>() == align_of::<*mut ffi::llama_model>());
const _: () = assert!(size_of::<Option<LlamaModel>>() == size_of::<LlamaModel>()); // as a NonNull has it

/// llama-cpp-2's view of a model that somebody else owns: it must not be dropped.
///
/// # Safety
/// The model is alive as long as the view is used.
unsafe fn view(model: NonNull<ffi::llama_model>) -> ManuallyDrop<LlamaModel> {
    // SAFETY: LlamaModel is transparent over NonNull<llama_model> (see above), and is never dropped.
    unsafe { std::mem::transmute_copy::<NonNull<ffi::llama_model>, ManuallyDrop<LlamaModel>>(&model) }
}

// ---- helpers

/// llama.cpp's name of a model's architecture.
///
/// # Safety
/// The model is alive.
pub(crate) unsafe fn arch(model: *const ffi::dim_model) -> Result<String, Error> {
    let arch = text(|buffer, capacity, length| {
        // SAFETY: the model is alive; `buffer` has room for `capacity` bytes.
        unsafe { ffi::dim_model_arch(model, buffer, capacity, length) }
    })?;
    Ok(String::from_utf8_lossy(&arch.unwrap_or_default()).into_owned())
}

/// Paths as C takes them.
pub(crate) fn c_paths<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<CString>, Error> {
    paths.iter().map(|p| c_path(p.as_ref())).collect()
}

/// dim_progress: calls the closure that [`Model::load`] was given.
unsafe extern "C" fn on_progress(fraction: f32, user: *mut c_void) -> bool {
    // SAFETY: Model::load() passes the address of its `progress`, which outlives the load and is used by nothing else
    // meanwhile.
    let progress = unsafe { &mut *user.cast::<Option<&mut dyn FnMut(f32) -> bool>>() };
    match progress {
        // a panic must not unwind into C++: it stops the load instead
        Some(f) => std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| f(fraction))).unwrap_or(false),
        None => true,
    }
}

/// Calls a function of the "length, then again with room" kind until the text fits. `None` where the length is -1.
pub(crate) fn text(
    mut call: impl FnMut(*mut c_char, usize, *mut i64) -> ffi::dim_status,
) -> Result<Option<Vec<u8>>, Error> {
    let mut buffer: Vec<u8> = Vec::with_capacity(64);
    loop {
        let mut length = 0;
        check_status(call(buffer.as_mut_ptr().cast(), buffer.capacity(), &raw mut length))?;
        let Ok(length) = usize::try_from(length) else { return Ok(None) };
        if length <= buffer.capacity() {
            // SAFETY: the call wrote all `length` bytes.
            unsafe { buffer.set_len(length) };
            return Ok(Some(buffer));
        }
        buffer.reserve(length);
    }
}

fn c_path(path: &Path) -> Result<CString, Error> {
    #[cfg(unix)]
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec();
    #[cfg(not(unix))]
    let bytes = path
        .to_str()
        .ok_or_else(|| Error::InvalidArgument(format!("{}: not Unicode", path.display())))?
        .as_bytes()
        .to_vec();
    CString::new(bytes).map_err(|_| nul(&PathBuf::from(path).display().to_string()))
}

fn nul(what: &str) -> Error {
    Error::InvalidArgument(format!("{what} has a NUL byte in it"))
}
