// quantize_rows and linear on rows with grids of their own, on the emulator: the bits of the CPU.
#include "csrc/gemm/cuda.cu"
#include "csrc/gemm/cuda_s8.cu"
#include "csrc/gemm/cuda_u8.cu"
#include "csrc/gemm/cuda_wgmma_sm90a.cu"
#include "csrc/linear_rows/linear_rows.h"
#include "csrc/quantize_rows/cuda.cu"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"
#include "tests/simt/grids.h"

using namespace qk;
using namespace qk::test;

namespace {

template <typename T>
void rows_give_the_codes_of_the_cpu(FloatType type, int64_t rows, int64_t depth, int64_t slack,
                                    int64_t misalign, Rng& rng) {
  CONTEXT("type ", type, " rows ", rows, " depth ", depth, " slack ", slack, " at ", misalign);
  const int64_t stride = depth + slack;
  Guarded<T> x(misalign + rows * stride, Touches::kStart);
  for (T& v : x) from_float(rng.real(-9, 9), &v);
  const float inf = std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < rows && depth > 0; r += 3) {  // every third row is strange
    T* row = x.data() + misalign + r * stride;
    if (rng.chance(0.3)) {
      for (int64_t i = 0; i < depth; ++i) from_float(0.0f, row + i);
    } else {
      from_float(rng.pick({inf, -inf, inf - inf, 1e30f, -0.0f}), row + rng.integer(0, depth - 1));
    }
  }
  struct Result {
    Guarded<uint8_t> q;
    Guarded<float> scale;
    Guarded<int32_t> zero_point;
    Result(int64_t rows, int64_t depth)
        : q(rows * depth, Touches::kStart), scale(rows), zero_point(rows) {}
  } expected(rows, depth), got(rows, depth);
  for (const bool symmetric : {false, true}) {
    const bool is_signed = rng.chance(0.5);
    QuantizeRowsArgs args{.x = x.data() + misalign,
                          .type = type,
                          .rows = rows,
                          .depth = depth,
                          .row_stride = stride,
                          .q = expected.q.data(),
                          .q_signed = is_signed,
                          .qmin = is_signed ? -127 : 0,
                          .qmax = is_signed ? 127 : 255,
                          .symmetric = symmetric,
                          .scale = expected.scale.data(),
                          .zero_point = expected.zero_point.data()};
    quantize_rows(args, kSerial);
    args.q = got.q.data(), args.scale = got.scale.data(), args.zero_point = got.zero_point.data();
    simt::seed = rng.bits();
    CHECK_EQ(quantize_rows_cuda(args, nullptr), cudaSuccess);
    CHECK(same_bytes(got.q.data(), expected.q.data(), rows * depth));
    CHECK(same_bytes(got.zero_point.data(), expected.zero_point.data(), rows));
    for (int64_t r = 0; r < rows; ++r) {
      const float a = got.scale[r], b = expected.scale[r];
      CHECK(a == b || (a != a && b != b), "row ", r);
    }
  }
}

void aligned_rows_move_16_bytes_at_a_time() {
  Guarded<float> x(2048), scale(2);
  Guarded<uint8_t> q(2048);
  Guarded<int32_t> zero_point(2);
  for (float& v : x) v = 1.0f;
  simt::counters = {};
  CHECK_EQ(quantize_rows_cuda({x.data(), FloatType::kFloat32, 2, 1024, 1024, q.data(), false, 0,
                               255, false, scale.data(), zero_point.data()},
                              nullptr),
           cudaSuccess);
  CHECK(simt::counters.vector_loads >= 2 * 512u);  // both passes
}

