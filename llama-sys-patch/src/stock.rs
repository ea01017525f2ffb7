//! Plain `llama_decode` on a whole model, with the settings of a stage.

use std::ptr::NonNull;

use crate::error::{check, check_status};
use crate::session::SessionCalls;
use crate::stage::to_c;
use crate::{ContextInfo, ContextParams, Error, Model, Row, ffi};

/// The whole model as stock llama.cpp runs it: the oracle, and the A arm of comparisons.
pub struct Stock {
    stock: NonNull<ffi::dim_stock>,
    info: ContextInfo,
    model: Model, // after `stock`: must outlive it
}

// SAFETY: as for Stage: a dim_stock belongs to no thread, everything that computes takes `&mut self`, and `model` keeps
// alive what it points to.
unsafe impl Send for Stock {}

impl Stock {
    /// Makes a context. `max_outputs` is the most rows of logits of one call; `None` is llama.cpp's default, `n_batch`,
    /// and makes it allocate buffers for that many.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], [`Error::OutOfMemory`], [`Error::Unsupported`] for models with an encoder.
    pub fn new(model: &Model, params: &ContextParams, max_outputs: Option<u32>) -> Result<Stock, Error> {
        let c_params = params.to_c(max_outputs.unwrap_or(0));
        let mut stock = std::ptr::null_mut();
        // SAFETY: the model is alive, and the context keeps it so; both structs are valid for the call.
        check_status(unsafe { ffi::dim_stock_create(model.raw(), &raw const c_params, &raw mut stock) })?;
        let stock = NonNull::new(stock).ok_or_else(|| Error::Internal("a context that is NULL".into()))?;
        let mut info = ffi::dim_context_info::default();
        // SAFETY: the context was just made; `info` is written.
        let status = unsafe { ffi::dim_stock_describe(stock.as_ptr(), &raw mut info) };
        let stock = Stock { stock, info: ContextInfo::from_c(&info), model: model.clone() };
        check_status(status)?;
        Ok(stock)
    }

    /// Computes rows as [`Stage::evaluate`](crate::Stage::evaluate) does. `logits`: (rows that want output, n_vocab);
    /// may be longer. Gives the number of rows written.
    ///
    /// # Errors
    /// See [`Error`]. The sessions then are as they were.
    pub fn decode(&mut self, rows: &[Row], tokens: &[i32], logits: &mut [f32]) -> Result<usize, Error> {
        let rows = to_c(rows);
        let mut n_written = 0;
        let mut fault = ffi::dim_fault::default();
        // SAFETY: the context is alive and ours alone (`&mut`); all pointers are valid for the lengths given.
        let status = unsafe {
            ffi::dim_stock_decode(
                self.stock.as_ptr(),
                rows.as_ptr(),
                rows.len(),
                tokens.as_ptr(),
                tokens.len(),
                logits.as_mut_ptr(),
                logits.len(),
                &raw mut n_written,
                &raw mut fault,
            )
        };
        check(status, &fault)?;
        Ok(n_written)
    }

    /// Forgets a session's positions from `position` on.
    ///
    /// # Errors
    /// [`Error::WrongPosition`] beyond the session's length, [`Error::UnknownSession`].
    pub fn rewind(&mut self, session: u32, position: u32) -> Result<(), Error> {
        // SAFETY: the context is alive and ours alone (`&mut`).
        unsafe { SESSIONS.rewind(self.stock.as_ptr(), session, position) }
    }

    /// Forgets a session.
    ///
    /// # Errors
    /// [`Error::UnknownSession`].
    pub fn clear(&mut self, session: u32) -> Result<(), Error> {
        self.rewind(session, 0)
    }

    /// Positions a session holds.
    ///
    /// # Errors
    /// [`Error::UnknownSession`].
    pub fn length(&self, session: u32) -> Result<u32, Error> {
        // SAFETY: the context is alive, and what changes it takes `&mut`.
        unsafe { SESSIONS.length(self.stock.as_ptr(), session) }
    }

    /// As [`Stage::lowest`](crate::Stage::lowest).
    ///
    /// # Errors
    /// [`Error::UnknownSession`].
    pub fn lowest(&self, session: u32) -> Result<Option<u32>, Error> {
        // SAFETY: the context is alive, and what changes it takes `&mut`.
        unsafe { SESSIONS.lowest(self.stock.as_ptr(), session) }
    }

    /// Sizes, as they came out.
    pub fn info(&self) -> &ContextInfo {
        &self.info
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }
}

const SESSIONS: SessionCalls<ffi::dim_stock> = SessionCalls {
    rewind: ffi::dim_stock_rewind,
    length: ffi::dim_stock_length,
    lowest: ffi::dim_stock_lowest,
};

impl Drop for Stock {
    fn drop(&mut self) {
        // SAFETY: the context is ours, and its model is still alive.
        unsafe { ffi::dim_stock_free(self.stock.as_ptr()) };
    }
}

impl std::fmt::Debug for Stock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stock({:?})", self.model)
    }
}
