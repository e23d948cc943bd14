// The driver of the depthwise kernels: cuts the output into strips and shares them out.
#include "csrc/conv/depthwise.h"

#include <cstring>
#include <initializer_list>

#include "csrc/base/integers.h"
#include "csrc/conv/depthwise_layout.h"
#include "csrc/conv/implicit_gemm.h"

namespace qk {

ConvShape depthwise_shape(const ConvShape& shape) {
  ConvShape s = shape;
  if (s.spatial_dims == 1) {
    for (int64_t* size : {s.kernel, s.stride, s.dilation, s.pad_lo, s.pad_hi}) {
      const int64_t along = size[2];
      size[2] = size[1];
      size[1] = along;
    }
  }
  return s;
}

ConvExtent depthwise_extent(const ConvShape& shape, const ConvExtent& extent) {
  ConvExtent e = extent;
  if (shape.spatial_dims == 1) {
    for (int64_t* size : {e.in, e.out}) {
      const int64_t along = size[2];
      size[2] = size[1];
      size[1] = along;
    }
  }
  return e;
}

DepthwiseKernel select_depthwise_kernel(Isa isa) {
  if (isa == Isa::kAmx) isa = Isa::kAvx512Vnni;
#define QK_DEPTHWISE_KERNEL(need, layout, name) \
  if (isa == layout) return name;
#define QK_WINOGRAD_KERNEL(need, layout, name)
#include "csrc/conv/kernels.inc"
#undef QK_DEPTHWISE_KERNEL
#undef QK_WINOGRAD_KERNEL
  return nullptr;
}

namespace {

// Of a strip in the scratch: stays in L1, on an L1 of 32 KiB beside the rows that it is filled
// from.
constexpr int64_t kScratchBytes = 32 * 1024, kAvx2ScratchBytes = 16 * 1024;
// Outputs of a strip: a multiple of the columns that kernels take together.
constexpr int64_t kTileUnit = 8;
constexpr int64_t kMacsPerNs = 30;

// One phase of one call.
struct PhaseRun {
  ConvPhase phase;
  DepthwisePlan plan;
  int64_t count[kConvDims];
  int64_t row_pairs;      // groups of rows_out output rows in a plane
  int64_t tile, tiles;    // output columns of a strip
  int64_t row_columns;    // input columns, padding included, under a whole row of outputs
  int64_t strip_columns;  // under a strip
  bool goes_down;         // strips one below the other share input rows in the scratch
};

int64_t columns_under(const DimPhase& dim, int64_t outputs) {
  return (outputs - 1) * dim.in_stride + (dim.taps - 1) * dim.in_dilation + 1;
}

PhaseRun phase_run(const ConvShape& shape, const ConvExtent& e, Isa isa, int64_t index) {
  const DepthwiseLayout layout = layout_of(isa);
  PhaseRun run;
  run.phase = conv_phase(shape, index);
  run.plan = depthwise_plan(shape, run.phase, layout);
  for (int d = 0; d < kConvDims; ++d) run.count[d] = run.phase.dim[d].count(e.out[d]);
  if (run.count[0] == 0 || run.count[1] == 0 || run.count[2] == 0) {
    run.row_pairs = run.tile = run.tiles = run.row_columns = run.strip_columns = 0;
    run.goes_down = false;
    return run;
  }
  const DimPhase& w = run.phase.dim[2];
  run.row_pairs = ceil_div(run.count[1], run.plan.rows_out);
  run.goes_down = run.plan.quads > 0 && layout.holds_taps && run.phase.dim[0].taps == 1;
  for (int d = 1; d < kConvDims; ++d) {
    const DimPhase& dim = run.phase.dim[d];
    run.goes_down &= dim.taps == 3 && dim.in_stride == 1 && dim.in_dilation == 1;
  }
  const int64_t column_bytes = layout.column_bytes(run.plan);
  const int64_t most_bytes = isa == Isa::kAvx2 ? kAvx2ScratchBytes : kScratchBytes;
  const int64_t fit = (most_bytes / column_bytes - columns_under(w, 1)) / w.in_stride + 1;
  const int64_t most = fit < kTileUnit ? kTileUnit : fit / kTileUnit * kTileUnit;
  const int64_t even = ceil_div(run.count[2], ceil_div(run.count[2], most));
  run.tile = run.count[2] <= most ? run.count[2] : ceil_div(even, kTileUnit) * kTileUnit;
  run.tiles = ceil_div(run.count[2], run.tile);
  run.row_columns = columns_under(w, run.count[2]);
  run.strip_columns = columns_under(w, run.tile);
  return run;
}

struct ScratchBytes {
  int64_t padding = 0, offsets = 0;  // shared
  int64_t rows = 0, strip = 0, acc = 0;
  int64_t per_thread() const { return rows + strip + acc; }
};

ScratchBytes scratch_bytes(const ConvArgs& args) {
  const PackedConvHeader& packed = *args.packed;
  const ConvShape shape = depthwise_shape(packed.shape);
  const ConvExtent extent = depthwise_extent(packed.shape, args.extent);
  const DepthwiseLayout layout = layout_of(packed.isa);
  ScratchBytes bytes;
  bytes.padding = align_up(extent.in[2] * in_stride(args));
  const auto grow = [](int64_t* to, int64_t size) {
    if (align_up(size) > *to) *to = align_up(size);
  };
  for (int64_t p = 0; p < packed.phases; ++p) {
    const PhaseRun run = phase_run(shape, extent, packed.isa, p);
    grow(&bytes.offsets, run.row_columns * 8);
    grow(&bytes.rows, run.plan.rows * 2 * static_cast<int64_t>(sizeof(void*)));
    grow(&bytes.strip, run.strip_columns * layout.column_bytes(run.plan));
    grow(&bytes.acc, run.tile * run.plan.rows_out * layout.block_channels() * 4);
  }
  return bytes;
}

class Worker {
 public:
  Worker(const ConvArgs& args, const PhaseRun& run, const uint8_t* part, const uint8_t* padding_row,
         const int64_t* column_offset, uint8_t* scratch, const ScratchBytes& bytes)
      : args_(args),
        packed_(*args.packed),
        shape_(depthwise_shape(packed_.shape)),
        extent_(depthwise_extent(packed_.shape, args.extent)),
        layout_(layout_of(packed_.isa)),
        run_(run),
        part_(*reinterpret_cast<const DepthwisePart*>(part)),
        blocks_(part + sizeof(DepthwisePart)),
        padding_row_(padding_row),
        column_offset_(column_offset),
        image_rows_(reinterpret_cast<const uint8_t**>(scratch)),
        rows_(image_rows_ + run.plan.rows),
        acc_(reinterpret_cast<int32_t*>(scratch + bytes.rows + bytes.strip)),
        kernel_(select_depthwise_kernel(packed_.isa)),
        lookup_(part_.epilogue.has_table ? select_lookup_kernel() : nullptr) {
    strip_.scratch = scratch + bytes.rows;
    strip_.rows = rows_;
    strip_.quads = run.plan.quads;
    strip_.window = run.plan.window;
    strip_.input_rows = run.plan.rows;
    strip_.in_group = shape_.in_per_group();
    strip_.out_group = shape_.out_per_group();
    strip_.padding = static_cast<uint8_t>(packed_.input_zero_point);
    strip_.input_flip = packed_.input_signed ? 0x80 : 0;
    strip_.row_groups = run.plan.row_groups;
    strip_.taps = run.plan.columns;
    strip_.tap_step = run.phase.dim[2].in_dilation;
    strip_.column_step = run.phase.dim[2].in_stride;
    strip_.rows_out = run.plan.rows_out;
    const int32_t flip = part_.epilogue.is_signed() ? 128 : 0;
    strip_.zero_point = static_cast<int16_t>(part_.epilogue.zero_point + flip);
    strip_.qmin = static_cast<uint8_t>(part_.epilogue.qmin + flip);
    strip_.qmax = static_cast<uint8_t>(part_.epilogue.qmax + flip);
    strip_.output_flip = static_cast<uint8_t>(flip);
  }

