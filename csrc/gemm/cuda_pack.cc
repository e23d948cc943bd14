#include "csrc/gemm/cuda_pack.h"

#include <cstring>

#include "csrc/base/integers.h"

namespace qk {

CudaPackedLayout cuda_packed_layout(int64_t n, int64_t taps, int64_t depth) {
  CudaPackedLayout layout{};
  int64_t at = 0;
  const auto reserve = [&at](int64_t bytes) {
    const int64_t begin = at;
    at += align_up(bytes, kPackedAlign);
    return begin;
  };
  reserve(sizeof(Epilogue));
  const int64_t column_bytes = cuda_columns(n) * 4;
  layout.init = reserve(column_bytes);
  layout.zero_point = reserve(column_bytes);
  layout.addend = reserve(column_bytes);
  layout.mult = reserve(column_bytes);
  layout.padding = reserve(kPackedAlign);
  layout.row_bytes = taps * cuda_depth(depth);
  layout.weight = reserve(n * layout.row_bytes);
  layout.bytes = at;
  return layout;
}

CudaPackedFacts cuda_packed_facts(const PackSource& source) {
  return {.output = source.epilogue.output,
          .input_signed = source.input_signed,
          .weight_zero_points = source.weight_zero_point != nullptr,
          .residual = source.epilogue.has_residual != 0};
}

int64_t cuda_packed_length(int64_t bytes, int64_t fingerprint, const CudaPackedFacts& facts) {
  return align_up(bytes, kCudaPage) + fingerprint * kPackedAlign + facts.code();
}

int64_t packed_cuda_bytes(int64_t n, int64_t taps, int64_t depth, const CudaPackedFacts& facts) {
  return cuda_packed_length(cuda_packed_layout(n, taps, depth).bytes, cuda_fingerprint(n, depth, 0),
                            facts);
}

Status pack_igemm_cuda(const PackSource& source, void* dst) {
  if (const Status status = check_accumulator(source); status != Status::kOk) return status;
  const CudaPackedLayout layout = cuda_packed_layout(source.n, source.taps, source.depth);
  auto* bytes = static_cast<uint8_t*>(dst);
  std::memset(bytes, 0,
              static_cast<size_t>(packed_cuda_bytes(source.n, source.taps, source.depth,
                                                    cuda_packed_facts(source))));
  std::memcpy(bytes, &source.epilogue, sizeof(Epilogue));
  std::memset(bytes + layout.padding, source.input_zero_point, kPackedAlign);
  const ColumnTerms terms{reinterpret_cast<int32_t*>(bytes + layout.init),
                          reinterpret_cast<int32_t*>(bytes + layout.zero_point),
                          reinterpret_cast<float*>(bytes + layout.addend),
                          reinterpret_cast<float*>(bytes + layout.mult)};
  for (int64_t n = 0; n < source.n; ++n) {
    // Unlike the CPU's kernels these take int8 activations as they are.
    if (const Status status = fold_column(source, n, source.input_zero_point, terms);
        status != Status::kOk) {
      return status;
    }
    auto* row = reinterpret_cast<int8_t*>(bytes + layout.weight + n * layout.row_bytes);
    for (int64_t tap = 0; tap < source.taps; ++tap) {
      const int8_t* from = source.weight + n * source.stride_n + tap * source.stride_tap;
      for (int64_t k = 0; k < source.depth; ++k) {
        row[tap * cuda_depth(source.depth) + k] = from[k * source.stride_k];
      }
    }
  }
  return Status::kOk;
}

Status facts_of_length(int64_t length, int64_t bytes, int64_t fingerprint, CudaPackedFacts* facts) {
  const int64_t code = length - cuda_packed_length(bytes, fingerprint, {});
  if (code < 0 || code >= kPackedAlign || (code & 7) > static_cast<int64_t>(OutputType::kF16)) {
    return Status::kBadShape;
  }
  *facts = {.output = static_cast<OutputType>(code & 7),
            .input_signed = (code >> 3 & 1) != 0,
            .weight_zero_points = (code >> 4 & 1) != 0,
            .residual = (code >> 5 & 1) != 0};
  return Status::kOk;
}

Status read_cuda_facts(int64_t length, int64_t n, int64_t taps, int64_t depth,
                       CudaPackedFacts* facts) {
  return facts_of_length(length, cuda_packed_layout(n, taps, depth).bytes,
                         cuda_fingerprint(n, depth, 0), facts);
}

}  // namespace qk
