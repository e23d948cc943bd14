#include "csrc/foreach/foreach.h"

#include <limits>

#include "csrc/fake_quant/fake_quant.h"
#include "csrc/fake_quant_backward/backward.h"
#include "csrc/observe/observe.h"
#include "csrc/quantize/quantize.h"

namespace qk {
namespace {

// Elements of a task: a few rows, or one.
constexpr int64_t kTaskElements = 16384;

int64_t rows_per_task(const ForeachItem& item) {
  const int64_t rows = item.inner > 0 ? kTaskElements / item.inner : item.rows;
  return rows > 0 ? rows : 1;
}
int64_t tasks_of(const ForeachItem& item) {
  const int64_t rows = rows_per_task(item);
  return (item.rows + rows - 1) / rows;
}

// Calls f(item, row) for each row of each item.
template <typename Item, typename F>
void for_each_row(const Item* items, int64_t count, const Parallel& parallel, const F& f) {
  int64_t tasks = 0, elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    tasks += tasks_of(items[i].in);
    elements += items[i].in.rows * items[i].in.inner;
  }
  parallel.for_each_range(tasks, elements / 4, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // task of items[i]
    for (int64_t i = 0; i < count && first < end; ++i) {
      const ForeachItem& item = items[i].in;
      const int64_t item_tasks = tasks_of(item), step = rows_per_task(item);
      const int64_t from = begin > first ? begin - first : 0;
      const int64_t to = end - first < item_tasks ? end - first : item_tasks;
      for (int64_t row = from * step; row < to * step && row < item.rows; ++row) f(items[i], row);
      first += item_tasks;
    }
  });
}

struct RowGrid {
  float inv_scale;
  GridSpan span;

  RowGrid(const ForeachItem& item, int64_t row)
      : inv_scale(1.0f / item.scale[row]),
        span{item.scale + row, &inv_scale, item.zero_point + row, false} {}
  RowGrid(const RowGrid&) = delete;
};

RowFlag choose_grid(const ForeachItem& item, int64_t row, const void* x, const GridRule& rule) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  float low = kInf, high = -kInf;
  const bool nan = select_minmax_kernel(item.type)(
      {.x = x, .n = item.inner, .low = &low, .high = &high, .per_element = false});
  if (nan || (item.inner > 0 && !(is_finite(low) && is_finite(high)))) return kRowNotFinite;
  if (item.inner == 0) low = high = 0;
  const float scale = choose_scale(low, high, rule);
  const int32_t zp = choose_zero_point(low, scale, rule);
  item.scale[row] = scale;
  item.zero_point[row] = zp;
  const float inv_scale = 1.0f / scale;
  const bool inside = fake_quant_passes(low * inv_scale, zp, rule.qmin, rule.qmax) &&
                      fake_quant_passes(high * inv_scale, zp, rule.qmin, rule.qmax);
  return inside ? kRowFine : kRowClipped;
}

}  // namespace

void foreach_fake_quant(const ForeachQuantArgs& args, const Parallel& parallel) {
  for_each_row(args.items, args.count, parallel, [&](const ForeachQuantItem& quant, int64_t row) {
    const ForeachItem& item = quant.in;
    const int64_t bytes = float_bytes(item.type), offset = row * item.inner;
    const char* x = static_cast<const char*>(item.x) + offset * bytes;
    if (quant.flags != nullptr) {
      const RowFlag flag = choose_grid(item, row, x, args.rule);
      quant.flags[row] = flag;
      if (flag == kRowNotFinite) return;
    }
    const RowGrid grid(item, row);
    if (quant.y != nullptr) {
      select_fake_quant_kernel(item.type)({.x = x,
                                           .y = static_cast<char*>(quant.y) + offset * bytes,
                                           .n = item.inner,
                                           .grid = grid.span,
                                           .qmin = args.rule.qmin,
                                           .qmax = args.rule.qmax,
                                           .stream = false});
    }
    if (quant.q != nullptr) {
      select_quantize_kernel(item.type)({.x = x,
                                         .q = static_cast<uint8_t*>(quant.q) + offset,
                                         .n = item.inner,
                                         .grid = grid.span,
                                         .q_signed = args.q_signed,
                                         .qmin = args.rule.qmin,
                                         .qmax = args.rule.qmax});
    }
  });
}

void foreach_fake_quant_backward(const ForeachBackwardArgs& args, const Parallel& parallel) {
  for_each_row(args.items, args.count, parallel, [&](const ForeachBackwardItem& back, int64_t row) {
    const ForeachItem& item = back.in;
    const int64_t offset = row * item.inner * float_bytes(item.type);
    const RowGrid grid(item, row);
    select_fake_quant_backward_kernel(item.type)(
        {.grad = static_cast<const char*>(back.grad) + offset,
         .x = static_cast<const char*>(item.x) + offset,
         .out = static_cast<char*>(back.out) + offset,
         .n = item.inner,
         .grid = grid.span,
         .qmin = args.qmin,
         .qmax = args.qmax,
         .stream = false,
         .clips = false,
         .partial = nullptr,
         .columns = nullptr});
  });
}

}  // namespace qk
