// quantize, dequantize, fake_quant and its backward on the emulator: the bits of the CPU's kernels
// for every type, layout of channels and alignment.
#include "csrc/fake_quant/cuda.cu"
#include "csrc/fake_quant/fake_quant.h"
#include "csrc/fake_quant_backward/backward.h"
#include "csrc/quantize/cuda.cu"
#include "csrc/quantize/quantize.h"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"
#include "tests/simt/grids.h"

using namespace qk;
using namespace qk::test;

namespace {

template <typename T>
void floats_give_the_bits_of_the_cpu(const Shape& shape, FloatType type, int64_t misalign,
                                     bool in_place) {
  CONTEXT("shape ", shape, " type ", type, " misalign ", misalign, " in_place ", in_place);
  Rng rng(static_cast<uint64_t>(shape.size() + misalign));
  const int64_t size = shape.size();
  const Grids grids(shape, rng);
  Guarded<T> x(size + misalign, Touches::kStart), y(size + misalign, Touches::kStart);
  Guarded<T> grad(size + misalign, Touches::kStart), out(size + misalign, Touches::kStart);
  Guarded<uint8_t> q(size + misalign, Touches::kStart), q_expected(size);
  Guarded<T> y_expected(size), out_expected(size);
  fill_floats(x, rng), fill_floats(grad, rng);
  const T* from = x.data() + misalign;
  const T* grads = grad.data() + misalign;
  simt::seed = rng.bits();

  quantize({from, type, q_expected.data(), false, 0, 255, grids.strided()}, kSerial);
  CHECK_EQ(quantize_cuda({from, type, q.data() + misalign, 0, 255, grids.dense()}, nullptr),
           cudaSuccess);
  CHECK(same_bytes(q.data() + misalign, q_expected.data(), size));

  fake_quant_backward({grads, from, out_expected.data(), type, 0, 255, grids.strided()}, kSerial);
  T* passed = in_place ? grad.data() + misalign : out.data() + misalign;
  CHECK_EQ(fake_quant_backward_cuda({grads, from, passed, type, 0, 255, grids.dense()}, nullptr),
           cudaSuccess);
  CHECK(same_bytes(passed, out_expected.data(), size));

  fake_quant({from, y_expected.data(), type, 0, 255, grids.strided()}, kSerial);
  T* written = in_place ? x.data() + misalign : y.data() + misalign;
  CHECK_EQ(fake_quant_cuda({from, written, type, 0, 255, grids.dense()}, nullptr), cudaSuccess);
  CHECK(same_bytes(written, y_expected.data(), size));
}

template <typename Q, typename T>
void codes_give_the_bits_of_the_cpu(const Shape& shape, CodeType q_type, FloatType type,
                                    int64_t misalign) {
  CONTEXT("shape ", shape, " codes ", q_type, " type ", type, " misalign ", misalign);
  Rng rng(7);
  const int64_t size = shape.size();
  const Grids grids(shape, rng);
  Guarded<Q> q(size + misalign, Touches::kStart);
  Guarded<T> x(size + misalign, Touches::kStart), expected(size);
  rng.fill(q);
  for (Q& v : q) v = static_cast<Q>(v % (1 << 30));  // a zero point may be taken off
  dequantize({q.data() + misalign, q_type, expected.data(), type, grids.strided()}, kSerial);
  CHECK_EQ(dequantize_cuda({q.data() + misalign, q_type, x.data() + misalign, type, grids.dense()},
                           nullptr),
           cudaSuccess);
  CHECK(same_bytes(x.data() + misalign, expected.data(), size));
}

void aligned_tensors_move_16_bytes_at_a_time() {
  Rng rng(3);
  const Shape shape{1, 1, 4096};
  const Grids grids(shape, rng);
  Guarded<float> x(4096), y(4096);
  fill_floats(x, rng);
  simt::counters = {};
  CHECK_EQ(
      fake_quant_cuda({x.data(), y.data(), FloatType::kFloat32, 0, 255, grids.dense()}, nullptr),
      cudaSuccess);
  CHECK_EQ(simt::counters.vector_loads, 1024u);
  CHECK_EQ(simt::counters.vector_stores, 1024u);
}

// As a tensor of more than 2^32 elements has them: the index and the channel do not wrap.
void elements_behind_the_first_2_to_the_32_are_reached() {
  constexpr uint64_t kFar = (uint64_t{1} << 33) + 12;
  constexpr int64_t kChannels = 3, kInner = 5;
  Guarded<float> x(8), y(8), scale(kChannels);
  Guarded<int32_t> zero_point(kChannels);
  for (int64_t i = 0; i < 8; ++i) x[i] = static_cast<float>(i) - 3.3f;
  for (int32_t c = 0; c < kChannels; ++c) {
    scale[c] = 0.1f * static_cast<float>(c + 1), zero_point[c] = c;
  }
  const FakeQuant<float> op{x.data() - kFar,
                            y.data() - kFar,
                            -50,
                            50,
                            {scale.data(), zero_point.data(), int64_t{1} << 34, kChannels, kInner}};
  simt::launch(1u, 1u, 0, [&] {
    op.run<4>(kFar);
    for (uint64_t i = 4; i < 8; ++i) op.run<1>(kFar + i);
  });
  for (uint64_t i = 0; i < 8; ++i) {
    const auto c = static_cast<int64_t>((kFar + i) / kInner % kChannels);
    const float expected =
        fake_quant(x[static_cast<int64_t>(i)], scale[c], 1.0f / scale[c], zero_point[c], -50, 50);
    CHECK_EQ(y[static_cast<int64_t>(i)], expected, "element ", i);
  }
}

}  // namespace

int main() {
  elements_behind_the_first_2_to_the_32_are_reached();
  for (const Shape& shape : {Shape{1, 1, 1},
                             {1, 1, 1024},
                             {1, 1, 2051},
                             {2, 3, 5},
                             {4, 7, 1},
                             {1, 5, 64},
                             {3, 16, 1},
                             {0, 3, 4}}) {
    for (int64_t misalign = 0; misalign < 9; misalign += 3) {
      const bool in_place = misalign % 2 == 0;
      floats_give_the_bits_of_the_cpu<float>(shape, FloatType::kFloat32, misalign, in_place);
      floats_give_the_bits_of_the_cpu<BFloat16>(shape, FloatType::kBFloat16, misalign, !in_place);
      floats_give_the_bits_of_the_cpu<Float16>(shape, FloatType::kFloat16, misalign, in_place);
      codes_give_the_bits_of_the_cpu<uint8_t, float>(shape, CodeType::kUInt8, FloatType::kFloat32,
                                                     misalign);
      codes_give_the_bits_of_the_cpu<int8_t, BFloat16>(shape, CodeType::kInt8, FloatType::kBFloat16,
                                                       misalign);
      codes_give_the_bits_of_the_cpu<int32_t, Float16>(shape, CodeType::kInt32, FloatType::kFloat16,
                                                       misalign);
      codes_give_the_bits_of_the_cpu<int32_t, float>(shape, CodeType::kInt32, FloatType::kFloat32,
                                                     misalign);
    }
  }
  aligned_tensors_move_16_bytes_at_a_time();
}
