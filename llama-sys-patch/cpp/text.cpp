// Text to tokens and back.
#include "boundary.h"
#include "model.h"

#include "llama-vocab.h"
#include "llama.h"

#include <algorithm>
#include <climits>

using namespace dim;

// llama.cpp's vocabulary asserts (and aborts) where there is none.
static const llama_vocab * tokenizer(const dim_model * model) {
    const auto * vocab = llama_model_get_vocab(model->llama.get());
    return llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE ? nullptr : vocab;
}

static const llama_vocab & need_tokenizer(const dim_model * model) {
    const auto * vocab = tokenizer(model);
    if (!vocab) fail(DIM_NO_TOKENIZER, "this file carries no tokenizer: text goes in and out at the head");
    return *vocab;
}

// What tokenize() asserts on: a model that wants a special token added and does not have it.
static void check_special(const llama_vocab & vocab) {
    const bool bert = llama_vocab_type(&vocab) == LLAMA_VOCAB_TYPE_WPM;
    const auto need = [&](bool wanted, llama_token token, const char * name) {
        if (wanted && token == LLAMA_TOKEN_NULL) {
            fail(DIM_NO_TOKENIZER, "the tokenizer adds a %s token to every text, but names none", name);
        }
    };
    need(bert || llama_vocab_get_add_bos(&vocab), llama_vocab_bos(&vocab), "begin-of-text");
    need(llama_vocab_get_add_eos(&vocab), llama_vocab_eos(&vocab), "end-of-text");
    need(bert || llama_vocab_get_add_sep(&vocab), llama_vocab_sep(&vocab), "separator");
}

// What merging asserts on: words with spaces in them. One pre-tokenizer (of embedders) leaves them there where the tokenizer is
// not of the kind that takes them out before.
static void check_words(const llama_vocab & vocab) {
    if (llama_vocab_type(&vocab) != LLAMA_VOCAB_TYPE_BPE) return;
    if (vocab.get_pre_type() == LLAMA_VOCAB_PRE_TYPE_WHITESPACE && vocab.get_tokenizer_model() != "whitespace") {
        fail(DIM_NO_TOKENIZER, "the tokenizer's words are split at white space, and its merges take no such words");
    }
}

dim_status dim_model_tokenize(const dim_model * model, const char * text, size_t length, bool add_special,
                              bool parse_special, int32_t * tokens, size_t capacity, int64_t * n_tokens) {
    return guarded([&] {
        const auto & vocab = need_tokenizer(model);
        if (length > INT32_MAX / 2)
            fail(DIM_INVALID_ARGUMENT, "a text of %zu bytes: at most %d", length, INT32_MAX / 2);
        check_words(vocab);
        if (add_special) check_special(vocab);
        const int32_t room = (int32_t) std::min<size_t>(capacity, INT32_MAX);
        const int32_t n = llama_tokenize(&vocab, text, (int32_t) length, tokens, room, add_special, parse_special);
        if (n == INT32_MIN) fail(DIM_INVALID_ARGUMENT, "the text has more tokens than can be counted");
        *n_tokens = n < 0 ? -(int64_t) n : n;
    });
}

dim_status dim_model_token_bytes(const dim_model * model, int32_t token, bool special, char * bytes, size_t capacity,
                                 int64_t * length) {
    return guarded([&] {
        const auto & vocab = need_tokenizer(model);
        const int32_t n_vocab = llama_vocab_n_tokens(&vocab);
        if (token < 0 || token >= n_vocab) {
            fail(DIM_UNKNOWN_TOKEN, "token %d is not in the vocabulary of %d", token, n_vocab);
        }
        const int32_t room = (int32_t) std::min<size_t>(capacity, INT32_MAX);
        const int32_t n = llama_token_to_piece(&vocab, token, bytes, room, 0, special);
        *length = n < 0 ? -(int64_t) n : n;
    });
}

dim_status dim_model_is_eog(const dim_model * model, int32_t token, bool * is_eog) {
    return guarded([&] {
        const auto * vocab = tokenizer(model);
        *is_eog = vocab && token >= 0 && token < llama_vocab_n_tokens(vocab) && llama_vocab_is_eog(vocab, token);
    });
}