  // `count` strips one below the other, from output rows [row * rows_out, ...) of plane z of image
  // n on, columns of tile `tile`.
  void run_strips(int64_t n, int64_t z, int64_t row, int64_t count, int64_t tile) {
    const int64_t x0 = run_.tile * tile, to_end = run_.count[2] - x0;
    const int64_t x1 = x0 + (to_end < run_.tile ? to_end : run_.tile);
    const int64_t element = output_bytes(packed_.epilogue.output), channels = shape_.out_channels;
    strip_.column_offset = column_offset_ + x0 * strip_.column_step;
    strip_.outputs = x1 - x0;
    strip_.strip_columns = columns_under(run_.phase.dim[2], x1 - x0);
    strip_.out_step = run_.phase.dim[2].out_step * channels * element;
    strip_.acc = part_.raw ? acc_ : nullptr;
    const uint8_t* block = blocks_;
    for (int64_t first = 0; first < channels; first += layout_.block_channels()) {
      for (int64_t i = 0; i < count; ++i) {
        if (count > 1 || first == 0) find_strip(n, z, row + i, x0);
        strip_.known_rows = static_cast<uint8_t>(i == 0 ? 0 : run_.plan.rows - 1);
        strip_.turn = static_cast<uint8_t>(i % run_.plan.rows);
        run_channels(first, block, out_);
        if (part_.raw && packed_.epilogue.output == OutputType::kF32) {
          store_floats(first, rows_out_, out_);
        } else if (part_.raw) {
          store_raw(first, rows_out_, pixel_, out_);
        }
      }
      block += part_.block_bytes;
    }
    for (int64_t i = 0; i < count && !part_.raw && finishes(); ++i) {
      find_strip(n, z, row + i, x0);
      finish(rows_out_, pixel_, out_);
    }
  }

