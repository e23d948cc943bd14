// The instruction-set cap: names round-trip, the cap only lowers, selection follows it.
#include <cstring>

#include "csrc/fake_quant/fake_quant.h"
#include "tests/csrc/check.h"

using namespace qk;

namespace {

constexpr Isa kHighest = static_cast<Isa>(kIsaCount - 1);

void names_round_trip() {
  for (int i = 0; i < kIsaCount; ++i) {
    Isa parsed;
    CHECK(parse_isa(isa_name(static_cast<Isa>(i)), &parsed));
    CHECK_EQ(static_cast<int>(parsed), i);
  }
  Isa unused;
  for (const char* name : {"", "AVX2", "avx2 ", "avx512", "sse"}) {
    CHECK(!parse_isa(name, &unused), name);
  }
}

void cap_only_lowers() {
  for (int i = 0; i < kIsaCount; ++i) {
    set_isa_cap(static_cast<Isa>(i));
    CHECK(isa_active() <= static_cast<Isa>(i));
    CHECK(isa_active() <= isa_supported());
    CHECK(has_features(cpu_features_supported(), cpu_features_active()));
  }
  set_isa_cap(kHighest);
  CHECK_EQ(cpu_features_active(), cpu_features_supported());
}

void scalar_cap_selects_scalar_kernels() {
  set_isa_cap(Isa::kScalar);
  CHECK_EQ(cpu_features_active(), kCpuScalar);
  CHECK(select_fake_quant_kernel(FloatType::kFloat32) == fake_quant_f32_scalar);
  set_isa_cap(kHighest);
}

}  // namespace

int main() {
  CHECK(invalid_isa_environment() == nullptr);
  if (std::getenv("QKERNELS_ISA") == nullptr) CHECK(isa_cap() == kHighest);
  names_round_trip();
  cap_only_lowers();
  scalar_cap_selects_scalar_kernels();
}
