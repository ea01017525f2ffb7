// Swift 6.0's libswiftObservation.so for Linux was built with a call of a function that no library exports:
// swift::threading::fatal(char const *, ...), called when a mutex cannot be made. Without this nothing that imports
// Observation links there. On Apple systems this file is in no target.
#include "fatal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

void _ZN5swift9threading5fatalEPKcz(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    abort();
}
