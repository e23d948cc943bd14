// Packing of weights into the steps of byte_steps.h.
#include "csrc/gemm/byte_steps.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "csrc/gemm/igemm.h"

namespace qk {
namespace {

// The most that the positive or the negative weights of an int16 may add up to.
constexpr int kMostLoad = 128;
// Quads among which a partner is looked for.
constexpr size_t kWindow = 128;
// In the first order a quad is next to its neighbours in L1. Up to this K it is taken in others not
// only because it overloads but to be coupled.
constexpr int64_t kFreelyOrderedK = 192, kMostOrderedK = 8192;
constexpr int64_t kSampledGroups = 4;
// Picoseconds for 16 rows and four columns, measured on a Zen 3: a double step, a single one; a
// quad of A in one more order, for all columns. With more for a quad, 0.95 of what pairs take
// (x86_avx2.cc), these are faster: steps of a varying number are harder to predict.
constexpr int64_t kDoubleCost = 4780, kSingleCost = 2940, kOrderCost = 700, kMostCost = 3110;

// Four weights of four columns, and what they add to the int16 of a step: [column][pair][sign].
struct Quad {
  int8_t weight[4][4];
  uint8_t load[16];
  int32_t source;

  void find_load() {
    for (int pair = 0; pair < 8; ++pair) {
      const int a = weight[pair / 2][2 * (pair % 2)], b = weight[pair / 2][2 * (pair % 2) + 1];
      const int positive = std::max(a, 0) + std::max(b, 0);
      load[2 * pair] = static_cast<uint8_t>(positive);
      load[2 * pair + 1] = static_cast<uint8_t>(std::min(positive - a - b, 255));
    }
  }
  int peak() const { return *std::max_element(load, load + 16); }
  int overloads() const {
    return static_cast<int>(
        std::count_if(load, load + 16, [](uint8_t l) { return l > kMostLoad; }));
  }
  // Leaves half of each overloaded pair behind, and returns the other half.
  Quad split() {
    Quad rest{};
    rest.source = source;
    for (int pair = 0; pair < 8; ++pair) {
      if (load[2 * pair] <= kMostLoad && load[2 * pair + 1] <= kMostLoad) continue;
      for (int i = 0; i < 2; ++i) {
        int8_t& w = weight[pair / 2][2 * (pair % 2) + i];
        const auto half = static_cast<int8_t>(w / 2);
        rest.weight[pair / 2][2 * (pair % 2) + i] = half;
        w = static_cast<int8_t>(w - half);
      }
    }
    find_load();
    rest.find_load();
    return rest;
  }
};

// No load is above kMostLoad.
bool may_couple(const Quad& a, const Quad& b) {
  uint8_t over = 0;
  for (int i = 0; i < 16; ++i) {
    over |= static_cast<uint8_t>(a.load[i] > static_cast<uint8_t>(kMostLoad - b.load[i]));
  }
  return over == 0;
}

// A quad in the orders in which it does not overload, the one with the lowest peak first.
struct Choices {
  Quad quad[kMostOrders];
  int count = 0;

  int peak() const { return quad[0].peak(); }
  void add(const Quad& q) {
    quad[count] = q;
    if (q.peak() < quad[0].peak()) std::swap(quad[0], quad[count]);
    ++count;
  }
};

// The steps of a group: doubles, two quads each, then singles.
struct Steps {
  std::vector<Quad> quads;
  int64_t doubles = 0;

  int64_t singles() const { return static_cast<int64_t>(quads.size()) - 2 * doubles; }
  int64_t cost() const { return doubles * kDoubleCost + singles() * kSingleCost; }
};

class Group {
 public:
  Group(const PackSource& source, int64_t first_column)
      : k_(source.taps * source.depth), weight_(static_cast<size_t>(4 * kept_quads(k_) * 4)) {
    const int64_t columns = std::min(kGroupColumns, source.n - first_column);
    for (int64_t c = 0; c < columns; ++c) {
      const int8_t* from = source.weight + (first_column + c) * source.stride_n;
      int8_t* to = weight_.data() + c * 4 * kept_quads(k_);
      for (int64_t tap = 0; tap < source.taps; ++tap, from += source.stride_tap) {
        if (source.stride_k == 1) {
          std::memcpy(to, from, static_cast<size_t>(source.depth));
        } else {
          for (int64_t k = 0; k < source.depth; ++k) to[k] = from[k * source.stride_k];
        }
        to += source.depth;
      }
    }
  }

  Steps steps(int64_t orders) const {
    std::vector<Choices> all;
    for (int64_t q = 0; q < (k_ + 3) / 4; ++q) {
      Choices choices;
      Quad least = quad(q, 0);
      if (least.overloads() == 0) choices.add(least);
      for (int64_t order = 1; order < orders && (choices.count == 0 || k_ <= kFreelyOrderedK);
           ++order) {
        const Quad other = quad(q, order);
        if (other.overloads() == 0) choices.add(other);
        if (other.overloads() < least.overloads()) least = other;
      }
      if (choices.count == 0) {
        Choices rest;
        rest.add(least.split());
        all.push_back(rest);
        choices.add(least);
      }
      all.push_back(choices);
    }
    return couple(all);
  }

