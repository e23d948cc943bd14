#include "csrc/dorefa/dorefa.h"

#include <limits>

#include "csrc/observe/observe.h"

namespace qk {
namespace {

// Elements of a task of the passes without sums.
constexpr int64_t kTask = 8192;

float magnitude(float v) { return v < 0 ? -v : v; }

struct Address {
  FloatType type;

  const char* operator()(const void* p, int64_t i) const {
    return static_cast<const char*>(p) + i * float_bytes(type);
  }
  char* operator()(void* p, int64_t i) const {
    return static_cast<char*>(p) + i * float_bytes(type);
  }
};

// Calls f(first, n) for runs of at most `run` elements.
template <typename F>
void for_each_piece(int64_t n, int64_t run, int64_t work_ns, const Parallel& parallel, const F& f) {
  parallel.for_each_range((n + run - 1) / run, work_ns, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * run;
      f(first, n - first < run ? n - first : run);
    }
  });
}

double tree_sum(const double* values, int64_t n) {
  if (n <= 0) return 0;
  if (n == 1) return values[0];
  int64_t half = 1;  // the largest power of two below n
  while (half * 2 < n) half *= 2;
  return tree_sum(values, half) + tree_sum(values + half, n - half);
}

// How many of the elements from `first` on are the maximum.
template <typename T>
int32_t count_ties(const T* x, int64_t n, float largest) {
  int32_t ties = 0;
  for (int64_t i = 0; i < n; ++i) ties += magnitude(to_float(x[i])) == largest;
  return ties;
}

// The part of the gradient that goes through the maximum, at the elements that are the maximum.
template <typename T>
void add_through_maximum(const DorefaBackwardArgs& args, const DorefaWeight& weight) {
  const T* x = static_cast<const T*>(args.x);
  int64_t ties = 0;
  for_each_piece(args.n, kTask, 0, kSerial,
                 [&](int64_t first, int64_t n) { ties += count_ties(x + first, n, args.largest); });
  if (ties == 0) return;
  const double sum = tree_sum(args.workspace, (args.n + kSumRun - 1) / kSumRun);
  const float part =
      static_cast<float>(sum * static_cast<double>(weight.inv_largest) / static_cast<double>(ties));
  const DorefaBackwardRun run{.grad = args.grad,
                              .x = args.x,
                              .out = args.out,
                              .n = args.n,
                              .weight = weight,
                              .sum = nullptr};
  for_each_piece(args.n, kTask, 0, kSerial, [&](int64_t first, int64_t n) {
    if (ties == 0 || count_ties(x + first, n, args.largest) == 0) return;
    for (int64_t i = first; i < first + n; ++i) {
      const float v = to_float(x[i]);
      if (magnitude(v) != args.largest) continue;
      float ignored = 0;
      dorefa_backward_element<T>(run, i, &ignored, v < 0 ? -part : part);
      --ties;
    }
  });
}

template <typename T>
void fill_nan(T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(std::numeric_limits<float>::quiet_NaN(), out + i);
}

}  // namespace

DorefaKernels select_dorefa_kernels(FloatType type, CpuFeatures features) {
#define QK_DOREFA_KERNELS(need, kernel_type, weight, backward, gradient) \
  if (type == kernel_type && has_features(features, need)) return {weight, backward, gradient};
#include "csrc/dorefa/kernels.inc"
#undef QK_DOREFA_KERNELS
  return {};
}

void dorefa_weight(const DorefaWeightArgs& args, const Parallel& parallel) {
  const DorefaWeightKernel kernel = select_dorefa_kernels(args.type).weight;
  const DorefaWeight weight = dorefa_constants(args.largest, args.grid);
  const Address at{args.type};
  for_each_piece(args.n, kTask, args.n, parallel, [&](int64_t first, int64_t n) {
    kernel({.x = at(args.x, first), .y = at(args.y, first), .n = n, .weight = weight});
  });
}

int64_t dorefa_workspace(int64_t n) { return (n + kSumRun - 1) / kSumRun; }

void dorefa_weight_backward(const DorefaBackwardArgs& args, const Parallel& parallel) {
  const DorefaBackwardKernel kernel = select_dorefa_kernels(args.type).backward;
  const DorefaWeight weight = dorefa_constants(args.largest, args.grid);
  const Address at{args.type};
  for_each_piece(args.n, kSumRun, args.n, parallel, [&](int64_t first, int64_t n) {
    kernel({.grad = at(args.grad, first),
            .x = at(args.x, first),
            .out = at(args.out, first),
            .n = n,
            .weight = weight,
            .sum = args.workspace + first / kSumRun});
  });
  switch (args.type) {
    case FloatType::kFloat32:
      return add_through_maximum<float>(args, weight);
    case FloatType::kBFloat16:
      return add_through_maximum<BFloat16>(args, weight);
    case FloatType::kFloat16:
      return add_through_maximum<Float16>(args, weight);
  }
}

void dorefa_gradient(const DorefaGradientArgs& args, const Parallel& parallel) {
  const DorefaGradientKernel kernel = select_dorefa_kernels(args.type).gradient;
  const MinMaxKernel minmax_kernel = select_minmax_kernel(args.type);
  const Address at{args.type};
  const auto row_task = [&](int64_t row) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    const int64_t first = row * args.inner;
    const void* grad = at(args.grad, first);
    void* out = at(args.out, first);
    float low = kInf, high = -kInf;
    const bool nan = minmax_kernel(
        {.x = grad, .n = args.inner, .low = &low, .high = &high, .per_element = false});
    const float largest = -low > high ? -low : high, twice = 2.0f * largest;
    if (nan || !is_finite(twice)) {
      args.type == FloatType::kFloat32    ? fill_nan(static_cast<float*>(out), args.inner)
      : args.type == FloatType::kBFloat16 ? fill_nan(static_cast<BFloat16*>(out), args.inner)
                                          : fill_nan(static_cast<Float16*>(out), args.inner);
    } else if (!is_finite(1.0f / twice)) {  // zero, or too small to divide by
      char* bytes = static_cast<char*>(out);
      for (int64_t i = 0; i < args.inner * float_bytes(args.type); ++i) bytes[i] = 0;
    } else {
      kernel({.grad = grad,
              .out = out,
              .n = args.inner,
              .twice_largest = twice,
              .inv = 1.0f / twice,
              .steps = args.steps,
              .key = noise_key(args.seed, static_cast<uint64_t>(row))});
    }
  };
  if (args.inner == 0) return;
  parallel.for_each_range(args.rows, args.rows * args.inner, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) row_task(row);
  });
}

}  // namespace qk
