// Concatenations, and what lies in them from the start.
//
// A value lives in the output of a concatenation of channels if it goes there as it is, its step
// can write pixels with gaps between them, and everybody else who reads it can read such pixels.
// The output of a concatenation lives in a longer one that begins with the same values: so all of
// a dense block is one buffer.
#include <algorithm>

#include "csrc/plan/builder.h"

namespace qk::plan {
namespace {

bool is_identity(const uint8_t* table) {
  for (int i = 0; i < 256; ++i) {
    if (table[i] != i) return false;
  }
  return true;
}

}  // namespace

bool Builder::writes_slices(const Step& step) const {
  switch (step.kind) {
    case StepKind::kConv:
      return conv_writes_slices(*packed_conv(writer_[step.output]));
    case StepKind::kMaxPool:
    case StepKind::kAvgPool:
    case StepKind::kAdaptiveAvgPool:
      return true;
    case StepKind::kCat:
      return step.as<CatStep>().dim == 1;
    default:
      return false;
  }
}

bool Builder::reads_slices(const Step& step, int value) const {
  switch (step.kind) {
    case StepKind::kConv:
      return conv_reads_slices(*packed_conv(writer_[step.output])) &&
             (step.inputs.size() == 1 || step.inputs[1] != value);
    case StepKind::kMaxPool:
    case StepKind::kAvgPool:
    case StepKind::kAdaptiveAvgPool:
    case StepKind::kCat:
      return true;
    default:
      return false;
  }
}

void Builder::find_parts_of_cats() {
  const size_t count = model_.values.size();
  cat_of_.assign(count, -1);
  prefix_.assign(count, 0);
  // Whether everybody who reads the value can read it where it is a slice.
  std::vector<bool> shared(count, true);
  for (const int value : model_.outputs) shared[value] = false;
  for (const Step& step : model_.steps) {
    for (const int value : step.inputs) shared[value] = shared[value] && reads_slices(step, value);
  }
  std::vector<int> begun_by(count, -1);  // by value: the last cat that begins with it
  for (size_t i = 0; i < model_.steps.size(); ++i) {
    const Step& cat = model_.steps[i];
    if (cat.kind != StepKind::kCat || cat.as<CatStep>().dim != 1 ||
        model_.values[cat.output].rank < 3) {
      continue;
    }
    const DType dtype = model_.values[cat.output].dtype;
    const auto as_it_is = [&](const Step& step, size_t k) {
      return model_.values[step.inputs[k]].dtype == dtype &&
             is_identity(constants_[step.as<CatStep>().tables] + 256 * k);
    };
    int& before = begun_by[cat.inputs[0]];
    if (before >= 0) {
      const Step& part = model_.steps[before];
      const size_t n = part.inputs.size();
      bool same = shared[part.output] && cat_of_[part.output] < 0 && n <= cat.inputs.size() &&
                  model_.values[part.output].dtype == dtype;
      for (size_t k = 0; same && k < n; ++k) {
        same = part.inputs[k] == cat.inputs[k] && as_it_is(part, k) && as_it_is(cat, k);
      }
      same = same && std::count(cat.inputs.begin(), cat.inputs.end(), part.output) == 0;
      if (same) {
        cat_of_[part.output] = static_cast<int>(i);
        prefix_[cat.output] = static_cast<int>(n);
      }
    }
    before = static_cast<int>(i);
    for (size_t k = prefix_[cat.output]; k < cat.inputs.size(); ++k) {
      const int value = cat.inputs[k];
      const bool first = std::find(cat.inputs.begin(), cat.inputs.end(), value) ==
                         cat.inputs.begin() + static_cast<int64_t>(k);
      if (cat_of_[value] < 0 && first && writer_[value] >= 0 && shared[value] &&
          writes_slices(model_.steps[writer_[value]]) && as_it_is(cat, k)) {
        cat_of_[value] = static_cast<int>(i);
      }
    }
  }
}

View Builder::part_of_cat(int value) {
  const Step& cat = model_.steps[cat_of_[value]];
  View& whole = views_[cat.output];
  if (whole.buffer < 0) {
    whole = output_view(cat);
    allocate_pixels(cat, &whole);
  }
  const auto at = std::find(cat.inputs.begin(), cat.inputs.end(), value);
  int64_t first = 0;  // of a cat that this one begins with
  if (at != cat.inputs.end()) {
    for (auto before = cat.inputs.begin(); before != at; ++before) {
      first += shapes_.values[*before][1];
    }
  }
  return narrow(whole, 1, first, shapes_.values[value][1]);
}

void Builder::allocate_pixels(const Step& step, View* out) {
  if (cat_of_[step.output] >= 0) {
    *out = part_of_cat(step.output);
  } else {
    set_channels_last(out);
    allocate(out);
  }
}

void Builder::mention_cat(const Step& step) {
  const int cat = cat_of_[step.output];
  if (cat >= 0) program_.info.back().output += " in " + model_.steps[cat].name;
}

void Builder::lower_cat(const Step& step, View* out) {
  const auto& s = step.as<CatStep>();
  if (out->buffer < 0) {
    bool pixels = out->rank() >= 3;
    for (const int value : step.inputs) {
      int64_t stride;
      const View& x = views_[value];
      pixels = pixels && (x.size.elements() == 0 || pixel_stride(x, &stride));
    }
    if (pixels || cat_of_[step.output] >= 0) {
      allocate_pixels(step, out);
    } else {
      set_contiguous(out);
      allocate(out);
    }
  }
  int64_t first = 0;
  for (size_t i = 0; i < step.inputs.size(); ++i) {
    const int value = step.inputs[i];
    const View& x = views_[value];
    const View to = narrow(*out, s.dim, first, x.size[s.dim]);
    const uint8_t* table = constants_[s.tables] + 256 * i;
    const bool there = static_cast<int>(i) < prefix_[step.output] ||
                       (x.buffer == to.buffer && x.offset == to.offset);
    if (!there && x.size.elements() > 0) {
      emit_move(x, to, is_identity(table) ? nullptr : table, "cat");
      mention_cat(step);
    }
    first += x.size[s.dim];
  }
}

}  // namespace qk::plan
