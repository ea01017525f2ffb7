// Grammars in GBNF, by llama.cpp's own engine: its llama_sampler lets exceptions into C and aborts at an end of text that
// the grammar does not allow.
#include "boundary.h"
#include "dialogue.h"
#include "grammar_check.h"
#include "model.h"

#include "llama-grammar.h"
#include "llama-vocab.h"
#include "llama.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace dim;

namespace {

struct free_grammar {
    void operator()(llama_grammar * grammar) const { llama_grammar_free_impl(grammar); }
};

// Bytes that a trigger is looked for in. The buffer would grow with the answer, and every token search all of it, by a
// regular expression that recurses for every character it matches.
constexpr size_t LONGEST_WAIT = 1024;
// Ways in which a text may go on that are followed at a time. Each token of an ambiguous grammar can double them.
constexpr size_t MOST_WAYS = 4096;
// Bytes of the grammar that a sentence about it quotes.
constexpr size_t QUOTED = 160;

}   // namespace

struct dim_grammar {
    std::unique_ptr<llama_grammar, free_grammar> grammar;
    const llama_vocab & vocab;

    // Whether the grammar says anything of the next token.
    bool holds() const { return !grammar->awaiting_trigger; }
    void check_token(int32_t token) const {
        const int32_t n = llama_vocab_n_tokens(&vocab);
        if (token < 0 || token >= n) fail(DIM_UNKNOWN_TOKEN, "token %d is not in the vocabulary of %d", token, n);
    }
    bool allows(int32_t token) const {
        if (!holds()) return true;
        llama_token_data data{ token, 0.0f, 0.0f };
        llama_token_data_array one{ &data, 1, -1, false };
        llama_grammar_apply_impl(*grammar, &one);
        return !std::isinf(data.logit);
    }
    void forget_the_oldest();
    void check_ways() const {
        if (grammar->stacks.size() > MOST_WAYS) {
            fail(DIM_INVALID_ARGUMENT, "it is ambiguous: what was said may go on in more than %zu ways", MOST_WAYS);
        }
    }
};

// Keeps the end of what a trigger is looked for in, token by token.
void dim_grammar::forget_the_oldest() {
    auto & buffer = grammar->trigger_buffer;
    if (!grammar->awaiting_trigger || buffer.size() <= 2 * LONGEST_WAIT) return;
    auto & tokens = grammar->trigger_buffer_positions;
    const size_t from = buffer.size() - LONGEST_WAIT;
    const auto first =
        std::find_if(tokens.begin(), tokens.end(), [&](const auto & token) { return token.second.first >= from; });
    const size_t cut = first == tokens.end() ? buffer.size() : first->second.first;
    tokens.erase(tokens.begin(), first);
    buffer.erase(0, cut);
    for (auto & token : tokens) {
        token.second.first -= cut;
        token.second.second -= cut;
    }
}

// Fails with llama.cpp's sentence where `gbnf` does not parse: its own way writes that, and all of the grammar, to the
// terminal.
static void check_rules(const llama_vocab * vocab, const char * gbnf) {
    check_repetitions(gbnf);
    llama_grammar_parser parser(vocab);
    try {
        for (const char * at = skip_blanks(gbnf); *at;) at = parser.parse_rule(at);
    } catch (const std::exception & e) {
        // it ends with all that follows
        std::string why(e.what(), std::min(std::strlen(e.what()), QUOTED));
        std::replace_if(why.begin(), why.end(), [](unsigned char c) { return std::iscntrl(c); }, ' ');
        fail(DIM_REFUSED, "%s", why.c_str());
    }
    if (parser.symbol_ids.count("root") == 0) fail(DIM_REFUSED, "it has no rule \"root\"");
    for (const auto & [name, id] : parser.symbol_ids) {
        if (id >= parser.rules.size() || parser.rules[id].empty()) {
            fail(DIM_REFUSED, "there is no rule \"%.*s\"", (int) QUOTED, name.c_str());
        }
    }
    check_beginnings(parser);
}

dim_status dim_grammar_create(const dim_model * model, const char * gbnf, const char * const * triggers,
                              size_t n_triggers, dim_grammar ** out) {
    return guarded_as(DIM_REFUSED, [&] {
        initialize();
        const auto * vocab = llama_model_get_vocab(model->llama.get());
        if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
            fail(DIM_NO_TOKENIZER, "this file carries no tokenizer: a grammar is about tokens");
        }
        check_rules(vocab, gbnf);
        forget_log();
        std::vector<const char *> patterns(triggers, triggers + n_triggers);
        std::unique_ptr<llama_grammar, free_grammar> grammar(
            llama_grammar_init_impl(vocab, gbnf, "root", n_triggers > 0, patterns.data(), patterns.size(), nullptr, 0));
        if (!grammar) {
            const char * why = log_error_line();
            fail(DIM_REFUSED, "%s", *why ? why : "it does not parse");
        }
        *out = new dim_grammar{ std::move(grammar), *vocab };
    });
}

void dim_grammar_free(dim_grammar * grammar) {
    guarded([&] { delete grammar; });
}

dim_status dim_grammar_apply(const dim_grammar * grammar, float * logits, size_t n) {
    return guarded([&] {
        if (!grammar->holds()) return;
        if (n > (size_t) llama_vocab_n_tokens(&grammar->vocab)) fail(DIM_WRONG_SIZE, "%zu logits", n);
        std::vector<llama_token_data> data(n);
        for (size_t i = 0; i < n; i++) data[i] = { (llama_token) i, 0.0f, 0.0f };
        llama_token_data_array all{ data.data(), n, -1, false };
        llama_grammar_apply_impl(*grammar->grammar, &all);
        for (size_t i = 0; i < n; i++) {
            if (std::isinf(data[i].logit)) logits[i] = -INFINITY;
        }
    });
}

dim_status dim_grammar_allows(const dim_grammar * grammar, int32_t token, bool * allowed) {
    return guarded([&] {
        grammar->check_token(token);
        *allowed = grammar->allows(token);
    });
}

dim_status dim_grammar_accept(dim_grammar * grammar, int32_t token) {
    return guarded_as(DIM_REFUSED, [&] {
        grammar->check_token(token);
        // llama.cpp throws where a text is not allowed, and aborts where an end is not
        if (!grammar->allows(token)) { fail(DIM_REFUSED, "the grammar does not allow token %d here", token); }
        llama_grammar_accept_impl(*grammar->grammar, token);
        grammar->forget_the_oldest();
        grammar->check_ways();
    });
}

dim_status dim_grammar_accept_text(dim_grammar * grammar, const char * text, size_t length) {
    return guarded_as(DIM_REFUSED, [&] {
        if (length > 0 && grammar->holds()) llama_grammar_accept_str(*grammar->grammar, std::string(text, length));
        grammar->check_ways();
    });
}
