// Normative: the formula of conv.h, one output at a time, from the canonical weight.
#include "csrc/conv/conv.h"

namespace qk {
namespace {

// The input index that tap `k` of output `o` reads in dimension `d`; -1: none.
int64_t input_index(const ConvShape& s, const ConvExtent& e, int d, int64_t o, int64_t k) {
  if (!s.transposed) {
    return source_index(s.padding_mode, o * s.stride[d] - s.pad_lo[d] + k * s.dilation[d], e.in[d]);
  }
  const int64_t steps = o + s.pad_lo[d] - k * s.dilation[d];
  const int64_t i = steps / s.stride[d];
  return steps % s.stride[d] == 0 && i >= 0 && i < e.in[d] ? i : -1;
}

}  // namespace

void conv_reference(const ConvSource& source, const ConvArgs& args) {
  const ConvShape& s = source.shape;
  const ConvExtent& e = args.extent;
  const int64_t in_group = s.in_per_group(), out_group = s.out_per_group();
  const int64_t kd = s.kernel[0], kh = s.kernel[1], kw = s.kernel[2], taps = kd * kh * kw;
  const int64_t step = s.transposed ? out_group * taps : taps;  // of the weight, in channels
  for (int64_t index = 0; index < e.batch * e.out_pixels() * s.out_channels; ++index) {
    const int64_t o = index % s.out_channels, pixel = index / s.out_channels;
    const int64_t x = pixel % e.out[2], y = pixel / e.out[2] % e.out[1];
    const int64_t z = pixel / (e.out[2] * e.out[1]) % e.out[0], n = pixel / e.out_pixels();
    const int64_t group = o / out_group, column = source.per_tensor ? 0 : o;
    const int32_t zw = source.weight_zero_point ? source.weight_zero_point[column] : 0;
    int32_t acc = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t iz = input_index(s, e, 0, z, tap / (kh * kw));
      const int64_t iy = input_index(s, e, 1, y, tap / kw % kh);
      const int64_t ix = input_index(s, e, 2, x, tap % kw);
      if (iz < 0 || iy < 0 || ix < 0) continue;
      const uint8_t* a = args.input +
                         (((n * e.in[0] + iz) * e.in[1] + iy) * e.in[2] + ix) * s.in_channels +
                         group * in_group;
      const int8_t* w = source.weight +
                        (s.transposed ? (group * in_group * out_group + o % out_group) * taps
                                      : o * in_group * taps) +
                        tap;
      for (int64_t c = 0; c < in_group; ++c) {
        acc +=
            (byte_value(a[c], source.input_signed) - source.input_zero_point) * (w[c * step] - zw);
      }
    }
    const float product = source.input_scale * source.weight_scale[column];
    const float addend = source.bias ? source.bias[o] / product : 0.0f;
    const float mult = source.epilogue.is_8bit() ? product / source.output_scale : product;
    store_output(source.epilogue, acc, addend, mult,
                 static_cast<uint8_t*>(args.out) + index * output_bytes(source.epilogue.output),
                 source.epilogue.has_residual ? args.residual + index : nullptr,
                 args.residual_signed);
  }
}

}  // namespace qk
