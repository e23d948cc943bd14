// A linear layer for the emulator: what the CPU gives for it, and a check that a plan on CUDA gives
// the same. For tests that include the kernels.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "csrc/gemm/cuda.h"
#include "csrc/gemm/linear.h"
#include "tests/csrc/check.h"
#include "tests/simt/layers.h"

namespace qk::test {

struct Case {
  int64_t m, n, k;
  OutputType output = OutputType::kU8;
  bool input_signed = false, weight_zero_points = false, table = false, residual = false,
       residual_signed = false, per_tensor = false, extremes = false;
  int64_t misalign = 0;  // of the input
  int64_t slack = -1;    // bytes between rows; -1: the least that keeps rows aligned
};

inline std::string describe(const Case& c) {
  return text_of("m=", c.m, " n=", c.n, " k=", c.k, " output=", c.output,
                 " signed=", c.input_signed, " zero_points=", c.weight_zero_points,
                 " table=", c.table, " residual=", c.residual, " misalign=", c.misalign,
                 " slack=", c.slack);
}

class Problem {
 public:
  Problem(const Case& c, Rng& rng)
      : c_(c),
        stride_(c.slack < 0 ? (c.k + 15) / 16 * 16 : c.k + c.slack),
        input_(c.misalign + c.m * stride_, Touches::kStart),
        weight_(static_cast<size_t>(c.n * c.k)),
        grids_(c.n, rng),
        residual_(c.m * c.n, Touches::kStart) {
    rng.fill(input_), rng.fill(weight_), rng.fill(residual_);
    if (c.extremes) {
      for (uint8_t& v : input_) v = c.input_signed ? 0x80 : 0xff;
      for (int8_t& v : weight_) v = -128;
    }
    source_ = {.weight = weight_.data(),
               .n = c.n,
               .taps = 1,
               .depth = c.k,
               .stride_n = c.k,
               .stride_tap = 0,
               .stride_k = 1,
               .weight_scale = grids_.scales.data(),
               .weight_zero_point = c.weight_zero_points ? grids_.zero_points.data() : nullptr,
               .per_tensor = c.per_tensor,
               .bias = grids_.bias.data(),
               .input_scale = 0.02f,
               .input_zero_point = c.input_signed ? -7 : 113,
               .input_signed = c.input_signed,
               .output_scale = 0.07f,
               .epilogue = some_epilogue(c.output, c.table, c.residual, rng)};
    const CudaPackedFacts facts = cuda_packed_facts(source_);
    packed_ =
        std::make_unique<Guarded<uint8_t>>(packed_cuda_bytes(c.n, 1, c.k, facts), Touches::kStart);
    CHECK_EQ(pack_igemm_cuda(source_, packed_->data()), Status::kOk);
    CudaPackedFacts read;
    CHECK_EQ(read_cuda_facts(packed_->size(), c.n, 1, c.k, &read), Status::kOk);
    CHECK_EQ(read.code(), facts.code());
    args_ = {.packed = packed_->data(),
             .facts = read,
             .n = c.n,
             .depth = c.k,
             .input = input_.data() + c.misalign,
             .rows = c.m,
             .input_row_stride = stride_,
             .out = nullptr,
             .residual = c.residual ? residual_.data() : nullptr,
             .residual_row_stride = c.n,
             .residual_signed = c.residual_signed,
             .workspace = nullptr};
    expect();
  }

  // The plan of the formula, or any other.
  void check(const CudaGemmPlan& plan) {
    CONTEXT(describe(c_), " tile=", plan.tile, " splits=", plan.splits);
    Guarded<uint8_t> out(static_cast<int64_t>(expected_.size()), Touches::kStart);
    Guarded<uint8_t> workspace(cuda_gemm_workspace(plan, c_.m, c_.n, 1), Touches::kStart);
    rng_.fill(workspace);
    args_.out = out.data();
    args_.workspace = workspace.data();
    CHECK_EQ(linear_cuda(args_, plan, nullptr), cudaSuccess);
    for (int64_t i = 0; i < out.size(); ++i) CHECK_EQ(out[i], expected_[i], "at byte ", i);
  }
  void check() {
    CudaMachine machine;
    CHECK_EQ(cuda_machine(&machine), cudaSuccess);
    check(plan_linear_cuda(args_, machine));
  }

 private:
  // What linear gives on this machine's CPU.
  void expect() {
    const Isa isa = isa_active();
    Guarded<uint8_t> packed(packed_igemm_bytes(c_.n, 1, c_.k, isa));
    CHECK_EQ(pack_igemm(source_, isa, packed.data()), Status::kOk);
    PackedMatrix matrix;
    CHECK_EQ(view_packed(packed.data(), packed.size(), &matrix), Status::kOk);
    expected_.resize(static_cast<size_t>(c_.m * c_.n * output_bytes(c_.output)));
    linear({matrix, args_.input, c_.m, stride_, expected_.data(), args_.residual, c_.n,
            c_.residual_signed},
           kSerial);
  }

  Case c_;
  Rng rng_;
  int64_t stride_;
  Guarded<uint8_t> input_;
  std::vector<int8_t> weight_;
  LayerGrids grids_;
  Guarded<uint8_t> residual_;
  PackSource source_;
  std::unique_ptr<Guarded<uint8_t>> packed_;
  LinearCudaArgs args_;
  std::vector<uint8_t> expected_;
};

inline constexpr OutputType kOutputs[] = {OutputType::kU8,  OutputType::kS8,   OutputType::kS32,
                                          OutputType::kF32, OutputType::kBF16, OutputType::kF16};

}  // namespace qk::test
