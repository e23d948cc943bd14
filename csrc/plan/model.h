// A plan file, parsed and checked: what format.h describes, as structs. Everything a later stage
// relies on (ids in range, ranks, dtypes, grids, shapes of weights) has been checked by read_model.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "csrc/conv/geometry.h"
#include "csrc/plan/error.h"
#include "csrc/plan/format.h"

namespace qk::plan {

constexpr int64_t dtype_bytes(DType type) {
  switch (type) {
    case DType::kU8:
    case DType::kS8:
      return 1;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    default:
      return 4;
  }
}
constexpr bool is_code(DType type) { return type == DType::kU8 || type == DType::kS8; }
constexpr bool is_float(DType type) {
  return type == DType::kF32 || type == DType::kBF16 || type == DType::kF16;
}
const char* dtype_name(DType type);
const char* step_kind_name(StepKind kind);

struct Tensor {
  DType dtype = DType::kU8;
  int rank = 0;
  int64_t dims[5] = {};
  int64_t elements = 0, bytes = 0;
  const uint8_t* data = nullptr;  // in the file's bytes

  const float* f32() const { return reinterpret_cast<const float*>(data); }
  const int32_t* s32() const { return reinterpret_cast<const int32_t*>(data); }
};

struct Value {
  std::string name;
  DType dtype = DType::kU8;
  int rank = 0;
};

struct Scalar {
  ScalarOp op = ScalarOp::kConst;
  int value = 0, a = 0, b = 0;
  int64_t number = 0;
};

struct Operand {
  float scale = 1.0f;
  int32_t zero_point = 0;
};
struct Grid {
  float scale = 1.0f;
  int32_t zero_point = 0, qmin = 0, qmax = 255;
};

struct ConstantStep {
  int tensor = 0;
};
struct QuantizeStep {  // dequantize too
  int axis = -1, scale = 0, zero_point = 0;
  int32_t qmin = 0, qmax = 255;
};
struct WeightedStep {  // linear and conv
  int weight = 0, weight_scale = 0, weight_zero_point = -1, bias = -1;
  Operand input;
  Grid output;
  int table = -1;
  bool has_residual = false;
  Operand residual;
  Grid sum;
  ConvShape conv;  // of a linear: in_channels, out_channels
  int64_t output_padding[kConvDims] = {};
};
struct BinaryStep {
  Operand a, b;
  Grid output;
};
struct CatStep {
  int dim = 0, tables = 0;
};
struct LookupStep {
  int table = 0;
};
struct PoolStep {
  int dims = 2;
  int64_t kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, padding[3] = {}, dilation[3] = {1, 1, 1};
  bool ceil_mode = false, count_include_pad = false;
  int64_t divisor = 0;
  int size[3] = {-1, -1, -1};  // scalars
  Operand input;
  Grid output;
};
struct InterpolateStep {
  int dims = 2;
  bool exact = false, sized = false;
  int size[3] = {};  // scalars
  double factor[3] = {};
};
struct PadStep {
  int pairs = 0;
  int amounts[2 * kMaxRank] = {};  // scalars
  int64_t value = 0;
};
struct ShapeStep {  // reshape, permute, expand
  int rank = 0;
  int items[kMaxRank] = {};  // scalars, or dimensions
};
struct SliceStep {
  int dim = 0, start = 0, stop = 0;  // start and stop: scalars
  int64_t step = 1;
};

using Attributes =
    std::variant<ConstantStep, QuantizeStep, WeightedStep, BinaryStep, CatStep, LookupStep,
                 PoolStep, InterpolateStep, PadStep, ShapeStep, SliceStep>;

struct Step {
  StepKind kind = StepKind::kConstant;
  std::string name;
  std::vector<int> inputs;
  int output = 0;
  Attributes attributes;

  template <typename T>
  const T& as() const {
    return *std::get_if<T>(&attributes);
  }
};

struct ModelInput {
  int value = 0;
  int64_t dims[kMaxRank] = {};  // -1: any
};

struct Model {
  std::string metadata;
  std::vector<Tensor> tensors;
  std::vector<Value> values;
  std::vector<Scalar> scalars;
  // The step after which a scalar can be computed; -1: when the inputs are known.
  std::vector<int64_t> scalar_after;
  std::vector<Step> steps;
  std::vector<ModelInput> inputs;
  std::vector<int> outputs;
};

// The tensors of the model point into `bytes`, which must be 64-byte aligned.
Error read_model(const uint8_t* bytes, int64_t size, Model* model);

}  // namespace qk::plan
