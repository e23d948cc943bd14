#include "csrc/plan/move.h"

#include <cstring>

#include "csrc/image/image.h"

namespace qk::plan {
namespace {

constexpr int64_t kBytesPerNs = 8;
constexpr int64_t kTaskBytes = 16384;
constexpr int64_t kTile = 32;  // rows and columns of a transposed tile

void copy_rows(const LookupRows& run) {
  for (int64_t row = 0; row < run.rows; ++row) {
    std::memcpy(run.out + row * run.out_stride, run.q + row * run.q_stride,
                static_cast<size_t>(run.n));
  }
}

// The layout as planes x rows x columns: its two innermost dimensions apart.
struct Planes {
  StridedLayout<2> outer;
  int64_t rows = 1, columns, out_row = 0, in_row = 0, out_column, in_column;

  explicit Planes(const StridedLayout<2>& layout) {
    const int last = layout.dims - 1;
    columns = layout.size[last];
    out_column = layout.stride[0][last];
    in_column = layout.stride[1][last];
    if (last > 0) {
      rows = layout.size[last - 1];
      out_row = layout.stride[0][last - 1];
      in_row = layout.stride[1][last - 1];
    }
    outer = layout;
    outer.dims = last + 1;  // the two innermost become one element, so that rows() counts planes
    outer.size[last] = 1;
    if (last > 0) outer.size[last - 1] = 1;
  }
};

// Calls f(out offset, in offset, first row, rows) in elements, for pieces of planes.
template <typename F>
void for_each_piece(const Planes& planes, int64_t row_bytes, const Parallel& parallel, const F& f) {
  const int64_t fit = kTaskBytes / (row_bytes > 0 ? row_bytes : 1);
  const int64_t step = fit < kTile ? kTile : fit / kTile * kTile;
  const int64_t pieces = (planes.rows + step - 1) / step, count = planes.outer.rows() * pieces;
  parallel.for_each_range(count, planes.outer.rows() * planes.rows * row_bytes / kBytesPerNs,
                          [&](int64_t begin, int64_t end) {
                            StridedCursor<2> cursor(planes.outer, begin / pieces);
                            for (int64_t task = begin; task < end; ++task) {
                              const int64_t row = task % pieces * step, left = planes.rows - row;
                              f(cursor.offset[0] + row * planes.out_row,
                                cursor.offset[1] + row * planes.in_row, left < step ? left : step);
                              if ((task + 1) % pieces == 0) cursor.next_row();
                            }
                          });
}

template <typename T>
void move_elements(const MoveArgs& args, const Planes& planes, const Parallel& parallel) {
  const T* in = reinterpret_cast<const T*>(args.in);
  T* out = reinterpret_cast<T*>(args.out);
  const auto value = [&](T x) {
    if constexpr (sizeof(T) == 1) {
      return args.table != nullptr ? args.table[x] : x;
    } else {
      return x;
    }
  };
  for_each_piece(planes, planes.columns * static_cast<int64_t>(sizeof(T)), parallel,
                 [&](int64_t out_first, int64_t in_first, int64_t rows) {
                   for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
                     const int64_t r1 = rows < r0 + kTile ? rows : r0 + kTile;
                     for (int64_t c0 = 0; c0 < planes.columns; c0 += kTile) {
                       const int64_t c1 = planes.columns < c0 + kTile ? planes.columns : c0 + kTile;
                       for (int64_t r = r0; r < r1; ++r) {
                         const T* from = in + in_first + r * planes.in_row;
                         T* to = out + out_first + r * planes.out_row;
                         for (int64_t c = c0; c < c1; ++c) {
                           to[c * planes.out_column] = value(from[c * planes.in_column]);
                         }
                       }
                     }
                   }
                 });
}

}  // namespace

void move(const MoveArgs& args, const Parallel& parallel) {
  const Planes planes(args.layout);
  if (planes.in_column == 1 && planes.out_column == 1) {
    const LookupKernel kernel = args.table != nullptr ? select_lookup_kernel() : &copy_rows;
    const int64_t bytes = args.element;
    const auto piece = [&](int64_t out, int64_t in, int64_t rows, int64_t columns) {
      kernel({.q = args.in + in * bytes,
              .out = args.out + out * bytes,
              .table = args.table,
              .rows = rows,
              .n = columns * bytes,
              .q_stride = planes.in_row * bytes,
              .out_stride = planes.out_row * bytes});
    };
    if (planes.columns * bytes >= kTaskBytes) {  // wide rows go in pieces, narrow ones many at once
      const int64_t work_ns = args.layout.rows() * planes.columns * bytes / kBytesPerNs;
      for_each_run(args.layout, parallel, kTaskBytes / bytes, work_ns,
                   [&](const StridedCursor<2>& cursor, int64_t first, int64_t n) {
                     piece(cursor.offset[0] + first, cursor.offset[1] + first, 1, n);
                   });
      return;
    }
    for_each_piece(
        planes, planes.columns * bytes, parallel,
        [&](int64_t out, int64_t in, int64_t rows) { piece(out, in, rows, planes.columns); });
    return;
  }
  if (args.element == 1 && args.table == nullptr && planes.in_row == 1 && planes.out_column == 1) {
    const InterleaveKernel kernel = select_interleave_kernel();
    return for_each_piece(planes, planes.columns, parallel,
                          [&](int64_t out, int64_t in, int64_t rows) {
                            kernel({.planes = args.in + in,
                                    .plane_stride = planes.in_column,
                                    .channels = planes.columns,
                                    .out = args.out + out,
                                    .pixel_stride = planes.out_row,
                                    .n = rows});
                          });
  }
  if (args.element == 1) {
    move_elements<uint8_t>(args, planes, parallel);
  } else if (args.element == 2) {
    move_elements<uint16_t>(args, planes, parallel);
  } else {
    move_elements<uint32_t>(args, planes, parallel);
  }
}

void resize(const ResizeArgs& args, const Parallel& parallel) {
  const int64_t lines = args.batch * args.out_size[0] * args.out_size[1];
  const int64_t out_line = args.out_size[2] * args.pixel_bytes;
  parallel.for_each_range(lines, lines * out_line / kBytesPerNs, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t y = line % args.out_size[1], z = line / args.out_size[1] % args.out_size[0];
      const int64_t n = line / (args.out_size[1] * args.out_size[0]);
      const int64_t row =
          (n * args.in_size[0] + args.index[0][z]) * args.in_size[1] + args.index[1][y];
      const uint8_t* in = args.in + row * args.in_size[2] * args.pixel_bytes;
      uint8_t* out = args.out + line * out_line;
      for (int64_t x = 0; x < args.out_size[2]; ++x, out += args.pixel_bytes) {
        std::memcpy(out, in + args.index[2][x] * args.pixel_bytes,
                    static_cast<size_t>(args.pixel_bytes));
      }
    }
  });
}

}  // namespace qk::plan
