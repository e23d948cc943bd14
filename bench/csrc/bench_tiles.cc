// What a step of 2 x 2 tiles takes on AMX, from L1, beside nops and vector instructions, in cycles:
// apart for the times when the core is alone and when its other thread is busy.
//
//   bench_tiles [seconds]
//
// A sample is of a core alone if four tile loads take less than 38 cycles before and after it, and
// of a shared one if they take more than 80; others are dropped. A cycle is the time of one of a
// chain of additions, measured beside each sample. Printed: medians, and how many samples.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <vector>

#include "bench/csrc/clock.h"
#include "bench/csrc/tiles.h"
#include "csrc/base/cpu.h"

namespace {

using qk::now_ns;

constexpr int kRuns = 64, kRepeats = 3;

#define LOAD(tile, at) "tileloadd " #at "(%0,%1,1), %%tmm" #tile "\n\t"
#define DOT(b, a, c) "tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #c "\n\t"
#define STORE(tile, at) "tilestored %%tmm" #tile ", " #at "(%0,%1,1)\n\t"
#define NOPS(n) ".rept " #n "\n\tnop\n\t.endr\n\t"
#define FLOATS(n) ".rept " #n "/4\n\t" FLOAT(2) FLOAT(3) FLOAT(4) FLOAT(5) ".endr\n\t"
#define FLOAT(to) "vmulps %%zmm0, %%zmm1, %%zmm" #to "\n\t"
#define INTS(n) ".rept " #n "/4\n\t" INT(2) INT(3) INT(4) INT(5) ".endr\n\t"
#define INT(to) "vpaddd %%zmm0, %%zmm1, %%zmm" #to "\n\t"

#define LOADS(x) LOAD(4, 0) x LOAD(5, 1024) x LOAD(6, 2048) x LOAD(7, 3072) x
#define DOTS(x) DOT(6, 4, 0) x DOT(6, 5, 2) x DOT(7, 4, 1) x DOT(7, 5, 3) x
#define STORES(x) STORE(0, 4096) x STORE(1, 5120) x STORE(2, 6144) x STORE(3, 7168) x

struct Case {
  const char* name;
  void (*run)(uint8_t* tiles);
};

#define CASE(name, code)                                                              \
  Case {                                                                              \
    name, [](uint8_t* tiles) {                                                        \
      for (int i = 0; i < kRuns; ++i) {                                               \
        __asm__ volatile(code::"r"(tiles), "r"(int64_t{64})                           \
                         : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5"); \
      }                                                                               \
    }                                                                                 \
  }

const Case kProbe = CASE("4 loads", LOADS(""));
const Case kCases[] = {
    kProbe,
    CASE("4 loads, 8 nops behind each", LOADS(NOPS(8))),
    CASE("4 products", DOTS("")),
    CASE("4 stores", STORES("")),
    CASE("step: 4 loads, 4 products", LOADS("") DOTS("")),
    CASE("step, 2 nops behind each", LOADS(NOPS(2)) DOTS(NOPS(2))),
    CASE("step, 4 nops behind each", LOADS(NOPS(4)) DOTS(NOPS(4))),
    CASE("step, 7 nops behind each", LOADS(NOPS(7)) DOTS(NOPS(7))),
    CASE("step, 8 nops behind each", LOADS(NOPS(8)) DOTS(NOPS(8))),
    CASE("step, 8 vmulps behind each", LOADS(FLOATS(8)) DOTS(FLOATS(8))),
    CASE("step, 64 vmulps at its end", LOADS("") DOTS("") FLOATS(64)),
    CASE("64 vmulps", FLOATS(64)),
    CASE("4 products, 64 vmulps behind each", DOTS(FLOATS(64))),
    CASE("4 products, 64 vpaddd behind each", DOTS(INTS(64))),
    CASE("step and 4 stores", LOADS("") DOTS("") STORES("")),
};

void configure() {
  const qk::WholeTiles config;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

double cycle_ns() {
  constexpr int kLinks = 8, kLoops = 500;
  double best = 1e18;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    long x = 1;
    const double start = now_ns();
    for (int i = 0; i < kLoops; ++i) {
      __asm__ volatile(".rept 8\n\tadd %0, %0\n\t.endr" : "+r"(x));
    }
    best = std::min(best, (now_ns() - start) / (kLinks * kLoops));
  }
  return best;
}

double time_ns(const Case& one, uint8_t* tiles) {
  double best = 1e18;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const double start = now_ns();
    one.run(tiles);
    best = std::min(best, (now_ns() - start) / kRuns);
  }
  return best;
}

void print_median(std::vector<double>& samples) {
  if (samples.empty()) {
    std::printf("  %16s", "-");
    return;
  }
  std::sort(samples.begin(), samples.end());
  std::printf("  %7.1f (%6zu)", samples[samples.size() / 2], samples.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (qk::isa_active() < qk::Isa::kAmx) {
    std::printf("no AMX here\n");
    return 0;
  }
  configure();
  alignas(4096) static uint8_t tiles[8 * 1024];
  std::vector<double> alone[std::size(kCases)], shared[std::size(kCases)];
  const double seconds = argc > 1 ? std::atof(argv[1]) : 20;
  for (const double end = now_ns() + seconds * 1e9; now_ns() < end;) {
    for (size_t i = 0; i < std::size(kCases); ++i) {
      const double cycle = cycle_ns();
      const double before = time_ns(kProbe, tiles) / cycle;
      const double sample = time_ns(kCases[i], tiles) / cycle;
      const double after = time_ns(kProbe, tiles) / cycle;
      if (std::max(before, after) < 38) alone[i].push_back(sample);
      if (std::min(before, after) > 80) shared[i].push_back(sample);
    }
    usleep(10000);
  }
  std::printf("%-36s  %16s  %16s\n", "cycles (samples)", "core alone", "core shared");
  for (size_t i = 0; i < std::size(kCases); ++i) {
    std::printf("%-36s", kCases[i].name);
    print_median(alone[i]);
    print_median(shared[i]);
    std::printf("\n");
  }
  return 0;
}
