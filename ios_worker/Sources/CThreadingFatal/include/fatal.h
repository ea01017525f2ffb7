#pragma once

__attribute__((noreturn)) void _ZN5swift9threading5fatalEPKcz(const char *format, ...);
