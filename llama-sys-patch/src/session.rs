//! What a stage and a stock context are asked of a session, in one place: the functions have the same form.

use crate::error::{Error, check};
use crate::ffi;

/// The functions of one of them. `T` is what they work on.
pub(crate) struct SessionCalls<T> {
    pub(crate) rewind: unsafe extern "C" fn(*mut T, u32, u32, *mut ffi::dim_fault) -> ffi::dim_status,
    pub(crate) length: unsafe extern "C" fn(*const T, u32, *mut u32, *mut ffi::dim_fault) -> ffi::dim_status,
    pub(crate) lowest:
        unsafe extern "C" fn(*const T, u32, *mut u32, *mut bool, *mut ffi::dim_fault) -> ffi::dim_status,
}

impl<T> SessionCalls<T> {
    /// Forgets a session's positions from `position` on.
    ///
    /// # Safety
    /// `of` is alive, and nobody else's for the call.
    pub(crate) unsafe fn rewind(&self, of: *mut T, session: u32, position: u32) -> Result<(), Error> {
        let mut fault = ffi::dim_fault::default();
        // SAFETY: the caller's promise; `fault` is written.
        let status = unsafe { (self.rewind)(of, session, position, &raw mut fault) };
        check(status, &fault)
    }

    /// Positions a session holds.
    ///
    /// # Safety
    /// `of` is alive, and nobody changes it during the call.
    pub(crate) unsafe fn length(&self, of: *const T, session: u32) -> Result<u32, Error> {
        let mut length = 0;
        let mut fault = ffi::dim_fault::default();
        // SAFETY: the caller's promise; `length` and `fault` are written.
        let status = unsafe { (self.length)(of, session, &raw mut length, &raw mut fault) };
        check(status, &fault)?;
        Ok(length)
    }

    /// The lowest position a session can be taken back to; `None` if it is lost.
    ///
    /// # Safety
    /// `of` is alive, and nobody changes it during the call.
    pub(crate) unsafe fn lowest(&self, of: *const T, session: u32) -> Result<Option<u32>, Error> {
        let (mut position, mut lost) = (0, false);
        let mut fault = ffi::dim_fault::default();
        // SAFETY: the caller's promise; all three are written.
        let status = unsafe { (self.lowest)(of, session, &raw mut position, &raw mut lost, &raw mut fault) };
        check(status, &fault)?;
        Ok((!lost).then_some(position))
    }
}
