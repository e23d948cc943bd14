// From the type of a tensor to the type of a kernel.
#pragma once

#include "csrc/base/dtype.h"

namespace qk {

// f(T{}) for the element type T that `type` names.
template <typename F>
inline auto with_float_type(FloatType type, const F& f) {
  switch (type) {
    case FloatType::kBFloat16:
      return f(BFloat16{});
    case FloatType::kFloat16:
      return f(Float16{});
    case FloatType::kFloat32:
      break;
  }
  return f(float{});
}

}  // namespace qk
