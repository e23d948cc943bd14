// Packed signs on the emulator: the CPU's words, and the bits of its products, for any axis, kernel
// and number of channels; what reads past an end is noticed.
#include <vector>

#include "csrc/binary/cuda_products.cu"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"

using namespace qk;
using namespace qk::test;

namespace {

template <typename T>
void words_are_those_of_the_cpu(FloatType type, int64_t outer, int64_t n, int64_t inner, Rng& rng) {
  CONTEXT("type ", type, " shape ", outer, "x", n, "x", inner);
  Guarded<T> x(outer * n * inner);
  for (T& v : x) {
    from_float(rng.chance(0.1) ? rng.pick({0.0f, -0.0f, std::nanf("")}) : rng.real(-1, 1), &v);
  }
  const int64_t size = outer * inner * binary_words(n);
  Guarded<uint64_t> got(size), expected(size);
  BinaryPackArgs args{x.data(), type, outer * inner, n, inner, n * inner, 1, inner, got.data()};
  simt::seed = rng.bits();
  CHECK_EQ(binary_pack_cuda(args, nullptr), cudaSuccess);
  args.out = expected.data();
  binary_pack(args, kSerial);
  CHECK(same_bytes(got.data(), expected.data(), size));
}

struct Layer {
  int64_t images = 1, in = 70, out = 40;
  int64_t size[2] = {5, 6}, kernel[2] = {3, 3}, stride[2] = {1, 1}, padding[2] = {1, 1},
          dilation[2] = {1, 1};
};

class Product {
 public:
  Product(const Layer& layer, bool with_bias, Rng& rng)
      : words_(binary_words(layer.in)),
        taps_(layer.kernel[0] * layer.kernel[1]),
        input_(layer.images * layer.size[0] * layer.size[1] * words_),
        weight_(binary_blocks(layer.out) * taps_ * words_ * kBinaryBlock),
        scale_(layer.out),
        bias_(layer.out) {
    rng.fill(scale_), rng.fill(bias_);
    // Bits beyond the channels are 0 on both sides.
    const uint64_t last = layer.in % 64 == 0 ? ~uint64_t{0} : (uint64_t{1} << layer.in % 64) - 1;
    for (int64_t i = 0; i < input_.size(); ++i) {
      input_[i] = rng.bits() & (i % words_ == words_ - 1 ? last : ~uint64_t{0});
    }
    std::vector<uint64_t> rows(static_cast<size_t>(layer.out * taps_ * words_));
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i] = rng.bits() & (static_cast<int64_t>(i) % words_ == words_ - 1 ? last : ~uint64_t{0});
    }
    binary_pack_weight(rows.data(), layer.out, taps_ * words_, weight_.data());
    args_ = {};
    args_.input = input_.data(), args_.weight = weight_.data(), args_.scale = scale_.data();
    args_.bias = with_bias ? bias_.data() : nullptr;
    args_.images = layer.images, args_.in_channels = layer.in, args_.out_channels = layer.out;
    for (int d = 0; d < 2; ++d) {
      args_.size[d] = layer.size[d], args_.kernel[d] = layer.kernel[d];
      args_.stride[d] = layer.stride[d], args_.padding[d] = layer.padding[d];
      args_.dilation[d] = layer.dilation[d];
      const int64_t reach = layer.dilation[d] * (layer.kernel[d] - 1) + 1;
      args_.out_size[d] = (layer.size[d] + 2 * layer.padding[d] - reach) / layer.stride[d] + 1;
    }
  }
  BinaryConvArgs& args() { return args_; }
  void check() {
    const int64_t size = args_.images * args_.out_size[0] * args_.out_size[1] * args_.out_channels;
    Guarded<float> got(size, Touches::kStart), expected(size);
    args_.out = expected.data();
    binary_conv(args_, kSerial);
    args_.out = got.data();
    CHECK_EQ(binary_conv_cuda(args_, nullptr), cudaSuccess);
    CHECK(same_bytes(got.data(), expected.data(), size));
  }

 private:
  int64_t words_, taps_;
  Guarded<uint64_t> input_, weight_;
  Guarded<float> scale_, bias_;
  BinaryConvArgs args_;
};

void products_have_the_bits_of_the_cpu() {
  Rng rng(2);
  for (int turn = 0; turn < 60; ++turn) {
    Layer layer{rng.integer(0, 3), rng.pick<int64_t>({1, 63, 64, 65, 130}),
                rng.pick<int64_t>({1, 31, 32, 33, 70})};
    for (int d = 0; d < 2; ++d) {
      layer.kernel[d] = rng.integer(1, 3), layer.stride[d] = rng.integer(1, 2);
      layer.padding[d] = rng.integer(0, 2), layer.dilation[d] = rng.integer(1, 2);
      layer.size[d] = rng.integer(5, 9);
    }
    CONTEXT("in ", layer.in, " out ", layer.out, " kernel ", layer.kernel[0], "x", layer.kernel[1]);
    simt::seed = rng.bits();
    Product(layer, rng.chance(0.5), rng).check();
  }
  // A linear layer is an image of M x 1 pixels.
  for (const int64_t rows : {1, 31, 33, 100}) {
    Product({.in = 300, .out = 65, .size = {rows, 1}, .kernel = {1, 1}, .padding = {0, 0}}, true,
            rng)
        .check();
  }
}

void what_reads_past_an_end_is_noticed() {
  Rng rng(3);
  const auto broken = [&](auto&& change) {
    Product product({.padding = {0, 0}}, true, rng);
    product.check();
    fault_of([&] {
      change(product.args());
      product.check();
    });
  };
  broken([](BinaryConvArgs& args) { args.images = 2; });
  broken([](BinaryConvArgs& args) { args.out_channels = 65; });
  broken([](BinaryConvArgs& args) { args.size[0] = 6, args.out_size[0] = 4; });
  Guarded<float> x(100);
  Guarded<uint64_t> out(2);
  expect_fault("misaligned load of 8", [&] {
    Product product({}, true, rng);
    product.args().input =
        reinterpret_cast<const uint64_t*>(reinterpret_cast<uintptr_t>(product.args().input) + 4);
    Guarded<float> result(5 * 6 * 40);
    product.args().out = result.data();
    binary_conv_cuda(product.args(), nullptr);
  });
  fault_of([&] {
    binary_pack_cuda({x.data(), FloatType::kFloat32, 1, 101, 1, 101, 1, 1, out.data()}, nullptr);
  });
}

}  // namespace

int main() {
  Rng rng(1);
  for (const int64_t n : {1, 31, 64, 65, 200}) {
    for (const int64_t inner : {1, 2, 35}) {
      words_are_those_of_the_cpu<float>(FloatType::kFloat32, 3, n, inner, rng);
      words_are_those_of_the_cpu<BFloat16>(FloatType::kBFloat16, 1, n, inner, rng);
      words_are_those_of_the_cpu<Float16>(FloatType::kFloat16, 2, n, inner, rng);
    }
  }
  products_have_the_bits_of_the_cpu();
  what_reads_past_an_end_is_noticed();
}
