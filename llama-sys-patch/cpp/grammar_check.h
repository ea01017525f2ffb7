// Whether llama.cpp's grammar engine comes to an end with a grammar: it has no bounds of its own.
#pragma once

#include "llama-grammar.h"

namespace dim {

// Fails (DIM_REFUSED) where reading `gbnf` would not end, or take memory without bound: {5,3}, or long items repeated often.
void check_repetitions(const char * gbnf);

// Fails (DIM_REFUSED) where a rule begins with itself, also behind what may be empty: llama.cpp does not see all of these,
// and its stacks grow for ever then; and where there are too many ways for a rule to begin, all of which its own search
// walks. `names`: of the rules, for sentences.
void check_beginnings(const llama_grammar_parser & parser);

}   // namespace dim
