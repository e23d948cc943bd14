// What the C++ tests share: checks that print both sides, a seeded generator, buffers with an
// unreadable page on either side, threads, and a loop over the instruction sets of this machine.
//
// A test is a plain main(): it ends at the first failed check with status 1. QK_TEST_SEED=<n>
// changes the random data; a failure prints the seed that was used.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <iostream>
#include <limits>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "csrc/base/cpu.h"
#include "csrc/base/parallel.h"

namespace qk::test {

inline uint64_t seed() {
  const char* text = std::getenv("QK_TEST_SEED");
  return text == nullptr ? 1 : std::strtoull(text, nullptr, 10);
}

// Says where the test is (shape, ISA, ...); printed with a failure. One string a thread.
inline std::string& context() {
  static thread_local std::string text;
  return text;
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::cerr << file << ":" << line << ": " << what;
  if (!context().empty()) std::cerr << "\n  with " << context();
  std::cerr << "\n  isa " << isa_name(isa_active()) << ", QK_TEST_SEED=" << seed() << std::endl;
  std::_Exit(1);
}

// Integers of one byte print as numbers.
template <typename T>
auto printable(const T& value) {
  if constexpr (std::is_integral_v<T> && sizeof(T) == 1) {
    return static_cast<int>(value);
  } else if constexpr (std::is_enum_v<T>) {
    return static_cast<int64_t>(value);
  } else {
    return value;
  }
}

template <typename... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << printable(parts));
  return stream.str();
}

}  // namespace qk::test