// `tile` < 0: as planned.
void sums_are_scaled_as_on_the_cpu(int64_t m, int64_t n, int64_t k, OutputType output,
                                   bool is_signed, int tile, int splits, Rng& rng) {
  CONTEXT("m ", m, " n ", n, " k ", k, " output ", output, " signed ", is_signed, " tile ", tile,
          " splits ", splits);
  const bool zero_points = tile < 0 && rng.chance(0.3), biased = rng.chance(0.7);
  Guarded<uint8_t> input(m * ((k + 15) / 16 * 16), Touches::kStart);
  Guarded<int8_t> weight(n * k);
  Guarded<float> row_scale(m, Touches::kStart), weight_scale(n, Touches::kStart), bias(n), one(1);
  Guarded<int32_t> row_zero_point(m), weight_sum(n), zw(n);
  rng.fill(input), rng.fill(weight);
  one[0] = 1.0f;
  for (float& v : row_scale) v = rng.real(0.01f, 2.0f);
  for (float& v : weight_scale) v = rng.real(0.001f, 0.1f);
  for (float& v : bias) v = rng.real(-3, 3);
  for (int32_t& v : row_zero_point) {
    v = static_cast<int32_t>(is_signed ? rng.integer(-128, 127) : rng.integer(0, 255));
  }
  for (int64_t c = 0; c < n; ++c) {
    zw[c] = zero_points ? static_cast<int32_t>(rng.integer(-20, 20)) : 0;
    weight_sum[c] = 0;
    for (int64_t i = 0; i < k; ++i) weight_sum[c] += weight[c * k + i] - zw[c];
  }
  PackSource source{.weight = weight.data(),
                    .n = n,
                    .taps = 1,
                    .depth = k,
                    .stride_n = k,
                    .stride_tap = 0,
                    .stride_k = 1,
                    .weight_scale = one.data(),
                    .weight_zero_point = zero_points ? zw.data() : nullptr,
                    .per_tensor = !zero_points,
                    .bias = nullptr,
                    .input_scale = 1.0f,
                    .input_zero_point = 0,
                    .input_signed = is_signed,
                    .output_scale = 1.0f,
                    .epilogue = {}};
  std::vector<float> ones(static_cast<size_t>(n), 1.0f);
  if (zero_points) source.weight_scale = ones.data();
  source.epilogue.output = OutputType::kS32;
  const RowScales scales{row_scale.data(), row_zero_point.data(), weight_scale.data(),
                         weight_sum.data(), biased ? bias.data() : nullptr};
  const int64_t stride = (k + 15) / 16 * 16;

  Guarded<uint8_t> packed(packed_igemm_bytes(n, 1, k, isa_active()));
  CHECK_EQ(pack_igemm(source, isa_active(), packed.data()), Status::kOk);
  PackedMatrix matrix;
  CHECK_EQ(view_packed(packed.data(), packed.size(), &matrix), Status::kOk);
  Guarded<uint8_t> expected(m * n * output_bytes(output)),
      out(m * n * output_bytes(output), Touches::kStart);
  linear_rows({.matrix = matrix,
               .input = input.data(),
               .rows = m,
               .input_row_stride = stride,
               .scales = scales,
               .output = output,
               .out = expected.data()},
              kSerial);

  const CudaPackedFacts facts = cuda_packed_facts(source);
  Guarded<uint8_t> device(packed_cuda_bytes(n, 1, k, facts), Touches::kStart);
  CHECK_EQ(pack_igemm_cuda(source, device.data()), Status::kOk);
  LinearCudaArgs args{.packed = device.data(),
                      .facts = facts,
                      .n = n,
                      .depth = k,
                      .input = input.data(),
                      .rows = m,
                      .input_row_stride = stride,
                      .out = out.data(),
                      .residual = nullptr,
                      .residual_row_stride = 0,
                      .residual_signed = false,
                      .workspace = nullptr,
                      .scales = scales,
                      .scaled_output = output};
  CudaMachine machine;
  CHECK_EQ(cuda_machine(&machine), cudaSuccess);
  const CudaGemmPlan plan =
      tile < 0 ? plan_linear_cuda(args, machine) : CudaGemmPlan{tile, splits, 0};
  Guarded<uint8_t> workspace(m <= kCudaGemvRows ? 0 : cuda_gemm_workspace(plan, m, n, 1));
  args.workspace = workspace.data();
  simt::seed = rng.bits();
  CHECK_EQ(linear_cuda(args, plan, nullptr), cudaSuccess);
  CHECK(same_bytes(out.data(), expected.data(), out.size()));
}

}  // namespace

int main() {
  Rng rng(1);
  for (const int64_t depth : {0, 1, 5, 16, 64, 257, 1024, 2051}) {
    for (const int64_t misalign : {0, 3}) {
      rows_give_the_codes_of_the_cpu<float>(FloatType::kFloat32, 5, depth, 0, misalign, rng);
      rows_give_the_codes_of_the_cpu<BFloat16>(FloatType::kBFloat16, 4, depth, 3, misalign, rng);
      rows_give_the_codes_of_the_cpu<Float16>(FloatType::kFloat16, 4, depth, 8, misalign, rng);
    }
  }
  rows_give_the_codes_of_the_cpu<float>(FloatType::kFloat32, 0, 7, 0, 0, rng);
  aligned_rows_move_16_bytes_at_a_time();
  constexpr OutputType kFloats[] = {OutputType::kF32, OutputType::kBF16, OutputType::kF16};
  for (int tile = 0; tile < kCudaTileCount; ++tile) {
    const CudaTile& t = kCudaTiles[tile];
    for (const OutputType output : kFloats) {
      sums_are_scaled_as_on_the_cpu(t.rows + rng.pick({-1, 0, 1}), t.columns + rng.pick({-3, 0, 1}),
                                    2 * t.depth + 5, output, rng.chance(0.5), tile, 1, rng);
    }
    sums_are_scaled_as_on_the_cpu(t.rows, t.columns, 6 * t.depth, OutputType::kF32, true, tile, 2,
                                  rng);
  }
  for (int i = 0; i < 60; ++i) {
    sums_are_scaled_as_on_the_cpu(rng.pick<int64_t>({1, 2, 5, 8, 9, 31, 70}), rng.integer(1, 90),
                                  rng.pick<int64_t>({1, 7, 16, 33, 64, 100}),
                                  kFloats[rng.integer(0, 2)], rng.chance(0.5), -1, 1, rng);
  }
}
