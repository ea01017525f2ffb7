//! Chat templates and what a model answers, by llama.cpp's `common`: one engine for templates, and for each family of
//! models the parser of its tool calls and of its reasoning part.
//!
//! A [`ChatTemplate`] is a program out of a model's file, and nothing bounds it: it belongs into a process of its own. What
//! that process gives back is text, and from it an [`AnswerParser`] is made where the model's answer is.

use std::ffi::{CString, c_char};
use std::ptr::NonNull;

use crate::error::check_status;
use crate::stack::with_room_for_brackets;
use crate::{Error, ffi};

/// A chat template that was read.
pub struct ChatTemplate(NonNull<ffi::dim_chat_template>);

// SAFETY: a dim_chat_template belongs to no thread, and all that is done with it leaves it as it is.
unsafe impl Send for ChatTemplate {}
// SAFETY: as above; dim_chat_template_apply() is "Thread: any".
unsafe impl Sync for ChatTemplate {}

impl ChatTemplate {
    /// Reads `source`; `bos` and `eos` are the texts of those tokens, which templates may insert. To be called where a stack
    /// that overflows, or memory without end, ends nothing but a process for this.
    ///
    /// # Errors
    /// [`Error::Refused`] with what the engine says; [`Error::InvalidArgument`] for a NUL byte in `bos` or `eos`.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate, Error> {
        let nul = |_| Error::InvalidArgument("a token whose text has a NUL byte in it".into());
        let (bos, eos) = (CString::new(bos).map_err(nul)?, CString::new(eos).map_err(nul)?);
        let mut template = std::ptr::null_mut();
        // SAFETY: `source` is valid for its length, the other two end with a NUL, all for the call; `template` is written.
        check_status(unsafe {
            ffi::dim_chat_template_create(
                source.as_ptr().cast(),
                source.len(),
                bos.as_ptr(),
                eos.as_ptr(),
                &raw mut template,
            )
        })?;
        NonNull::new(template)
            .map(ChatTemplate)
            .ok_or_else(|| Error::Internal("a template that is NULL".into()))
    }

    /// The prompt of a conversation and what its answer is read with: JSON in and out, both described at
    /// `dim_chat_template_apply` in `cpp/dialogue.h`. To be called where [`new`](ChatTemplate::new) is.
    ///
    /// # Errors
    /// [`Error::Refused`]: the template does not take it.
    pub fn apply(&self, request: &str) -> Result<String, Error> {
        said(|text| {
            // SAFETY: the template is alive, `request` valid for its length; `text` is written.
            unsafe {
                ffi::dim_chat_template_apply(self.0.as_ptr(), request.as_ptr().cast(), request.len(), text)
            }
        })
    }
}

impl Drop for ChatTemplate {
    fn drop(&mut self) {
        // SAFETY: the template is ours.
        unsafe { ffi::dim_chat_template_free(self.0.as_ptr()) };
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChatTemplate")
    }
}

/// The parser of a model's answers to one request.
pub struct AnswerParser(NonNull<ffi::dim_chat_parser>);

// SAFETY: a dim_chat_parser belongs to no thread, and parsing leaves it as it is.
unsafe impl Send for AnswerParser {}
// SAFETY: as above; dim_chat_parser_parse() is "Thread: any".
unsafe impl Sync for AnswerParser {}

impl AnswerParser {
    /// Most brackets of JSON that may be open at a time in an answer: llama.cpp's parser recurses for each of them. What a
    /// program takes as arguments has a few levels.
    pub const MAX_DEPTH: usize = 1_000;

    /// The parser that [`ChatTemplate::apply`] gave as text.
    ///
    /// # Errors
    /// [`Error::Refused`]: it is none.
    pub fn new(saved: &str) -> Result<AnswerParser, Error> {
        let mut parser = std::ptr::null_mut();
        // SAFETY: `saved` is valid for its length; `parser` is written.
        check_status(unsafe {
            ffi::dim_chat_parser_create(saved.as_ptr().cast(), saved.len(), &raw mut parser)
        })?;
        NonNull::new(parser).map(AnswerParser).ok_or_else(|| Error::Internal("a parser that is NULL".into()))
    }

    /// What `answer` says, or with `is_partial` what as much of it as there is says so far: JSON with `content`,
    /// `reasoning_content` and `tool_calls`, each with `name`, `arguments` (a text) and `id`.
    ///
    /// # Errors
    /// [`Error::Refused`]: it does not have the parser's form, or has more than [`MAX_DEPTH`](Self::MAX_DEPTH) brackets open
    /// at a time; [`Error::OutOfMemory`]: there is no stack for as many as it has.
    pub fn parse(&self, answer: &str, is_partial: bool) -> Result<String, Error> {
        // those of JSON: what is between a family's own marks it reads in a row
        with_room_for_brackets(answer, b"[]{}", Self::MAX_DEPTH, || {
            said(|text| {
                // SAFETY: the parser is alive, `answer` valid for its length; `text` is written.
                unsafe {
                    ffi::dim_chat_parser_parse(
                        self.0.as_ptr(),
                        answer.as_ptr().cast(),
                        answer.len(),
                        is_partial,
                        text,
                    )
                }
            })
        })?
    }
}

impl Drop for AnswerParser {
    fn drop(&mut self) {
        // SAFETY: the parser is ours.
        unsafe { ffi::dim_chat_parser_free(self.0.as_ptr()) };
    }
}

impl std::fmt::Debug for AnswerParser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AnswerParser")
    }
}

/// The text that a call gives.
fn said(call: impl FnOnce(*mut *mut ffi::dim_text) -> ffi::dim_status) -> Result<String, Error> {
    let mut text = std::ptr::null_mut();
    check_status(call(&raw mut text))?;
    let mut length = 0;
    // SAFETY: the call succeeded, so the text is there and ours.
    let data: *const c_char = unsafe { ffi::dim_text_data(text, &raw mut length) };
    // SAFETY: `length` bytes are there until the text is freed; they are copied.
    let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), length) }.to_vec();
    // SAFETY: the text is ours, and used no more.
    unsafe { ffi::dim_text_free(text) };
    String::from_utf8(bytes).map_err(|_| Error::Internal("llama.cpp gave JSON that is no UTF-8".into()))
}
