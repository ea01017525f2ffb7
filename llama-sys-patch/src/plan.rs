//! Where a model can be cut, what a range of it needs, and what crosses: asked of llama.cpp's graph, without the weights.

use std::ffi::c_char;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;

use crate::error::{check, check_status};
use crate::model::{arch, c_paths, text};
use crate::{Error, Layout, ffi};

/// A model of which only the keys and the list of tensors were read.
///
/// Methods: [`open`](GraphPlan::open); [`cut`](GraphPlan::cut), whether and why not; [`range`](GraphPlan::range), what a slice holds.
pub struct GraphPlan {
    plan: NonNull<ffi::dim_plan>,
    arch: String,
    n_blocks: u32,
    blocks: Range<u32>,
    n_embd: u32,
}

// SAFETY: a dim_plan belongs to no thread; it is used by one at a time, because everything that looks takes `&mut self`.
unsafe impl Send for GraphPlan {}

/// What a range of blocks needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangePlan {
    /// The blocks, numbered as in the model.
    pub blocks: Range<u32>,
    /// Names of the tensors that a slice of them has to hold, sorted: the blocks' own, those of no block that their graph
    /// reads, and the factors of the rotation.
    pub tensors: Vec<String>,
    /// Bytes of these tensors, as stored.
    pub weights_bytes: u64,
    /// What comes in: empty for the first block, which takes tokens.
    pub input: Layout,
    /// What goes out: empty for the last block, which gives logits.
    pub output: Layout,
    /// Token ids are read, beside the rows that come in or instead of them.
    pub reads_tokens: bool,
    /// Bytes of cached keys and values for each position of a session, as F16.
    pub cache_bytes_per_position: u64,
    /// Bytes of a session's state that do not grow with positions: recurrent states, windows.
    pub state_bytes_per_session: u64,
}

impl GraphPlan {
    /// Opens a model, or the parts of a split one in order. A slice that says what it lacks will do as well.
    ///
    /// The file should have been through gguf-tools' reader before: llama.cpp aborts on some malformed ones.
    ///
    /// # Errors
    /// [`Error::LoadFailed`]; [`Error::BadSlice`]; [`Error::Unsupported`] for what is no text decoder.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<GraphPlan, Error> {
        let names = c_paths(paths)?;
        let pointers: Vec<*const c_char> = names.iter().map(|n| n.as_ptr()).collect();
        let mut plan = std::ptr::null_mut();
        let mut fault = ffi::dim_fault::default();
        // SAFETY: `pointers` is valid for the call, which copies what it keeps; `plan` and `fault` are written.
        let status =
            unsafe { ffi::dim_plan_open(pointers.as_ptr(), pointers.len(), &raw mut plan, &raw mut fault) };
        check(status, &fault)?;
        let plan = NonNull::new(plan).ok_or_else(|| Error::Internal("a plan that is NULL".into()))?;
        let mut plan = GraphPlan { plan, arch: String::new(), n_blocks: 0, blocks: 0..0, n_embd: 0 };
        // SAFETY: the plan is alive, and its model with it.
        let model = unsafe { ffi::dim_plan_model(plan.plan.as_ptr()) };
        let mut info = ffi::dim_model_info::default();
        // SAFETY: as above; `info` is written.
        check_status(unsafe { ffi::dim_model_describe(model, &raw mut info) })?;
        // SAFETY: as above.
        plan.arch = unsafe { arch(model) }?;
        (plan.n_blocks, plan.n_embd) = (info.n_blocks, info.n_embd);
        plan.blocks = info.first_block..info.last_block;
        Ok(plan)
    }

    /// llama.cpp's name of the architecture.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// Blocks of the model.
    pub fn n_blocks(&self) -> u32 {
        self.n_blocks
    }

    /// The blocks that have weights in the file: all of them, or a slice's.
    pub fn blocks(&self) -> Range<u32> {
        self.blocks.clone()
    }

    /// Width of a hidden row.
    pub fn n_embd(&self) -> usize {
        self.n_embd as usize
    }

    /// What the model keeps of past positions, for people, as `KV cache with sliding windows`.
    pub fn memory(&self) -> &'static str {
        // SAFETY: the plan is alive; the text is NUL-terminated and static.
        let text = unsafe { std::ffi::CStr::from_ptr(ffi::dim_plan_memory(self.plan.as_ptr())) };
        text.to_str().unwrap_or_default()
    }

    /// What crosses where the model is cut before block `block`.
    ///
    /// # Errors
    /// [`Error::NotApart`]; [`Error::InvalidArgument`] for a block before which nothing can be.
    pub fn cut(&mut self, block: u32) -> Result<Layout, Error> {
        // SAFETY: the plan is alive and ours alone.
        check_status(unsafe { ffi::dim_plan_cut(self.plan.as_ptr(), block) })?;
        self.crossing(ffi::DIM_END_IN)
    }

    /// What the blocks need.
    ///
    /// # Errors
    /// [`Error::NotApart`]; [`Error::InvalidArgument`] for blocks that
    /// the model does not have.
    pub fn range(&mut self, blocks: Range<u32>) -> Result<RangePlan, Error> {
        let mut c = ffi::dim_range_plan::default();
        // SAFETY: the plan is alive and ours alone; `c` is written.
        check_status(unsafe {
            ffi::dim_plan_range(self.plan.as_ptr(), blocks.start, blocks.end, &raw mut c)
        })?;
        let tensors = (0..c.n_tensors)
            .map(|index| {
                let name = text(|buffer, capacity, length| {
                    // SAFETY: the plan is alive; `buffer` has room for `capacity` bytes.
                    unsafe { ffi::dim_plan_tensor(self.plan.as_ptr(), index, buffer, capacity, length) }
                })?;
                Ok(String::from_utf8_lossy(&name.unwrap_or_default()).into_owned())
            })
            .collect::<Result<Vec<_>, Error>>()?;
        Ok(RangePlan {
            input: self.crossing(ffi::DIM_END_IN)?,
            output: self.crossing(ffi::DIM_END_OUT)?,
            blocks,
            tensors,
            weights_bytes: c.weights_bytes,
            reads_tokens: c.reads_tokens,
            cache_bytes_per_position: c.cache_bytes_per_position,
            state_bytes_per_session: c.state_bytes_per_session,
        })
    }

    /// What crosses one end of what was looked at last.
    fn crossing(&self, end: ffi::dim_end) -> Result<Layout, Error> {
        Layout::read(|out, capacity, n| {
            // SAFETY: the plan is alive; `out` has room for `capacity` entries.
            unsafe { ffi::dim_plan_crossing(self.plan.as_ptr(), end, out, capacity, n) }
        })
    }
}

impl Drop for GraphPlan {
    fn drop(&mut self) {
        // SAFETY: the plan is ours.
        unsafe { ffi::dim_plan_free(self.plan.as_ptr()) };
    }
}

impl std::fmt::Debug for GraphPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GraphPlan({}, {} blocks)", self.arch, self.n_blocks)
    }
}
