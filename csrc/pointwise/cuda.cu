#include "csrc/pointwise/cuda.h"

#include "csrc/base/cuda_elementwise.cuh"
#include "csrc/base/numerics.h"

namespace qk {
namespace {

// Where element `first` of the walk lies in operand k; k = 0 is dense, so it is `first` itself.
template <int kOperands, typename Index>
QK_DEVICE void offsets_of(const StridedLayout<kOperands>& layout, Index first,
                          int64_t (&offset)[kOperands]) {
  offset[0] = static_cast<int64_t>(first);
  for (int k = 1; k < kOperands; ++k) offset[k] = 0;
  for (int d = layout.dims - 1; d >= 0; --d) {
    const auto size = static_cast<Index>(layout.size[d]);
    const Index index = d == 0 ? first : first % size;
    first /= size;
    for (int k = 1; k < kOperands; ++k) {
      offset[k] += static_cast<int64_t>(index) * layout.stride[k][d];
    }
  }
}

// Whether 16 elements from a multiple of 16 on are 16 aligned bytes of operand k, or one byte.
template <int kOperands>
bool rows_align(const StridedLayout<kOperands>& layout, int k, const void* pointer) {
  const int last = layout.dims - 1;
  if (layout.inner() % 16 != 0 && layout.dims > 1) return false;
  if (k > 0 && layout.stride[k][last] == 0) return true;
  for (int d = 0; d < last; ++d) {
    if (layout.stride[k][d] % 16 != 0) return false;
  }
  return cuda::is_aligned(pointer, 16);
}

// kCount codes of operand k, or one that is repeated.
template <int kCount>
QK_DEVICE cuda::Vector<uint8_t, kCount> load_codes(const uint8_t* from, bool repeats) {
  if (!repeats) return cuda::load_vector<kCount>(from);
  cuda::Vector<uint8_t, kCount> v;
#pragma unroll
  for (int i = 0; i < kCount; ++i) v.v[i] = *from;
  return v;
}

struct Lookup {
  static constexpr int kPerThread = 16;
  LookupArgs args;

  bool aligned() const {
    return rows_align(args.layout, 0, args.out) && rows_align(args.layout, 1, args.q);
  }
  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    int64_t offset[2];
    offsets_of(args.layout, first, offset);
    auto v = cuda::load_vector<kCount>(args.q + offset[1]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v.v[i] = args.table[v.v[i]];
    cuda::store_vector(args.out + offset[0], v);
  }
};

template <BinaryOp kOp>
struct Binary {
  static constexpr int kPerThread = 16;
  BinaryArgs args;

  bool aligned() const {
    return rows_align(args.layout, 0, args.out) && rows_align(args.layout, 1, args.a) &&
           rows_align(args.layout, 2, args.b);
  }
  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    const BinaryGrid& g = args.grid;
    const int last = args.layout.dims - 1;
    int64_t offset[3];
    offsets_of(args.layout, first, offset);
    const auto a = load_codes<kCount>(args.a + offset[1], args.layout.stride[1][last] == 0);
    const auto b = load_codes<kCount>(args.b + offset[2], args.layout.stride[2][last] == 0);
    const float a_offset = add_offset(g.a_scale, g.a_zero_point);
    const float b_offset = add_offset(g.b_scale, g.b_zero_point);
    const float factor = kOp == BinaryOp::kAdd ? 1.0f / g.out_scale
                                               : mul_multiplier(g.a_scale, g.b_scale, g.out_scale);
    cuda::Vector<uint8_t, kCount> out;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int32_t qa = byte_value(a.v[i], g.a_signed), qb = byte_value(b.v[i], g.b_signed);
      out.v[i] = static_cast<uint8_t>(
          kOp == BinaryOp::kAdd ? add_codes(qa, g.a_scale, a_offset, qb, g.b_scale, b_offset,
                                            factor, g.out_zero_point, g.qmin, g.qmax)
                                : mul_codes(qa, g.a_zero_point, qb, g.b_zero_point, factor,
                                            g.out_zero_point, g.qmin, g.qmax));
    }
    cuda::store_vector(args.out + offset[0], out);
  }
};

// The rows of one input, to their place in the rows of the output.
struct CatOne {
  static constexpr int kPerThread = 16;
  CatInput input;
  uint8_t* out;
  int64_t out_width;

  bool aligned() const {
    return input.width % 16 == 0 && out_width % 16 == 0 && cuda::is_aligned(input.q, 16) &&
           cuda::is_aligned(out, 16);
  }
  template <int kCount, typename Index>
  QK_DEVICE void run(Index first) const {
    const auto width = static_cast<Index>(input.width);
    auto v = cuda::load_vector<kCount>(input.q + first);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v.v[i] = input.table[v.v[i]];
    cuda::store_vector(out + static_cast<int64_t>(first / width) * out_width + first % width, v);
  }
};

template <int kOperands>
int64_t elements(const StridedLayout<kOperands>& layout) {
  return layout.rows() * layout.inner();
}

}  // namespace

cudaError_t lookup_cuda(const LookupArgs& args, cudaStream_t stream) {
  return cuda::launch_elementwise(Lookup{args}, elements(args.layout), stream);
}

cudaError_t binary_cuda(const BinaryArgs& args, cudaStream_t stream) {
  const int64_t size = elements(args.layout);
  if (args.op == BinaryOp::kAdd) {
    return cuda::launch_elementwise(Binary<BinaryOp::kAdd>{args}, size, stream);
  }
  return cuda::launch_elementwise(Binary<BinaryOp::kMul>{args}, size, stream);
}

cudaError_t cat_cuda(const CatArgs& args, cudaStream_t stream) {
  int64_t width = 0, column = 0;
  for (int64_t i = 0; i < args.count; ++i) width += args.inputs[i].width;
  for (int64_t i = 0; i < args.count; ++i) {
    const CatInput& input = args.inputs[i];
    const cudaError_t error = cuda::launch_elementwise(CatOne{input, args.out + column, width},
                                                       args.rows * input.width, stream);
    if (error != cudaSuccess) return error;
    column += input.width;
  }
  return cudaSuccess;
}

}  // namespace qk
