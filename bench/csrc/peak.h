// The dot-product peak of this machine, measured: a loop of an ISA's dot products on registers, 12
// independent sums in one asm block. Shared by the benches that report fractions of it.
#pragma once

#include <cstdint>

#include "bench/csrc/clock.h"
#include "bench/csrc/tiles.h"
#include "csrc/base/cpu.h"

namespace qk {
namespace {

#define SUMS12(one) \
  one(0) one(1) one(2) one(3) one(4) one(5) one(6) one(7) one(8) one(9) one(10) one(11)
#define CLOBBERS                                                                           \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define ZMM_DOT(n) "vpdpbusd %%zmm12, %%zmm12, %%zmm" #n "\n\t"
#define YMM_DOT(n) "%{vex%} vpdpbusd %%ymm12, %%ymm12, %%ymm" #n "\n\t"
// A double step of csrc/gemm/byte_steps.h.
#define YMM_STEP(n)                          \
  "vpmaddubsw %%ymm12, %%ymm12, %%ymm13\n\t" \
  "vpmaddubsw %%ymm12, %%ymm12, %%ymm14\n\t" \
  "vpaddw %%ymm14, %%ymm13, %%ymm13\n\t"     \
  "vpmaddwd %%ymm15, %%ymm13, %%ymm13\n\t"   \
  "vpaddd %%ymm13, %%ymm" #n ", %%ymm" #n "\n\t"
#define TILE_DOTS                      \
  "tdpbusd %%tmm4, %%tmm6, %%tmm0\n\t" \
  "tdpbusd %%tmm5, %%tmm6, %%tmm1\n\t" \
  "tdpbusd %%tmm4, %%tmm7, %%tmm2\n\t" \
  "tdpbusd %%tmm5, %%tmm7, %%tmm3\n\t"

constexpr int kLoops = 2000;

// Runs `one` on 12 accumulators kLoops times.
#define PEAK_LOOP(one)                                                                     \
  long n = kLoops;                                                                         \
  __asm__ volatile("1:\n\t" SUMS12(one) "dec %0\n\tjne 1b\n\t" : "+r"(n)::CLOBBERS, "cc"); \
  __asm__ volatile("vzeroupper" ::: CLOBBERS)

void zmm_dots() { PEAK_LOOP(ZMM_DOT); }
void ymm_dots() { PEAK_LOOP(YMM_DOT); }
void ymm_steps() { PEAK_LOOP(YMM_STEP); }

void tile_dots() {
  const WholeTiles config;
  long n = kLoops;
  __asm__ volatile("ldtilecfg %1\n\t1:\n\t" TILE_DOTS "dec %0\n\tjne 1b\n\ttilerelease"
                   : "+r"(n)
                   : "m"(config)
                   : "cc");
}

template <typename F>
double fastest_ns(const F& f, int runs) {
  double best = 1e18;
  for (int i = 0; i < runs; ++i) {
    const double begin = now_ns();
    f();
    const double time = now_ns() - begin;
    if (time < best) best = time;
  }
  return best;
}

// Multiply-adds a nanosecond.
double peak(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return kLoops * 4.0 * 16 * 16 * 64 / fastest_ns(tile_dots, 5);
    case Isa::kAvx512Vnni:
      return kLoops * 12.0 * 64 / fastest_ns(zmm_dots, 5);
    case Isa::kAvxVnni:
      return kLoops * 12.0 * 32 / fastest_ns(ymm_dots, 5);
    case Isa::kAvx2:
      return kLoops * 12.0 * 64 / fastest_ns(ymm_steps, 5);
    case Isa::kScalar:
      break;
  }
  return 0;
}

}  // namespace
}  // namespace qk
