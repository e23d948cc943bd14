// What the operations of a program have in common: their addresses, and that they can run on a part
// of the batch.
#pragma once

#include <type_traits>

#include "csrc/plan/program.h"

namespace qk::plan {

// Every Ref of an operation.
template <typename Op, typename F>
void for_each_ref(Op& op, const F& f) {
  std::visit(
      [&f](auto& o) {
        using T = std::remove_cvref_t<decltype(o)>;
        if constexpr (std::is_same_v<T, QuantizeOp> || std::is_same_v<T, ImageOp> ||
                      std::is_same_v<T, DequantizeOp>) {
          f(o.x);
          f(o.q);
        } else if constexpr (std::is_same_v<T, LinearOp>) {
          f(o.input);
          f(o.out);
          f(o.residual);
          f(o.workspace);
        } else if constexpr (std::is_same_v<T, ConvOp>) {
          f(o.input);
          f(o.floats);
          f(o.out);
          f(o.residual);
          f(o.workspace);
        } else if constexpr (std::is_same_v<T, PairOp>) {
          f(o.a);
          f(o.b);
          f(o.out);
        } else if constexpr (std::is_same_v<T, MoveOp> || std::is_same_v<T, ResizeOp>) {
          f(o.in);
          f(o.out);
        } else if constexpr (std::is_same_v<T, FillOp>) {
          f(o.out);
        } else {
          f(o.q);
          f(o.out);
        }
      },
      op);
}

// The operation on `count` of its `batch` images; Ref::image leads from image to image. False if
// its arguments do not say where one image ends and the next one begins.
bool take_images(int64_t batch, int64_t count, Operation* operation);

}  // namespace qk::plan
