#include "csrc/foreach/cuda.h"

#include "csrc/observe/cuda_extremes.cuh"

namespace qk {
namespace {

constexpr int kRowThreads = 256;
// A row is cut into pieces of at least as many elements, for a block each; at most as many pieces
// as threads, so that a block can join what they have found.
constexpr int64_t kLeastPiece = 32768;
constexpr int64_t kMostPieces = kRowThreads;

QK_HD int64_t pieces_of(int64_t inner) {
  const int64_t pieces = (inner + kLeastPiece - 1) / kLeastPiece;
  return pieces < 1 ? 1 : pieces > kMostPieces ? kMostPieces : pieces;
}
// A multiple of what a thread loads at once.
QK_HD int64_t piece_elements(int64_t inner) {
  return ((inner + pieces_of(inner) - 1) / pieces_of(inner) + 63) / 64 * 64;
}

// Items of a launch; item i has the blocks from first_block[i] to first_block[i + 1], one a piece.
template <class Item>
struct Batch {
  Item items[kForeachItems];
  uint32_t first_block[kForeachItems + 1];
  int32_t qmin, qmax;
  GridRule rule;
  bool* clipped;  // of the items, or null
  uint4* found;   // what a block has found, where rows have several pieces and grids are chosen
};

// The elements of a row that a block does.
struct Piece {
  int64_t row, first, count;
  int pieces;
  bool is_first;
};

// This block's item and piece.
template <class Item>
QK_DEVICE const Item& find_item(const Batch<Item>& batch, Piece* piece, bool** clipped) {
  int low = 0, high = kForeachItems;  // the last item that begins at or before this block
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  const Item& item = batch.items[low];
  const int64_t n = item.in.inner, pieces = pieces_of(n);
  const int64_t block = blockIdx.x - batch.first_block[low], number = block % pieces;
  const int64_t first = number * piece_elements(n), left = n - first;
  piece->row = block / pieces;
  piece->first = first;
  piece->count = left < 0 ? 0 : left < piece_elements(n) ? left : piece_elements(n);
  piece->pieces = static_cast<int>(pieces);
  piece->is_first = number == 0;
  *clipped = batch.clipped == nullptr ? nullptr : batch.clipped + low;
  return item;
}

QK_DEVICE void store_found(uint4* to, const cuda::Extremes& e) {
  cuda::store_16(to, uint4{float_bits(e.low), float_bits(e.high), e.nans, e.infinities});
}
QK_DEVICE cuda::Extremes load_found(const uint4* from) {
  const uint4 v = cuda::load_16(from);
  cuda::Extremes e;
  e.low = bits_float(v.x), e.high = bits_float(v.y);
  e.nans = v.z, e.infinities = v.w;
  return e;
}

struct RowGrid {
  float scale, inv_scale;
  int32_t zero_point;
};

// The extremes of a row: of its one piece, or of what the blocks of all pieces have found.
template <typename T>
QK_DEVICE cuda::Extremes extremes_of_row(const Batch<ForeachQuantItem>& batch, const T* x,
                                         const Piece& piece, int64_t n) {
  if (piece.pieces == 1) return cuda::extremes_of<T, kRowThreads>(x, piece.count);
  cuda::Extremes mine;
  if (static_cast<int>(threadIdx.x) < piece.pieces) {
    const int64_t mine_of_row = blockIdx.x - piece.first / piece_elements(n) + threadIdx.x;
    mine = load_found(batch.found + mine_of_row);
  }
  return mine;
}

// The grid of a row, written by thread 0 of its first piece, the same on every thread.
template <typename T>
QK_DEVICE RowGrid choose_grid(const Batch<ForeachQuantItem>& batch, const ForeachQuantItem& item,
                              const Piece& piece, const T* x, bool* clipped) {
  const GridRule& rule = batch.rule;
  const int64_t row = piece.row;
  const auto found = cuda::join_block<kRowThreads>(extremes_of_row(batch, x, piece, item.in.inner));
  const bool finite = found.nans + found.infinities == 0;
  const float low = item.in.inner > 0 ? found.low : 0.0f;
  const float high = item.in.inner > 0 ? found.high : 0.0f;
  const float scale = finite ? choose_scale(low, high, rule) : bits_float(0x7fc00000u);
  const int32_t zp = choose_zero_point(finite ? low : 0.0f, finite ? scale : 1.0f, rule);
  const RowGrid grid{scale, 1.0f / scale, zp};
  if (threadIdx.x == 0 && piece.is_first) {
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
                            const Piece& piece, bool* clipped) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t n = piece.count, first = piece.row * item.in.inner + piece.first;
  const T* x = static_cast<const T*>(item.in.x) + first;
  RowGrid grid;
  if (item.flags != nullptr) {
    grid = choose_grid(batch, item, piece, x, clipped);
  } else {
    grid.scale = item.in.scale[piece.row];
    grid.inv_scale = 1.0f / grid.scale;
    grid.zero_point = item.in.zero_point[piece.row];
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

template <typename T>
QK_DEVICE void find_extremes(const Batch<ForeachQuantItem>& batch, const ForeachQuantItem& item,
                             const Piece& piece) {
  const T* x = static_cast<const T*>(item.in.x) + piece.row * item.in.inner + piece.first;
  const auto found =
      cuda::join_block<kRowThreads>(cuda::extremes_of<T, kRowThreads>(x, piece.count));
  if (threadIdx.x == 0) store_found(batch.found + blockIdx.x, found);
}

// What each piece of rows with several of them has.
__global__ void __launch_bounds__(kRowThreads, 4)
    foreach_extremes_kernel(const __grid_constant__ Batch<ForeachQuantItem> batch) {
  Piece piece;
  bool* clipped;
  const ForeachQuantItem& item = find_item(batch, &piece, &clipped);
  if (piece.pieces == 1 || item.flags == nullptr) return;
  switch (item.in.type) {
    case FloatType::kFloat32:
      return find_extremes<float>(batch, item, piece);
    case FloatType::kBFloat16:
      return find_extremes<BFloat16>(batch, item, piece);
    case FloatType::kFloat16:
      return find_extremes<Float16>(batch, item, piece);
  }
}

__global__ void __launch_bounds__(kRowThreads, 4)
    foreach_quant_kernel(const __grid_constant__ Batch<ForeachQuantItem> batch) {
  Piece piece;
  bool* clipped;
  const ForeachQuantItem& item = find_item(batch, &piece, &clipped);
  switch (item.in.type) {
    case FloatType::kFloat32:
      return quantize_row<float>(batch, item, piece, clipped);
    case FloatType::kBFloat16:
      return quantize_row<BFloat16>(batch, item, piece, clipped);
    case FloatType::kFloat16:
      return quantize_row<Float16>(batch, item, piece, clipped);
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
                        const Piece& piece) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t n = piece.count, first = piece.row * item.in.inner + piece.first;
  const float scale = item.in.scale[piece.row];
  const RowGrid grid{scale, 1.0f / scale, item.in.zero_point[piece.row]};
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
  Piece piece;
  bool* clipped;
  const ForeachBackwardItem& item = find_item(batch, &piece, &clipped);
  switch (item.in.type) {
    case FloatType::kFloat32:
      return pass_row<float>(batch, item, piece);
    case FloatType::kBFloat16:
      return pass_row<BFloat16>(batch, item, piece);
    case FloatType::kFloat16:
      return pass_row<Float16>(batch, item, piece);
  }
}

// Calls f(batch, blocks) for the items, kForeachItems at a time, until one gives an error.
template <class Item, typename F>
cudaError_t for_each_batch(const Item* items, int64_t count, const GridRule& rule, const F& f) {
  for (int64_t first = 0; first < count; first += kForeachItems) {
    Batch<Item> batch{};
    batch.qmin = rule.qmin, batch.qmax = rule.qmax, batch.rule = rule;
    int64_t blocks = 0;
    for (int i = 0; i < kForeachItems; ++i) {
      batch.first_block[i] = static_cast<uint32_t>(blocks);
      if (first + i >= count) continue;
      batch.items[i] = items[first + i];
      blocks += items[first + i].in.rows * pieces_of(items[first + i].in.inner);
      if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    }
    batch.first_block[kForeachItems] = static_cast<uint32_t>(blocks);
    if (blocks == 0) continue;
    const cudaError_t error = f(batch, first, static_cast<unsigned>(blocks));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Whether a batch has grids to choose of rows with several pieces.
bool has_pieces(const Batch<ForeachQuantItem>& batch) {
  for (const ForeachQuantItem& item : batch.items) {
    if (item.flags != nullptr && item.in.rows > 0 && pieces_of(item.in.inner) > 1) return true;
  }
  return false;
}

template <class Item>
cudaError_t start(void (*kernel)(Batch<Item>), const Batch<Item>& batch, unsigned blocks,
                  cudaStream_t stream) {
  static_assert(sizeof(Batch<Item>) <= 4096, "the arguments of a launch");
  return cuda::launch(kernel, blocks, kRowThreads, cuda::kJoinBytes<kRowThreads>, stream, batch);
}

}  // namespace

// Batches run one after the other: they share it.
int64_t foreach_cuda_workspace(const ForeachQuantArgs& args) {
  int64_t most = 0;
  for_each_batch(args.items, args.count, args.rule,
                 [&](const auto& batch, int64_t, unsigned blocks) {
                   if (has_pieces(batch) && blocks > most) most = blocks;
                   return cudaSuccess;
                 });
  return most * int64_t{sizeof(uint4)};
}

cudaError_t foreach_fake_quant_cuda(const ForeachQuantArgs& args, bool* clipped, void* workspace,
                                    cudaStream_t stream) {
  if (clipped != nullptr) {
    const size_t bytes = static_cast<size_t>(args.count) * sizeof(bool);
    const cudaError_t error = cudaMemsetAsync(clipped, 0, bytes, stream);
    if (error != cudaSuccess) return error;
  }
  return for_each_batch(args.items, args.count, args.rule,
                        [&](Batch<ForeachQuantItem>& batch, int64_t first, unsigned blocks) {
                          batch.clipped = clipped == nullptr ? nullptr : clipped + first;
                          batch.found = static_cast<uint4*>(workspace);
                          if (has_pieces(batch)) {
                            const cudaError_t error =
                                start(&foreach_extremes_kernel, batch, blocks, stream);
                            if (error != cudaSuccess) return error;
                          }
                          return start(&foreach_quant_kernel, batch, blocks, stream);
                        });
}

cudaError_t foreach_fake_quant_backward_cuda(const ForeachBackwardArgs& args, cudaStream_t stream) {
  return for_each_batch(args.items, args.count, GridRule{args.qmin, args.qmax, false, 0},
                        [&](const auto& batch, int64_t, unsigned blocks) {
                          return start(&foreach_backward_kernel, batch, blocks, stream);
                        });
}

}  // namespace qk
