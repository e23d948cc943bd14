// Transformed weights: when they are kept, and G w G'. See winograd.h.
#include <cstring>

#include "csrc/base/integers.h"
#include "csrc/conv/implicit_gemm.h"
#include "csrc/conv/winograd.h"

namespace qk {
namespace {

// More bytes come from L3 or memory with every call, and would be most of a network's weights.
constexpr int64_t kMaxBytes = 6 * 1024 * 1024;
// With fewer channels the transforms cost more than the products they save.
constexpr int64_t kMinChannels = 16;
// Of a panel.
constexpr int64_t kMaxColumns = 64;
// What 576 y modulo 2^32 tells apart.
constexpr int64_t kMaxSum = (int64_t{1} << 25) - 1;

// 24 G, its last row halved.
constexpr int32_t kG[kWinogradWindow][3] = {{6, 0, 0}, {-4, -4, -4}, {-4, 4, -4},
                                            {1, 2, 4}, {1, -2, 4},   {0, 0, 12}};

int32_t zero_point_of(const ConvSource& source, int64_t out_channel) {
  if (source.weight_zero_point == nullptr) return 0;
  return source.weight_zero_point[source.per_tensor ? 0 : out_channel];
}

// The transformed weights of an input and an output channel.
struct Kernel {
  int32_t point[kWinogradWindow][kWinogradWindow];

  Kernel(const int8_t* w, int32_t zero_point) {
    int32_t down[kWinogradWindow][3];
    for (int i = 0; i < kWinogradWindow; ++i) {
      for (int x = 0; x < 3; ++x) {
        down[i][x] = 0;
        for (int y = 0; y < 3; ++y) down[i][x] += kG[i][y] * (w[3 * y + x] - zero_point);
      }
    }
    for (int i = 0; i < kWinogradWindow; ++i) {
      for (int j = 0; j < kWinogradWindow; ++j) {
        point[i][j] = 0;
        for (int x = 0; x < 3; ++x) point[i][j] += down[i][x] * kG[j][x];
      }
    }
  }
};

// Whether the sums of an output channel fit, and int16 its transformed weights: with a zero point
// these can be larger.
bool fits(const ConvSource& source, int64_t out_channel) {
  const int64_t count = 9 * source.shape.in_channels;
  const int8_t* w = source.weight + out_channel * count;
  const int32_t zero_point = zero_point_of(source, out_channel);
  if (zero_point < -99 || zero_point > 99) return false;
  int64_t positive = 0, negative = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t v = w[i] - zero_point;
    positive += v > 0 ? v : 0;
    negative -= v < 0 ? v : 0;
  }
  return 255 * positive <= kMaxSum && 255 * negative <= kMaxSum;
}

}  // namespace

bool winograd_shape(const ConvShape& s, Isa isa) {
  return select_winograd_kernel(isa) != nullptr && s.spatial_dims == 2 && !s.transposed &&
         s.groups == 1 && s.kernel[0] == 1 && s.kernel[1] == 3 && s.kernel[2] == 3 &&
         s.stride[1] == 1 && s.stride[2] == 1 && s.dilation[1] == 1 && s.dilation[2] == 1 &&
         !gemm_plan(s, conv_phase(s, 0), 1, isa).padded_image;
}

bool has_winograd(const ConvSource& source, Isa isa) {
  const ConvShape& s = source.shape;
  if (!source.keeps || !winograd_shape(s, isa) || s.in_channels < kMinChannels ||
      s.out_channels < kMinChannels || packed_winograd_bytes(s, isa) > kMaxBytes) {
    return false;
  }
  for (int64_t o = 0; o < s.out_channels; ++o) {
    if (!fits(source, o)) return false;
  }
  return true;
}

int64_t packed_winograd_bytes(const ConvShape& shape, Isa isa) {
  const int64_t columns = align_up(shape.out_channels, panel_shape(isa).lanes);
  return columns * kWinogradPoints * ceil_div(shape.in_channels, 2) * 4;
}

void pack_winograd(const ConvSource& source, Isa isa, int16_t* dst) {
  const ConvShape& s = source.shape;
  const PanelShape panel = panel_shape(isa);
  const int64_t pairs = ceil_div(s.in_channels, 2);
  for (int64_t first = 0; first < s.out_channels; first += panel.columns) {
    const int64_t left = s.out_channels - first;
    const int64_t columns = left < panel.columns ? left : panel.columns;
    const int64_t width = align_up(columns, panel.lanes);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      int16_t rows[kWinogradPoints][2 * kMaxColumns] = {};
      for (int64_t o = 0; o < columns; ++o) {
        const int8_t* w = source.weight + (first + o) * s.in_channels * 9;
        const int32_t zero_point = zero_point_of(source, first + o);
        for (int64_t c = 2 * pair; c < s.in_channels && c < 2 * pair + 2; ++c) {
          const Kernel kernel(w + 9 * c, zero_point);
          for (int p = 0; p < kWinogradPoints; ++p) {
            rows[p][2 * o + c % 2] =
                static_cast<int16_t>(kernel.point[p / kWinogradWindow][p % kWinogradWindow]);
          }
        }
      }
      for (int p = 0; p < kWinogradPoints; ++p) {
        std::memcpy(dst + (p * pairs + pair) * width * 2, rows[p], static_cast<size_t>(width * 4));
      }
    }
    dst += kWinogradPoints * pairs * width * 2;
  }
}

}  // namespace qk
