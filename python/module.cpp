// The only pybind11 module of the project: facts about the build and the machine, and the compiled
// plan (plan.cpp). Tensors go through torch.ops.qkernels.
#include <map>
#include <string>
#include <vector>

#include "csrc/base/cpu.h"
#include "csrc/binary/binary.h"
#include "csrc/conv/depthwise.h"
#include "csrc/dorefa/dorefa.h"
#include "csrc/fake_quant/fake_quant.h"
#include "csrc/fake_quant_backward/backward.h"
#include "csrc/fake_quant_mask/mask.h"
#include "csrc/gemm/cuda_pack.h"
#include "csrc/gemm/igemm.h"
#include "csrc/image/image.h"
#include "csrc/observe/observe.h"
#include "csrc/pointwise/pointwise.h"
#include "csrc/pool/pool.h"
#include "csrc/quantize/quantize.h"
#include "python/plan.h"
#include "python/pybind.h"

namespace py = pybind11;

// Made by setup.py for each build: of the names and bytes of csrc/ and python/.
extern "C" const char qk_source_fingerprint[];

namespace {

using KernelLists = std::map<std::string, std::vector<std::pair<std::string, bool>>>;

// Every kernel of every op, best first, with whether the active features admit it.
KernelLists list_kernels() {
  using namespace qk;
  const CpuFeatures active = cpu_features_active();
  KernelLists lists;
#define QK_FAKE_QUANT_KERNEL(need, type, name) \
  lists["fake_quant"].emplace_back(#name, has_features(active, need));
#include "csrc/fake_quant/kernels.inc"
#undef QK_FAKE_QUANT_KERNEL
#define QK_FAKE_QUANT_BACKWARD_KERNEL(need, type, name) \
  lists["fake_quant_backward"].emplace_back(#name, has_features(active, need));
#include "csrc/fake_quant_backward/kernels.inc"
#undef QK_FAKE_QUANT_BACKWARD_KERNEL
#define QK_FAKE_QUANT_MASK_KERNEL(need, type, name) \
  lists["fake_quant_mask"].emplace_back(#name, has_features(active, need));
#define QK_MASK_BACKWARD_KERNEL(need, bytes, name) \
  lists["fake_quant_mask_backward"].emplace_back(#name, has_features(active, need));
#include "csrc/fake_quant_mask/kernels.inc"
#undef QK_FAKE_QUANT_MASK_KERNEL
#undef QK_MASK_BACKWARD_KERNEL
#define QK_DOREFA_KERNELS(need, type, weight, backward, gradient)                      \
  lists["dorefa_weight"].emplace_back(#weight, has_features(active, need));            \
  lists["dorefa_weight_backward"].emplace_back(#backward, has_features(active, need)); \
  lists["dorefa_gradient"].emplace_back(#gradient, has_features(active, need));
#include "csrc/dorefa/kernels.inc"
#undef QK_DOREFA_KERNELS
#define QK_SIGN_PRODUCT_KERNEL(need, name) \
  lists["binary_conv2d"].emplace_back(#name, has_features(active, need));
#include "csrc/binary/kernels.inc"
#undef QK_SIGN_PRODUCT_KERNEL
#define QK_MINMAX_KERNEL(need, type, name) \
  lists["observe"].emplace_back(#name, has_features(active, need));
#include "csrc/observe/kernels.inc"
#undef QK_MINMAX_KERNEL
#define QK_IGEMM_KERNEL(need, isa, name)                           \
  lists["linear"].emplace_back(#name, has_features(active, need)); \
  lists["conv"].emplace_back(#name, has_features(active, need));
#include "csrc/gemm/kernels.inc"
#undef QK_IGEMM_KERNEL
#define QK_DEPTHWISE_KERNEL(need, isa, name) \
  lists["conv_depthwise"].emplace_back(#name, has_features(active, need));
#define QK_WINOGRAD_KERNEL(need, isa, name) \
  lists["conv_winograd"].emplace_back(#name, isa == isa_active());
#include "csrc/conv/kernels.inc"
#undef QK_DEPTHWISE_KERNEL
#undef QK_WINOGRAD_KERNEL
#define QK_QUANTIZE_KERNEL(need, type, name) \
  lists["quantize"].emplace_back(#name, has_features(active, need));
#define QK_DEQUANTIZE_KERNEL(need, type, name) \
  lists["dequantize"].emplace_back(#name, has_features(active, need));
#include "csrc/quantize/kernels.inc"
#undef QK_QUANTIZE_KERNEL
#undef QK_DEQUANTIZE_KERNEL
#define QK_SCALE_KERNEL(need, name) \
  lists["linear_rows"].emplace_back(#name, has_features(active, need));
#include "csrc/linear_rows/kernels.inc"
#undef QK_SCALE_KERNEL
#define QK_INTERLEAVE_KERNEL(need, name) \
  lists["quantize_image"].emplace_back(#name, has_features(active, need));
#include "csrc/image/kernels.inc"
#undef QK_INTERLEAVE_KERNEL
#define QK_LOOKUP_KERNEL(need, name) \
  lists["lookup"].emplace_back(#name, has_features(active, need));
#define QK_BINARY_KERNEL(need, op, name) \
  lists[op == BinaryOp::kAdd ? "add" : "mul"].emplace_back(#name, has_features(active, need));
#include "csrc/pointwise/kernels.inc"
#undef QK_LOOKUP_KERNEL
#undef QK_BINARY_KERNEL
#define QK_MAX_POOL_KERNEL(need, name) \
  lists["max_pool"].emplace_back(#name, has_features(active, need));
#define QK_AVG_POOL_KERNEL(need, name) \
  lists["avg_pool"].emplace_back(#name, has_features(active, need));
#include "csrc/pool/kernels.inc"
#undef QK_MAX_POOL_KERNEL
#undef QK_AVG_POOL_KERNEL
  return lists;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the build and the machine.";
  m.def("isa_supported", [] { return std::string(qk::isa_name(qk::isa_supported())); });
  m.def("isa_active", [] { return std::string(qk::isa_name(qk::isa_active())); });
  m.def("isa_cap", [] { return std::string(qk::isa_name(qk::isa_cap())); });
  m.def("set_isa_cap", [](const std::string& name) {
    qk::Isa isa;
    if (!qk::parse_isa(name.c_str(), &isa)) {
      throw py::value_error(std::string("isa must be one of ") + qk::kIsaNames + ", got '" + name +
                            "'");
    }
    qk::set_isa_cap(isa);
  });
  m.def("cpu_features", [] { return qk::cpu_features_active(); });
  m.def("list_kernels", &list_kernels);
  m.def("packed_linear_bytes", [](int64_t out_features, int64_t in_features) {
    return qk::packed_igemm_bytes(out_features, 1, in_features, qk::isa_active());
  });
  qk::seam::bind_plan(m);
  m.def("packed_linear_bytes_cuda", [](int64_t out_features, int64_t in_features, int output,
                                       bool input_signed, bool weight_zero_points, bool residual) {
    return qk::packed_cuda_bytes(out_features, 1, in_features,
                                 {.output = static_cast<qk::OutputType>(output),
                                  .input_signed = input_signed,
                                  .weight_zero_points = weight_zero_points,
                                  .residual = residual});
  });
#if defined(QK_CUDA_ARCHS)
  m.attr("with_cuda") = true;
  m.attr("cuda_archs") = QK_CUDA_ARCHS;
  m.attr("cuda_version") = QK_CUDA_VERSION;
#else
  m.attr("with_cuda") = false;
  m.attr("cuda_archs") = "";
  m.attr("cuda_version") = "";
#endif
  m.attr("source_fingerprint") = std::string(qk_source_fingerprint);
#if defined(QK_DEBUG_BUILD)
  m.attr("debug") = true;
#else
  m.attr("debug") = false;
#endif
  m.attr("compiler") = __VERSION__;
  if (qk::invalid_isa_environment() != nullptr) {
    throw py::value_error(std::string("QKERNELS_ISA must be one of ") + qk::kIsaNames + ", got '" +
                          qk::invalid_isa_environment() + "'");
  }
}
