// Cuts output pixels into blocks, finds the rows of A of a block (row pointers, copies of windows
// that overhang the image), and shares the blocks out over threads.
#include "csrc/conv/implicit_gemm.h"

#include <cstring>

namespace qk {
namespace {

// Output pixels of a block: a multiple of the rows of a register tile, large enough that the
// weights are read from L2 rarely, small enough that pointers and input stay in L1. Whole output
// rows where they fit: 224 is divided by the widths of most networks, and holds an image of 14
// x 14.
constexpr int64_t kMaxBlock = 224, kMinBlock = 24;
// AMX reads the weights for every 32 rows anyway; every block costs a tile configuration and an
// epilogue that nothing hides.
constexpr int64_t kEvenBlock = 1024, kTileRows = 16;
// Limits of a block's pointer table and of its window copies, in bytes.
constexpr int64_t kTableBytes = 128 * 1024, kWindowBytes = 1024 * 1024;
// Padded images at a time.
constexpr int64_t kImageBytes = 512 * 1024;
// Of one thread, for estimates: bytes per nanosecond of a row copy; multiply-adds; and bytes that
// another core wrote or that L3 holds.
constexpr int64_t kBytesPerNs = 16, kFarBytesPerNs = 16;
constexpr int64_t macs_per_ns(Isa isa) {
  constexpr int64_t kRates[kIsaCount] = {1, 64, 192, 384, 1024};
  return kRates[static_cast<int>(isa)];
}

int64_t align_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t clamp(int64_t v, int64_t low, int64_t high) { return v < low ? low : v > high ? high : v; }

// Elements from one output pixel to the next.
int64_t out_stride(const ConvArgs& args) {
  return args.out_pixel_stride > 0 ? args.out_pixel_stride : args.packed->shape.out_channels;
}

// Rows of the image with `left` pixels of padding before them, in the workspace. Joined rows follow
// each other without a gap, with `top` rows of padding before those of an image: then all pixels of
// an image are evenly spaced.
struct PaddedImage {
  int64_t left = 0, pixels = 0, row_bytes = 0, rows = 0;
  bool joined = false;
  int64_t top = 0, image_rows = 0, slack = 0;
  int64_t bytes() const { return align_up(rows * row_bytes + slack); }
};

// One phase of one call.
struct PhaseRun {
  ConvPhase phase;
  GemmPlan plan;
  int64_t count[kConvDims];  // outputs in each dimension
  int64_t pixels;
  int64_t inner_begin, inner_end;  // outputs of a row whose windows lie inside the image
  bool direct;                     // the input is the matrix A
  int64_t block;                   // pixels in a block
  int64_t blocks;
  int64_t row_parts, column_parts;  // shares of the threads: of the blocks, of the panels
  int64_t windows;                  // most windows that a block copies
  PaddedImage image;
};

// Outputs j of [0, count) with 0 <= position(j, tap) < in: [*begin, *end).
void inner_range(const DimPhase& dim, int64_t first_tap, int64_t last_tap, int64_t in,
                 int64_t count, int64_t* begin, int64_t* end) {
  const int64_t low = dim.position(0, first_tap), high = in - 1 - dim.position(0, last_tap);
  *begin = clamp(low >= 0 ? 0 : ceil_div(-low, dim.in_stride), 0, count);
  *end = clamp(high < 0 ? 0 : high / dim.in_stride + 1, *begin, count);
}

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
  if (!plan.padded_image || !plan.runs || packed.input_signed || args.extent.in[0] != 1 ||
      count[0] != 1 || phase.dim[0].taps != 1 || count[1] == 0 || count[2] == 0 ||
      y.in_stride != 1 || x.in_stride != 1 || !phase.dense_output() ||
      !fills_tiles(1, plan.taps, plan.depth)) {
    return false;
  }
  const int64_t pitch = x.position(count[2] - 1, x.taps - 1) + 1 - x.position(0, 0);
  const int64_t run = count[1] * pitch;
  return run >= kMinTileRows && 4 * ceil_div(run, 16) <= 3 * count[1] * ceil_div(count[2], 16);
}

// Row `row` of the padded image. What lies behind the last window is left as it is: it is read, but
// meets weights that count as zero.
void pad_row(const ConvArgs& args, const PaddedImage& image, int64_t row, uint8_t* dst) {
  const PackedConvHeader& packed = *args.packed;
  const int64_t channels = packed.shape.in_channels, width = args.extent.in[2];
  int64_t source_row = row;
  if (image.joined) {
    const int64_t height = args.extent.in[1];
    const int64_t iy =
        source_index(packed.shape.padding_mode, row % image.image_rows - image.top, height);
    if (iy < 0) {
      std::memset(dst, packed.input_zero_point, static_cast<size_t>(image.row_bytes));
      return;
    }
    source_row = row / image.image_rows * height + iy;
  }
  const uint8_t* src = args.input + source_row * width * channels;
  const auto pixel = [&](int64_t x) {
    const int64_t ix = source_index(packed.shape.padding_mode, x - image.left, width);
    uint8_t* to = dst + x * channels;
    if (ix < 0) {
      std::memset(to, packed.input_zero_point, static_cast<size_t>(channels));
    } else {
      std::memcpy(to, src + ix * channels, static_cast<size_t>(channels));
    }
  };
  const int64_t begin = clamp(image.left, 0, image.pixels);
  const int64_t end = clamp(image.left + width, begin, image.pixels);
  for (int64_t x = 0; x < begin; ++x) pixel(x);
  std::memcpy(dst + begin * channels, src + (begin - image.left) * channels,
              static_cast<size_t>((end - begin) * channels));
  for (int64_t x = end; x < image.pixels; ++x) pixel(x);
}

// The rows that a block consists of: whole output rows, or images if their rows are joined.
int64_t block_unit(const PhaseRun& run) {
  if (!run.plan.even_rows || run.direct) return 1;
  const int64_t row = most(run.count[2], 1);
  return run.image.joined ? run.count[1] * row : row;
}

// Panels of all sets of a phase, counted through: the columns that tasks share out.
int64_t panels_of_phase(const PackedConvHeader& packed) {
  const int64_t n = packed.groups_per_set * packed.shape.out_per_group();
  return packed.sets * panel_count(n, packed.isa);
}

// Shares the rows or the columns out over the threads, or both: so that the largest share is small,
// and that little comes from other cores. Who has rows has what the layers before and after do to
// the same rows, but reads all weights; who has columns reads rows that others wrote.
void share_out(const ConvArgs& args, int64_t threads, PhaseRun* run) {
  const PackedConvHeader& packed = *args.packed;
  const int64_t panels = panels_of_phase(packed);
  const int64_t unit = run->direct ? kTileRows : block_unit(*run);
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

// Cuts the pixels into blocks of nearly the same size, at most `largest`, an equal number for each
// share of the rows.
void cut_blocks(int64_t largest, int64_t threads, PhaseRun* run) {
  // In a plain matrix one thread takes whole pairs of tiles.
  const int64_t unit =
      run->plan.even_rows && run->direct && threads == 1 ? 2 * kTileRows : block_unit(*run);
  const int64_t blocks = ceil_div(most(ceil_div(run->pixels, largest), 1), run->row_parts);
  const int64_t size = ceil_div(run->pixels, blocks * run->row_parts);
  run->block = most(ceil_div(size, unit), 1) * unit;
  run->blocks = ceil_div(run->pixels, run->block);
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
    cut_blocks(run.plan.even_rows ? kEvenBlock : run.block, threads, &run);
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

// The part of the workspace that belongs to one thread.
struct Scratch {
  const uint8_t** pointers;
  int64_t* out_offset;       // bytes
  int64_t* residual_offset;  // bytes
  uint8_t* windows;
};

struct ScratchBytes {
  int64_t pointers = 0, offsets = 0, windows = 0;
  int64_t total() const { return pointers + 2 * offsets + windows; }
};

ScratchBytes scratch_bytes(const ConvArgs& args, int64_t threads) {
  ScratchBytes bytes;
  for (int64_t p = 0; p < args.packed->phases; ++p) {
    const PhaseRun run = phase_run(args, p, threads);
    const int64_t block = run.block < run.pixels ? run.block : run.pixels;
    if (!run.direct) {
      const int64_t sharing = run.plan.even_rows ? run.count[2] : 1;
      bytes.pointers = most(bytes.pointers, align_up(ceil_div(block, sharing) * run.plan.taps * 8));
      bytes.windows = most(bytes.windows, align_up(run.windows * run.plan.taps * run.plan.depth));
    }
    if (!run.phase.dense_output()) bytes.offsets = most(bytes.offsets, align_up(block * 8));
  }
  return bytes;
}

// Only an ordinary convolution pads its image, and it has one phase.
PaddedImage image_of(const ConvArgs& args) {
  return args.packed->shape.transposed ? PaddedImage{} : phase_run(args, 0, 1).image;
}

// A row of the matrix that is all padding, at the start of the workspace: as long as a run of taps,
// and as a pixel, because pointers to it move along with the groups; and as a padded row.
int64_t padding_bytes(const ConvArgs& args) {
  const ConvShape& shape = args.packed->shape;
  const int64_t run = most(shape.kernel[2] * shape.in_channels, image_of(args).row_bytes);
  return align_up(most(run, kFillBytes));
}

// Where the pixels of a block lie: walks the runs of pixels that share an output row.
template <typename F>
void for_each_row_segment(const PhaseRun& run, int64_t begin, int64_t end, const F& f) {
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t row = pixel / run.count[2], x = pixel % run.count[2];
    const int64_t left = run.count[2] - x, length = left < end - pixel ? left : end - pixel;
    const int64_t y = row % run.count[1], z = row / run.count[1] % run.count[0];
    f(pixel - begin, row / (run.count[1] * run.count[0]), z, y, x, x + length);
    pixel += length;
  }
}

// What all threads read from the workspace.
struct Shared {
  const uint8_t* padding;
  const uint8_t* image;  // padded, if the plan asks for it
};

class BlockRows {
 public:
  BlockRows(const ConvArgs& args, const PhaseRun& run, const Shared& shared, const Scratch& scratch)
      : args_(args), run_(run), padding_(shared.padding), image_(shared.image), scratch_(scratch) {}

  // Fills the pointers of pixels [begin, end), for channels from `channel` on.
  void find(int64_t begin, int64_t end, int64_t channel) {
    uint8_t* windows = scratch_.windows;
    for_each_row_segment(
        run_, begin, end,
        [&](int64_t row, int64_t n, int64_t z, int64_t y, int64_t x0, int64_t x1) {
          const DimPhase* dim = run_.phase.dim;
          const ConvExtent& e = args_.extent;
          const int64_t pixel_bytes = args_.packed->shape.in_channels, taps = run_.plan.taps;
          const uint8_t** segment = scratch_.pointers + row * taps;
          for (int64_t t = 0; t < dim[0].taps * dim[1].taps; ++t) {
            const int64_t iz = source(0, z, t / dim[1].taps), iy = source(1, y, t % dim[1].taps);
            const int64_t image_index = (n * e.in[0] + iz) * e.in[1] + iy;
            const bool outside = iz < 0 || iy < 0;
            const uint8_t* image_row =
                outside ? nullptr : args_.input + image_index * e.in[2] * pixel_bytes + channel;
            if (run_.plan.runs) {
              find_runs(image_row, segment + t, x0, x1, &windows);
            } else {
              for (int64_t tx = 0; tx < dim[2].taps; ++tx) {
                find_tap(image_row, segment + t * dim[2].taps + tx, tx, x0, x1);
              }
            }
          }
        });
  }

  // Fills the pointers of the output rows that are pixels [begin, end), for channels from `channel`
  // on.
  void find_even(int64_t begin, int64_t end, int64_t channel) {
    const DimPhase* dim = run_.phase.dim;
    const ConvExtent& e = args_.extent;
    const int64_t channels = args_.packed->shape.in_channels;
    const int64_t taps_in_row = run_.plan.runs ? 1 : dim[2].taps;
    const bool padded = run_.plan.padded_image;
    const uint8_t* image = padded ? image_ : args_.input;
    const int64_t row_bytes = padded ? run_.image.row_bytes : e.in[2] * channels;
    const uint8_t** pointer = scratch_.pointers;
    for (int64_t row = begin / run_.count[2]; row < end / run_.count[2]; ++row) {
      const int64_t y = row % run_.count[1], z = row / run_.count[1] % run_.count[0];
      const int64_t n = row / (run_.count[1] * run_.count[0]);
      for (int64_t t = 0; t < dim[0].taps * dim[1].taps; ++t) {
        const int64_t iz = source(0, z, t / dim[1].taps), iy = source(1, y, t % dim[1].taps);
        const uint8_t* from =
            iz < 0 || iy < 0 ? padding_ : image + ((n * e.in[0] + iz) * e.in[1] + iy) * row_bytes;
        for (int64_t x = 0; x < taps_in_row; ++x) {
          *pointer++ = from + x * dim[2].in_dilation * channels + channel;
        }
      }
    }
  }

  // The same where the rows of an image are joined: the pointers of its first pixel.
  void find_joined(int64_t begin, int64_t end) {
    const PaddedImage& image = run_.image;
    const DimPhase& y = run_.phase.dim[1];
    const int64_t pixels = run_.count[1] * run_.count[2];
    const uint8_t** pointer = scratch_.pointers;
    for (int64_t n = begin / pixels; n < end / pixels; ++n) {
      for (int64_t t = 0; t < y.taps; ++t) {
        const int64_t row = n * image.image_rows + t * y.in_dilation;
        *pointer++ = image_ + row * image.row_bytes;
      }
    }
  }

  // Moves `count` pointers to the channels `bytes` further on.
  void move(int64_t count, int64_t bytes) {
    const int64_t pointers = count * run_.plan.taps;
    for (int64_t i = 0; i < pointers; ++i) scratch_.pointers[i] += bytes;
  }

  // The places of the block's pixels in an output with gaps.
  void find_outputs(int64_t begin, int64_t end) {
    const int64_t element = output_bytes(args_.packed->epilogue.output);
    for_each_row_segment(
        run_, begin, end,
        [&](int64_t row, int64_t n, int64_t z, int64_t y, int64_t x0, int64_t x1) {
          const DimPhase* dim = run_.phase.dim;
          const ConvExtent& e = args_.extent;
          const int64_t oz = dim[0].out_first + z * dim[0].out_step;
          const int64_t oy = dim[1].out_first + y * dim[1].out_step;
          for (int64_t x = x0; x < x1; ++x) {
            const int64_t ox = dim[2].out_first + x * dim[2].out_step;
            const int64_t pixel = ((n * e.out[0] + oz) * e.out[1] + oy) * e.out[2] + ox;
            scratch_.residual_offset[row + x - x0] = pixel * args_.packed->shape.out_channels;
            scratch_.out_offset[row + x - x0] = pixel * out_stride(args_) * element;
          }
        });
  }

 private:
  int64_t source(int d, int64_t j, int64_t tap) const {
    return source_index(args_.packed->shape.padding_mode, run_.phase.dim[d].position(j, tap),
                        args_.extent.in[d]);
  }

  // Whole rows of windows: inside the image the image itself, at its edges a copy.
  void find_runs(const uint8_t* image_row, const uint8_t** pointers, int64_t x0, int64_t x1,
                 uint8_t** windows) const {
    const DimPhase& dim = run_.phase.dim[2];
    const int64_t taps = run_.plan.taps, pixel_bytes = args_.packed->shape.in_channels;
    int64_t x = x0;
    if (image_row == nullptr) {
      for (; x < x1; ++x, pointers += taps) *pointers = padding_;
      return;
    }
    const int64_t step = dim.in_stride * pixel_bytes;
    const int64_t inner_begin = clamp(run_.inner_begin, x0, x1);
    const int64_t inner_end = clamp(run_.inner_end, inner_begin, x1);
    for (; x < inner_begin; ++x, pointers += taps) *pointers = copy_window(image_row, x, windows);
    const uint8_t* p = image_row + dim.position(x, 0) * pixel_bytes;
    for (; x < inner_end; ++x, pointers += taps, p += step) *pointers = p;
    for (; x < x1; ++x, pointers += taps) *pointers = copy_window(image_row, x, windows);
  }

  const uint8_t* copy_window(const uint8_t* image_row, int64_t x, uint8_t** windows) const {
    const int64_t pixel_bytes = args_.packed->shape.in_channels;
    uint8_t* window = *windows;
    for (int64_t tap = 0; tap < run_.phase.dim[2].taps; ++tap) {
      const int64_t ix = source(2, x, tap);
      std::memcpy(*windows, ix < 0 ? padding_ : image_row + ix * pixel_bytes,
                  static_cast<size_t>(pixel_bytes));
      *windows += pixel_bytes;
    }
    return window;
  }

  void find_tap(const uint8_t* image_row, const uint8_t** pointers, int64_t tap, int64_t x0,
                int64_t x1) const {
    const DimPhase& dim = run_.phase.dim[2];
    const int64_t taps = run_.plan.taps, pixel_bytes = args_.packed->shape.in_channels;
    int64_t x = x0, begin, end;
    if (image_row == nullptr) {
      for (; x < x1; ++x, pointers += taps) *pointers = padding_;
      return;
    }
    inner_range(dim, tap, tap, args_.extent.in[2], run_.count[2], &begin, &end);
    begin = clamp(begin, x0, x1);
    end = clamp(end, begin, x1);
    const auto outside = [&] {
      const int64_t ix = source(2, x, tap);
      *pointers = ix < 0 ? padding_ : image_row + ix * pixel_bytes;
    };
    for (; x < begin; ++x, pointers += taps) outside();
    const uint8_t* p = image_row + dim.position(x, tap) * pixel_bytes;
    const int64_t step = dim.in_stride * pixel_bytes;
    for (; x < end; ++x, pointers += taps, p += step) *pointers = p;
    for (; x < x1; ++x, pointers += taps) outside();
  }

  const ConvArgs& args_;
  const PhaseRun& run_;
  const uint8_t* padding_;
  const uint8_t* image_;
  const Scratch& scratch_;
};

PackedMatrix part(const PackedConvHeader& packed, int64_t index) {
  const auto* base = reinterpret_cast<const uint8_t*>(&packed);
  const auto* offsets = reinterpret_cast<const int64_t*>(base + packed.parts_offset);
  const int64_t end = index + 1 < packed.parts ? offsets[index + 1] : packed.bytes;
  PackedMatrix matrix;
  view_packed(base + offsets[index], end - offsets[index], &matrix);
  return matrix;
}

void run_block(const ConvArgs& args, const PhaseRun& run, int64_t phase, int64_t block,
               int64_t panel_begin, int64_t panel_end, const Shared& shared,
               const Scratch& scratch) {
  const PackedConvHeader& packed = *args.packed;
  const ConvShape& shape = packed.shape;
  const int64_t element = output_bytes(packed.epilogue.output);
  const int64_t begin = block * run.block;
  const int64_t end = run.pixels < begin + run.block ? run.pixels : begin + run.block;
  const int64_t set_panels = panels_of_phase(packed) / packed.sets;
  const int64_t in_set = packed.groups_per_set * shape.in_per_group();
  const int64_t out_set = packed.groups_per_set * shape.out_per_group();
  BlockRows rows(args, run, shared, scratch);
  const bool dense = run.phase.dense_output();
  if (!dense) rows.find_outputs(begin, end);
  const int64_t first_set = panel_begin / set_panels;
  for (int64_t set = first_set; set * set_panels < panel_end; ++set) {
    IgemmArgs gemm;
    gemm.matrix = part(packed, phase * packed.sets + set);
    gemm.row_end = end - begin;
    const int64_t panels = panel_count(gemm.matrix.header->n, packed.isa);
    gemm.panel_begin = most(panel_begin - set * set_panels, 0);
    gemm.panel_end = clamp(panel_end - set * set_panels, 0, panels);
    if (run.direct) {
      gemm.a = args.input + begin * shape.in_channels + set * in_set;
      gemm.a_row_stride = shape.in_channels;
    } else {
      const bool even = run.plan.even_rows;
      if (set > first_set) {
        rows.move(even ? (end - begin) / run.count[2] : end - begin, in_set);
      } else if (run.image.joined) {
        rows.find_joined(begin, end);
      } else if (even) {
        rows.find_even(begin, end, set * in_set);
      } else {
        rows.find(begin, end, set * in_set);
      }
      gemm.pointers = scratch.pointers;
      if (even) {
        gemm.run = run.count[2];
        gemm.a_row_stride = run.phase.dim[2].in_stride * shape.in_channels;
      }
      if (run.image.joined) {
        const int64_t images = (end - begin) / (run.count[1] * run.count[2]);
        gemm.run_width = run.count[2];
        gemm.run_pitch = run.image.pixels;
        gemm.run = run.count[1] * gemm.run_pitch;
        gemm.row_end = images * gemm.run;
      }
    }
    const int64_t first = dense ? begin : 0;
    gemm.out =
        static_cast<uint8_t*>(args.out) + (first * out_stride(args) + set * out_set) * element;
    gemm.out_row_stride = out_stride(args) * element;
    gemm.residual_row_stride = shape.out_channels;
    if (!dense) {
      gemm.out_row_offset = scratch.out_offset;
      gemm.residual_row_offset = scratch.residual_offset;
    }
    if (packed.epilogue.has_residual) {
      gemm.residual = args.residual + first * shape.out_channels + set * out_set;
    }
    gemm.residual_signed = args.residual_signed;
    if (end == run.pixels && set + 1 == packed.sets && panel_begin == 0) gemm.next = args.next;
    igemm(gemm);
  }
}

void run_images(const ConvArgs& args, const Parallel& parallel) {
  const PackedConvHeader& packed = *args.packed;
  const ConvShape& shape = packed.shape;
  auto* workspace = static_cast<uint8_t*>(args.workspace);
  std::memset(workspace, packed.input_zero_point, static_cast<size_t>(padding_bytes(args)));
  uint8_t* image = workspace + padding_bytes(args);
  uint8_t* scratches = image + image_of(args).bytes();
  const Shared shared{workspace, image};
  const ScratchBytes bytes = scratch_bytes(args, parallel.threads);

  const int64_t panels = panels_of_phase(packed);
  for (int64_t p = 0; p < packed.phases; ++p) {
    const PhaseRun run = phase_run(args, p, parallel.threads);
    if (run.pixels == 0) continue;
    parallel.for_each_range(run.image.rows, run.image.bytes() / kBytesPerNs,
                            [&](int64_t begin, int64_t end) {
                              for (int64_t row = begin; row < end; ++row) {
                                pad_row(args, run.image, row, image + row * run.image.row_bytes);
                              }
                            });
    const int64_t macs = run.pixels * run.plan.taps * run.plan.depth * shape.out_channels;
    const int64_t rows = run.row_parts, columns = run.column_parts, tasks = rows * columns;
    const int64_t work_ns = macs / macs_per_ns(packed.isa) + run.pixels * shape.out_channels / 8;
    parallel.for_each_range(tasks, work_ns, [&](int64_t task_begin, int64_t task_end) {
      for (int64_t task = task_begin; task < task_end; ++task) {
        uint8_t* base = scratches + task * bytes.total();
        const Scratch scratch{reinterpret_cast<const uint8_t**>(base),
                              reinterpret_cast<int64_t*>(base + bytes.pointers),
                              reinterpret_cast<int64_t*>(base + bytes.pointers + bytes.offsets),
                              base + bytes.pointers + 2 * bytes.offsets};
        const int64_t row = task / columns, column = task % columns;
        for (int64_t block = run.blocks * row / rows; block < run.blocks * (row + 1) / rows;
             ++block) {
          run_block(args, run, p, block, panels * column / columns, panels * (column + 1) / columns,
                    shared, scratch);
        }
      }
    });
  }
}

// The images that are padded together: they stay in L2 until they have been read.
int64_t images_at_once(const ConvArgs& args) {
  const int64_t batch = args.extent.batch, bytes = image_of(args).bytes();
  if (bytes <= kImageBytes || batch < 2) return batch;
  return clamp(kImageBytes / (bytes / batch), 1, batch);
}

// `count` images from image `first` on.
ConvArgs images(const ConvArgs& args, int64_t first, int64_t count) {
  const PackedConvHeader& packed = *args.packed;
  const int64_t pixels = args.extent.out_pixels();
  ConvArgs part = args;
  part.extent.batch = count;
  part.input += first * args.extent.in_pixels() * packed.shape.in_channels;
  part.out = static_cast<uint8_t*>(args.out) +
             first * pixels * out_stride(args) * output_bytes(packed.epilogue.output);
  if (packed.epilogue.has_residual) part.residual += first * pixels * packed.shape.out_channels;
  return part;
}

}  // namespace

bool conv_adds_in_place(const PackedConvHeader& packed) {
  bool in_place = packed.kind == ConvKind::kIgemm && !packed.has_fill;
  for (int64_t i = 0; in_place && i < packed.parts; ++i) {
    in_place = igemm_adds_in_place(*part(packed, i).header);
  }
  return in_place;
}

NextWeights conv_first_weights(const PackedConvHeader& packed) {
  if (packed.kind != ConvKind::kIgemm) return {};
  return first_weights(part(packed, 0));
}

void fill_outputs(const ConvArgs& args, const Parallel& parallel) {
  const PackedConvHeader& packed = *args.packed;
  auto* padding = static_cast<uint8_t*>(args.workspace);
  std::memset(padding, packed.input_zero_point, kFillBytes);
  const int64_t pixels = args.extent.batch * args.extent.out_pixels();
  const int64_t channels = packed.shape.out_channels,
                element = output_bytes(packed.epilogue.output);
  parallel.for_each_range(pixels, pixels * channels / 8, [&](int64_t begin, int64_t end) {
    IgemmArgs gemm;
    gemm.matrix = part(packed, packed.parts - 1);
    gemm.panel_end = panel_count(gemm.matrix.header->n, packed.isa);
    gemm.a = padding;
    gemm.row_begin = begin;
    gemm.row_end = end;
    gemm.out = args.out;
    gemm.out_row_stride = out_stride(args) * element;
    gemm.residual = args.residual;
    gemm.residual_row_stride = channels;
    gemm.residual_signed = args.residual_signed;
    igemm(gemm);
  });
}

int64_t implicit_gemm_workspace_bytes(const ConvArgs& args, const Parallel& parallel) {
  const ConvArgs part = images(args, 0, images_at_once(args));
  return padding_bytes(args) + image_of(part).bytes() +
         parallel.threads * scratch_bytes(part, parallel.threads).total();
}

void implicit_gemm(const ConvArgs& args, const Parallel& parallel) {
  const int64_t batch = args.extent.batch, step = images_at_once(args);
  for (int64_t first = 0; first < batch; first += step) {
    run_images(images(args, first, batch - first < step ? batch - first : step), parallel);
  }
}

}  // namespace qk