// CHECK(condition) or CHECK(condition, "part", value, ...)
#define CHECK(condition, ...)                                                               \
  do {                                                                                      \
    if (!(condition))                                                                       \
      ::qk::test::fail(                                                                     \
          __FILE__, __LINE__,                                                               \
          ::qk::test::text_of("CHECK(" #condition ") failed " __VA_OPT__(, ) __VA_ARGS__)); \
  } while (0)

// CHECK_EQ(got, expected) or CHECK_EQ(got, expected, "part", value, ...)
#define CHECK_EQ(got, expected, ...)                                                         \
  do {                                                                                       \
    const auto qk_got = (got);                                                               \
    const auto qk_expected = (expected);                                                     \
    if (!(qk_got == qk_expected))                                                            \
      ::qk::test::fail(__FILE__, __LINE__,                                                   \
                       ::qk::test::text_of(#got, " is ", qk_got, ", expected ", qk_expected, \
                                           " " __VA_OPT__(, ) __VA_ARGS__));                 \
  } while (0)

// Names the case for every failure below it: CONTEXT("M=", m, " N=", n).
#define CONTEXT(...) (::qk::test::context() = ::qk::test::text_of(__VA_ARGS__))

namespace qk::test {

// SplitMix64: the same numbers on every machine, unlike the distributions of <random>.
class Rng {
 public:
  explicit Rng(uint64_t stream = 0) : state_(seed() * 0x9e3779b97f4a7c15u + stream) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // Uniform in [low, high], both included.
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  // Uniform in [low, high).
  float real(float low, float high) {
    return low + (high - low) * (static_cast<float>(bits() >> 40) * 0x1p-24f);
  }
  bool chance(double p) { return static_cast<double>(bits() >> 11) * 0x1p-53 < p; }
  template <typename T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
  }
  // Integers: over the whole type, the two ends often. Floats: in [-4, 4).
  template <typename Range>
  void fill(Range&& range) {
    using T = std::remove_cvref_t<decltype(*range.begin())>;
    for (T& value : range) {
      if constexpr (std::is_floating_point_v<T>) {
        value = static_cast<T>(real(-4, 4));
      } else {
        value = chance(0.1) ? pick({std::numeric_limits<T>::min(), std::numeric_limits<T>::max()})
                            : static_cast<T>(bits());
      }
    }
  }

 private:
  uint64_t state_;
};

// `size` elements of T whose end (kEnd) or start (kStart) touches an unreadable page: one byte too
// far is a fault. The other side has a canary of up to a page, checked at the end of life, and an
// unreadable page behind it.
enum class Touches { kEnd, kStart };

template <typename T>
class Guarded {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit Guarded(int64_t size, Touches touches = Touches::kEnd) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    body_bytes_ = (bytes + page) / page * page;  // at least one byte of canary
    map_bytes_ = body_bytes_ + 2 * page;
    void* map = mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(map != MAP_FAILED);
    map_ = static_cast<uint8_t*>(map);
    body_ = map_ + page;
    CHECK_EQ(mprotect(body_, body_bytes_, PROT_READ | PROT_WRITE), 0);
    std::memset(body_, kCanary, body_bytes_);
    offset_ = touches == Touches::kEnd ? body_bytes_ - bytes : 0;
    std::memset(body_ + offset_, 0, bytes);
  }
  ~Guarded() {
    const size_t end = offset_ + static_cast<size_t>(size_) * sizeof(T);
    check_canary(0, offset_);
    check_canary(end, body_bytes_);
    munmap(map_, map_bytes_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return reinterpret_cast<T*>(body_ + offset_); }
  const T* data() const { return reinterpret_cast<const T*>(body_ + offset_); }
  int64_t size() const { return size_; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

 private:
  static constexpr uint8_t kCanary = 0xa5;

  void check_canary(size_t begin, size_t end) const {
    for (size_t i = begin; i < end; ++i) {
      CHECK(body_[i] == kCanary, "byte ", static_cast<int64_t>(i) - static_cast<int64_t>(offset_),
            " of a buffer of ", size_ * static_cast<int64_t>(sizeof(T)), " bytes was written");
    }
  }

  int64_t size_;
  uint8_t* map_;
  uint8_t* body_;
  size_t body_bytes_, map_bytes_, offset_;
};

template <typename T>
bool same_bytes(const T* a, const T* b, int64_t size) {
  return size == 0 || std::memcmp(a, b, static_cast<size_t>(size) * sizeof(T)) == 0;
}

// A Parallel that starts `threads` std::threads for each run.
inline Parallel threads(int count) {
  Parallel parallel;
  parallel.threads = count;
  parallel.run = [](const Parallel& self, int64_t tasks, Parallel::Body body, void* context) {
    std::vector<std::thread> workers;
    for (int64_t t = 0; t < self.threads; ++t) {
      const int64_t begin = tasks * t / self.threads, end = tasks * (t + 1) / self.threads;
      if (begin < end) workers.emplace_back(body, context, begin, end);
    }
    for (std::thread& worker : workers) worker.join();
  };
  return parallel;
}

// Calls f() on a thread with a stack of so many bytes.
template <typename F>
void with_stack(size_t bytes, const F& f) {
  pthread_attr_t attributes;
  pthread_t thread;
  CHECK_EQ(pthread_attr_init(&attributes), 0);
  CHECK_EQ(pthread_attr_setstacksize(&attributes, bytes), 0);
  const auto run = [](void* body) -> void* {
    (*static_cast<const F*>(body))();
    return nullptr;
  };
  CHECK_EQ(pthread_create(&thread, &attributes, run, const_cast<F*>(&f)), 0);
  CHECK_EQ(pthread_join(thread, nullptr), 0);
  pthread_attr_destroy(&attributes);
}

// Calls f(isa) once for each instruction set of this machine, weakest first, with the cap set to
// it.
template <typename F>
void for_each_isa(const F& f) {
  const Isa before = isa_cap();
  for (int i = 0; i < kIsaCount; ++i) {
    set_isa_cap(static_cast<Isa>(i));
    if (isa_active() == static_cast<Isa>(i)) f(static_cast<Isa>(i));
  }
  set_isa_cap(before);
}

}  // namespace qk::test
