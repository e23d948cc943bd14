// Normative: the formulas of batch_norm.h, one element at a time.
#include "csrc/batch_norm/batch_norm.h"

namespace qk {
namespace {

template <bool kLearned>
void backward_rows(const NormBackwardRun& run) {
  for (int64_t j = 0; j < run.at.n; ++j) {
    if (run.out == nullptr) {
      norm_sums_column<kLearned>(run, j);
    } else {
      for (int64_t r = 0; r < run.at.rows; ++r) norm_out_element<kLearned>(run, r, j);
    }
  }
}

}  // namespace

bool norm_statistics_scalar(const StatisticsRun& run) {
  bool nan = false;
  for (int64_t j = 0; j < run.at.n; ++j) nan |= statistics_column(run, j);
  return nan;
}

void norm_fake_quant_scalar(const NormFakeQuantRun& run) {
  for (int64_t r = 0; r < run.at.rows; ++r) {
    for (int64_t j = 0; j < run.at.n; ++j) norm_fake_quant_element(run, r, j);
  }
}

void norm_backward_scalar(const NormBackwardRun& run) {
  run.learned ? backward_rows<true>(run) : backward_rows<false>(run);
}

}  // namespace qk
