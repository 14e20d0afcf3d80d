// The tensors of modulate and gate_residual as Python passes them, for both modules.
#pragma once

#include <tuple>

#include "common/bind.h"
#include "modulate/modulate.h"

namespace sana {

using Row = std::tuple<Address, int64_t, int>;         // (B, C): address, stride of B, dtype
using Tokens = std::tuple<Address, int64_t, int64_t>;  // (B, N, C): address, strides of B and N

inline ImageRows image_rows(const Row& row) {
  return {pointer(std::get<0>(row)), std::get<1>(row), DType(std::get<2>(row))};
}

inline TokenRows token_rows(const Tokens& x) { return {pointer(std::get<0>(x)), {std::get<1>(x), std::get<2>(x)}}; }

}  // namespace sana
