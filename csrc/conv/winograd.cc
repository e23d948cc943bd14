// The driver of the Winograd kernels: when they pay, and blocks of tiles for the threads.
#include "csrc/conv/winograd.h"

#include <cstring>

#include "csrc/conv/blocks.h"

namespace qk {

WinogradKernel select_winograd_kernel(Isa isa) {
#define QK_DEPTHWISE_KERNEL(need, layout, name)
#define QK_WINOGRAD_KERNEL(need, layout, name) \
  if (isa == layout) return name;
#include "csrc/conv/kernels.inc"
#undef QK_DEPTHWISE_KERNEL
#undef QK_WINOGRAD_KERNEL
  return nullptr;
}

namespace {

// Tiles of a block: so many rows pass over the weights of a point while these are in L1.
constexpr int64_t kMaxTiles = 24;
// What is fetched of the weights while the call before runs.
constexpr int64_t kFirstBytes = 128 * 1024;
// With fewer, every dot product waits for its weights from L2, or from beyond it.
constexpr int64_t kMinTiles = 4, kMinFarTiles = 12;

// What an ISA takes for a vector of columns, in units of its own: measured, AVX2 against pairs
// (gemm/x86_avx2.cc). Of the direct way the
// products of four channels with a pixel, of this one those of a pair with a tile; the transforms
// of a tile, of a vector of sums and of 16 channels of pixels.
struct Cost {
  int64_t lanes, quad, pair, output, pixels;
};
constexpr Cost cost_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return {8, 4, 2, 460, 310};
    case Isa::kAvxVnni:
      return {8, 1, 1, 240, 180};
    default:
      return {16, 1, 1, 230, 118};
  }
}

// The tiles of one call, and how threads share them out: by tiles as far as each has enough of them
// for one reading of the weights, then by panels, for each of which pixels are transformed again.
struct Tiling {
  int64_t across, down, count;
  int64_t block = 0, blocks = 0;  // tiles in a block
  int64_t row_parts = 1, column_parts = 1;

  Tiling(const ConvArgs& args, int64_t threads)
      : across(ceil_div(args.extent.out[2], kWinogradTile)),
        down(ceil_div(args.extent.out[1], kWinogradTile)),
        count(args.extent.batch * across * down) {
    if (count == 0) return;
    const int64_t panels = panel_count(args.packed->shape.out_channels, args.packed->isa);
    row_parts = clamp(count / kMinFarTiles, 1, threads);
    column_parts = clamp(threads / row_parts, 1, panels);
    const int64_t share = ceil_div(count, row_parts);
    block = ceil_div(share, ceil_div(share, kMaxTiles));
    blocks = ceil_div(count, block);
  }
  int64_t parts() const { return row_parts * column_parts; }
};

// The workspace: padding, then for each share of the threads what a WinogradBlock points at.
struct Room {
  int64_t padding, pixels, tiles, transformed, sums, scratch;

  Room(const ConvArgs& args, const Tiling& tiling) {
    const ConvShape& shape = args.packed->shape;
    padding = align_up(shape.in_channels);
    pixels = align_up(tiling.block * kWinogradPoints * static_cast<int64_t>(sizeof(void*)));
    tiles = align_up(tiling.block * static_cast<int64_t>(sizeof(WinogradTile)));
    transformed = kWinogradPoints * point_stride(args, tiling) * 2;
    sums = align_up(tiling.block * kWinogradPoints * panel_shape(args.packed->isa).columns * 4);
    scratch = kWinogradPoints * kWinogradLanes * 2;
  }
  // A line more than the tiles fill, so that the points of a tile fall into different cache sets.
  static int64_t point_stride(const ConvArgs& args, const Tiling& tiling) {
    const int64_t depth = align_up(args.packed->shape.in_channels, kWinogradLanes);
    return tiling.block * depth + kWinogradLanes;
  }
  int64_t share() const { return pixels + tiles + transformed + sums + scratch; }
};

// Fills in a block of tiles.
class Tiles {
 public:
  Tiles(const ConvArgs& args, const Tiling& tiling, const uint8_t* padding)
      : args_(args), tiling_(tiling), padding_(padding) {}

  // The addresses of the 36 pixels under tile `index`.
  void find_pixels(int64_t index, const uint8_t** pixels) const {
    const ConvExtent& e = args_.extent;
    const int64_t channels = args_.packed->shape.in_channels;
    int64_t down[kWinogradWindow], across[kWinogradWindow];
    for (int64_t i = 0; i < kWinogradWindow; ++i) {
      down[i] = source(1, row(index) * kWinogradTile + i);
      across[i] = source(2, column(index) * kWinogradTile + i);
    }
    const uint8_t* image = args_.input + this->image(index) * e.in_pixels() * channels;
    for (const int64_t y : down) {
      for (const int64_t x : across) {
        *pixels++ = y < 0 || x < 0 ? padding_ : image + (y * e.in[2] + x) * channels;
      }
    }
  }

  WinogradTile tile(int64_t index) const {
    const ConvExtent& e = args_.extent;
    const int64_t y = row(index) * kWinogradTile, x = column(index) * kWinogradTile;
    const int64_t pixel = (image(index) * e.out[1] + y) * e.out[2] + x;
    const int64_t height = e.out[1] - y, width = e.out[2] - x;
    return {static_cast<uint8_t*>(args_.out) + pixel * out_stride(args_) * out_element(args_),
            args_.packed->epilogue.has_residual
                ? args_.residual + pixel * args_.packed->shape.out_channels
                : nullptr,
            height < kWinogradTile ? height : kWinogradTile,
            width < kWinogradTile ? width : kWinogradTile};
  }

