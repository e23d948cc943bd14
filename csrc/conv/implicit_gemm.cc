// Runs a convolution as a GEMM: lays out the workspace, pads the image, and gives each thread its
// share of the blocks (blocks.h), whose rows are found by pointers (block_rows.h).
#include "csrc/conv/implicit_gemm.h"

#include <cstring>

#include "csrc/conv/block_rows.h"

namespace qk {
namespace {

// Padded images at a time.
constexpr int64_t kImageBytes = 512 * 1024;
// Of one thread, for estimates: bytes per nanosecond of a row copy, and of one from floats.
constexpr int64_t kCopiedPerNs = 16, kQuantizedPerNs = 8;

struct ScratchBytes {
  int64_t pointers = 0, offsets = 0, windows = 0, codes = 0;
  int64_t total() const { return pointers + 2 * offsets + windows + codes; }
};

// `first`: the run of phase 0.
ScratchBytes scratch_bytes(const ConvArgs& args, const PhaseRun& first, int64_t threads) {
  ScratchBytes bytes;
  for (int64_t p = 0; p < args.packed->phases; ++p) {
    const PhaseRun run = p == 0 ? first : phase_run(args, p, threads);
    const int64_t block = run.block < run.pixels ? run.block : run.pixels;
    if (!run.direct) {
      const int64_t sharing = run.plan.even_rows ? run.count[2] : 1;
      bytes.pointers = most(bytes.pointers, align_up(ceil_div(block, sharing) * run.plan.taps * 8));
      bytes.windows = most(bytes.windows, align_up(run.windows * run.plan.taps * run.plan.depth));
    }
    if (!run.phase.dense_output()) bytes.offsets = most(bytes.offsets, align_up(block * 8));
    if (args.dequantized.scale != nullptr) {
      const int64_t columns = args.packed->groups_per_set * args.packed->shape.out_per_group();
      bytes.codes = most(bytes.codes, align_up(block * columns));
    }
  }
  return bytes;
}

// Only an ordinary convolution pads its image, and it has one phase.
PaddedImage image_of(const ConvArgs& args, const PhaseRun& first) {
  return args.packed->shape.transposed ? PaddedImage{} : first.image;
}

// A row of the matrix that is all padding, at the start of the workspace: as long as a run of taps,
// and as a pixel, because pointers to it move along with the groups; and as a padded row.
int64_t padding_bytes(const ConvArgs& args, const PaddedImage& image) {
  const ConvShape& shape = args.packed->shape;
  const int64_t run = most(shape.kernel[2] * shape.in_channels, image.row_bytes);
  return align_up(most(run, kFillBytes));
}

void run_block(const ConvArgs& args, const PhaseRun& run, int64_t phase, int64_t block,
               int64_t panel_begin, int64_t panel_end, const Shared& shared,
               const Scratch& scratch) {
  const PackedConvHeader& packed = *args.packed;
  const ConvShape& shape = packed.shape;
  const int64_t element = out_element(args);
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
    gemm.matrix = conv_part(packed, phase * packed.sets + set);
    gemm.row_end = end - begin;
    const int64_t panels = panel_count(gemm.matrix.header->n, packed.isa);
    gemm.panel_begin = most(panel_begin - set * set_panels, 0);
    gemm.panel_end = clamp(panel_end - set * set_panels, 0, panels);
    if (run.direct) {
      gemm.a = args.input + begin * in_stride(args) + set * in_set;
      gemm.a_row_stride = in_stride(args);
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
    if (args.dequantized.scale != nullptr) {
      igemm_dequantized(gemm, args.dequantized, scratch.codes);
    } else {
      igemm(gemm);
    }
  }
}

void run_images(const ConvArgs& args, const Parallel& parallel) {
  const PackedConvHeader& packed = *args.packed;
  const ConvShape& shape = packed.shape;
  const PhaseRun first = phase_run(args, 0, parallel.threads);
  const PaddedImage padded_image = image_of(args, first);
  const int64_t padding = padding_bytes(args, padded_image);
  auto* workspace = static_cast<uint8_t*>(args.workspace);
  std::memset(workspace, packed.input_zero_point, static_cast<size_t>(padding));
  uint8_t* image = workspace + padding;
  uint8_t* scratches = image + padded_image.bytes();
  const Shared shared{workspace, image};
  const ScratchBytes bytes = scratch_bytes(args, first, parallel.threads);

  const int64_t panels = panels_of_phase(packed);
  for (int64_t p = 0; p < packed.phases; ++p) {
    const PhaseRun run = p == 0 ? first : phase_run(args, p, parallel.threads);
    if (run.pixels == 0) continue;
    const PaddedRows padded(args, run.image);
    const int64_t per_ns = args.floats.x != nullptr ? kQuantizedPerNs : kCopiedPerNs;
    parallel.for_each_range(run.image.rows, run.image.bytes() / per_ns,
                            [&](int64_t begin, int64_t end) {
                              for (int64_t row = begin; row < end; ++row) {
                                padded.write(row, image + row * run.image.row_bytes);
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
                              base + bytes.pointers + 2 * bytes.offsets,
                              base + bytes.total() - bytes.codes};
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
  const int64_t batch = args.extent.batch;
  if (batch < 2) return batch;
  const int64_t bytes = image_of(args, phase_run(args, 0, 1)).bytes();
  if (bytes <= kImageBytes) return batch;
  return clamp(kImageBytes / (bytes / batch), 1, batch);
}

// `count` images from image `first` on.
ConvArgs images(const ConvArgs& args, int64_t first, int64_t count) {
  const PackedConvHeader& packed = *args.packed;
  const int64_t pixels = args.extent.out_pixels();
  ConvArgs part = args;
  part.extent.batch = count;
  if (args.floats.x != nullptr) {
    part.floats = args.floats.from(first);
  } else {
    part.input += first * args.extent.in_pixels() * in_stride(args);
  }
  part.out =
      static_cast<uint8_t*>(args.out) + first * pixels * out_stride(args) * out_element(args);
  if (packed.epilogue.has_residual) part.residual += first * pixels * packed.shape.out_channels;
  return part;
}

int64_t group_bytes(const ConvArgs& args, int64_t threads) {
  const PhaseRun first = phase_run(args, 0, threads);
  const PaddedImage image = image_of(args, first);
  return padding_bytes(args, image) + image.bytes() +
         threads * scratch_bytes(args, first, threads).total();
}

}  // namespace

PackedMatrix conv_part(const PackedConvHeader& packed, int64_t index) {
  const auto* base = reinterpret_cast<const uint8_t*>(&packed);
  const auto* offsets = reinterpret_cast<const int64_t*>(base + packed.parts_offset);
  const int64_t end = index + 1 < packed.parts ? offsets[index + 1] : packed.parts_end();
  PackedMatrix matrix;
  view_packed(base + offsets[index], end - offsets[index], &matrix);
  return matrix;
}

bool conv_adds_in_place(const PackedConvHeader& packed) {
  bool in_place = packed.kind == ConvKind::kIgemm && !packed.has_fill;
  for (int64_t i = 0; in_place && i < packed.parts; ++i) {
    in_place = igemm_adds_in_place(*conv_part(packed, i).header);
  }
  return in_place;
}

bool conv_pads_image(const PackedConvHeader& packed) {
  const ConvShape& shape = packed.shape;
  return packed.kind == ConvKind::kIgemm && !shape.transposed &&
         gemm_plan(shape, conv_phase(shape, 0), packed.groups_per_set, packed.isa).padded_image;
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
    gemm.matrix = conv_part(packed, packed.parts - 1);
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
  const int64_t batch = args.extent.batch, step = images_at_once(args);
  const int64_t group = group_bytes(images(args, 0, step), parallel.threads);
  if (step == 0 || batch % step == 0) return group;
  // The last images may be cut into larger blocks.
  return most(group, group_bytes(images(args, 0, batch % step), parallel.threads));
}

void implicit_gemm(const ConvArgs& args, const Parallel& parallel) {
  const int64_t batch = args.extent.batch, step = images_at_once(args);
  for (int64_t first = 0; first < batch; first += step) {
    run_images(images(args, first, batch - first < step ? batch - first : step), parallel);
  }
}

}  // namespace qk