 private:
  int64_t out_pixel(int64_t n, int64_t z, int64_t y, int64_t x) const {
    const DimPhase* dim = run_.phase.dim;
    const int64_t oz = dim[0].out_first + z * dim[0].out_step;
    const int64_t oy = dim[1].out_first + y * dim[1].out_step;
    const int64_t ox = dim[2].out_first + x * dim[2].out_step;
    return ((n * extent_.out[0] + oz) * extent_.out[1] + oy) * extent_.out[2] + ox;
  }

  // Where a strip reads and writes.
  void find_strip(int64_t n, int64_t z, int64_t row, int64_t x0) {
    find_rows(n, z, row);
    const int64_t bytes = shape_.out_channels * output_bytes(packed_.epilogue.output);
    const int64_t left = run_.count[1] - row * run_.plan.rows_out;
    rows_out_ = left < run_.plan.rows_out ? left : run_.plan.rows_out;
    for (int64_t p = 0; p < 2; ++p) {
      pixel_[p] = p < rows_out_ ? out_pixel(n, z, row * run_.plan.rows_out + p, x0) : 0;
      out_[p] = p < rows_out_ ? static_cast<uint8_t*>(args_.out) + pixel_[p] * bytes : nullptr;
    }
  }

  void find_rows(int64_t n, int64_t z, int64_t row) {
    const DimPhase* dim = run_.phase.dim;
    const int64_t tap_rows = run_.plan.rows / dim[0].taps;
    const int64_t y0 = dim[1].position(row * run_.plan.rows_out, 0);
    const int64_t row_bytes = extent_.in[2] * in_stride(args_);
    for (int64_t i = 0; i < run_.plan.rows; ++i) {
      const int64_t r = i % tap_rows, kd = i / tap_rows;
      image_rows_[i] = padding_row_;
      if (r >= run_.plan.window) continue;
      const int64_t step = run_.plan.rows_out == 1 ? dim[1].in_dilation : 1;
      const int64_t iz = source_index(shape_.padding_mode, dim[0].position(z, kd), extent_.in[0]);
      const int64_t p = y0 + r * step;
      // Below the last output row of an odd number of rows, a window row may lie outside even the
      // padding: its outputs are not stored.
      const int64_t last = extent_.in[1] + shape_.pad_hi[1] - 1;
      if (!shape_.transposed && p > last) continue;
      const int64_t iy = source_index(shape_.padding_mode, p, extent_.in[1]);
      if (iz < 0 || iy < 0) continue;
      image_rows_[i] = args_.input + ((n * extent_.in[0] + iz) * extent_.in[1] + iy) * row_bytes;
    }
  }

