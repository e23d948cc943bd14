// Normative: the formulas of quantize.h, one element at a time.
#include "csrc/base/numerics.h"
#include "csrc/quantize/quantize.h"

namespace qk {
namespace {

template <typename T>
void quantize_scalar(const QuantizeRun& run) {
  const T* x = static_cast<const T*>(run.x);
  uint8_t* q = static_cast<uint8_t*>(run.q);  // an int8 code is stored as its two's complement
  for (int64_t i = 0; i < run.n; ++i) {
    const int64_t c = run.grid.per_element ? i : 0;
    q[i] = static_cast<uint8_t>(quantize(to_float(x[i]), run.grid.inv_scale[c],
                                         run.grid.zero_point[c], run.qmin, run.qmax));
  }
}

template <typename T, typename Q>
void dequantize_codes(const DequantizeRun& run) {
  const Q* q = static_cast<const Q*>(run.q);
  T* x = static_cast<T*>(run.x);
  for (int64_t i = 0; i < run.n; ++i) {
    const int64_t c = run.grid.per_element ? i : 0;
    from_float(dequantize(q[i], run.grid.scale[c], run.grid.zero_point[c]), x + i);
  }
}

template <typename T>
void dequantize_scalar(const DequantizeRun& run) {
  switch (run.q_type) {
    case CodeType::kUInt8:
      return dequantize_codes<T, uint8_t>(run);
    case CodeType::kInt8:
      return dequantize_codes<T, int8_t>(run);
    case CodeType::kInt32:
      return dequantize_codes<T, int32_t>(run);
  }
}

}  // namespace

void quantize_f32_scalar(const QuantizeRun& run) { quantize_scalar<float>(run); }
void quantize_bf16_scalar(const QuantizeRun& run) { quantize_scalar<BFloat16>(run); }
void quantize_f16_scalar(const QuantizeRun& run) { quantize_scalar<Float16>(run); }
void dequantize_f32_scalar(const DequantizeRun& run) { dequantize_scalar<float>(run); }
void dequantize_bf16_scalar(const DequantizeRun& run) { dequantize_scalar<BFloat16>(run); }
void dequantize_f16_scalar(const DequantizeRun& run) { dequantize_scalar<Float16>(run); }

}  // namespace qk
