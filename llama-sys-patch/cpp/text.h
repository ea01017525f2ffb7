// A text that goes over the boundary.
#pragma once

#include <string>

struct dim_text {
    std::string bytes;
};
