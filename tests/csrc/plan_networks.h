// A network with every kind of step, as a plan file.
#pragma once

#include "tests/csrc/check.h"
#include "tests/csrc/plan_file.h"

namespace qk::test {

struct NetworkWriter {
  PlanFile file;
  Rng rng;

  using Cells = PlanFile::Cells;
  static constexpr float kScale = 0.0625f;
  static constexpr int64_t kZero = 121;

  explicit NetworkWriter(uint64_t stream) : rng(stream) {}

  static Cells operand(float scale = kScale) { return {PlanFile::real(scale), kZero}; }
  static Cells grid(float scale = kScale) { return {PlanFile::real(scale), kZero, 3, 250}; }
  template <typename... Lists>
  static Cells join(const Lists&... lists) {
    Cells all;
    (PlanFile::append(&all, lists), ...);
    return all;
  }

  std::vector<int8_t> weights(int64_t n) {
    std::vector<int8_t> w(static_cast<size_t>(n));
    for (int8_t& v : w) v = static_cast<int8_t>(rng.integer(-127, 127));
    return w;
  }
  std::vector<uint8_t> table(bool identity = false) {
    std::vector<uint8_t> t(256);
    for (int i = 0; i < 256; ++i) t[i] = static_cast<uint8_t>(identity ? i : rng.bits());
    return t;
  }

  Cells weighted(int weight, int64_t channels, bool zero_points, bool integer_output,
                 bool with_table, bool residual) {
    std::vector<float> scales, bias;
    std::vector<int32_t> points;
    for (int64_t i = 0; i < channels; ++i) {
      scales.push_back(rng.real(0.001f, 0.004f));
      bias.push_back(rng.real(-1, 1));
      points.push_back(static_cast<int32_t>(rng.integer(-3, 3)));
    }
    Cells cells{weight, file.tensor(DType::kF32, {channels}, scales),
                zero_points ? file.tensor(DType::kS32, {channels}, points) : -1,
                file.tensor(DType::kF32, {channels}, bias)};
    PlanFile::append(&cells, operand());
    PlanFile::append(&cells, integer_output ? grid() : Cells{PlanFile::real(1), 0, 0, 255});
    cells.push_back(with_table ? file.tensor(DType::kU8, {256}, table()) : -1);
    cells.push_back(residual);
    if (residual) PlanFile::append(&cells, join(operand(0.05f), grid(0.1f)));
    return cells;
  }

  struct Conv {
    int64_t in, out, kernel, stride = 1, padding = 0, groups = 1;
    bool transposed = false, float_output = false, with_table = false, zero_points = false;
    int64_t mode = 0;
  };
  int conv(int x, const Conv& c, int residual = -1) {
    const int64_t first = c.transposed ? c.in : c.out,
                  inner = (c.transposed ? c.out : c.in) / c.groups;
    const int weight = file.tensor(DType::kS8, {first, inner, c.kernel, c.kernel},
                                   weights(first * inner * c.kernel * c.kernel));
    Cells cells =
        weighted(weight, c.out, c.zero_points, !c.float_output, c.with_table, residual >= 0);
    const int64_t p = c.padding;
    PlanFile::append(
        &cells, {2, c.stride, c.stride, p, p, p, p, 1, 1, 0, 0, c.groups, c.transposed, c.mode});
    const DType out = c.float_output ? DType::kF32 : DType::kU8;
    return residual >= 0 ? file.step(StepKind::kConv, {x, residual}, out, 4, cells)
                         : file.step(StepKind::kConv, {x}, out, 4, cells);
  }

