// Damaged plan files. A changed file is refused, always; a changed file with a fitting checksum is
// refused or runs, and never harms the process. QK_TEST_FUZZ=<n>: how many of each.
#include "csrc/plan/plan.h"
#include "tests/csrc/check.h"
#include "tests/csrc/plan_networks.h"

using namespace qk;
using namespace qk::test;
using namespace qk::plan;

#if defined(__SANITIZE_ADDRESS__)
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "allocator_may_return_null=1:max_allocation_size_mb=1024";
}
constexpr int64_t kFiles = 4000;
#else
constexpr int64_t kFiles = 100'000;
#endif

namespace {

constexpr int64_t kSmall = int64_t{1} << 24;  // bytes and multiply-adds of a call worth making

int64_t files() {
  const char* text = std::getenv("QK_TEST_FUZZ");
  return text == nullptr ? kFiles : std::strtoll(text, nullptr, 10);
}

// Changes one or a few places: bits, bytes, words with telling values, copied and cut ranges.
void mutate(std::vector<uint8_t>* file, size_t from, Rng& rng) {
  const auto place = [&] { return from + static_cast<size_t>(rng.bits() % (file->size() - from)); };
  for (int64_t n = rng.chance(0.7) ? 1 : rng.integer(2, 6); n > 0; --n) {
    const size_t at = place();
    switch (rng.integer(0, 5)) {
      case 0:
        (*file)[at] ^= static_cast<uint8_t>(1u << rng.integer(0, 7));
        break;
      case 1:
        (*file)[at] = static_cast<uint8_t>(rng.bits());
        break;
      case 2:
      case 3: {  // a whole cell
        const int64_t values[] = {
            0,     1,     -1,        2,         3,         255,
            65535, 65536, INT32_MAX, INT64_MAX, INT64_MIN, static_cast<int64_t>(rng.bits())};
        const size_t aligned = at / 8 * 8;
        if (aligned >= from && aligned + 8 <= file->size()) {
          std::memcpy(file->data() + aligned, &values[rng.integer(0, 11)], 8);
        }
        break;
      }
      case 4: {  // one place over another
        const size_t source = place(), bytes = static_cast<size_t>(rng.integer(1, 64));
        if (source + bytes <= file->size() && at + bytes <= file->size()) {
          std::memmove(file->data() + at, file->data() + source, bytes);
        }
        break;
      }
      case 5:
        (*file)[at] = static_cast<uint8_t>((*file)[at] + rng.pick({-1, 1, 2}));
        break;
    }
  }
}

Error load(const std::vector<uint8_t>& file, std::unique_ptr<Plan>* plan) {
  return Plan::load(file.data(), static_cast<int64_t>(file.size()), plan);
}

void changed_files_are_refused() {
  const std::vector<uint8_t> original = network_file();
  Rng rng(11);
  for (int64_t i = 0; i < files(); ++i) {
    std::vector<uint8_t> file = original;
    mutate(&file, 0, rng);
    if (rng.chance(0.1)) file.resize(static_cast<size_t>(rng.integer(0, 2 * file.size())));
    std::unique_ptr<Plan> plan;
    const Error error = load(file, &plan);
    if (file == original) {
      CHECK(error.ok());
      continue;
    }
    CONTEXT("file ", i);
    CHECK(!error.ok() && plan == nullptr);
    CHECK(!error.message.empty());
  }
}

// Everything that a caller can do with a plan that was let in.
bool use(const Plan& plan, Rng& rng) {
  std::vector<InputLayout> layouts;
  for (const PlanInput& input : plan.inputs()) {
    InputLayout layout;
    layout.size.rank = input.size.rank;
    int64_t stride = 1;
    for (int d = input.size.rank - 1; d >= 0; --d) {
      const int64_t free = d == 0 ? rng.integer(0, 2) : rng.pick({4, 8, 16, 17});
      layout.size[d] = input.size[d] == -1 ? free : input.size[d];
      layout.stride[d] = stride;
      if (__builtin_mul_overflow(stride, layout.size[d], &stride) || stride > kSmall) return false;
    }
    layouts.push_back(layout);
  }
  Plan::Description description;
  if (!plan.describe(layouts, kSerial, &description).ok()) return false;
  std::vector<OutputSpec> specs;
  CHECK(plan.outputs(layouts, kSerial, &specs).ok());
  int64_t work = description.arena_bytes;
  for (const OperationInfo& info : description.operations) work += info.bytes + info.macs;
  if (work > kSmall) return false;
  std::vector<std::vector<uint8_t>> memory;
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  for (size_t i = 0; i < layouts.size(); ++i) {
    memory.emplace_back(
        static_cast<size_t>(layouts[i].size.elements() * dtype_bytes(plan.inputs()[i].dtype)));
    for (uint8_t& byte : memory.back()) byte = static_cast<uint8_t>(rng.bits());
  }
  for (const OutputSpec& spec : specs) memory.emplace_back(static_cast<size_t>(spec.bytes));
  for (size_t i = 0; i < memory.size(); ++i) {
    if (i < layouts.size()) {
      inputs.push_back(memory[i].data());
    } else {
      outputs.push_back(memory[i].data());
    }
  }
  CHECK(plan.run(layouts, inputs.data(), outputs.data(), kSerial).ok());
  return true;
}

void sealed_files_do_no_harm() {
  const std::vector<uint8_t> original = network_file();
  Rng rng(12);
  int64_t loaded = 0, ran = 0;
  for (int64_t i = 0; i < files(); ++i) {
    CONTEXT("file ", i);
    std::vector<uint8_t> file = original;
    // Mostly in the tables, which say what to do.
    const auto* header = reinterpret_cast<const FileHeader*>(original.data());
    const size_t data = header->sections[static_cast<int>(Section::kData)].offset;
    std::vector<uint8_t> head(file.begin(), file.begin() + static_cast<int64_t>(data));
    mutate(rng.chance(0.9) ? &head : &file, rng.chance(0.1) ? 0 : sizeof(FileHeader), rng);
    if (head.size() == data) std::copy(head.begin(), head.end(), file.begin());
    seal(&file);
    std::unique_ptr<Plan> plan;
    const Error error = load(file, &plan);
    CHECK(error.ok() == (plan != nullptr));
    if (!error.ok()) {
      CHECK(!error.message.empty());
      continue;
    }
    ++loaded;
    ran += use(*plan, rng);
  }
  std::cout << files() << " sealed files: " << loaded << " loaded, " << ran << " ran" << std::endl;
  CHECK(loaded > 0 && ran > 0);
}

}  // namespace

int main() {
  changed_files_are_refused();
  sealed_files_do_no_harm();
}
