// Convolution: every ISA and every thread count gives the bytes of the reference, for thousands of
// random configurations, without touching a byte outside its buffers.
#include "csrc/conv/conv.h"

#include <string>
#include <vector>

#include "csrc/conv/winograd.h"
#include "tests/csrc/check.h"

namespace {

using namespace qk;
using test::Guarded;
using test::Rng;

struct Case {
  ConvShape shape;
  ConvExtent extent;
  bool input_signed, per_tensor, weight_zero_points, with_bias, extremes, residual_signed;
  bool small_zero_points;  // of weights
  bool lowest;             // weights of -128 on an input of 255
  int32_t input_zero_point;
  float input_scale, output_scale;
  Epilogue epilogue;
  int threads;
};

std::string text(const Case& c) {
  const ConvShape& s = c.shape;
  std::string t = test::text_of(
      "batch ", c.extent.batch, " C ", s.in_channels, " O ", s.out_channels, " groups ", s.groups,
      " transposed ", s.transposed, " mode ", s.padding_mode, " rank ", s.spatial_dims, " output ",
      static_cast<int>(c.epilogue.output), " table ", c.epilogue.has_table, " residual ",
      c.epilogue.has_residual, " signed ", c.input_signed, " za ", c.input_zero_point, " zw ",
      c.weight_zero_points, " threads ", c.threads);
  for (int d = 0; d < kConvDims; ++d) {
    t +=
        test::text_of(" | in ", c.extent.in[d], " out ", c.extent.out[d], " k ", s.kernel[d], " s ",
                      s.stride[d], " p ", s.pad_lo[d], ",", s.pad_hi[d], " d ", s.dilation[d]);
  }
  return t;
}

void random_epilogue(Rng& rng, Case* c) {
  Epilogue& e = c->epilogue;
  e.output =
      rng.chance(0.7)
          ? rng.pick({OutputType::kU8, OutputType::kS8})
          : rng.pick({OutputType::kS32, OutputType::kF32, OutputType::kBF16, OutputType::kF16});
  const int32_t low = e.is_signed() ? -128 : 0;
  e.qmin = low;
  e.qmax = low + 255;
  e.zero_point = static_cast<int32_t>(rng.integer(e.qmin, e.qmax));
  if (rng.chance(0.3)) e.qmin = e.zero_point;
  if (rng.chance(0.1)) e.qmax = static_cast<int32_t>(rng.integer(e.zero_point, e.qmax));
  if (!e.is_8bit()) return;
  e.has_table = rng.chance(0.2);
  for (uint8_t& byte : e.table) byte = static_cast<uint8_t>(rng.bits());
  e.has_residual = rng.chance(0.3);
  if (!e.has_residual) return;
  c->residual_signed = rng.chance(0.5);
  const float scale = rng.real(0.01f, 0.1f), residual_scale = rng.real(0.01f, 0.1f);
  e.residual = {scale,
                static_cast<float>(-e.zero_point) * scale,
                residual_scale,
                -3.0f * residual_scale,
                1.0f / rng.real(0.01f, 0.1f),
                e.zero_point,
                low,
                low + 255,
                3};
}

// Grids of one case, and how many threads run it.
void random_grids(Rng& rng, Case* c) {
  c->input_signed = rng.chance(0.3);
  c->per_tensor = rng.chance(0.3);
  c->weight_zero_points = rng.chance(0.1);
  c->with_bias = rng.chance(0.7);
  c->extremes = rng.chance(0.1);
  c->input_zero_point = static_cast<int32_t>(rng.integer(0, 255)) - (c->input_signed ? 128 : 0);
  c->input_scale = rng.real(0.005f, 0.2f);
  // Few different outputs of a product of scales: many ties.
  c->output_scale = rng.chance(0.5) ? rng.real(0.05f, 5.0f) : c->input_scale * 2;
  c->threads = static_cast<int>(rng.pick({1, 1, 2, 5}));
  random_epilogue(rng, c);
}

int64_t count_macs(const Case& c) {
  return c.extent.batch * c.extent.out_pixels() * c.shape.out_channels * c.shape.in_per_group() *
         c.shape.kernel_size();
}

// Small images with every feature mixed, at most a million MACs.
bool random_case(Rng& rng, Case* c) {
  ConvShape& s = c->shape;
  s.spatial_dims = static_cast<int32_t>(rng.pick({1, 2, 2, 2, 3}));
  s.transposed = rng.chance(0.25);
  s.padding_mode =
      s.transposed || rng.chance(0.6)
          ? PaddingMode::kZeros
          : rng.pick({PaddingMode::kReflect, PaddingMode::kReplicate, PaddingMode::kCircular});
  const int kind = static_cast<int>(rng.integer(0, 4));
  if (kind == 0) {  // depthwise
    s.groups = rng.integer(2, 140);
    s.in_channels = s.groups;
    s.out_channels = s.groups * rng.pick<int64_t>({1, 1, 1, 2, 3});
  } else if (kind == 1) {  // narrow groups of a power of two
    const int64_t out = rng.pick<int64_t>({4, 8, 16}), in = rng.pick<int64_t>({4, 4, 8, 12, 16});
    s.groups = rng.integer(2, 24);
    s.in_channels = s.groups * (in <= out ? in : 4);
    s.out_channels = s.groups * out;
  } else if (kind == 2) {  // grouped
    s.groups = rng.integer(2, 9);
    s.in_channels = s.groups * rng.integer(1, 17);
    s.out_channels = s.groups * rng.integer(1, 20);
  } else {
    s.in_channels = rng.pick<int64_t>({1, 2, 3, 4, 5, 8, 16, 17, 33, 64});
    s.out_channels = rng.integer(1, 140);
  }
  c->extent.batch = rng.integer(1, 3);
  for (int d = kConvDims - s.spatial_dims; d < kConvDims; ++d) {
    s.kernel[d] = rng.pick<int64_t>({1, 1, 2, 3, 3, 3, 4, 5, 7});
    if (s.spatial_dims == 3 && s.kernel[d] > 3) s.kernel[d] = 3;
    s.stride[d] = rng.pick<int64_t>({1, 1, 2, 2, 3});
    s.dilation[d] = rng.pick<int64_t>({1, 1, 1, 2, 3});
    s.pad_lo[d] = rng.integer(0, s.kernel[d]);
    s.pad_hi[d] = rng.chance(0.6) ? s.pad_lo[d] : rng.integer(0, s.kernel[d]);
    c->extent.in[d] = rng.integer(1, s.spatial_dims == 3 ? 6 : s.spatial_dims == 1 ? 90 : 14);
    const int64_t window = (s.kernel[d] - 1) * s.dilation[d] + 1;
    const int64_t padding = s.pad_lo[d] + s.pad_hi[d];
    c->extent.out[d] = s.transposed ? (c->extent.in[d] - 1) * s.stride[d] + window - padding +
                                          rng.integer(0, s.stride[d] - 1)
                                    : (c->extent.in[d] + padding - window) / s.stride[d] + 1;
    if (!s.transposed && c->extent.in[d] + padding < window) return false;
  }
  if (rng.chance(0.05)) c->extent.batch = 0;
  random_grids(rng, c);
  return check_conv_extent(s, c->extent) == Status::kOk && count_macs(*c) < 1'000'000;
}

// Floats whose codes are `codes`, in planes or with the channels innermost, with gaps between the
// planes and the images.
struct Images {
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  FloatImages args;
  Guarded<float> x;

