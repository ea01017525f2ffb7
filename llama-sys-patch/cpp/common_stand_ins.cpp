// What `common`'s chat part calls of the rest of that library, which is not compiled: its log, which writes to the
// terminal from a thread of its own, the vocabulary, which is asked only where a template comes from a model, and four
// functions over strings. All of it is here, also what only sections call that a linker leaves out.
#include "chat.h"
#include "common.h"
#include "log.h"

#include <stdexcept>

void common_log_set_verbosity_thold(int) {}
// lower than every level: nothing is formatted
int common_log_get_verbosity_thold(void) { return -1000; }
bool common_log_get_jsonl(void) { return false; }
common_log * common_log_main() { return nullptr; }
void common_log_add(common_log *, ggml_log_level, const char *, ...) {}
void common_log_add_json(common_log *, const char *, const common_json &) {}

std::string common_token_to_piece(const llama_vocab *, llama_token, bool) {
    throw std::logic_error("a template is read without a model");
}

std::vector<llama_token> common_tokenize(const llama_vocab *, const std::string &, bool, bool) {
    throw std::logic_error("a template is read without a model");
}

std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string joined;
    for (const std::string & value : values) {
        if (&value != values.data()) { joined += separator; }
        joined += value;
    }
    return joined;
}

// by a separator that is not empty; what follows the last one is a part too, where it is nothing as well
std::vector<std::string> string_split(const std::string & text, const std::string & separator) {
    std::vector<std::string> parts;
    size_t begin = 0;
    if (!separator.empty()) {
        for (size_t at; (at = text.find(separator, begin)) != std::string::npos; begin = at + separator.size()) {
            parts.push_back(text.substr(begin, at - begin));
        }
    }
    parts.push_back(text.substr(begin));
    return parts;
}

std::string string_repeat(const std::string & text, size_t n) {
    std::string all;
    all.reserve(text.size() * n);
    while (n-- > 0) { all += text; }
    return all;
}

// from left to right, in one pass
void string_replace_all(std::string & text, const std::string & search, const std::string & replace) {
    if (!search.empty()) { text = string_join(string_split(text, search), replace); }
}
