// Which instruction sets the kernels may use: what the machine has, lowered by a cap.
//
// Detection is CPUID plus XGETBV (a feature whose registers the OS does not save is absent). The
// cap comes from QKERNELS_ISA when the library is loaded, or from set_isa_cap(); it can only lower.
#pragma once

#include <cstdint>

namespace qk {

// Ordered: a cap at one level removes every later level.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 3, kAmx = 4 };
inline constexpr int kIsaCount = 5;
inline constexpr const char* kIsaNames = "scalar, avx2, avxvnni, avx512vnni, amx";

// Multiply-adds of one thread, for estimates of work.
constexpr int64_t macs_per_ns(Isa isa) {
  constexpr int64_t kRates[kIsaCount] = {1, 80, 192, 384, 1024};
  return kRates[static_cast<int>(isa)];
}

// Bits of a feature set. One bit per Isa, and sub-features that single kernels ask for.
using CpuFeatures = uint32_t;
inline constexpr CpuFeatures kCpuScalar = 0;
inline constexpr CpuFeatures kCpuAvx2 = 1u << 0;        // AVX2, FMA, F16C
inline constexpr CpuFeatures kCpuAvxVnni = 1u << 1;     // + AVX-VNNI
inline constexpr CpuFeatures kCpuAvx512Vnni = 1u << 2;  // AVX512 F, BW, VL, DQ, VNNI
inline constexpr CpuFeatures kCpuAvx512Vbmi = 1u << 3;  // + VBMI (belongs to the avx512vnni level)
inline constexpr CpuFeatures kCpuAmx = 1u << 4;         // AVX512-VNNI and AMX-INT8, tiles allowed

const char* isa_name(Isa isa);
// Parses a name of isa_name(); false if it is none of them.
bool parse_isa(const char* name, Isa* isa);

CpuFeatures cpu_features_supported();
// Supported features under the current cap: what kernel selection uses.
CpuFeatures cpu_features_active();
Isa isa_supported();
Isa isa_active();

void set_isa_cap(Isa cap);
Isa isa_cap();

// The value of QKERNELS_ISA if it was set to an unknown name when the library was loaded, else
// nullptr. The binding turns it into an error; the kernels ran with no cap until then.
const char* invalid_isa_environment();

// Bytes of the cache that a core has for itself; 1 MiB where the machine does not say.
int64_t l2_cache_bytes();

inline bool has_features(CpuFeatures have, CpuFeatures need) { return (have & need) == need; }

}  // namespace qk
