// Whether llama.cpp's grammar engine comes to an end with a grammar: it has no bounds of its own.
#pragma once

#include "llama-grammar.h"

namespace dim {

// Behind blanks and comments, which may stand between any two signs.
const char * skip_blanks(const char * at);

// Fails (DIM_REFUSED) where reading `gbnf` would not end, or take memory without bound: {5,3}, long items repeated often, or
// as many brackets and repetitions in rules with long names.
void check_repetitions(const char * gbnf);

// Fails (DIM_REFUSED) where a rule begins with itself, also behind what may be empty: llama.cpp does not see all of these,
// and its stacks grow for ever then; where there are too many ways for a rule to begin, all of which its own search
// walks; and where a text may go on in too many ways from one place, or through too many rules that are nothing.
void check_beginnings(const llama_grammar_parser & parser);

}   // namespace dim
