// Broken kernels are noticed: an alignment that is not there, a bound that is not kept, a barrier
// left out, and terms that meet in one bank, in elementwise kernels, pools and those of training.
#include "csrc/dorefa/cuda.cu"
#include "csrc/fake_quant_backward/cuda.cu"
#include "csrc/foreach/cuda.cu"
#include "csrc/observe/cuda.cu"
#include "csrc/pool/cuda.cu"
#include "csrc/quantize/cuda.cu"
#include "csrc/quantize_rows/cuda.cu"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"
#include "tests/simt/grids.h"

using namespace qk;
using namespace qk::test;

namespace {

struct Floats {
  Guarded<float> x, y, scale;
  Guarded<int32_t> zero_point;
  Guarded<uint8_t> q;
  explicit Floats(int64_t n) : x(n), y(n), scale(1), zero_point(1), q(n) {
    for (float& v : x) v = 1.0f;
    scale[0] = 0.1f, zero_point[0] = 3;
  }
  DenseGrid grid(int64_t n) const { return {scale.data(), zero_point.data(), n, 1, 1}; }
};

// What launch_elementwise does, whatever the alignment and the size are.
template <class Op>
void launch_as(const Op& op, uint32_t size, bool aligned) {
  cuda::launch(cuda::elementwise_kernel<Op, uint32_t>, 1u, cuda::kElementwiseThreads, 0, nullptr,
               op, size, aligned);
}

void vectors_of_misaligned_tensors_are_noticed() {
  Floats f(64);
  expect_fault("misaligned load of 16", [&] {
    launch_as(Quantize<float>{f.x.data() + 1, f.q.data(), 0, 255, f.grid(32)}, 32, true);
  });
  expect_fault("misaligned store", [&] {
    launch_as(Quantize<float>{f.x.data(), f.q.data() + 1, 0, 255, f.grid(32)}, 32, true);
  });
  expect_fault("misaligned", [&] {
    launch_as(Dequantize<uint8_t, float>{f.q.data(), f.x.data() + 1, f.grid(32)}, 32, true);
  });
}

// Tensors end at a guard page: one element too many ends the process.
void a_dropped_tail_is_noticed() {
  Floats f(37);
  fault_of(
      [&] { launch_as(Quantize<float>{f.x.data(), f.q.data(), 0, 255, f.grid(38)}, 38, true); });
  fault_of(
      [&] { launch_as(Dequantize<uint8_t, float>{f.q.data(), f.y.data(), f.grid(38)}, 38, true); });
  QuantizeRowsArgs rows{
      f.x.data(),     FloatType::kFloat32, 1, 38, 38, f.q.data(), false, 0, 255, false,
      f.scale.data(), f.zero_point.data()};
  fault_of([&] { quantize_rows_cuda(rows, nullptr); });
  Guarded<uint8_t> workspace(dorefa_cuda_workspace(38), Touches::kStart);
  const DorefaWeightCudaArgs dorefa{
      f.x.data(),          f.x.data(), f.y.data(), FloatType::kFloat32, 38, f.scale.data(),
      f.zero_point.data(), -7,         7,          workspace.data()};
  fault_of([&] { dorefa_weight_cuda(dorefa, nullptr); });
  fault_of([&] { dorefa_weight_backward_cuda(dorefa, nullptr); });
}

void a_pool_that_leaves_the_image_is_noticed() {
  PoolGeometry g{};
  g.batch = 1, g.channels = 16;
  for (int d = 0; d < 3; ++d) g.in[d] = g.out[d] = g.kernel[d] = g.stride[d] = g.dilation[d] = 1;
  g.in[2] = 8, g.out[2] = 4, g.kernel[2] = g.stride[2] = 2;
  Guarded<uint8_t> q(8 * 16), out(4 * 16);
  CHECK_EQ(max_pool_cuda({q.data(), out.data(), false, g}, nullptr), cudaSuccess);
  PoolGeometry wide = g;
  wide.in[2] = 10, wide.out[2] = 5;  // one window more than there is
  fault_of([&] { max_pool_cuda({q.data(), out.data(), false, wide}, nullptr); });
  AvgPoolArgs mean{q.data(), out.data(), false, false, wide, true, 0, 1.0f, 0, 0, 0, 255};
  fault_of([&] { avg_pool_cuda(mean, nullptr); });
}

// Every kernel that joins what the threads of a block found waits for them.
void a_missing_barrier_is_noticed() {
  Floats f(4096);
  const auto broken = [](auto&& run) {
    expect_fault("shared byte", [&] {
      simt::sabotage.skip_barrier = 0;
      run();
    });
  };
  Guarded<float> ends(2);
  Guarded<int64_t> counts(2);
  Guarded<uint8_t> space(minmax_cuda_workspace(f.grid(4096)), Touches::kStart);
  broken([&] {
    minmax_cuda({f.x.data(), FloatType::kFloat32, f.grid(4096), ends.data(), ends.data() + 1,
                 counts.data(), space.data()},
                nullptr);
  });
  broken([&] {
    quantize_rows_cuda({f.x.data(), FloatType::kFloat32, 2, 2048, 2048, f.q.data(), false, 0, 255,
                        false, ends.data(), f.zero_point.data()},
                       nullptr);
  });
  broken([&] {
    dorefa_gradient_cuda({f.x.data(), f.y.data(), FloatType::kFloat32, 1, 4096, 3, nullptr, 5},
                         nullptr);
  });
  Guarded<uint8_t> flags(1);
  Guarded<bool> clipped(1);
  const ForeachQuantItem item{
      {f.x.data(), FloatType::kFloat32, 1, 4096, f.scale.data(), f.zero_point.data()},
      f.y.data(),
      f.q.data(),
      flags.data()};
  broken([&] {
    foreach_fake_quant_cuda({&item, 1, GridRule{-128, 127, false, 1e-6f}, true}, clipped.data(),
                            nullptr, nullptr);
  });
  // A row of several blocks: in the launch that finds what their pieces have.
  Floats large(100000);
  const ForeachQuantItem row{
      {large.x.data(), FloatType::kFloat32, 1, 100000, large.scale.data(), large.zero_point.data()},
      large.y.data(),
      large.q.data(),
      flags.data()};
  const ForeachQuantArgs args{&row, 1, GridRule{-128, 127, false, 1e-6f}, true};
  Guarded<uint8_t> found(foreach_cuda_workspace(args), Touches::kStart);
  CHECK_EQ(found.size(), 4 * 16);
  broken([&] { foreach_fake_quant_cuda(args, clipped.data(), found.data(), nullptr); });
  fault_of([&] { foreach_fake_quant_cuda(args, clipped.data(), nullptr, nullptr); });
}

// The backward of DoReFa sums what the block has left in shared memory: behind the barrier of the
// extremes' kernels, which are launched first.
void a_sum_before_its_terms_is_noticed() {
  Floats f(4096);
  Guarded<uint8_t> workspace(dorefa_cuda_workspace(4096), Touches::kStart);
  const DorefaScratch scratch = scratch_of(workspace.data(), 4096);
  const DorefaWeightCudaArgs args{
      f.x.data(),          f.x.data(), f.y.data(), FloatType::kFloat32, 4096, f.scale.data(),
      f.zero_point.data(), -7,         7,          workspace.data()};
  CHECK_EQ(dorefa_weight_backward_cuda(args, nullptr), cudaSuccess);
  expect_fault("shared byte", [&] {
    simt::sabotage.skip_barrier = 0;
    cuda::launch(dorefa_run_kernel<float>, 1u, kDorefaRunThreads, kSumRun * 4, nullptr, args,
                 scratch);
  });
}

void terms_meet_no_bank_twice() {
  Floats f(4096);
  Guarded<float> grads(2);
  Guarded<double> sums(lsq_cuda_workspace(f.grid(4096)));
  simt::counters = {};
  CHECK_EQ(lsq_backward_cuda({f.x.data(), f.x.data(), f.y.data(), FloatType::kFloat32, -7, 8, false,
                              f.grid(4096), 1.0, sums.data(), grads.data(), grads.data() + 1},
                             nullptr),
           cudaSuccess);
  CHECK_EQ(simt::counters.shared_conflicts, 0u);
  // The same kernel with the second terms in the banks of the first.
  simt::counters = {};
  simt::launch(1u, 32u, 8192, [] {
    const uint32_t lane = threadIdx.x % 16, which = threadIdx.x / 16;
    cuda::shared_store_u32(which * 4096 + lane * 4, 0);
  });
  CHECK(simt::counters.shared_conflicts > 0);
}

}  // namespace

int main() {
  vectors_of_misaligned_tensors_are_noticed();
  a_dropped_tail_is_noticed();
  a_pool_that_leaves_the_image_is_noticed();
  a_missing_barrier_is_noticed();
  a_sum_before_its_terms_is_noticed();
  terms_meet_no_bank_twice();
}
