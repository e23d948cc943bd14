// One step of a plan file: its operands and attribute cells, each checked before it is used.
#pragma once

#include <vector>

#include "csrc/plan/model.h"

namespace qk::plan {

inline constexpr int64_t kLimit = int64_t{1} << 40;  // of sizes and amounts in a file

// Places of a value's writer besides the indices of steps.
inline constexpr int64_t kInput = -1, kNever = INT64_MAX;

// A complaint about the step at `index`.
template <typename... Parts>
Error step_error(int64_t index, const Step& step, const Parts&... parts) {
  return error(ErrorKind::kDamaged, "plan: step ", index, " (", step_kind_name(step.kind), " '",
               step.name, "') ", parts...);
}

// Fills in `step`, the one at `index`, of which kind and name are known, from `count` cells.
// `model` holds the tables; `written_by` says which step writes each value: its index, kInput or
// kNever so far.
Error read_step(const Model& model, const std::vector<int64_t>& written_by, int64_t index,
                const int64_t* cells, int64_t count, int inputs, Step* step);

}  // namespace qk::plan
