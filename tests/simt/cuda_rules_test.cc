// DoReFa and signs on the emulator: the bits of the CPU's kernels, sums and noise too.
#include "csrc/binary/cuda.cu"
#include "csrc/dorefa/cuda.cu"
#include "csrc/observe/cuda.cu"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"
#include "tests/simt/grids.h"

using namespace qk;
using namespace qk::test;

namespace {

template <typename T>
void weights_give_the_bits_of_the_cpu(FloatType type, int64_t n, int64_t misalign, bool ties,
                                      Rng& rng) {
  CONTEXT("type ", type, " n ", n, " at ", misalign, " ties ", ties);
  Guarded<T> x(n + misalign, Touches::kStart), grad(n + misalign, Touches::kStart);
  Guarded<T> y(n + misalign, Touches::kStart), expected(n);
  float largest = 0;
  for (T& v : x) from_float(rng.real(-2, 2), &v);
  for (T& v : grad) from_float(rng.real(-1, 1), &v);
  for (int64_t i = 0; ties && i < n; ++i) {
    if (rng.chance(0.01) || i == n - 1)
      from_float(rng.chance(0.5) ? 2.5f : -2.5f, &x[misalign + i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const float v = std::fabs(to_float(x[misalign + i]));
    if (v > largest) largest = v;
  }
  const DorefaGrid grid{2.0f / 15, 0, -7, 7};
  Guarded<float> scale(1);
  Guarded<int32_t> zero_point(1);
  scale[0] = grid.scale, zero_point[0] = grid.zero_point;
  Guarded<uint8_t> workspace(dorefa_cuda_workspace(n), Touches::kStart);
  rng.fill(workspace);
  DorefaWeightCudaArgs args{.grad = grad.data() + misalign,
                            .x = x.data() + misalign,
                            .out = y.data() + misalign,
                            .type = type,
                            .n = n,
                            .scale = scale.data(),
                            .zero_point = zero_point.data(),
                            .qmin = grid.qmin,
                            .qmax = grid.qmax,
                            .workspace = workspace.data()};
  simt::seed = rng.bits();
  dorefa_weight({args.x, expected.data(), type, n, largest, grid}, kSerial);
  CHECK_EQ(dorefa_weight_cuda(args, nullptr), cudaSuccess);
  CHECK(same_bytes(y.data() + misalign, expected.data(), n));

  Guarded<double> sums(dorefa_workspace(n));
  dorefa_weight_backward({args.grad, args.x, expected.data(), type, n, largest, grid, sums.data()},
                         kSerial);
  CHECK_EQ(dorefa_weight_backward_cuda(args, nullptr), cudaSuccess);
  CHECK(same_bytes(y.data() + misalign, expected.data(), n));
}

void a_weight_that_is_not_finite_becomes_nan() {
  Guarded<float> x(100), y(100), scale(1);
  Guarded<int32_t> zero_point(1);
  for (float& v : x) v = 1.0f;
  x[7] = std::numeric_limits<float>::infinity();
  scale[0] = 0.1f, zero_point[0] = 0;
  Guarded<uint8_t> workspace(dorefa_cuda_workspace(100), Touches::kStart);
  CHECK_EQ(dorefa_weight_cuda({nullptr, x.data(), y.data(), FloatType::kFloat32, 100, scale.data(),
                               zero_point.data(), -7, 7, workspace.data()},
                              nullptr),
           cudaSuccess);
  for (const float v : y) CHECK(v != v);
}

template <typename T>
void gradients_have_the_noise_of_the_cpu(FloatType type, int64_t rows, int64_t inner, Rng& rng) {
  CONTEXT("type ", type, " rows ", rows, " inner ", inner);
  Guarded<T> grad(rows * inner, Touches::kStart), out(rows * inner, Touches::kStart),
      expected(rows * inner);
  for (int64_t i = 0; i < rows * inner; ++i) {
    const int64_t row = i / inner;
    from_float(row % 4 == 1 ? 0.0f : rng.real(-3, 3), &grad[i]);
    if (row % 4 == 2 && i % inner == 0) from_float(std::nanf(""), &grad[i]);
  }
  Guarded<int64_t> seed(1);
  seed[0] = static_cast<int64_t>(rng.bits());
  const int32_t steps = rng.pick({1, 3, 15, 255});
  dorefa_gradient(
      {grad.data(), expected.data(), type, rows, inner, steps, static_cast<uint64_t>(seed[0])},
      kSerial);
  for (const bool on_device : {false, true}) {
    simt::seed = rng.bits();
    CHECK_EQ(dorefa_gradient_cuda({grad.data(), out.data(), type, rows, inner, steps,
                                   on_device ? seed.data() : nullptr, on_device ? 0 : seed[0]},
                                  nullptr),
             cudaSuccess);
    CHECK(same_bytes(out.data(), expected.data(), rows * inner));
  }
}

template <typename T>
void signs_give_the_bits_of_the_cpu(FloatType type, int64_t n, int64_t misalign, Rng& rng) {
  CONTEXT("type ", type, " n ", n, " at ", misalign);
  Guarded<T> x(n + misalign, Touches::kStart), grad(n + misalign, Touches::kStart);
  Guarded<T> y(n + misalign, Touches::kStart), expected(n);
  fill_floats(x, rng), fill_floats(grad, rng);
  for (int64_t i = 0; i < n; i += 2) from_float(rng.real(-2, 2), &x[misalign + i]);
  simt::seed = rng.bits();
  binary_sign({x.data() + misalign, expected.data(), type, n}, kSerial);
  CHECK_EQ(binary_sign_cuda({x.data() + misalign, y.data() + misalign, type, n}, nullptr),
           cudaSuccess);
  CHECK(same_bytes(y.data() + misalign, expected.data(), n));
  for (const bool is_weight : {false, true}) {
    binary_sign_backward(
        {grad.data() + misalign, x.data() + misalign, expected.data(), type, n, is_weight},
        kSerial);
    CHECK_EQ(binary_sign_backward_cuda({grad.data() + misalign, x.data() + misalign,
                                        y.data() + misalign, type, n, is_weight},
                                       nullptr),
             cudaSuccess);
    CHECK(same_bytes(y.data() + misalign, expected.data(), n));
  }
}

}  // namespace

int main() {
  Rng rng(1);
  for (const int64_t n : {0, 1, 7, 1024, 4096, 4097, 30000}) {
    for (const int64_t misalign : {0, 3}) {
      const bool ties = n % 2 == 0;
      weights_give_the_bits_of_the_cpu<float>(FloatType::kFloat32, n, misalign, ties, rng);
      weights_give_the_bits_of_the_cpu<BFloat16>(FloatType::kBFloat16, n, misalign, !ties, rng);
      weights_give_the_bits_of_the_cpu<Float16>(FloatType::kFloat16, n, misalign, ties, rng);
      signs_give_the_bits_of_the_cpu<float>(FloatType::kFloat32, n, misalign, rng);
      signs_give_the_bits_of_the_cpu<BFloat16>(FloatType::kBFloat16, n, misalign, rng);
      signs_give_the_bits_of_the_cpu<Float16>(FloatType::kFloat16, n, misalign, rng);
    }
  }
  a_weight_that_is_not_finite_becomes_nan();
  for (const int64_t inner : {1, 5, 64, 515, 3000}) {
    gradients_have_the_noise_of_the_cpu<float>(FloatType::kFloat32, 5, inner, rng);
    gradients_have_the_noise_of_the_cpu<BFloat16>(FloatType::kBFloat16, 4, inner, rng);
    gradients_have_the_noise_of_the_cpu<Float16>(FloatType::kFloat16, 3, inner, rng);
  }
}
