// Whether the system still gives memory, asked before llama.cpp takes it.
#pragma once

#include <cstdint>

namespace dim {

// ggml and llama.cpp check what they allocate where it is large, and end the process by an assertion where it is small:
// so it is asked, before anything is, whether there is room for `bytes` and all the small things. Fails
// (DIM_OUT_OF_MEMORY); the sentence begins with `what`. `mapped`: the bytes are a file's, and take addresses only.
void check_room(uint64_t bytes, bool mapped, const char * what);

// Bytes that this process may have at all: the machine's, or those of a group of processes that has a limit (Linux's
// cgroups), swap included where it is known. 0: not known.
uint64_t memory_limit();

}   // namespace dim
