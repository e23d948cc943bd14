// Four lanes of 64-bit words. Each round is a bijection of the lane for a fixed word and of the
// word for a fixed lane, and so is the merge: a change inside one word always changes the result.
#include <cstring>

#include "csrc/plan/format.h"

namespace qk::plan {
namespace {

constexpr uint64_t kA = 0x9e3779b97f4a7c15u, kB = 0xc2b2ae3d27d4eb4fu, kC = 0xd6e8feb86659fd93u;
constexpr int kLanes = 4;

uint64_t rotate(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

uint64_t finish(uint64_t h) {
  h = (h ^ (h >> 32)) * kC;
  h = (h ^ (h >> 32)) * kC;
  return h ^ (h >> 32);
}

}  // namespace

uint64_t plan_checksum(const void* data, int64_t bytes, int64_t skip) {
  const auto* p = static_cast<const uint8_t*>(data);
  uint64_t lane[kLanes] = {kA, kB, kC, kA ^ kB};
  const auto word_at = [&](int64_t at) {
    uint64_t word = 0;
    const int64_t left = bytes - at;
    std::memcpy(&word, p + at, static_cast<size_t>(left < 8 ? left : 8));
    return at == skip ? 0 : word;
  };
  const auto round = [&lane](int i, uint64_t word) {
    lane[i] = rotate(lane[i] + word * kB, 31) * kA;
  };
  const int64_t stripe = kLanes * 8, whole = bytes / stripe * stripe;
  for (int64_t at = 0; at < whole; at += stripe) {
    for (int i = 0; i < kLanes; ++i) round(i, word_at(at + i * 8));
  }
  for (int64_t at = whole; at < bytes; at += 8)
    round(static_cast<int>(at / 8 % kLanes), word_at(at));
  uint64_t h = static_cast<uint64_t>(bytes) * kA;
  for (const uint64_t l : lane) h = rotate(h ^ finish(l), 27) * kA + kB;
  return finish(h);
}

}  // namespace qk::plan
