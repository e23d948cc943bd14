#include "csrc/base/cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace qk {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avxvnni", "avx512vnni", "amx"};

#if defined(__x86_64__)
uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

// Linux lets a process use the tile registers only after it has asked.
bool allow_tiles() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return kCpuScalar;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), f16c = bit(c, 29);
  if (!osxsave) return kCpuScalar;
  const uint64_t xcr0 = read_xcr0();
  constexpr uint64_t kYmmState = 0x6, kZmmState = 0xe6;
  uint32_t a7, b7, c7, d7;
  if ((xcr0 & kYmmState) != kYmmState || !__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) {
    return kCpuScalar;
  }
  const bool avx2 = bit(b7, 5) && fma && f16c;
  if (!avx2) return kCpuScalar;
  CpuFeatures features = kCpuAvx2;
#if defined(QK_EMULATE_AVXVNNI)  // csrc/base/x86_avxvnni.h
  features |= kCpuAvxVnni;
#endif
  uint32_t a71 = 0, b71, c71, d71;
  if (a7 >= 1 && __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71) && bit(a71, 4)) {
    features |= kCpuAvxVnni;
  }
  const bool avx512 = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);  // F DQ BW VL
  if ((xcr0 & kZmmState) == kZmmState && avx512 && bit(c7, 11)) {
    features |= kCpuAvx512Vnni;
    // The bit stands for what came together: VBMI and VPOPCNTDQ.
    if (bit(c7, 1) && bit(c7, 14)) features |= kCpuAvx512Vbmi;
    constexpr uint64_t kTileState = 0x60000;
    const bool amx = bit(d7, 24) && bit(d7, 25);  // AMX-TILE, AMX-INT8
    if (amx && (xcr0 & kTileState) == kTileState && allow_tiles()) features |= kCpuAmx;
  }
  return features;
}

// Leaf 0x80000006: the L2 of a core in KiB, on AMD and Intel alike.
int64_t read_l2_bytes() {
  uint32_t a, b, c = 0, d;
  return __get_cpuid(0x80000006, &a, &b, &c, &d) ? static_cast<int64_t>(c >> 16) * 1024 : 0;
}
#else
CpuFeatures detect() { return kCpuScalar; }
int64_t read_l2_bytes() { return 0; }
#endif

constexpr CpuFeatures features_up_to(Isa cap) {
  switch (cap) {
    case Isa::kScalar:
      return kCpuScalar;
    case Isa::kAvx2:
      return kCpuAvx2;
    case Isa::kAvxVnni:
      return kCpuAvx2 | kCpuAvxVnni;
    case Isa::kAvx512Vnni:
      return ~kCpuAmx;
    case Isa::kAmx:
      return ~CpuFeatures{0};
  }
  return kCpuScalar;
}

Isa best_isa(CpuFeatures features) {
  if (has_features(features, kCpuAmx)) return Isa::kAmx;
  if (has_features(features, kCpuAvx512Vnni)) return Isa::kAvx512Vnni;
  if (has_features(features, kCpuAvxVnni)) return Isa::kAvxVnni;
  if (has_features(features, kCpuAvx2)) return Isa::kAvx2;
  return Isa::kScalar;
}

struct Environment {
  Isa cap = Isa::kAmx;
  const char* invalid = nullptr;
};

// In small letters and without blanks around it, as shells and configuration files may give it.
std::string plain_name(const char* value) {
  std::string name(value);
  constexpr const char* kBlanks = " \t\r\n";
  name.erase(name.find_last_not_of(kBlanks) + 1);
  name.erase(0, name.find_first_not_of(kBlanks));
  for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return name;
}

Environment read_environment() {
  Environment environment;
  const char* value = std::getenv("QKERNELS_ISA");
  if (value == nullptr) return environment;
  const std::string name = plain_name(value);
  if (!name.empty() && !parse_isa(name.c_str(), &environment.cap)) environment.invalid = value;
  return environment;
}

const Environment& environment() {
  static const Environment value = read_environment();
  return value;
}

std::atomic<Isa>& cap() {
  static std::atomic<Isa> value{environment().cap};
  return value;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool parse_isa(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

CpuFeatures cpu_features_supported() {
  static const CpuFeatures features = detect();
  return features;
}

CpuFeatures cpu_features_active() {
  return cpu_features_supported() & features_up_to(cap().load(std::memory_order_relaxed));
}

Isa isa_supported() { return best_isa(cpu_features_supported()); }
Isa isa_active() { return best_isa(cpu_features_active()); }
void set_isa_cap(Isa isa) { cap().store(isa, std::memory_order_relaxed); }
Isa isa_cap() { return cap().load(std::memory_order_relaxed); }

int64_t l2_cache_bytes() {
  constexpr int64_t kUnknown = 1024 * 1024;
  static const int64_t bytes = read_l2_bytes();
  return bytes > 0 ? bytes : kUnknown;
}

const char* invalid_isa_environment() { return environment().invalid; }

}  // namespace qk
