// The part of the C contract that is about what is said: chat templates, the parsers of what a model answers, and
// grammars. What layer_eval.h says of every function holds here too, except that templates and parsers are llama.cpp's
// `common` library, which bounds neither time, nor memory, nor stack:
//   - a template is a program out of a model's file. dim_chat_template_*() belong into a process that may die.
//   - a parser or a grammar recurses as deep as its text nests. The caller bounds the depth and gives the stack.
#pragma once

#include "layer_eval.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- a text that a call gives ---------------------------------------------------------------------------------------

typedef struct dim_text dim_text;

// The bytes, *length of them, UTF-8 without a NUL at the end; the text's own, until it is freed. Thread: any.
const char * dim_text_data(const dim_text * text, size_t * length);

// NULL is allowed. Thread: one.
void dim_text_free(dim_text * text);

// ---- chat templates -------------------------------------------------------------------------------------------------

typedef struct dim_chat_template dim_chat_template;

// Reads a template. `bos` and `eos` are the texts of those tokens, which templates may insert. On DIM_OK *out belongs to
// the caller. DIM_REFUSED: it does not parse. Thread: any.
dim_status dim_chat_template_create(const char * source, size_t source_length, const char * bos, const char * eos,
                                    dim_chat_template ** out);

// NULL is allowed. Thread: one.
void dim_chat_template_free(dim_chat_template * chat);

// Renders a conversation, and makes what the answer is read with. `request` is JSON, no deeper than 128 levels:
//   messages             OpenAI's
//   tools                OpenAI's; optional
//   tool_choice          "auto" (the default), "none" or "required"
//   parallel_tool_calls  optional, false
//   enable_thinking      optional, true
// *answer is JSON:
//   prompt               text that the model goes on from
//   parser               text: what dim_chat_parser_create() takes
//   grammar              GBNF that a tool call follows, "" where there is none
//   grammar_lazy         whether it holds only from a trigger on
//   triggers             [pattern]: as dim_grammar_create() takes them
//   prefill              what of the prompt's end the grammar and the parser count as answer, "" where nothing
//   preserved            [text]: control tokens that belong to the answer's text
//   stops                [text]: where the answer ends too
//   takes_tools          whether the template does anything with tools
//   thinks               whether the model has a reasoning part
// DIM_REFUSED: the template does not take it, with its sentence. On DIM_OK *answer belongs to the caller. Thread: any.
dim_status dim_chat_template_apply(const dim_chat_template * chat, const char * request, size_t request_length,
                                   dim_text ** answer);

// ---- answers --------------------------------------------------------------------------------------------------------

typedef struct dim_chat_parser dim_chat_parser;

// Reads a parser that dim_chat_template_apply() gave, in this process or another. On DIM_OK *out belongs to the caller.
// DIM_REFUSED: it is none. Thread: any.
dim_status dim_chat_parser_create(const char * saved, size_t saved_length, dim_chat_parser ** out);

// NULL is allowed. Thread: one.
void dim_chat_parser_free(dim_chat_parser * parser);

// Reads an answer, or with `partial` as much of one as there is. *message is JSON: content, reasoning_content and
// tool_calls, [{name, arguments (a text), id}]. DIM_REFUSED: it has not the form that the parser knows. Recurses for
// every bracket that is open. On DIM_OK *message belongs to the caller. Thread: any.
dim_status dim_chat_parser_parse(const dim_chat_parser * parser, const char * answer, size_t answer_length,
                                 bool partial, dim_text ** message);

// ---- grammars -------------------------------------------------------------------------------------------------------

typedef struct dim_grammar dim_grammar;

// Reads a grammar in GBNF, whose start is `root`. With triggers, ECMAScript's regular expressions, it holds from where
// one of them matches in what was accepted (from its first group on, where it has one); without, from the start. The
// grammar leans on the model, which must outlive it. Recurses for every bracket that is open, and for every rule that
// begins with another. On DIM_OK *out belongs to the caller. DIM_REFUSED: it does not parse, recurses on its left, has no
// root; DIM_NO_TOKENIZER. Thread: any.
dim_status dim_grammar_create(const dim_model * model, const char * gbnf, const char * const * triggers,
                              size_t n_triggers, dim_grammar ** out);

// NULL is allowed. Thread: one.
void dim_grammar_free(dim_grammar * grammar);

// Sets logits[i], of token i, to minus infinity where the grammar does not allow it next; n is the vocabulary's size or
// less. DIM_WRONG_SIZE where it is more. Thread: one.
dim_status dim_grammar_apply(const dim_grammar * grammar, float * logits, size_t n);

// Whether the grammar allows the token next. DIM_UNKNOWN_TOKEN. Thread: one.
dim_status dim_grammar_allows(const dim_grammar * grammar, int32_t token, bool * allowed);

// Goes on by a token. DIM_REFUSED where the grammar does not allow it, DIM_UNKNOWN_TOKEN; nothing has changed then.
// Thread: one.
dim_status dim_grammar_accept(dim_grammar * grammar, int32_t token);

// Goes on by a text that was said before the first token. DIM_REFUSED where the grammar does not allow it: the grammar is
// of no use any more. Thread: one.
dim_status dim_grammar_accept_text(dim_grammar * grammar, const char * text, size_t length);

#ifdef __cplusplus
}
#endif
