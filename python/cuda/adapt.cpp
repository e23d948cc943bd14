#include "python/cuda/adapt.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "csrc/gemm/cuda.h"

namespace qk::seam {
namespace {

void check_capability(const char* op, int32_t device) {
  static std::array<std::atomic<bool>, 64> known{};  // to be new enough
  const auto index = static_cast<size_t>(device);
  if (index < known.size() && known[index].load(std::memory_order_relaxed)) return;
  int major = 0, minor = 0;
  check_launch(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_launch(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const std::string why = why_too_old(major * 10 + minor, QK_CUDA_ARCHS);
  STD_TORCH_CHECK(why.empty(), op, ": ", why);
  if (index < known.size()) known[index].store(true, std::memory_order_relaxed);
}

}  // namespace

int32_t guarded_device(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda(), op, ": every tensor must be on CUDA, as some are, got one on ",
                  device_text(t));
  check_capability(op, t.get_device_index());
  return t.get_device_index();
}

DenseGrid dense_grid(const Tensor& out, std::optional<int64_t> axis, const GridView& grid) {
  DenseGrid dense{grid.scale, grid.zero_point, out.numel(), 1, 1};
  if (!axis.has_value() || out.size(*axis) == 1) return dense;
  dense.channels = out.size(*axis);
  if (dense.size > 0) dense.inner = out.stride(*axis);
  return dense;
}

Tensor in_layout_of(const Tensor& out, const Tensor& t) {
  for (int64_t d = 0; d < out.dim(); ++d) {
    if (out.size(d) != 1 && out.stride(d) != t.stride(d)) return copy_in_layout(t, out);
  }
  return t;
}

Tensor to_cpu(const Tensor& t) {
  if (t.is_cpu()) return t;
  return torch::stable::to(t, std::nullopt, std::nullopt,
                           torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

OptionalTensor to_cpu(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(to_cpu(*t)) : std::nullopt;
}

Tensor to_device_of(const Tensor& like, const Tensor& t) {
  return torch::stable::to(t, std::nullopt, std::nullopt, like.device());
}

CudaMachine current_machine(const char* op) {
  // Read once: at every launch it would race with whoever changes the environment.
  static const bool wgmma = [] {
    const char* asked = std::getenv("QKERNELS_WGMMA");
    return asked != nullptr && std::strcmp(asked, "1") == 0;
  }();
  CudaMachine machine;
  check_launch(op, cuda_machine(&machine));
  machine.wgmma = wgmma;
  return machine;
}

void check_launch_size(const char* op, int64_t rows, int64_t out_features) {
  // The smallest tile has 32 x 64 outputs, a grid at most 2^31 - 1 blocks.
  STD_TORCH_CHECK(rows <= INT32_MAX && (rows / 32 + 1) * (out_features / 64 + 1) < INT32_MAX, op,
                  ": input must have fewer rows for one launch, got ", rows, " rows and ",
                  out_features, " out_features; split the batch");
}

CudaPackedFacts check_packed_cuda(const char* op, const char* pack_op, const Tensor& packed,
                                  int64_t n, int64_t taps, int64_t depth) {
  CudaPackedFacts facts;
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 &&
                      packed.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % kPackedAlign == 0 &&
                      read_cuda_facts(packed.numel(), n, taps, depth, &facts) == Status::kOk,
                  op, ": packed must be an unchanged result of ", pack_op, " on CUDA for ", n,
                  " outputs and ", taps * depth, " inputs, got ", dtype_text(packed.scalar_type()),
                  " of shape ", shape_text(packed));
  return facts;
}

bool check_residual_cuda(const char* op, const OptionalTensor& residual,
                         const CudaPackedFacts& facts, const std::vector<int64_t>& output_sizes,
                         const Tensor& input) {
  STD_TORCH_CHECK(residual.has_value() == facts.residual, op, ": residual must ",
                  residual.has_value() ? "not " : "", "be given: the weight was packed with",
                  residual.has_value() ? "out" : "", " a residual in its epilogue");
  if (!residual.has_value()) return false;
  check_device(op, "residual", *residual, input);
  STD_TORCH_CHECK(sizes_of(*residual) == output_sizes, op,
                  ": residual must have the shape of the output, got ", shape_text(*residual));
  return check_code_type(op, "residual", residual->scalar_type());
}

}  // namespace qk::seam
