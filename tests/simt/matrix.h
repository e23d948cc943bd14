// ldmatrix and mma on the emulator.
#pragma once

#include <cstdint>
#include <cstring>

#include "tests/simt/memory.h"

namespace simt {

// ldmatrix .m8n8.x4 .b16: matrix j is the 8 rows whose addresses lanes 8j..8j+7 give.
inline void ldmatrix_x4(uint32_t (&result)[4], uint32_t address) {
  struct Arguments {
    uint32_t address;
    uint32_t* result;
  } mine{address, result};
  meet("ldmatrix", kFullMask, mine, [](Arguments** all) {
    const unsigned first = this_thread().warp() * kWarp;
    uint32_t addresses[kWarp];
    for (int l = 0; l < kWarp; ++l) {
      addresses[l] = all[l]->address;
      check_bounds(addresses[l], 16, "ldmatrix");
      shadow_read(state.block.threads[first + static_cast<unsigned>(l)], addresses[l], 16);
    }
    for (int l = 0; l < kWarp; ++l) {
      for (int j = 0; j < 4; ++j) {
        const uint32_t at = addresses[j * 8 + l / 4] + static_cast<uint32_t>(l % 4) * 4;
        std::memcpy(&all[l]->result[j], &state.block.shared[at], 4);
      }
    }
    counters.ldmatrix_conflicts += extra_passes(addresses, kWarp, 16);
  });
}

// mma.m8n8k16.row.col with s32 sums; A is u8 or s8, B is s8. Sums wrap.
template <bool kASigned>
void mma_m8n8k16(int32_t* sum0, int32_t* sum1, uint32_t a, uint32_t b) {
  struct Arguments {
    int32_t* sums[2];
    uint32_t a, b;
  } mine{{sum0, sum1}, a, b};
  meet("mma.m8n8k16", kFullMask, mine, [](Arguments** all) {
    uint8_t rows[8][16];
    int8_t columns[8][16];
    for (int l = 0; l < kWarp; ++l) {
      std::memcpy(&rows[l / 4][l % 4 * 4], &all[l]->a, 4);
      std::memcpy(&columns[l / 4][l % 4 * 4], &all[l]->b, 4);
    }
    for (int l = 0; l < kWarp; ++l) {
      for (int i = 0; i < 2; ++i) {
        int32_t dot = 0;
        for (int k = 0; k < 16; ++k) {
          const uint8_t byte = rows[l / 4][k];
          dot += (kASigned ? static_cast<int8_t>(byte) : byte) * columns[l % 4 * 2 + i][k];
        }
        int32_t& sum = *all[l]->sums[i];
        sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(dot));
      }
    }
    ++counters.small_mmas;
  });
}

// mma.m16n8k32.row.col with s32 sums; A is u8 or s8, B is s8. Sums wrap.
template <bool kASigned>
void mma_m16n8k32(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Arguments {
    int32_t* sums;
    const uint32_t* a;
    const uint32_t* b;
  } mine{sums, a, b};
  meet("mma", kFullMask, mine, [](Arguments** all) {
    uint8_t rows[16][32];
    int8_t columns[8][32];
    for (int l = 0; l < kWarp; ++l) {
      const int group = l / 4, at = l % 4 * 4;
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&rows[group + i % 2 * 8][at + i / 2 * 16], &all[l]->a[i], 4);
      }
      for (int i = 0; i < 2; ++i) std::memcpy(&columns[group][at + i * 16], &all[l]->b[i], 4);
    }
    for (int l = 0; l < kWarp; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        int32_t dot = 0;
        for (int k = 0; k < 32; ++k) {
          const int32_t value = kASigned ? static_cast<int8_t>(rows[row][k]) : rows[row][k];
          dot += value * columns[column][k];
        }
        all[l]->sums[i] = static_cast<int32_t>(static_cast<uint32_t>(all[l]->sums[i]) +
                                               static_cast<uint32_t>(dot));
      }
    }
    ++counters.mmas;
  });
}

}  // namespace simt