  void run_channels(int64_t first, const uint8_t* block, uint8_t* const out[2]) {
    const int64_t left = shape_.out_channels - first;
    strip_.channels = left < layout_.block_channels() ? left : layout_.block_channels();
    strip_.vectors = layout_.vectors(left);
    strip_.channel_phase = first % strip_.out_group;
    const int64_t positions = strip_.vectors * layout_.lanes;
    strip_.init = reinterpret_cast<const int32_t*>(block);
    strip_.addend = reinterpret_cast<const float*>(strip_.init + positions);
    strip_.mult = strip_.addend + positions;
    strip_.order = reinterpret_cast<const int32_t*>(strip_.mult + positions);
    strip_.weights = reinterpret_cast<const int8_t*>(block) + parameter_bytes(layout_, run_.plan);
    const int64_t channel = first / strip_.out_group * strip_.in_group;
    for (int64_t i = 0; i < run_.plan.rows; ++i) {
      rows_[i] = image_rows_[i] + channel;
    }
    for (int p = 0; p < 2; ++p) strip_.out[p] = out[p] ? out[p] + first : nullptr;
    kernel_(strip_);
  }

  void store_floats(int64_t first, int64_t rows, uint8_t* const out[2]) const {
    const int64_t chunks = layout_.chunks(strip_.vectors);
    for (int64_t x = 0; x < strip_.outputs; ++x) {
      for (int64_t p = 0; p < rows; ++p) {
        const int32_t* acc = acc_ + (x * run_.plan.rows_out + p) * chunks * 16;
        float* y = reinterpret_cast<float*>(out[p] + x * strip_.out_step) + first;
        if (strip_.channels < chunks * 16) {
          store_some_floats(acc, chunks, y);
        } else if (chunks == 4) {
          store_block<4>(acc, y);
        } else if (chunks == 2) {
          store_block<2>(acc, y);
        } else {
          store_block<1>(acc, y);
        }
      }
    }
  }

  // Four positions in a row are four channels in a row: gcc keeps them in one register.
  template <int64_t kChunks>
  void store_block(const int32_t* acc, float* y) const {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kChunks * 16; i += 4) {
      float v[4];
      for (int64_t t = 0; t < 4; ++t) {
        v[t] = output_value(acc[i + t], strip_.addend[i + t], strip_.mult[i + t]);
      }
      std::memcpy(y + channel_at(kChunks, i), v, sizeof v);
    }
  }

  void store_some_floats(const int32_t* acc, int64_t chunks, float* y) const {
    for (int64_t i = 0; i < chunks * 16; ++i) {
      const int64_t c = channel_at(chunks, i);
      if (c < strip_.channels) y[c] = output_value(acc[i], strip_.addend[i], strip_.mult[i]);
    }
  }

  // Outputs that the fast epilogue does not write, from the accumulators of a block.
  void store_raw(int64_t first, int64_t rows, const int64_t pixel[2], uint8_t* const out[2]) const {
    const int64_t positions = strip_.vectors * layout_.lanes, channels = shape_.out_channels;
    const int64_t element = output_bytes(packed_.epilogue.output),
                  step = run_.phase.dim[2].out_step;
    const bool adds = part_.epilogue.has_residual;
    for (int64_t x = 0; x < strip_.outputs; ++x) {
      for (int64_t p = 0; p < rows; ++p) {
        const int32_t* acc = acc_ + (x * run_.plan.rows_out + p) * positions;
        const uint8_t* residual =
            adds ? args_.residual + (pixel[p] + x * step) * channels : nullptr;
        for (int64_t i = 0; i < positions; ++i) {
          const int64_t o = first + channel_at(layout_.chunks(strip_.vectors), i);
          if (o >= channels) continue;
          store_output(part_.epilogue, acc[i], strip_.addend[i], strip_.mult[i],
                       out[p] + x * strip_.out_step + o * element, adds ? residual + o : nullptr,
                       args_.residual_signed);
        }
      }
    }
  }

  bool finishes() const { return part_.epilogue.has_table || part_.epilogue.has_residual; }

