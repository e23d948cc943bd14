#include "csrc/conv/blocks.h"

namespace qk {
namespace {

// Output pixels of a block: a multiple of the rows of most register tiles, large enough that the
// weights are read from L2 rarely, small enough that pointers and input stay in L1. Whole output
// rows where they fit: 224 is divided by the widths of most networks, and holds an image of 14
// x 14.
constexpr int64_t kMaxBlock = 224, kMinBlock = 24;
// AMX reads the weights for every 32 rows anyway; every block costs a tile configuration and an
// epilogue that nothing hides.
constexpr int64_t kEvenBlock = 1024, kTileRows = 16;
// Limits of a block's pointer table and of its window copies, in bytes.
constexpr int64_t kTableBytes = 128 * 1024, kWindowBytes = 1024 * 1024;
// Bytes a nanosecond that another core wrote or that L3 holds, for estimates.
constexpr int64_t kFarBytesPerNs = 16;

// As wide as all windows of a row, and so long that the last one can be read for `depth` bytes.
PaddedImage padded_image(const ConvArgs& args, const ConvPhase& phase, int64_t depth,
                         const int64_t (&counts)[kConvDims], bool joined) {
  const ConvExtent& e = args.extent;
  const int64_t channels = args.packed->shape.in_channels, count = counts[2];
  const DimPhase &dim = phase.dim[2], &y = phase.dim[1];
  PaddedImage image;
  if (count == 0) return image;
  const int64_t first = dim.position(0, 0);
  image.left = -first;
  image.pixels = dim.position(count - 1, dim.taps - 1) + 1 - first;
  const int64_t slack = 4 * ceil_div(depth, kTileDepth);
  if (joined) {
    image.joined = true;
    image.row_bytes = image.pixels * channels;
    image.top = -y.position(0, 0);
    image.image_rows = y.position(counts[1] - 1, y.taps - 1) + 1 + image.top;
    image.rows = e.batch * image.image_rows;
    image.slack = slack + (image.pixels - count) * channels;
  } else {
    image.row_bytes = align_up(image.pixels * channels + slack);
    image.rows = e.batch * e.in[0] * e.in[1];
  }
  return image;
}

// Whether the pixels of an image fill fewer tiles as one stretch, padding between its rows
// included, than row by row.
bool joins_rows(const ConvArgs& args, const ConvPhase& phase, const GemmPlan& plan,
                const int64_t (&count)[kConvDims]) {
  const PackedConvHeader& packed = *args.packed;
  const DimPhase &y = phase.dim[1], &x = phase.dim[2];
  if (packed.isa != Isa::kAmx || !plan.padded_image || !plan.runs || packed.input_signed ||
      args.extent.in[0] != 1 || count[0] != 1 || phase.dim[0].taps != 1 || count[1] == 0 ||
      count[2] == 0 || y.in_stride != 1 || x.in_stride != 1 || !phase.dense_output() ||
      !fills_tiles(1, plan.taps, plan.depth)) {
    return false;
  }
  const int64_t pitch = x.position(count[2] - 1, x.taps - 1) + 1 - x.position(0, 0);
  const int64_t run = count[1] * pitch;
  return run >= kMinTileRows && 4 * ceil_div(run, 16) <= 3 * count[1] * ceil_div(count[2], 16);
}

// The rows that a block consists of: whole output rows, or images if their rows are joined; on
// AVX2, whose tiles are tall, whole tiles.
int64_t block_unit(const PhaseRun& run, Isa isa) {
  if (!run.plan.even_rows || run.direct) return isa == Isa::kAvx2 ? kTileRows : 1;
  const int64_t row = most(run.count[2], 1);
  return run.image.joined ? run.count[1] * row : row;
}

// Shares the rows or the columns out over the threads, or both: so that the largest share is small,
// and that little comes from other cores. Who has rows has what the layers before and after do to
// the same rows, but reads all weights; who has columns reads rows that others wrote.
void share_out(const ConvArgs& args, int64_t threads, PhaseRun* run) {
  const PackedConvHeader& packed = *args.packed;
  const int64_t panels = panels_of_phase(packed);
  const int64_t unit = run->direct ? kTileRows : block_unit(*run, packed.isa);
  const int64_t units = most(ceil_div(run->pixels, unit), 1);
  const int64_t in = args.extent.batch * args.extent.in_pixels() * packed.shape.in_channels;
  const int64_t out = run->pixels * packed.shape.out_channels;
  const int64_t weights = packed.shape.out_channels * run->plan.taps * run->plan.depth;
  const int64_t work_ns = run->pixels * weights / macs_per_ns(packed.isa);
  int64_t best_ns = INT64_MAX;
  run->row_parts = run->column_parts = 1;
  for (int64_t rows = 1; rows <= threads && rows <= units; ++rows) {
    const int64_t columns = clamp(threads / rows, 1, panels);
    const int64_t share = ceil_div(units, rows) * ceil_div(panels, columns);
    const int64_t far = (in + out) / rows * (columns - 1) / columns + weights / columns;
    const int64_t ns = work_ns * share / (units * panels) + far / kFarBytesPerNs;
    if (ns >= best_ns) continue;
    best_ns = ns;
    run->row_parts = rows;
    run->column_parts = columns;
  }
}

// Cuts the pixels into blocks of nearly the same size, at most `largest` up to whole units, an
// equal number for each share of the rows but for the last ones.
void cut_blocks(int64_t largest, int64_t threads, Isa isa, PhaseRun* run) {
  // In a plain matrix one thread takes whole pairs of tiles.
  const int64_t unit =
      run->plan.even_rows && run->direct && threads == 1 ? 2 * kTileRows : block_unit(*run, isa);
  const int64_t blocks = ceil_div(most(ceil_div(run->pixels, largest), 1), run->row_parts);
  const int64_t size = ceil_div(run->pixels, blocks * run->row_parts);
  run->block = most(ceil_div(size, unit), 1) * unit;
  run->blocks = ceil_div(run->pixels, run->block);
}

}  // namespace

int64_t panels_of_phase(const PackedConvHeader& packed) {
  const int64_t n = packed.groups_per_set * packed.shape.out_per_group();
  return packed.sets * panel_count(n, packed.isa);
}

PhaseRun phase_run(const ConvArgs& args, int64_t index, int64_t threads) {
  const PackedConvHeader& packed = *args.packed;
  const ConvExtent& e = args.extent;
  PhaseRun run;
  run.phase = conv_phase(packed.shape, index);
  run.plan = gemm_plan(packed.shape, run.phase, packed.groups_per_set, packed.isa);
  run.pixels = e.batch;
  run.direct = packed.phases == 1 && !packed.shape.transposed;
  for (int d = 0; d < kConvDims; ++d) {
    const DimPhase& dim = run.phase.dim[d];
    run.count[d] = dim.count(e.out[d]);
    run.pixels *= run.count[d];
    run.direct = run.direct && dim.taps == 1 && dim.in_stride == 1 && dim.in_offset == 0 &&
                 e.in[d] == e.out[d];
  }
  inner_range(run.phase.dim[2], 0, run.phase.dim[2].taps - 1, e.in[2], run.count[2],
              &run.inner_begin, &run.inner_end);
  const int64_t pointer_bytes = run.plan.taps * static_cast<int64_t>(sizeof(void*));
  const int64_t window_bytes = run.plan.runs ? run.plan.taps * run.plan.depth : 1;
  const int64_t limit = clamp(kTableBytes / pointer_bytes, 0, kWindowBytes / window_bytes);
  run.block = clamp(limit / kMinBlock * kMinBlock, kMinBlock, kMaxBlock);
  if (run.count[2] > 0 && run.count[2] <= run.block) run.block -= run.block % run.count[2];
  if (run.plan.padded_image) {
    run.image = padded_image(args, run.phase, run.plan.depth, run.count,
                             joins_rows(args, run.phase, run.plan, run.count));
  }
  run.row_parts = run.column_parts = 1;
  if (threads > 1) share_out(args, threads, &run);
  if (run.plan.even_rows || threads > 1) {
    cut_blocks(run.plan.even_rows ? kEvenBlock : run.block, threads, packed.isa, &run);
  } else {
    run.blocks = ceil_div(run.pixels, run.block);
  }
  run.windows = 0;
  if (run.plan.runs && !run.plan.even_rows && run.count[2] > 0) {
    const int64_t border = run.count[2] - (run.inner_end - run.inner_begin);
    const int64_t rows = (run.block - 1) / run.count[2] + 2;
    run.windows = border * rows < run.block ? border * rows : run.block;
  }
  return run;
}

}  // namespace qk
