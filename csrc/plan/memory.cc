#include "csrc/plan/memory.h"

#include <algorithm>

namespace qk::plan {

int64_t place_buffers(std::vector<Lifetime>* buffers) {
  std::vector<Lifetime*> order;
  for (Lifetime& buffer : *buffers) order.push_back(&buffer);
  std::stable_sort(order.begin(), order.end(),
                   [](const Lifetime* a, const Lifetime* b) { return a->bytes > b->bytes; });
  std::vector<const Lifetime*> placed;  // by offset
  int64_t arena = 0;
  for (Lifetime* buffer : order) {
    const int64_t bytes = align_up(buffer->bytes);
    int64_t end = 0, best = -1, best_gap = INT64_MAX;
    for (const Lifetime* other : placed) {
      if (other->last < buffer->first || buffer->last < other->first) continue;
      const int64_t gap = other->offset - end;
      if (gap >= bytes && gap < best_gap) {
        best = end;
        best_gap = gap;
      }
      end = std::max(end, other->offset + align_up(other->bytes));
    }
    buffer->offset = best >= 0 ? best : end;
    arena = std::max(arena, buffer->offset + bytes);
    placed.insert(std::upper_bound(
                      placed.begin(), placed.end(), buffer,
                      [](const Lifetime* a, const Lifetime* b) { return a->offset < b->offset; }),
                  buffer);
  }
  return arena;
}

}  // namespace qk::plan