 private:
  Quad quad(int64_t index, int64_t order) const {
    Quad quad;
    quad.source = static_cast<int32_t>(order * kept_quads(k_) + index);
    for (int c = 0; c < 4; ++c) {
      const int8_t* w = weight_.data() + c * 4 * kept_quads(k_) + 4 * index;
      for (int i = 0; i < 4; ++i) quad.weight[c][i] = w[kQuadOrder[order][i]];
    }
    quad.find_load();
    return quad;
  }

  // The quad with the highest peak first, with the next that goes with it.
  static Steps couple(std::vector<Choices>& all) {
    Steps steps;
    std::vector<Quad> singles;
    std::vector<std::pair<int, Choices*>> window;
    for (size_t first = 0; first < all.size(); first += kWindow) {
      window.clear();
      for (size_t i = first; i < std::min(all.size(), first + kWindow); ++i) {
        window.emplace_back(-all[i].peak(), &all[i]);
      }
      std::sort(window.begin(), window.end());
      for (size_t i = 0; i < window.size(); ++i) {
        const Choices& a = *window[i].second;
        if (a.count == 0) continue;
        bool coupled = false;
        for (size_t j = i + 1; j < window.size() && !coupled; ++j) {
          coupled = take(a, *window[j].second, steps);
        }
        if (!coupled) singles.push_back(a.quad[0]);
      }
    }
    steps.quads.insert(steps.quads.end(), singles.begin(), singles.end());
    return steps;
  }

  // Couples a and b if they go together in any of their orders.
  static bool take(const Choices& a, Choices& b, Steps& steps) {
    for (int i = 0; i < a.count; ++i) {
      for (int j = 0; j < b.count; ++j) {
        if (!may_couple(a.quad[i], b.quad[j])) continue;
        steps.quads.push_back(a.quad[i]);
        steps.quads.push_back(b.quad[j]);
        ++steps.doubles;
        b.count = 0;
        return true;
      }
    }
    return false;
  }

  int64_t k_;
  std::vector<int8_t> weight_;
};

int64_t record_bytes(int64_t quads) {
  return (2 * quads + 31) / 32 * 32 + (16 * quads + 31) / 32 * 32;
}

int64_t heads_bytes(int64_t groups) {
  return (groups * static_cast<int64_t>(sizeof(ByteGroup)) + 31) / 32 * 32;
}

// Of which kMostOrders are best, or one, or, if pairs are, none, by some of the groups.
int32_t choose_orders(const PackSource& source) {
  const int64_t k = source.taps * source.depth, groups = (source.n + 3) / 4, quads = (k + 3) / 4;
  if (k == 0) return 0;
  const int64_t sampled = std::min(groups, kSampledGroups);
  int64_t one = 0, most = 0;
  for (int64_t i = 0; i < sampled; ++i) {
    const Group group(source, i * groups / sampled * kGroupColumns);
    one += group.steps(1).cost();
    if (k <= kMostOrderedK) most += group.steps(kMostOrders).cost();
  }
  const int64_t copies =
      sampled * quads * (kMostOrders - 1) * kOrderCost / std::max(groups, int64_t{1});
  const bool ordered = k <= kMostOrderedK && most + copies < one;
  const int64_t least = ordered ? most + copies : one;
  if (least >= sampled * quads * kMostCost) return 0;
  return ordered ? kMostOrders : 1;
}

}  // namespace

int64_t byte_steps_bytes(int64_t columns, int64_t k) {
  const int64_t groups = columns / kGroupColumns, quads = (k + 3) / 4;
  return heads_bytes(groups) + groups * record_bytes(quads + quads / 3);
}

int32_t pack_byte_steps(const PackSource& source, int64_t columns, void* panels) {
  auto* base = static_cast<uint8_t*>(panels);
  const int64_t groups = columns / kGroupColumns;
  const int64_t size = byte_steps_bytes(columns, source.taps * source.depth);
  const int32_t orders = source.few_rows ? 0 : choose_orders(source);
  int64_t at = heads_bytes(groups);
  for (int64_t g = 0; orders != 0 && g * kGroupColumns < source.n; ++g) {
    const Steps steps = Group(source, g * kGroupColumns).steps(orders);
    const auto count = static_cast<int64_t>(steps.quads.size());
    if (at + record_bytes(count) > size || steps.singles() > UINT16_MAX) {
      std::memset(panels, 0, static_cast<size_t>(at));
      return 0;
    }
    const ByteGroup head{static_cast<uint32_t>(at / 32), static_cast<uint16_t>(steps.doubles),
                         static_cast<uint16_t>(steps.singles())};
    std::memcpy(base + g * static_cast<int64_t>(sizeof(head)), &head, sizeof(head));
    uint8_t *sources = base + at, *weights = sources + (2 * count + 31) / 32 * 32;
    for (int64_t i = 0; i < count; ++i) {
      const Quad& quad = steps.quads[static_cast<size_t>(i)];
      const auto index = static_cast<uint16_t>(quad.source);
      std::memcpy(sources + 2 * i, &index, 2);
      std::memcpy(weights + 16 * i, quad.weight, 16);
    }
    at += record_bytes(count);
  }
  return orders;
}

}  // namespace qk
