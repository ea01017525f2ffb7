#include "room.h"

#include "boundary.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#    include <sys/mman.h>
#endif

namespace dim {

// For all that is small: tokenizer, graphs, threads, and what this project's programs take themselves.
constexpr uint64_t small_things = 96u << 20;

static uint64_t machine_bytes() {
    auto * cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    size_t free = 0, total = 0;
    if (cpu) ggml_backend_dev_memory(cpu, &free, &total);
    return total;
}

#if defined(__linux__)
// A number, or nothing: the file is not there, or says "max".
static bool read_bytes(const std::string & path, uint64_t & bytes) {
    std::ifstream file(path);
    return (bool) (file >> bytes);
}

// The least of the limits of this process's group and of those that it is in (version 2); nothing where there is none.
static uint64_t group_bytes() {
    constexpr uint64_t none = std::numeric_limits<uint64_t>::max();
    std::ifstream groups("/proc/self/cgroup");
    std::string line, group;
    while (std::getline(groups, line))
        if (!line.compare(0, 4, "0::/")) group = line.substr(3);
    if (group == "/") group.clear();
    uint64_t least = none;
    // from the group itself to the one that all are in
    for (bool more = true; more;) {
        const std::string folder = "/sys/fs/cgroup" + group;
        uint64_t most = 0, swap = 0;
        if (read_bytes(folder + "/memory.max", most)) {
            // no limit of swap: what the machine has of it is not known here
            const bool limited = read_bytes(folder + "/memory.swap.max", swap);
            if (limited) least = std::min(least, most + swap);
        }
        more = !group.empty();
        if (more) group.resize(group.rfind('/'));
    }
    return least == none ? 0 : least;
}
#else
static uint64_t group_bytes() { return 0; }
#endif

uint64_t memory_limit() {
    const uint64_t machine = machine_bytes(), group = group_bytes();
    if (machine == 0 || group == 0) return std::max(machine, group);
    return std::min(machine, group);
}

[[noreturn]] static void no_room(uint64_t bytes, const char * what, const char * why) {
    if (bytes < (1u << 20)) fail(DIM_OUT_OF_MEMORY, "%s: %s", what, why);
    fail(DIM_OUT_OF_MEMORY, "%s: %.1f MiB are needed: %s", what, (double) bytes / (1 << 20), why);
}

void check_room(uint64_t bytes, bool mapped, const char * what) {
    const uint64_t limit = mapped ? 0 : memory_limit();
    if (limit > 0 && bytes > limit) {
        char why[96];
        std::snprintf(why, sizeof why, "this process may have %.1f MiB", (double) limit / (1 << 20));
        no_room(bytes, what, why);
    }
#if defined(__unix__) || defined(__APPLE__)
    // what is mapped is no memory of the process, but has addresses like it
    const int access = mapped ? PROT_NONE : PROT_READ | PROT_WRITE;
    void * files = bytes == 0 ? nullptr : mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANON, -1, 0);
    void * small = files == MAP_FAILED
                       ? MAP_FAILED
                       : mmap(nullptr, small_things, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (small != MAP_FAILED) munmap(small, small_things);
    if (files && files != MAP_FAILED) munmap(files, bytes);
    if (small == MAP_FAILED) no_room(bytes, what, "the system gives this process no more memory");
#endif
}

}   // namespace dim