 private:
  int64_t column(int64_t index) const { return index % tiling_.across; }
  int64_t row(int64_t index) const { return index / tiling_.across % tiling_.down; }
  int64_t image(int64_t index) const { return index / (tiling_.across * tiling_.down); }

  // The input index under padded position `p`; -1: padding, or only under outputs outside.
  int64_t source(int d, int64_t p) const {
    const ConvShape& shape = args_.packed->shape;
    if (p >= args_.extent.out[d] + kWinogradWindow - kWinogradTile) return -1;
    return source_index(shape.padding_mode, p - shape.pad_lo[d], args_.extent.in[d]);
  }

  const ConvArgs& args_;
  const Tiling& tiling_;
  const uint8_t* padding_;
};

}  // namespace

bool uses_winograd(const ConvArgs& args, int64_t threads) {
  if (args.packed->winograd_offset == 0 || args.dequantized.scale != nullptr) return false;
  const ConvShape& shape = args.packed->shape;
  const Tiling tiling(args, threads);
  const int64_t bytes = packed_winograd_bytes(shape, args.packed->isa);
  if (tiling.count < (bytes > l2_cache_bytes() ? kMinFarTiles : kMinTiles)) return false;
  // A tile that hangs over the image costs as much as any.
  const Cost cost = cost_of(args.packed->isa);
  const int64_t in = shape.in_channels, out = shape.out_channels;
  const int64_t products = cost.pair * kWinogradPoints * in / 2;
  const int64_t pixels = cost.pixels * in * cost.lanes / (16 * out);
  const int64_t direct = cost.quad * 9 * in / 4 * args.extent.batch * args.extent.out_pixels();
  const int64_t ours = tiling.count * (products + cost.output + pixels) * threads / tiling.parts();
  return 10 * ours < 9 * direct;
}

NextWeights winograd_first_weights(const ConvArgs& args) {
  const PackedConvHeader& packed = *args.packed;
  const int64_t bytes = packed.bytes - packed.winograd_offset;
  return {reinterpret_cast<const int8_t*>(&packed) + packed.winograd_offset,
          bytes < kFirstBytes ? bytes : kFirstBytes};
}

int64_t winograd_workspace_bytes(const ConvArgs& args, const Parallel& parallel) {
  const Tiling tiling(args, parallel.threads);
  const Room room(args, tiling);
  return room.padding + tiling.parts() * room.share();
}

void winograd(const ConvArgs& args, const Parallel& parallel) {
  const PackedConvHeader& packed = *args.packed;
  const ConvShape& shape = packed.shape;
  const Tiling tiling(args, parallel.threads);
  const Room room(args, tiling);
  auto* workspace = static_cast<uint8_t*>(args.workspace);
  std::memset(workspace, packed.input_zero_point, static_cast<size_t>(room.padding));
  const Tiles tiles(args, tiling, workspace);
  const WinogradKernel kernel = select_winograd_kernel(packed.isa);
  const int64_t element = out_element(args);

  WinogradBlock block{};
  block.matrix = conv_part(packed, 0);
  block.weights = reinterpret_cast<const int16_t*>(reinterpret_cast<const uint8_t*>(&packed) +
                                                   packed.winograd_offset);
  block.channels = shape.in_channels;
  const int64_t panels = panel_count(shape.out_channels, packed.isa);
  block.out_pixel_stride = out_stride(args) * element;
  block.out_row_stride = args.extent.out[2] * block.out_pixel_stride;
  block.residual_pixel_stride = shape.out_channels;
  block.residual_row_stride = args.extent.out[2] * shape.out_channels;
  block.residual_signed = args.residual_signed;
  block.lookup = block.matrix.header->epilogue.has_table ? select_lookup_kernel() : nullptr;
  block.point_stride = Room::point_stride(args, tiling);

  const int64_t macs = tiling.count * kWinogradPoints * shape.in_channels * shape.out_channels;
  const auto run_part = [&](int64_t part) {
    uint8_t* at = workspace + room.padding + part * room.share();
    auto* pixels = reinterpret_cast<const uint8_t**>(at);
    auto* places = reinterpret_cast<WinogradTile*>(at += room.pixels);
    WinogradBlock b = block;
    b.pixels = pixels;
    b.tiles = places;
    b.transformed = reinterpret_cast<int16_t*>(at += room.tiles);
    b.sums = reinterpret_cast<int32_t*>(at += room.transformed);
    b.scratch = reinterpret_cast<int16_t*>(at + room.sums);
    const int64_t row = part / tiling.column_parts, column = part % tiling.column_parts;
    b.panel_begin = panels * column / tiling.column_parts;
    b.panel_end = panels * (column + 1) / tiling.column_parts;
    const int64_t end = tiling.blocks * (row + 1) / tiling.row_parts;
    for (int64_t i = tiling.blocks * row / tiling.row_parts; i < end; ++i) {
      const int64_t first = i * tiling.block, left = tiling.count - first;
      b.count = left < tiling.block ? left : tiling.block;
      for (int64_t t = 0; t < b.count; ++t) {
        tiles.find_pixels(first + t, pixels + t * kWinogradPoints);
        places[t] = tiles.tile(first + t);
      }
      if (i + 1 == tiling.blocks && column == 0) b.next = args.next;
      kernel(b);
    }
  };
  parallel.for_each_range(tiling.parts(), 2 * macs / macs_per_ns(packed.isa),
                          [&](int64_t begin, int64_t end) {
                            for (int64_t part = begin; part < end; ++part) run_part(part);
                          });
}

}  // namespace qk
