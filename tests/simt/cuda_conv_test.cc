// Convolution on the emulator: every kernel gives the bits of the reference for every rank, padding
// mode, group, dilation, stride, output and alignment, transposed too; broken instructions are
// noticed.
#include "csrc/conv/cuda.cu"
#include "csrc/conv/cuda_device_pack.cu"
#include "csrc/conv/cuda_s8.cu"
#include "csrc/conv/cuda_u8.cu"
#include "csrc/gemm/cuda.cu"
#include "csrc/gemm/cuda_s8.cu"
#include "csrc/gemm/cuda_u8.cu"
#include "csrc/gemm/cuda_wgmma_sm90a.cu"
#include "tests/csrc/check.h"
#include "tests/simt/expect_fault.h"
#include "tests/simt/layers.h"

using namespace qk;
using namespace qk::test;

namespace {

struct Case {
  ConvShape shape;
  ConvExtent extent;
  OutputType output = OutputType::kU8;
  bool input_signed = false, weight_zero_points = false, table = false, residual = false,
       residual_signed = false, per_tensor = false;
  int64_t misalign = 0;
};

// The output size that follows, the smallest for a transposed convolution.
bool set_output(Case& c) {
  for (int d = 0; d < kConvDims; ++d) {
    const ConvShape& s = c.shape;
    const int64_t window = (s.kernel[d] - 1) * s.dilation[d] + 1, pads = s.pad_lo[d] + s.pad_hi[d];
    c.extent.out[d] = s.transposed ? (c.extent.in[d] - 1) * s.stride[d] + window - pads
                                   : (c.extent.in[d] + pads - window) / s.stride[d] + 1;
    if (!s.transposed && c.extent.in[d] + pads < window) return false;
  }
  return check_conv_shape(c.shape) == Status::kOk &&
         check_conv_extent(c.shape, c.extent) == Status::kOk;
}

std::string describe(const Case& c) {
  const ConvShape& s = c.shape;
  const auto list = [](const int64_t* v) { return text_of(v[0], ",", v[1], ",", v[2]); };
  return text_of("in ", s.in_channels, " out ", s.out_channels, " groups ", s.groups, " kernel ",
                 list(s.kernel), " stride ", list(s.stride), " dilation ", list(s.dilation),
                 " pad ", list(s.pad_lo), "/", list(s.pad_hi), " mode ", s.padding_mode,
                 " transposed ", s.transposed, " size ", c.extent.batch, "x", list(c.extent.in),
                 " output ", c.output, " signed ", c.input_signed, " zero points ",
                 c.weight_zero_points, " misalign ", c.misalign);
}

class Problem {
 public:
  Problem(const Case& c, Rng& rng)
      : c_(c),
        input_(c.misalign + c.extent.batch * c.extent.in_pixels() * c.shape.in_channels,
               Touches::kStart),
        residual_(outputs(c), Touches::kStart),
        weight_(static_cast<size_t>(c.shape.out_channels * c.shape.in_per_group() *
                                    c.shape.kernel_size())),
        grids_(c.shape.out_channels, rng) {
    rng.fill(input_), rng.fill(weight_), rng.fill(residual_);
    source_ = {.shape = c.shape,
               .weight = weight_.data(),
               .weight_scale = grids_.scales.data(),
               .weight_zero_point = c.weight_zero_points ? grids_.zero_points.data() : nullptr,
               .per_tensor = c.per_tensor,
               .bias = grids_.bias.data(),
               .input_scale = 0.02f,
               .input_zero_point = c.input_signed ? -7 : 113,
               .input_signed = c.input_signed,
               .output_scale = 0.03f,
               .epilogue = some_epilogue(c.output, c.table, c.residual, rng)};
    const CudaPackedFacts facts = conv_cuda_facts(source_);
    packed_ =
        std::make_unique<Guarded<uint8_t>>(packed_conv_cuda_bytes(c.shape, facts), Touches::kStart);
    CHECK_EQ(pack_conv_cuda(source_, packed_->data()), Status::kOk, describe(c));
    check_packing_on_the_device();
    args_ = {.shape = c.shape,
             .extent = c.extent,
             .packed = packed_->data(),
             .facts = {},
             .input = input_.data() + c.misalign,
             .out = nullptr,
             .residual = c.residual ? residual_.data() : nullptr,
             .residual_signed = c.residual_signed,
             .workspace = nullptr};
    CHECK_EQ(read_conv_cuda_facts(packed_->size(), c.shape, &args_.facts), Status::kOk);
    CHECK_EQ(args_.facts.code(), facts.code());
    CHECK(conv_cuda_fits(args_));
    expected_.resize(static_cast<size_t>(outputs(c) * output_bytes(c.output)));
    ConvArgs reference;
    reference.extent = c.extent;
    reference.input = args_.input;
    reference.out = expected_.data();
    reference.residual = args_.residual;
    reference.residual_signed = c.residual_signed;
    conv_reference(source_, reference);
  }

