// What `common`'s chat part calls of the rest of that library, which is not compiled: its log, which writes to the
// terminal from a thread of its own, and the vocabulary, which is asked only where a template comes from a model.
#include "chat.h"
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
