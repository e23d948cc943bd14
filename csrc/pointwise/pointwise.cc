#include "csrc/pointwise/pointwise.h"

#include <cstring>

namespace qk {
namespace {

// Bytes of one task: its operands and output stay inside L2.
constexpr int64_t kRunBytes = 16384;

bool is_identity(const uint8_t* table) {
  for (int i = 0; i < 256; ++i) {
    if (table[i] != i) return false;
  }
  return true;
}

void copy_rows(const LookupRows& run) {
  for (int64_t row = 0; row < run.rows; ++row) {
    std::memcpy(run.out + row * run.out_stride, run.q + row * run.q_stride,
                static_cast<size_t>(run.n));
  }
}

LookupKernel lookup_or_copy(const uint8_t* table) {
  return is_identity(table) ? &copy_rows : select_lookup_kernel();
}

}  // namespace

LookupKernel select_lookup_kernel(CpuFeatures features) {
#define QK_LOOKUP_KERNEL(need, name) \
  if (has_features(features, need)) return name;
#define QK_BINARY_KERNEL(need, kernel_op, name)
#include "csrc/pointwise/kernels.inc"
#undef QK_LOOKUP_KERNEL
#undef QK_BINARY_KERNEL
  return nullptr;
}

BinaryKernel select_binary_kernel(BinaryOp op, CpuFeatures features) {
#define QK_LOOKUP_KERNEL(need, name)
#define QK_BINARY_KERNEL(need, kernel_op, name) \
  if (op == kernel_op && has_features(features, need)) return name;
#include "csrc/pointwise/kernels.inc"
#undef QK_LOOKUP_KERNEL
#undef QK_BINARY_KERNEL
  return nullptr;
}

void lookup(const LookupArgs& args, const Parallel& parallel) {
  const LookupKernel kernel = select_lookup_kernel();
  const int64_t work_ns = args.layout.rows() * args.layout.inner() / 16;
  for_each_run(args.layout, parallel, kRunBytes, work_ns,
               [&](const StridedCursor<2>& cursor, int64_t first, int64_t n) {
                 kernel({.q = args.q + cursor.offset[1] + first,
                         .out = args.out + cursor.offset[0] + first,
                         .table = args.table,
                         .rows = 1,
                         .n = n,
                         .q_stride = 0,
                         .out_stride = 0});
               });
}

void binary(const BinaryArgs& args, const Parallel& parallel) {
  const BinaryKernel kernel = select_binary_kernel(args.op);
  const int last = args.layout.dims - 1;
  const bool a_repeats = args.layout.inner() > 1 && args.layout.stride[1][last] == 0;
  const bool b_repeats = args.layout.inner() > 1 && args.layout.stride[2][last] == 0;
  const bool one_code = a_repeats && b_repeats;
  const int64_t work_ns = args.layout.rows() * args.layout.inner() / 8;
  for_each_run(args.layout, parallel, kRunBytes, work_ns,
               [&](const StridedCursor<3>& cursor, int64_t first, int64_t n) {
                 uint8_t* out = args.out + cursor.offset[0] + first;
                 kernel({.a = args.a + cursor.offset[1] + (a_repeats ? 0 : first),
                         .b = args.b + cursor.offset[2] + (b_repeats ? 0 : first),
                         .out = out,
                         .n = one_code ? 1 : n,
                         .a_repeats = a_repeats && !one_code,
                         .b_repeats = b_repeats && !one_code,
                         .grid = &args.grid});
                 if (one_code) std::memset(out, out[0], static_cast<size_t>(n));
               });
}

void cat(const CatArgs& args, const Parallel& parallel) {
  int64_t out_width = 0;
  for (int64_t k = 0; k < args.count; ++k) out_width += args.inputs[k].width;
  if (out_width == 0) return;
  int64_t out_first = 0;
  for (int64_t k = 0; k < args.count; ++k) {
    const CatInput& input = args.inputs[k];
    if (input.width == 0) continue;
    const LookupKernel kernel = lookup_or_copy(input.table);
    uint8_t* out = args.out + out_first;
    out_first += input.width;
    // Narrow rows go many to a task, wide rows in pieces.
    const int64_t piece = input.width < kRunBytes ? input.width : kRunBytes;
    const int64_t pieces = (input.width + piece - 1) / piece, rows = kRunBytes / piece;
    const int64_t row_tasks = (args.rows + rows - 1) / rows;
    const int64_t work_ns = args.rows * input.width / 16;
    parallel.for_each_range(row_tasks * pieces, work_ns, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / pieces * rows, first = task % pieces * piece;
        kernel({.q = input.q + row * input.width + first,
                .out = out + row * out_width + first,
                .table = input.table,
                .rows = args.rows - row < rows ? args.rows - row : rows,
                .n = input.width - first < piece ? input.width - first : piece,
                .q_stride = input.width,
                .out_stride = out_width});
      }
    });
  }
}

}  // namespace qk