  Images(Rng& rng, const Case& c, const Guarded<uint8_t>& codes, test::Touches touches)
      : scale(c.shape.in_channels),
        zero_point(c.shape.in_channels),
        x(size(rng, c, &args), touches) {
    const int64_t channels = c.shape.in_channels, pixels = c.extent.in_pixels();
    for (float& value : scale) value = rng.pick({0.25f, 1.0f, 4.0f});  // exact, like their products
    for (int32_t& value : zero_point) value = static_cast<int32_t>(rng.integer(-128, 127));
    for (int64_t i = 0; i < codes.size(); ++i) {
      const int64_t channel = i % channels, pixel = i / channels % pixels;
      const int64_t grid = args.per_channel ? channel : 0;
      const int64_t at =
          i / channels / pixels * args.batch_stride +
          (args.interleaved ? pixel * channels + channel : channel * args.channel_stride + pixel);
      x[at] =
          static_cast<float>(byte_value(codes[i], c.input_signed) - zero_point[grid]) * scale[grid];
    }
    args.x = x.data();
    args.scale = scale.data();
    args.zero_point = zero_point.data();
    args.q_signed = c.input_signed;
    args.qmin = c.input_signed ? -128 : 0;
    args.qmax = args.qmin + 255;
  }

  static int64_t size(Rng& rng, const Case& c, FloatImages* args) {
    const int64_t channels = c.shape.in_channels, pixels = c.extent.in_pixels();
    args->channels = channels;
    args->interleaved = channels > kMaxImageChannels || rng.chance(0.3);
    args->per_channel = !args->interleaved && rng.chance(0.3);
    args->channel_stride = pixels + rng.integer(0, 9);
    const int64_t image =
        args->interleaved ? channels * pixels : (channels - 1) * args->channel_stride + pixels;
    args->batch_stride = image + rng.integer(0, 9);
    return (c.extent.batch - 1) * args->batch_stride + image;
  }
};

void check_case(Rng& rng, const Case& c) {
  const ConvShape& s = c.shape;
  const int64_t inputs = c.extent.batch * c.extent.in_pixels() * s.in_channels;
  const int64_t outputs = c.extent.batch * c.extent.out_pixels() * s.out_channels;
  const int64_t element = output_bytes(c.epilogue.output);
  const auto touches = rng.chance(0.5) ? test::Touches::kEnd : test::Touches::kStart;
  Guarded<uint8_t> input(inputs, touches), residual(outputs, touches);
  Guarded<int8_t> weight(s.out_channels * s.in_per_group() * s.kernel_size());
  rng.fill(input);
  rng.fill(residual);
  rng.fill(weight);
  if (c.extremes) {
    const auto a = rng.pick<uint8_t>({0, 255}), w = rng.pick<uint8_t>({0x80, 0x7f});
    for (uint8_t& byte : input) byte = a;
    for (int8_t& byte : weight) byte = static_cast<int8_t>(w);
  }
  if (c.lowest) {
    for (uint8_t& byte : input) byte = 255;
    for (int8_t& byte : weight) byte = -128;
  }
  std::vector<float> scale(s.out_channels), bias(s.out_channels);
  std::vector<int32_t> zero_point(s.out_channels);
  for (int64_t o = 0; o < s.out_channels; ++o) {
    scale[o] = rng.chance(0.5) ? 0.5f : rng.real(0.001f, 0.5f);
    bias[o] = rng.real(-3, 3);
    const int64_t reach = c.small_zero_points ? 99 : 128;
    zero_point[o] = static_cast<int32_t>(rng.integer(-reach, reach - 1));
  }
  ConvSource source = {s,
                       weight.data(),
                       scale.data(),
                       c.weight_zero_points ? zero_point.data() : nullptr,
                       c.per_tensor,
                       c.with_bias ? bias.data() : nullptr,
                       c.input_scale,
                       c.input_zero_point,
                       c.input_signed,
                       c.output_scale,
                       c.epilogue};
  ConvArgs args;
  args.extent = c.extent;
  args.input = input.data();
  args.residual = c.epilogue.has_residual ? residual.data() : nullptr;
  args.residual_signed = c.residual_signed;
  std::vector<uint8_t> expected(static_cast<size_t>(outputs * element));
  args.out = expected.data();
  conv_reference(source, args);

  test::for_each_isa([&](Isa isa) {
    Guarded<uint8_t> packed_bytes((packed_conv_bytes(source, isa) + 63) / 64 * 64);
    CHECK_EQ(pack_conv(source, isa, packed_bytes.data()), Status::kOk);
    CHECK_EQ(view_packed_conv(packed_bytes.data(), packed_bytes.size(), &args.packed), Status::kOk);
    const Parallel parallel = c.threads == 1 ? kSerial : test::threads(c.threads);
    Guarded<uint8_t> out(outputs * element, touches);
    Guarded<uint8_t> workspace((conv_workspace_bytes(args, parallel) + 63) / 64 * 64);
    args.out = out.data();
    args.workspace = workspace.data();
    const auto check = [&] {
      for (int64_t i = 0; i < outputs * element; ++i) {
        CHECK_EQ(out[i], expected[i], "at byte ", i, " channel ", i / element % s.out_channels,
                 " pixel ", i / element / s.out_channels);
      }
    };
    conv(args, parallel);
    check();
    if (isa == Isa::kScalar && count_macs(c) > 3'000'000) return;  // slow
    if (args.packed->winograd_offset > 0) {  // whatever the call above has used
      Guarded<uint8_t> room((winograd_workspace_bytes(args, parallel) + 63) / 64 * 64);
      ConvArgs tiles = args;
      tiles.workspace = room.data();
      std::fill(out.begin(), out.end(), uint8_t{0xa5});
      winograd(tiles, parallel);
      check();
    }
    if (conv_writes_slices(*args.packed) && outputs > 0) {
      // Channels [first, first + out_channels) of a wider output: the others keep what they have.
      const int64_t pixels = outputs / s.out_channels, more = rng.integer(1, 70);
      const int64_t first = rng.integer(0, more), stride = s.out_channels + more;
      Guarded<uint8_t> wide(((pixels - 1) * stride + first + s.out_channels) * element, touches);
      std::fill(wide.begin(), wide.end(), uint8_t{0xa5});
      ConvArgs slice = args;
      slice.out = wide.data() + first * element;
      slice.out_pixel_stride = stride;
      conv(slice, parallel);
      for (int64_t i = 0; i < wide.size(); ++i) {
        const int64_t pixel = i / element / stride, channel = i / element % stride - first;
        const bool inside = channel >= 0 && channel < s.out_channels;
        const int64_t at = (pixel * s.out_channels + channel) * element + i % element;
        CHECK_EQ(wide[i], inside ? expected[at] : 0xa5, "slice, at byte ", i);
      }
    }
    if (conv_reads_slices(*args.packed) && inputs > 0) {
      // Channels [first, first + in_channels) of a wider input.
      const int64_t pixels = inputs / s.in_channels, more = rng.integer(1, 70);
      const int64_t first = rng.integer(0, more), stride = s.in_channels + more;
      Guarded<uint8_t> wide((pixels - 1) * stride + first + s.in_channels, touches);
      rng.fill(wide);
      for (int64_t i = 0; i < inputs; ++i) {
        wide[i / s.in_channels * stride + first + i % s.in_channels] = input[i];
      }
      ConvArgs slice = args;
      slice.input = wide.data() + first;
      slice.in_pixel_stride = stride;
      Guarded<uint8_t> room((conv_workspace_bytes(slice, parallel) + 63) / 64 * 64);
      slice.workspace = room.data();
      conv(slice, parallel);
      check();
    }
    if (conv_pads_image(*args.packed) && inputs > 0) {
      const Images images(rng, c, input, touches);
      ConvArgs floats = args;
      floats.input = nullptr;
      floats.floats = images.args;
      conv(floats, parallel);
      check();
    }
    if (conv_dequantizes(*args.packed)) {
      const float unit = rng.real(0.01f, 0.1f);
      const int32_t zero = static_cast<int32_t>(rng.integer(-128, 255));
      Guarded<float> floats(outputs, touches);
      ConvArgs dequantized = args;
      dequantized.dequantized = {&unit, &zero, rng.chance(0.3)};
      Guarded<uint8_t> more((conv_workspace_bytes(dequantized, parallel) + 63) / 64 * 64);
      dequantized.workspace = more.data();
      dequantized.out = floats.data();
      conv(dequantized, parallel);
      for (int64_t i = 0; i < outputs; ++i) {
        const int32_t code = byte_value(expected[i], c.epilogue.is_signed());
        CHECK_EQ(floats[i], static_cast<float>(code - zero) * unit, "float ", i);
      }
    }
    if (c.epilogue.has_residual && conv_adds_in_place(*args.packed)) {
      ConvArgs over = args;
      std::copy(residual.begin(), residual.end(), out.begin());
      over.residual = out.data();
      conv(over, parallel);
      check();
    }
  });
}

// 3x3 of stride 1, of widths that have transformed weights and that have none.
bool random_winograd_case(Rng& rng, Case* c) {
  ConvShape& s = c->shape;
  s.padding_mode =
      rng.chance(0.6)
          ? PaddingMode::kZeros
          : rng.pick({PaddingMode::kReflect, PaddingMode::kReplicate, PaddingMode::kCircular});
  s.in_channels = rng.pick<int64_t>({15, 16, 22, 23, 31, 32, 33, 64, 65});
  s.out_channels = rng.pick<int64_t>({15, 16, 17, 24, 33, 48, 64, 65, 111, 128});
  c->extent.batch = rng.integer(0, 3);
  for (int d = 1; d < kConvDims; ++d) {
    s.kernel[d] = 3;
    s.pad_lo[d] = rng.integer(0, 3);
    s.pad_hi[d] = rng.integer(0, 3);
    c->extent.in[d] = rng.integer(1, 18);
    c->extent.out[d] = c->extent.in[d] + s.pad_lo[d] + s.pad_hi[d] - 2;
  }
  random_grids(rng, c);
  c->small_zero_points = rng.chance(0.8);
  return check_conv_extent(s, c->extent) == Status::kOk;
}

struct Map {
  int64_t in, out, groups, kernel, stride, dilation, height, width;
  int transposed;
};

void check_map(Rng& rng, const Map& map, int64_t batch, int threads, bool plain) {
  Case c = {};
  ConvShape& s = c.shape;
  s.in_channels = map.in;
  s.out_channels = map.out;
  s.groups = map.groups;
  s.transposed = map.transposed;
  c.extent.batch = batch;
  c.extent.in[1] = map.height;
  c.extent.in[2] = map.width;
  for (int d = 1; d < kConvDims; ++d) {
    s.kernel[d] = map.kernel;
    s.stride[d] = map.stride;
    s.dilation[d] = map.dilation;
    s.pad_lo[d] = s.pad_hi[d] = map.kernel / 2;
    const int64_t in = c.extent.in[d], reach = (map.kernel - 1) * map.dilation;
    c.extent.out[d] = map.transposed ? (in - 1) * map.stride - 2 * s.pad_lo[d] + reach + 1
                                     : (in + 2 * s.pad_lo[d] - reach - 1) / map.stride + 1;
  }
  c.with_bias = true;
  c.input_zero_point = 77;
  c.input_scale = 0.02f;
  c.output_scale = 1.0f;
  c.threads = threads;
  if (!plain) random_epilogue(rng, &c);
  CONTEXT("map: ", text(c));
  CHECK_EQ(check_conv_extent(s, c.extent), Status::kOk);
  check_case(rng, c);
}

// Maps large enough for many blocks and strips, and for threads to be worth their fork.
void large_maps() {
  const Map maps[] = {{24, 40, 1, 3, 1, 1, 61, 67, 0},    {96, 96, 96, 3, 1, 1, 40, 150, 0},
                      {80, 80, 80, 5, 2, 1, 60, 133, 0},  {64, 64, 16, 3, 1, 1, 50, 61, 0},
                      {48, 100, 1, 1, 1, 1, 60, 60, 0},   {16, 160, 1, 3, 2, 2, 90, 91, 0},
                      {32, 24, 1, 3, 2, 1, 33, 31, 1},    {48, 48, 48, 3, 2, 1, 41, 47, 1},
                      {128, 128, 16, 3, 1, 1, 37, 29, 0}, {20, 64, 1, 3, 1, 1, 32, 32, 0},
                      {256, 256, 1, 3, 1, 1, 14, 14, 0}};
  Rng rng(2);
  for (const Map& map : maps) {
    for (int threads : {2, 7}) check_map(rng, map, 2, threads, false);
  }
}

// Batches that are padded in groups of images, of which the last has fewer, cut into larger blocks.
void last_group_of_images() {
  Rng rng(3);
  for (int threads : {1, 3}) {
    check_map(rng, {20, 256, 1, 3, 2, 1, 33, 33, 0}, 43, threads, true);
  }
}

// Sums of transformed weights that need 27 bits: such layers have none.
void sums_of_26_bits_are_exact() {
  for (const int64_t channels : {114, 115}) {
    Rng rng(4);
    Case c = {};
    ConvShape& s = c.shape;
    s.in_channels = channels;
    s.out_channels = 16;
    c.extent.batch = 2;
    for (int d = 1; d < kConvDims; ++d) {
      s.kernel[d] = 3;
      c.extent.in[d] = 10;
      c.extent.out[d] = 8;
    }
    c.input_scale = c.output_scale = 1;
    c.threads = 1;
    c.lowest = true;
    c.epilogue.output = OutputType::kS32;
    CONTEXT("sums: ", text(c));
    check_case(rng, c);
    const std::vector<int8_t> weight(static_cast<size_t>(16 * channels * 9), -128);
    const float scale = 1;
    ConvSource source = {};
    source.shape = s;
    source.weight = weight.data();
    source.weight_scale = &scale;
    source.per_tensor = true;
    source.input_scale = source.output_scale = 1;
    test::for_each_isa([&](Isa isa) {
      if (select_winograd_kernel(isa) == nullptr) return;
      CHECK_EQ(has_winograd(source, isa), channels == 114);
    });
  }
}

// Columns that merged groups or the padding of tiles make longer than K, some of them too long for
// the kernels: K alone decides.
void only_k_must_fit() {
  struct Long {
    int64_t in, out, groups, kernel, height;
    bool input_signed, zero_points;
  };
  const Long layers[] = {{32, 16, 16, 2100, 1, false, false},  {32, 16, 16, 2100, 1, false, true},
                         {32, 16, 16, 4200, 1, false, false},  {34, 17, 17, 4200, 1, false, true},
                         {48, 16, 16, 21931, 1, false, false}, {7310, 16, 1, 3, 3, false, false},
                         {14563, 16, 1, 3, 3, true, false},    {21846, 24, 3, 1, 9, false, false},
                         {12000, 24, 3, 1, 9, false, true}};
  Rng rng(5);
  for (const Long& layer : layers) {
    Case c = {};
    ConvShape& s = c.shape;
    s.in_channels = layer.in;
    s.out_channels = layer.out;
    s.groups = layer.groups;
    s.kernel[1] = layer.height;
    s.kernel[2] = layer.kernel;
    c.extent.batch = 1;
    for (int d = 1; d < kConvDims; ++d) {
      if (s.kernel[d] == 1) continue;
      s.pad_lo[d] = s.pad_hi[d] = 1;
      c.extent.in[d] = s.kernel[d] + 1;
      c.extent.out[d] = 4;
    }
    c.input_signed = layer.input_signed;
    c.weight_zero_points = layer.zero_points;
    c.small_zero_points = true;
    c.input_scale = c.output_scale = 1;
    c.threads = 1;
    c.lowest = !layer.zero_points;
    c.epilogue.output = OutputType::kS32;
    CONTEXT("long: ", text(c));
    check_case(rng, c);
  }
}

void damaged_headers_are_refused() {
  const std::vector<int8_t> weight(32 * 32 * 9, 1);
  const std::vector<float> scale(32, 1.0f);
  ConvSource source = {};
  source.shape.in_channels = source.shape.out_channels = source.shape.groups = 2;
  source.shape.kernel[1] = source.shape.kernel[2] = 3;
  source.weight = weight.data();
  source.weight_scale = scale.data();
  source.input_scale = source.output_scale = 1;
  const Isa isa = isa_active();
  for (const int64_t channels : {2, 1, 32}) {
    source.shape.groups = channels == 2 ? 2 : 1;
    source.shape.in_channels = channels;
    source.shape.out_channels = channels == 32 ? 32 : 2;
    const int64_t bytes = packed_conv_bytes(source, isa);
    Guarded<uint8_t> packed((bytes + 63) / 64 * 64);
    const PackedConvHeader* header = nullptr;
    CHECK_EQ(pack_conv(source, isa, packed.data()), Status::kOk);
    CHECK_EQ(view_packed_conv(packed.data(), bytes, &header), Status::kOk);
    auto* h = reinterpret_cast<PackedConvHeader*>(packed.data());
    const PackedConvHeader good = *h;
    const auto refused = [&] {
      CHECK(view_packed_conv(packed.data(), bytes, &header) != Status::kOk);
      *h = good;
    };
    h->magic ^= 1, refused();
    h->version += 1, refused();
    h->isa = isa == Isa::kScalar ? Isa::kAvx2 : Isa::kScalar, refused();
    h->bytes += 64, refused();
    h->shape.out_channels *= 100, refused();
    h->shape.kernel[1] = 30, refused();
    h->shape.stride[2] = 0, refused();
    h->groups_per_set = 0, refused();
    h->sets = 3, refused();
    h->parts = 1 << 20, refused();
    h->winograd_offset += 64, refused();
    h->winograd_offset = bytes, refused();
    h->winograd_offset = -64, refused();
    if (channels != 2) h->epilogue.output = OutputType::kF32, refused();  // the GEMM's own differs
    CHECK(view_packed_conv(packed.data(), bytes - 64, &header) != Status::kOk);
  }
}

void random_configurations(int count, bool (*make)(Rng& rng, Case* c)) {
  Rng rng(1);
  for (int i = 0; i < count;) {
    Case c = {};
    if (!make(rng, &c)) continue;
    CONTEXT("case ", i, ": ", text(c));
    check_case(rng, c);
    ++i;
  }
}

}  // namespace

int main() {
  damaged_headers_are_refused();
  random_configurations(3000, random_case);
  random_configurations(300, random_winograd_case);
  sums_of_26_bits_are_exact();
  only_k_must_fit();
  large_maps();
  last_group_of_images();
  return 0;
}