  int quantize(int x, int rank) {
    return file.step(StepKind::kQuantize, {x}, DType::kU8, rank,
                     {-1, file.tensor<float>(DType::kF32, {1}, {kScale}),
                      file.tensor<int32_t>(DType::kS32, {1}, {kZero}), 3, 250});
  }
  int dequantize(int q, int rank, DType dtype = DType::kF32) {
    return file.step(StepKind::kDequantize, {q}, dtype, rank,
                     {-1, file.tensor<float>(DType::kF32, {1}, {kScale}),
                      file.tensor<int32_t>(DType::kS32, {1}, {kZero})});
  }
  int constant(int64_t number) { return file.constant(number); }
};

// Input [N, 3, H, W] float with H and W multiples of 4; outputs float logits [N, 10], a float image
// and codes.
inline std::vector<uint8_t> network_file(uint64_t stream = 7) {
  NetworkWriter n(stream);
  PlanFile& f = n.file;
  using Cells = PlanFile::Cells;
  const int x = f.input(DType::kF32, {-1, 3, -1, -1});
  const int q = n.quantize(x, 4);
  const int stem = n.conv(q, {.in = 3, .out = 20, .kernel = 3, .stride = 2, .padding = 1});
  const int expand = n.conv(stem, {.in = 20, .out = 24, .kernel = 1, .with_table = true});
  const int depthwise =
      n.conv(expand, {.in = 24, .out = 24, .kernel = 3, .padding = 1, .groups = 24});
  const int block = n.conv(depthwise, {.in = 24, .out = 20, .kernel = 1}, stem);
  const int dense = n.conv(
      block, {.in = 20, .out = 20, .kernel = 3, .padding = 1, .zero_points = true, .mode = 1});
  // Channel shuffle: [N, 2, 10, H, W] -> transpose -> [N, 20, H, W], sizes taken from the value.
  const int batch = f.size_of(dense, 0), height = f.size_of(dense, 2), width = f.size_of(dense, 3);
  const int halves = f.scalar(ScalarOp::kFloorDiv, 0, f.size_of(dense, 1), n.constant(2), 0);
  const int split = f.step(StepKind::kReshape, {dense}, DType::kU8, 5,
                           Cells{5, batch, n.constant(2), halves, height, width});
  const int swapped = f.step(StepKind::kPermute, {split}, DType::kU8, 5, {5, 0, 2, 1, 3, 4});
  const int shuffled = f.step(StepKind::kReshape, {swapped}, DType::kU8, 4,
                              Cells{4, batch, f.size_of(dense, 1), height, width});
  const int first = f.step(StepKind::kSlice, {shuffled}, DType::kU8, 4,
                           Cells{1, n.constant(0), n.constant(10), 1});
  const int second = f.step(StepKind::kSlice, {shuffled}, DType::kU8, 4,
                            Cells{1, n.constant(-10), n.constant(INT64_MAX), 1});
  const int branch = n.conv(second, {.in = 10, .out = 10, .kernel = 3, .padding = 1, .groups = 10});
  std::vector<uint8_t> tables = n.table(true);
  const std::vector<uint8_t> other = n.table();
  tables.insert(tables.end(), other.begin(), other.end());
  const int cat = f.step(StepKind::kCat, {first, branch}, DType::kU8, 4,
                         {1, f.tensor(DType::kU8, {2, 256}, tables)});
  // Squeeze and excitation.
  const int squeezed =
      f.step(StepKind::kAdaptiveAvgPool, {cat}, DType::kU8, 4,
             NetworkWriter::join(Cells{2, n.constant(1), n.constant(1)}, n.operand(), n.grid()));
  const int gate = n.conv(squeezed, {.in = 20, .out = 20, .kernel = 1, .with_table = true});
  const int gated = f.step(StepKind::kMul, {cat, gate}, DType::kU8, 4,
                           NetworkWriter::join(n.operand(), n.operand(), n.grid()));
  const int added = f.step(StepKind::kAdd, {gated, block}, DType::kU8, 4,
                           NetworkWriter::join(n.operand(), n.operand(), n.grid()));
  const int active =
      f.step(StepKind::kLookup, {added}, DType::kU8, 4, {f.tensor(DType::kU8, {256}, n.table())});
  const int pooled =
      f.step(StepKind::kMaxPool, {active}, DType::kU8, 4, {2, 3, 3, 2, 2, 1, 1, 1, 1, 0});
  const int averaged =
      f.step(StepKind::kAvgPool, {active}, DType::kU8, 4,
             NetworkWriter::join(Cells{2, 2, 2, 2, 2, 0, 0, 0, 1, 0}, n.operand(), n.grid()));
  const int both = f.step(StepKind::kAdd, {pooled, averaged}, DType::kU8, 4,
                          NetworkWriter::join(n.operand(), n.operand(), n.grid()));
  const int resized = f.step(StepKind::kInterpolate, {both}, DType::kU8, 4,
                             {2, 0, 0, PlanFile::real(2.0), PlanFile::real(2.0)});
  const int padded = f.step(
      StepKind::kPad, {resized}, DType::kU8, 4,
      Cells{2, n.constant(1), n.constant(0), n.constant(0), n.constant(1), NetworkWriter::kZero});
  const int image = n.conv(
      padded,
      {.in = 20, .out = 5, .kernel = 2, .stride = 2, .transposed = true, .float_output = true});
  const int mean =
      f.step(StepKind::kAdaptiveAvgPool, {both}, DType::kU8, 4,
             NetworkWriter::join(Cells{2, n.constant(1), n.constant(1)}, n.operand(), n.grid()));
  const int flat = f.step(StepKind::kReshape, {mean}, DType::kU8, 2,
                          Cells{2, f.size_of(mean, 0), n.constant(20)});
  const int bias = f.step(StepKind::kConstant, {}, DType::kU8, 1,
                          {f.tensor(DType::kU8, {20}, std::vector<uint8_t>(20, 130))});
  const int shifted = f.step(StepKind::kAdd, {flat, bias}, DType::kU8, 2,
                             NetworkWriter::join(n.operand(), n.operand(), n.grid()));
  const int weight = f.tensor(DType::kS8, {10, 20}, n.weights(200));
  const int logits = f.step(StepKind::kLinear, {shifted}, DType::kF32, 2,
                            n.weighted(weight, 10, false, false, false, false));
  f.output(logits);
  f.output(image);
  f.output(active);
  f.output(n.dequantize(flat, 2));
  return f.bytes();
}

}  // namespace qk::test