  ConvCudaArgs& args() { return args_; }
  void check() {
    CONTEXT(describe(c_));
    CudaMachine machine;
    CHECK_EQ(cuda_machine(&machine), cudaSuccess);
    Guarded<uint8_t> out(static_cast<int64_t>(expected_.size()), Touches::kStart);
    Guarded<uint8_t> workspace(conv_cuda_workspace(args_, machine), Touches::kStart);
    Rng().fill(workspace);
    args_.out = out.data();
    args_.workspace = workspace.data();
    CHECK_EQ(conv_cuda(args_, machine, nullptr), cudaSuccess);
    for (int64_t i = 0; i < out.size(); ++i) CHECK_EQ(out[i], expected_[i], "at byte ", i);
  }

 private:
  // It gives the bytes of the host.
  void check_packing_on_the_device() {
    Guarded<uint8_t> packed(packed_->size(), Touches::kStart);
    Guarded<float> input_scale(1);
    Guarded<int32_t> input_zero_point(1);
    input_scale[0] = source_.input_scale, input_zero_point[0] = source_.input_zero_point;
    ConvDeviceSource source{source_, input_scale.data(), input_zero_point.data()};
    source.source.input_scale = 0, source.source.input_zero_point = 0;
    CHECK_EQ(pack_conv_on_device(source, packed.data(), nullptr), cudaSuccess);
    CHECK(same_bytes(packed.data(), packed_->data(), packed_->size()));
  }

  static int64_t outputs(const Case& c) {
    return c.extent.batch * c.extent.out_pixels() * c.shape.out_channels;
  }

