#include "csrc/foreach/cuda.h"

#include "csrc/observe/cuda_extremes.cuh"

namespace qk {
namespace {

constexpr int kRowThreads = 256;

// Items of a launch; item i has the blocks from first_block[i] to first_block[i + 1].
template <class Item>
struct Batch {
  Item items[kForeachItems];
  uint32_t first_block[kForeachItems + 1];
  int32_t qmin, qmax;
  GridRule rule;
  bool* clipped;  // of the items, or null
};

// This block's item and row.
template <class Item>
QK_DEVICE const Item& find_item(const Batch<Item>& batch, int64_t* row, bool** clipped) {
  int low = 0, high = kForeachItems;  // the last item that begins at or before this block
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  *row = blockIdx.x - batch.first_block[low];
  *clipped = batch.clipped == nullptr ? nullptr : batch.clipped + low;
  return batch.items[low];
}

struct RowGrid {
  float scale, inv_scale;
  int32_t zero_point;
};

// The grid of a row, written by thread 0, the same on every thread.
template <typename T>
QK_DEVICE RowGrid choose_grid(const ForeachQuantItem& item, int64_t row, const T* x,
                              const GridRule& rule, bool* clipped) {
  const auto found =
      cuda::join_block<kRowThreads>(cuda::extremes_of<T, kRowThreads>(x, item.in.inner));
  const bool finite = found.nans + found.infinities == 0;
  const float low = item.in.inner > 0 ? found.low : 0.0f;
  const float high = item.in.inner > 0 ? found.high : 0.0f;
  const float scale = finite ? choose_scale(low, high, rule) : bits_float(0x7fc00000u);
  const int32_t zp = choose_zero_point(finite ? low : 0.0f, finite ? scale : 1.0f, rule);
  const RowGrid grid{scale, 1.0f / scale, zp};
  if (threadIdx.x == 0) {
    const bool inside = fake_quant_passes(low * grid.inv_scale, zp, rule.qmin, rule.qmax) &&
                        fake_quant_passes(high * grid.inv_scale, zp, rule.qmin, rule.qmax);
    item.in.scale[row] = scale;
    item.in.zero_point[row] = zp;
    if (clipped != nullptr && !(finite && inside)) *clipped = true;
    item.flags[row] = !finite ? kRowNotFinite : inside ? kRowFine : kRowClipped;
  }
  return grid;
}

template <typename T, int kCount>
QK_DEVICE void quantize_elements(const ForeachQuantItem& item, const RowGrid& grid,
                                 const GridRule& rule, int64_t i) {
  auto v = cuda::load_vector<kCount>(static_cast<const T*>(item.in.x) + i);
  cuda::Vector<uint8_t, kCount> q;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float x = to_float(v.v[k]);
    q.v[k] =
        static_cast<uint8_t>(quantize(x, grid.inv_scale, grid.zero_point, rule.qmin, rule.qmax));
    from_float(fake_quant(x, grid.scale, grid.inv_scale, grid.zero_point, rule.qmin, rule.qmax),
               &v.v[k]);
  }
  if (item.y != nullptr) cuda::store_vector(static_cast<T*>(item.y) + i, v);
  if (item.q != nullptr) cuda::store_vector(static_cast<uint8_t*>(item.q) + i, q);
}

// Whether element i is at the start of 16 bytes of T and of as many codes.
template <typename T>
QK_DEVICE bool is_aligned(const void* p, int64_t i, int64_t size) {
  return (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(i * size)) %
             (16 / sizeof(T) * static_cast<uintptr_t>(size)) ==
         0;
}

template <typename T>
QK_DEVICE void quantize_row(const Batch<ForeachQuantItem>& batch, const ForeachQuantItem& item,
                            int64_t row, bool* clipped) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t n = item.in.inner, first = row * n;
  const T* x = static_cast<const T*>(item.in.x) + first;
  RowGrid grid;
  if (item.flags != nullptr) {
    grid = choose_grid(item, row, x, batch.rule, clipped);
  } else {
    grid.scale = item.in.scale[row];
    grid.inv_scale = 1.0f / grid.scale;
    grid.zero_point = item.in.zero_point[row];
  }
  const bool aligned = is_aligned<T>(item.in.x, first, sizeof(T)) &&
                       is_aligned<T>(item.y, first, sizeof(T)) && is_aligned<T>(item.q, first, 1);
  const int64_t vectors = aligned ? n / kVector * kVector : 0;
#pragma unroll 1
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < vectors; i += kRowThreads * kVector) {
    quantize_elements<T, kVector>(item, grid, batch.rule, first + i);
  }
#pragma unroll 1
  for (int64_t i = vectors + threadIdx.x; i < n; i += kRowThreads) {
    quantize_elements<T, 1>(item, grid, batch.rule, first + i);
  }
}

