// fake_quant that also says where the gradient passes, one bit an element, and its backward from
// those bits: x need not be kept (1/8 byte an element instead).
//
//   y    = fake_quant(x)
//   bit  = qmin - zp[c] <= RNE(x * inv[c]) <= qmax - zp[c] (0 for NaN)
//   out  = bit ? grad : 0
//   code = quantize(x), one byte, if asked (so that integer layers need not quantize y again)
//
// Layout: as fake_quant, of dense tensors in one memory layout. A row of the walk (all of a tensor
// without channels; a channel's contiguous run; some rows of channels if they are innermost) starts
// a new byte of the mask, so that no two tasks share one: mask_layout says where. Bit i % 8 of byte
// i / 8 of a row is element i.
// Memory: owned by the caller; out may alias grad exactly.
// Numbers: y and out have the bits of fake_quant and fake_quant_backward.
#pragma once

#include <cstdint>

#include "csrc/base/cpu.h"
#include "csrc/base/dtype.h"
#include "csrc/base/parallel.h"
#include "csrc/quantize/grid.h"

namespace qk {

struct MaskLayout {
  int64_t row_elements;
  int64_t row_bytes;
  int64_t bytes;

  // Of the element at `offset` in memory, which is a multiple of 8 inside its row.
  int64_t byte_of(int64_t offset) const {
    return offset / row_elements * row_bytes + offset % row_elements / 8;
  }
};

MaskLayout mask_layout(const GridLayout& grid);

struct FakeQuantMaskArgs {
  const void* x;
  void* y;
  uint8_t* mask;   // mask_layout(grid).bytes
  uint8_t* codes;  // null: none
  FloatType type;
  int32_t qmin;
  int32_t qmax;
  GridLayout grid;
};

// True if a bit is 0.
bool fake_quant_mask(const FakeQuantMaskArgs& args, const Parallel& parallel);

struct MaskBackwardArgs {
  const void* grad;
  const uint8_t* mask;
  void* out;
  FloatType type;
  GridLayout grid;  // its scale and zero_point are unused
};

void fake_quant_mask_backward(const MaskBackwardArgs& args, const Parallel& parallel);

// One contiguous run; `mask` is that of its first element.
struct FakeQuantMaskRun {
  const void* x;
  void* y;
  uint8_t* mask;
  uint8_t* codes;  // null: none
  int64_t n;
  GridSpan grid;
  int32_t qmin;
  int32_t qmax;
  bool stream;  // store past the caches if y is aligned; the caller fences
};

struct MaskBackwardRun {
  const void* grad;
  const uint8_t* mask;
  void* out;
  int64_t n;
  bool stream;
};

// Element i of the run; its bit.
template <typename T>
inline __attribute__((always_inline)) uint32_t mask_element(const FakeQuantMaskRun& run,
                                                            int64_t i) {
  const int64_t c = run.grid.per_element ? i : 0;
  const float x = to_float(static_cast<const T*>(run.x)[i]);
  const float scale = run.grid.scale[c], inv_scale = run.grid.inv_scale[c];
  const int32_t zp = run.grid.zero_point[c];
  from_float(fake_quant(x, scale, inv_scale, zp, run.qmin, run.qmax), static_cast<T*>(run.y) + i);
  if (run.codes != nullptr) {
    run.codes[i] = static_cast<uint8_t>(quantize(x, inv_scale, zp, run.qmin, run.qmax));
  }
  return fake_quant_passes(x * inv_scale, zp, run.qmin, run.qmax);
}

// The run from element `first` (a multiple of 8) on; true if a bit is 0.
template <typename T>
inline __attribute__((always_inline)) bool mask_elements(const FakeQuantMaskRun& run,
                                                         int64_t first) {
  bool clipped = false;
  for (int64_t i = first; i < run.n; i += 8) {
    const int64_t count = run.n - i < 8 ? run.n - i : 8;
    uint32_t bits = 0;
    for (int64_t k = 0; k < count; ++k) bits |= mask_element<T>(run, i + k) << k;
    run.mask[i / 8] = static_cast<uint8_t>(bits);
    clipped |= bits != (1u << count) - 1;
  }
  return clipped;
}

template <typename T>
inline __attribute__((always_inline)) void pass_elements(const MaskBackwardRun& run,
                                                         int64_t first) {
  for (int64_t i = first; i < run.n; ++i) {
    const bool passes = run.mask[i / 8] >> (i % 8) & 1;
    static_cast<T*>(run.out)[i] = passes ? static_cast<const T*>(run.grad)[i] : T{};
  }
}

using FakeQuantMaskKernel = bool (*)(const FakeQuantMaskRun&);
using MaskBackwardKernel = void (*)(const MaskBackwardRun&);

#define QK_FAKE_QUANT_MASK_KERNEL(features, type, name) bool name(const FakeQuantMaskRun&);
#define QK_MASK_BACKWARD_KERNEL(features, bytes, name) void name(const MaskBackwardRun&);
#include "csrc/fake_quant_mask/kernels.inc"
#undef QK_FAKE_QUANT_MASK_KERNEL
#undef QK_MASK_BACKWARD_KERNEL

FakeQuantMaskKernel select_fake_quant_mask_kernel(FloatType type,
                                                  CpuFeatures features = cpu_features_active());
MaskBackwardKernel select_mask_backward_kernel(FloatType type,
                                               CpuFeatures features = cpu_features_active());

}  // namespace qk