  // Table and residual on the bytes that the fast epilogue wrote.
  void finish(int64_t rows, const int64_t pixel[2], uint8_t* const out[2]) const {
    const Epilogue& e = part_.epilogue;
    const int64_t channels = shape_.out_channels, step = run_.phase.dim[2].out_step;
    const int64_t runs = step == 1 ? 1 : strip_.outputs;
    const int64_t bytes = step == 1 ? strip_.outputs * channels : channels;
    for (int64_t p = 0; p < rows; ++p) {
      for (int64_t x = 0; x < runs; ++x) {
        uint8_t* q = out[p] + x * strip_.out_step;
        if (e.has_table) lookup_({q, q, e.table, 1, bytes, 0, 0});
        if (!e.has_residual) continue;
        const uint8_t* residual = args_.residual + (pixel[p] + x * step) * channels;
        for (int64_t i = 0; i < bytes; ++i) {
          q[i] = residual_add(e.residual, byte_value(q[i], e.is_signed()),
                              byte_value(residual[i], args_.residual_signed));
        }
      }
    }
  }

  const ConvArgs& args_;
  const PackedConvHeader& packed_;
  const ConvShape shape_;
  const ConvExtent extent_;
  const DepthwiseLayout layout_;
  const PhaseRun& run_;
  const DepthwisePart& part_;
  const uint8_t* blocks_;
  const uint8_t* padding_row_;
  const int64_t* column_offset_;
  const uint8_t** image_rows_;
  const uint8_t** rows_;
  int32_t* acc_;
  uint8_t* out_[2] = {};  // of a strip, like the following
  int64_t pixel_[2] = {}, rows_out_ = 0;
  const DepthwiseKernel kernel_;
  const LookupKernel lookup_;
  DepthwiseStrip strip_ = {};
};

}  // namespace

int64_t depthwise_workspace_bytes(const ConvArgs& args, const Parallel& parallel) {
  const ScratchBytes bytes = scratch_bytes(args);
  return kFillBytes + bytes.padding + bytes.offsets + parallel.threads * bytes.per_thread();
}

void depthwise(const ConvArgs& args, const Parallel& parallel) {
  const PackedConvHeader& packed = *args.packed;
  const ConvShape shape = depthwise_shape(packed.shape);
  const ConvExtent extent = depthwise_extent(packed.shape, args.extent);
  const ScratchBytes bytes = scratch_bytes(args);
  const auto* base = reinterpret_cast<const uint8_t*>(&packed);
  const auto* parts = reinterpret_cast<const int64_t*>(base + packed.parts_offset);
  uint8_t* padding_row = static_cast<uint8_t*>(args.workspace) + kFillBytes;
  auto* column_offset = reinterpret_cast<int64_t*>(padding_row + bytes.padding);
  uint8_t* scratches = padding_row + bytes.padding + bytes.offsets;
  std::memset(padding_row, packed.input_zero_point, static_cast<size_t>(bytes.padding));
  for (int64_t p = 0; p < packed.phases; ++p) {
    const PhaseRun run = phase_run(shape, extent, packed.isa, p);
    const int64_t per_image = run.count[0] * run.row_pairs * run.tiles;
    const int64_t strips = extent.batch * per_image;
    if (strips == 0) continue;
    for (int64_t i = 0; i < run.row_columns; ++i) {
      const int64_t ix =
          source_index(shape.padding_mode, i + run.phase.dim[2].in_offset, extent.in[2]);
      column_offset[i] = ix < 0 ? -1 : ix * in_stride(args);
    }
    const int64_t macs = extent.batch * run.count[0] * run.count[1] * run.count[2] *
                         shape.out_channels * shape.in_per_group() * run.phase.dim[0].taps *
                         run.phase.dim[1].taps * run.plan.columns;
    const int64_t tasks = parallel.threads < strips ? parallel.threads : strips;
    parallel.for_each_range(tasks, macs / kMacsPerNs, [&](int64_t task_begin, int64_t task_end) {
      for (int64_t task = task_begin; task < task_end; ++task) {
        Worker worker(args, run, base + parts[p], padding_row, column_offset,
                      scratches + task * bytes.per_thread(), bytes);
        const int64_t end = strips * (task + 1) / tasks;
        for (int64_t s = strips * task / tasks; s < end;) {
          const int64_t z = s / (run.tiles * run.row_pairs) % run.count[0];
          int64_t tile = s % run.tiles, row = s / run.tiles % run.row_pairs, count = 1;
          if (run.goes_down) {
            row = s % run.row_pairs;
            tile = s / run.row_pairs % run.tiles;
            count = run.row_pairs - row < end - s ? run.row_pairs - row : end - s;
          }
          worker.run_strips(s / per_image, z, row, count, tile);
          s += count;
        }
      }
    });
  }
}

}  // namespace qk