__global__ void __launch_bounds__(kRowThreads, 4)
    foreach_quant_kernel(const __grid_constant__ Batch<ForeachQuantItem> batch) {
  int64_t row;
  bool* clipped;
  const ForeachQuantItem& item = find_item(batch, &row, &clipped);
  switch (item.in.type) {
    case FloatType::kFloat32:
      return quantize_row<float>(batch, item, row, clipped);
    case FloatType::kBFloat16:
      return quantize_row<BFloat16>(batch, item, row, clipped);
    case FloatType::kFloat16:
      return quantize_row<Float16>(batch, item, row, clipped);
  }
}

template <typename T, int kCount>
QK_DEVICE void pass_elements(const ForeachBackwardItem& item, const RowGrid& grid, int32_t qmin,
                             int32_t qmax, int64_t i) {
  auto grad = cuda::load_vector<kCount>(static_cast<const T*>(item.grad) + i);
  const auto x = cuda::load_vector<kCount>(static_cast<const T*>(item.in.x) + i);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float v = to_float(x.v[k]) * grid.inv_scale;
    if (!fake_quant_passes(v, grid.zero_point, qmin, qmax)) grad.v[k] = T{};
  }
  cuda::store_vector(static_cast<T*>(item.out) + i, grad);
}

template <typename T>
QK_DEVICE void pass_row(const Batch<ForeachBackwardItem>& batch, const ForeachBackwardItem& item,
                        int64_t row) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t n = item.in.inner, first = row * n;
  const RowGrid grid{item.in.scale[row], 1.0f / item.in.scale[row], item.in.zero_point[row]};
  const bool aligned = is_aligned<T>(item.in.x, first, sizeof(T)) &&
                       is_aligned<T>(item.grad, first, sizeof(T)) &&
                       is_aligned<T>(item.out, first, sizeof(T));
  const int64_t vectors = aligned ? n / kVector * kVector : 0;
#pragma unroll 1
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < vectors; i += kRowThreads * kVector) {
    pass_elements<T, kVector>(item, grid, batch.qmin, batch.qmax, first + i);
  }
#pragma unroll 1
  for (int64_t i = vectors + threadIdx.x; i < n; i += kRowThreads) {
    pass_elements<T, 1>(item, grid, batch.qmin, batch.qmax, first + i);
  }
}

__global__ void __launch_bounds__(kRowThreads, 4)
    foreach_backward_kernel(const __grid_constant__ Batch<ForeachBackwardItem> batch) {
  int64_t row;
  bool* clipped;
  const ForeachBackwardItem& item = find_item(batch, &row, &clipped);
  switch (item.in.type) {
    case FloatType::kFloat32:
      return pass_row<float>(batch, item, row);
    case FloatType::kBFloat16:
      return pass_row<BFloat16>(batch, item, row);
    case FloatType::kFloat16:
      return pass_row<Float16>(batch, item, row);
  }
}

// Launches `kernel` for the items, kForeachItems at a time.
template <class Item>
cudaError_t launch_items(void (*kernel)(Batch<Item>), const Item* items, int64_t count,
                         const GridRule& rule, bool* clipped, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kForeachItems) {
    Batch<Item> batch{};
    batch.qmin = rule.qmin, batch.qmax = rule.qmax, batch.rule = rule;
    batch.clipped = clipped == nullptr ? nullptr : clipped + first;
    uint32_t blocks = 0;
    for (int i = 0; i < kForeachItems; ++i) {
      batch.first_block[i] = blocks;
      if (first + i >= count) continue;
      batch.items[i] = items[first + i];
      blocks += static_cast<uint32_t>(items[first + i].in.rows);
    }
    batch.first_block[kForeachItems] = blocks;
    if (blocks == 0) continue;
    const cudaError_t error =
        cuda::launch(kernel, blocks, kRowThreads, cuda::kJoinBytes<kRowThreads>, stream, batch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t foreach_fake_quant_cuda(const ForeachQuantArgs& args, bool* clipped,
                                    cudaStream_t stream) {
  if (clipped != nullptr) {
    const size_t bytes = static_cast<size_t>(args.count) * sizeof(bool);
    const cudaError_t error = cudaMemsetAsync(clipped, 0, bytes, stream);
    if (error != cudaSuccess) return error;
  }
  return launch_items(&foreach_quant_kernel, args.items, args.count, args.rule, clipped, stream);
}

cudaError_t foreach_fake_quant_backward_cuda(const ForeachBackwardArgs& args, cudaStream_t stream) {
  return launch_items(&foreach_backward_kernel, args.items, args.count,
                      GridRule{args.qmin, args.qmax, false, 0}, nullptr, stream);
}

}  // namespace qk
