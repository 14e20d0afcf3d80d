// Division that rounds up, of sizes: not negative.
#pragma once

#include <stdint.h>

namespace sana {

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }

}  // namespace sana