  Case c_;
  Guarded<uint8_t> input_, residual_;
  std::vector<int8_t> weight_;
  LayerGrids grids_;
  ConvSource source_;
  std::unique_ptr<Guarded<uint8_t>> packed_;
  ConvCudaArgs args_;
  std::vector<uint8_t> expected_;
};

Case square(int64_t in, int64_t out, int64_t groups, int64_t size, int64_t kernel, int64_t stride,
            int64_t pad) {
  Case c;
  c.shape.in_channels = in, c.shape.out_channels = out, c.shape.groups = groups;
  c.extent.batch = 1;
  for (int d = 1; d < 3; ++d) {
    c.shape.kernel[d] = kernel, c.shape.stride[d] = stride;
    c.shape.pad_lo[d] = c.shape.pad_hi[d] = pad;
    c.extent.in[d] = size;
  }
  CHECK(set_output(c));
  return c;
}

// The convolutions of real networks, each on its kernel.
void usual_layers_give_the_bits_of_the_reference() {
  Rng rng(1);
  for (const Case& c :
       {square(32, 64, 1, 8, 3, 1, 1), square(16, 130, 1, 9, 3, 2, 1),
        square(64, 24, 1, 5, 1, 1, 0), square(64, 16, 1, 6, 1, 2, 0), square(3, 32, 1, 16, 3, 2, 1),
        square(3, 24, 1, 15, 7, 2, 3), square(32, 32, 32, 9, 3, 1, 1),
        square(24, 24, 24, 8, 5, 2, 2), square(6, 12, 6, 7, 3, 1, 1), square(64, 64, 4, 7, 3, 1, 1),
        square(32, 32, 8, 7, 3, 1, 1), square(24, 24, 1, 6, 3, 1, 1),
        square(512, 32, 1, 4, 3, 1, 1)}) {
    simt::seed = rng.bits();
    Problem(c, rng).check();
  }
}

constexpr OutputType kOutputs[] = {OutputType::kU8,  OutputType::kS8,   OutputType::kS32,
                                   OutputType::kF32, OutputType::kBF16, OutputType::kF16};

void random_convolutions_give_the_bits_of_the_reference(int turns) {
  Rng rng(2);
  for (int turn = 0; turn < turns;) {
    Case c;
    ConvShape& s = c.shape;
    s.spatial_dims = 3;
    s.groups = rng.pick<int64_t>({1, 1, 1, 2, 3, 8});
    const int64_t in_group = rng.pick<int64_t>({1, 1, 2, 3, 4, 5, 16, 16, 17, 32});
    s.in_channels = s.groups * in_group;
    s.out_channels = s.groups * rng.pick<int64_t>({1, 2, 3, 16, 20});
    s.transposed = rng.chance(0.3);
    s.padding_mode =
        s.transposed ? PaddingMode::kZeros : static_cast<PaddingMode>(rng.pick({0, 0, 0, 1, 2, 3}));
    for (int d = 0; d < kConvDims; ++d) {
      if (d == 0 && rng.chance(0.7)) continue;
      s.kernel[d] = rng.integer(1, 3), s.stride[d] = rng.integer(1, 3);
      s.dilation[d] = rng.integer(1, 2);
      s.pad_lo[d] = rng.integer(0, 2), s.pad_hi[d] = rng.integer(0, 2);
      c.extent.in[d] = rng.integer(1, 6);
    }
    c.extent.batch = rng.integer(0, 2);
    c.output = kOutputs[rng.integer(0, 5)];
    const bool bytes = c.output == OutputType::kU8 || c.output == OutputType::kS8;
    c.input_signed = rng.chance(0.5), c.weight_zero_points = rng.chance(0.25);
    c.table = bytes && rng.chance(0.3), c.residual = bytes && rng.chance(0.3);
    c.residual_signed = rng.chance(0.5), c.per_tensor = rng.chance(0.3);
    c.misalign = rng.chance(0.7) ? 0 : rng.integer(1, 15);
    if (!set_output(c)) continue;
    ++turn;
    simt::seed = rng.bits();
    Problem(c, rng).check();
  }
}

// The same kernels with the instructions of capability 7.5.
void turing_gives_the_bits_of_the_reference() {
  const simt::Device before = simt::device;
  simt::device = {7, 5, 40, 64 << 10, 64 << 10};
  simt::counters = {};
  usual_layers_give_the_bits_of_the_reference();
  random_convolutions_give_the_bits_of_the_reference(60);
  CHECK_EQ(simt::counters.mmas, 0u);
  CHECK(simt::counters.small_mmas > 0);
  simt::device = before;
}

void a_linear_layer_is_packed_as_a_convolution_of_one_tap() {
  Rng rng(7);
  for (const int64_t k : {1, 16, 37, 300}) {
    constexpr int64_t kColumns = 21;
    LayerGrids grids(kColumns, rng);
    std::vector<int8_t> weight(static_cast<size_t>(kColumns * k));
    rng.fill(weight);
    PackSource linear{};
    linear.weight = weight.data(), linear.n = kColumns, linear.taps = 1, linear.depth = k;
    linear.stride_n = k, linear.stride_k = 1;
    linear.weight_scale = grids.scales.data(), linear.bias = grids.bias.data();
    linear.input_scale = 0.02f, linear.input_zero_point = 9, linear.output_scale = 1.0f;
    linear.epilogue.output = OutputType::kF32;
    const int64_t size = packed_cuda_bytes(kColumns, 1, k, cuda_packed_facts(linear));
    Guarded<uint8_t> expected(size, Touches::kStart), packed(size, Touches::kStart);
    CHECK_EQ(pack_igemm_cuda(linear, expected.data()), Status::kOk);
    ConvDeviceSource source{};
    source.source.shape.in_channels = k, source.source.shape.out_channels = kColumns;
    source.source.weight = weight.data(), source.source.weight_scale = linear.weight_scale;
    source.source.bias = linear.bias, source.source.output_scale = 1.0f;
    source.source.epilogue = linear.epilogue;
    source.input_scale = &linear.input_scale;
    source.input_zero_point = &linear.input_zero_point;
    CHECK_EQ(packed_conv_cuda_bytes(source.source.shape, conv_cuda_facts(source.source)), size);
    CHECK_EQ(pack_conv_on_device(source, packed.data(), nullptr), cudaSuccess);
    CHECK(same_bytes(packed.data(), expected.data(), size));
  }
}

void the_weight_of_another_layer_is_refused() {
  for (const ConvShape& shape :
       {square(64, 64, 1, 9, 3, 1, 1).shape, ConvShape{.in_channels = 48, .out_channels = 32},
        square(60, 32, 4, 9, 5, 2, 2).shape}) {
    const int64_t bytes = packed_conv_cuda_bytes(shape, {});
    const auto refused = [&](auto&& change) {
      ConvShape other = shape;
      change(other);
      CudaPackedFacts facts;
      return read_conv_cuda_facts(bytes, other, &facts) == Status::kBadShape;
    };
    CHECK(!refused([](ConvShape&) {}));
    for (int d = 0; d < kConvDims; ++d) {
      CHECK(refused([d](ConvShape& s) { s.stride[d] += 1; }), d);
      CHECK(refused([d](ConvShape& s) { s.dilation[d] += 1; }), d);
      CHECK(refused([d](ConvShape& s) { s.pad_lo[d] += 1; }), d);
      CHECK(refused([d](ConvShape& s) { s.pad_hi[d] += 1; }), d);
      CHECK(refused([d](ConvShape& s) { s.pad_lo[d] += 1, s.pad_hi[d] += 1; }), d);
      CHECK(refused([d](ConvShape& s) { s.kernel[d] += 1; }), d);
    }
    for (const PaddingMode mode :
         {PaddingMode::kReflect, PaddingMode::kReplicate, PaddingMode::kCircular}) {
      CHECK(refused([mode](ConvShape& s) { s.padding_mode = mode; }), mode);
    }
    CHECK(refused([](ConvShape& s) { s.transposed = 1; }));
    for (int64_t more = 1; more < 16; ++more) {
      CHECK(refused([more](ConvShape& s) { s.in_channels += more * s.groups; }), more);
      CHECK(refused([more](ConvShape& s) { s.out_channels += more * s.groups; }), more);
    }
  }
}

void tiles_read_the_image_16_bytes_at_a_time() {
  Rng rng(3);
  Problem problem(square(64, 64, 1, 8, 3, 1, 1), rng);
  simt::counters = {};
  problem.check();
  CHECK(simt::counters.mmas > 0);
  CHECK_EQ(simt::counters.ldmatrix_conflicts, 0u);
  CHECK_EQ(simt::counters.copy_conflicts, 0u);
}

// Groups of 4, 8 and 12 channels: dot products alone.
void narrow_groups_give_the_bits_of_the_reference() {
  Rng rng(8);
  simt::counters = {};
  for (const int64_t in_group : {4, 8, 12}) {
    for (const int64_t out_group : {1, 4, 6, 8}) {
      for (const bool zero_points : {false, true}) {
        Case c = square(in_group * 5, out_group * 5, 5, 6, 3, 2, 1);
        c.input_signed = rng.chance(0.5), c.weight_zero_points = zero_points;
        c.output = kOutputs[rng.integer(0, 5)];
        simt::seed = rng.bits();
        Problem(c, rng).check();
      }
    }
  }
  CHECK_EQ(simt::counters.mmas, 0u);
  // A word that is not where it should be is noticed, and so is a channel beyond the last.
  Case c = square(20, 20, 5, 6, 3, 2, 1);
  const auto broken = [&](auto&& change) {
    return fault_of([&] {
      Problem problem(c, rng);
      change(problem.args());
      problem.check();
    });
  };
  broken([](ConvCudaArgs& args) { args.packed = static_cast<const uint8_t*>(args.packed) + 2; });
  broken([](ConvCudaArgs& args) { args.extent.batch += 1; });
}

void broken_instructions_are_noticed() {
  Rng rng(4);
  Problem problem(square(32, 40, 1, 6, 3, 1, 1), rng);
  const auto broken = [&](auto&& sabotage) {
    return fault_of([&] {
      sabotage();
      problem.check();
    });
  };
  broken([] { simt::sabotage.wait_for_fewer_groups = 1; });
  for (const int barrier : {0, 2}) broken([=] { simt::sabotage.skip_barrier = barrier; });
  broken([] { simt::sabotage.skip_warp_barriers = true; });
  broken([] { simt::sabotage.copy_all_bytes = true; });
  expect_fault("shared byte", [&] {  // where the sum of a channel is joined
    simt::sabotage.skip_barrier = 0;
    Problem(square(32, 40, 1, 6, 3, 1, 1), rng);
  });
}

}  // namespace

int main() {
  usual_layers_give_the_bits_of_the_reference();
  random_convolutions_give_the_bits_of_the_reference(260);
  turing_gives_the_bits_of_the_reference();
  a_linear_layer_is_packed_as_a_convolution_of_one_tap();
  the_weight_of_another_layer_is_refused();
  narrow_groups_give_the_bits_of_the_reference();
  tiles_read_the_image_16_bytes_at_a_time();
  broken_instructions_are_noticed();
}
