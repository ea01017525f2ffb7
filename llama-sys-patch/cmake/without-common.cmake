# llama-cpp-sys-2 asks for llama.cpp's `common` library, because llama-cpp-2 takes its default features. Its part about chats is
# compiled by llama-sys-patch's build.rs; the rest, which nothing here uses, is more than half of what there is to compile.
# .cargo/config.toml has CMake read this file right after llama.cpp's project() line (CMAKE_PROJECT_INCLUDE). A build that
# does not see that file compiles a little longer, and gives the same programs.
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "llama: build common utils library" FORCE)
