// Selection of the kernel and blocking for L2.
#include "csrc/gemm/igemm.h"

namespace qk {
namespace {

// Panels that stay in L2 while all rows pass over them: half of a 1 MiB L2. AMX and AVX512-VNNI
// fetch the next panels meanwhile.
constexpr int64_t kPanelBlockBytes = 512 * 1024, kFetchedBlockBytes = 128 * 1024;

int64_t panels_in_block(const PackedHeader& header) {
  const int64_t bytes = header.isa >= Isa::kAvx512Vnni ? kFetchedBlockBytes : kPanelBlockBytes;
  const int64_t panels = header.panel_bytes == 0 ? 1 : bytes / header.panel_bytes;
  return panels < 1 ? 1 : panels;
}

}  // namespace

IgemmKernel select_igemm_kernel(Isa isa) {
#define QK_IGEMM_KERNEL(need, layout, name) \
  if (isa == layout) return name;
#include "csrc/gemm/kernels.inc"
#undef QK_IGEMM_KERNEL
  return nullptr;
}

bool igemm_adds_in_place(const PackedHeader& header) {
  return header.isa != Isa::kScalar && header.stores_plain_bytes();
}

NextWeights first_weights(const PackedMatrix& matrix) {
  const PackedHeader& header = *matrix.header;
  const int64_t panels = header.n / panel_shape(header.isa).columns, most = panels_in_block(header);
  return {matrix.panels, (panels < most ? panels : most) * header.panel_bytes};
}

void igemm(const IgemmArgs& args) {
  const PackedHeader& header = *args.matrix.header;
  const IgemmKernel kernel = select_igemm_kernel(header.isa);
  const LookupKernel lookup = header.epilogue.has_table ? select_lookup_kernel() : nullptr;
  const int64_t step = panels_in_block(header);
  for (int64_t panel = args.panel_begin; panel < args.panel_end; panel += step) {
    const int64_t end = args.panel_end - panel < step ? args.panel_end : panel + step;
    kernel({args, args.row_begin, args.row_end, panel, end, lookup});
  }
}

}  // namespace qk
