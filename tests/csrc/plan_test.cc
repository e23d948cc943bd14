// The plan executor: the same bits on every instruction set and for any number of threads and
// callers, no allocation a call, shapes that change, and an error that says why for everything that
// does not fit.
#include "csrc/plan/plan.h"

#include <sys/wait.h>

#include <atomic>
#include <cstddef>
#include <fstream>
#include <new>
#include <set>

#include "tests/csrc/check.h"
#include "tests/csrc/plan_networks.h"

using namespace qk;
using namespace qk::test;
using namespace qk::plan;

// ---- allocations are counted; AddressSanitizer keeps its own allocator

namespace {

std::atomic<int64_t> allocations{0};

#if !defined(__SANITIZE_ADDRESS__)
void* counted(size_t size, size_t align = alignof(std::max_align_t)) {
  ++allocations;
  return std::aligned_alloc(align, (size + align - 1) / align * align);
}
#endif

}  // namespace

#if !defined(__SANITIZE_ADDRESS__)
void* operator new(size_t size) { return counted(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept { return counted(size); }
void* operator new(size_t size, std::align_val_t align) {
  return counted(size, static_cast<size_t>(align));
}
void* operator new(size_t size, std::align_val_t align, const std::nothrow_t&) noexcept {
  return counted(size, static_cast<size_t>(align));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }
#endif

namespace {

std::unique_ptr<Plan> load(const std::vector<uint8_t>& file) {
  std::unique_ptr<Plan> plan;
  const Error error = Plan::load(file.data(), static_cast<int64_t>(file.size()), &plan);
  CHECK(error.ok(), error.message);
  return plan;
}

struct Result {
  std::vector<std::vector<uint8_t>> outputs;
  bool operator==(const Result& other) const { return outputs == other.outputs; }
};

std::vector<float> image(int64_t batch, int64_t height, int64_t width, uint64_t stream = 1) {
  Rng rng(stream);
  std::vector<float> values(static_cast<size_t>(batch * 3 * height * width));
  for (float& v : values) v = rng.real(-8, 8);
  return values;
}

// One call, the outputs between guard pages.
Result run(const Plan& plan, const InputLayout& layout, const float* x, const Parallel& parallel) {
  std::vector<OutputSpec> specs;
  Error error = plan.outputs({layout}, parallel, &specs);
  CHECK(error.ok(), error.message);
  std::vector<std::unique_ptr<Guarded<uint8_t>>> memory;
  std::vector<void*> targets;
  for (const OutputSpec& spec : specs) {
    memory.push_back(std::make_unique<Guarded<uint8_t>>(spec.bytes));
    targets.push_back(memory.back()->data());
  }
  const void* source = x;
  error = plan.run({layout}, &source, targets.data(), parallel);
  CHECK(error.ok(), error.message);
  Result result;
  for (const auto& output : memory) result.outputs.emplace_back(output->begin(), output->end());
  return result;
}

Result run_image(const Plan& plan, int64_t batch, int64_t height, int64_t width,
                 const Parallel& parallel = kSerial) {
  const std::vector<float> x = image(batch, height, width);
  return run(plan, contiguous_input({batch, 3, height, width}), x.data(), parallel);
}

void every_isa_and_thread_count_gives_the_same_bits() {
  const std::vector<uint8_t> file = network_file();
  std::vector<Result> expected;
  const int64_t sizes[][3] = {{1, 16, 16}, {2, 20, 12}, {3, 8, 32}};
  for_each_isa([&](Isa) {
    const std::unique_ptr<Plan> plan = load(file);
    for (int i = 0; i < 3; ++i) {
      for (const int count : {1, 3, 8}) {
        CONTEXT("shape ", i, ", threads ", count);
        const Result result =
            run_image(*plan, sizes[i][0], sizes[i][1], sizes[i][2], test::threads(count));
        if (static_cast<int>(expected.size()) == i) expected.push_back(result);
        CHECK(result == expected[static_cast<size_t>(i)]);
      }
    }
  });
}

// Whatever the cache is said to hold; the last slice may be smaller, and lanes may outnumber
// slices.
void slices_of_the_batch_give_the_same_bits() {
  const std::vector<uint8_t> file = network_file();
  constexpr int64_t kBatch = 7;
  const Result expected = run_image(*load(file), kBatch, 16, 16);
  std::set<int64_t> sizes;
  for (const int64_t cache : {500, 2000, 4000, 8000, 16000, 64000}) {
    std::unique_ptr<Plan> plan;
    CHECK(Plan::load(file.data(), static_cast<int64_t>(file.size()), &plan, cache).ok());
    for (const int count : {1, 2, 3, 8}) {
      CONTEXT("cache ", cache, ", threads ", count);
      CHECK(run_image(*plan, kBatch, 16, 16, test::threads(count)) == expected);
      Plan::Description description;
      const InputLayout layout = contiguous_input({kBatch, 3, 16, 16});
      CHECK(plan->describe({layout}, test::threads(count), &description).ok());
      for (const OperationInfo& info : description.operations) sizes.insert(info.images);
    }
  }
  CHECK(sizes.count(1) == 1 && sizes.size() > 2);
}

void quantize_and_dequantize_are_the_formula() {
  NetworkWriter n(1);
  const int x = n.file.input(DType::kF32, {-1, 3});
  n.file.output(n.dequantize(n.quantize(x, 2), 2));
  const std::unique_ptr<Plan> plan = load(n.file.bytes());
  const std::vector<float> in{-1.0f, 0.03f, 0.1f, 100.0f, -100.0f, 0.09375f};
  const Result result = run(*plan, contiguous_input({2, 3}), in.data(), kSerial);
  for (size_t i = 0; i < in.size(); ++i) {
    float got;
    std::memcpy(&got, result.outputs[0].data() + 4 * i, 4);
    const int32_t code =
        qk::quantize(in[i], 1.0f / NetworkWriter::kScale, NetworkWriter::kZero, 3, 250);
    CHECK_EQ(got, qk::dequantize(code, NetworkWriter::kScale, NetworkWriter::kZero));
  }
}

void inputs_of_too_many_dimensions_are_an_error() {
  NetworkWriter n(1);
  const int x = n.file.input(DType::kF32, {-1, 3});
  n.file.output(n.dequantize(n.quantize(x, 2), 2));
  const std::unique_ptr<Plan> plan = load(n.file.bytes());
  InputLayout wrong = contiguous_input({2, 3});
  for (const int rank : {-1, 7, 1 << 30}) {
    wrong.size.rank = rank;
    std::vector<OutputSpec> specs;
    const Error error = plan->outputs({wrong}, kSerial, &specs);
    CHECK(error.kind == ErrorKind::kArgument, error.message);
  }
  CHECK_EQ(contiguous_input({1, 1, 1, 1, 1, 1, 1}).size.rank, -1);
}

// A layer writes float32 itself; 16 bits are a step of their own, with the same values.
void layers_are_dequantized_to_every_float() {
  const auto outputs = [](DType dtype, size_t* operations) {
    NetworkWriter n(3);
    const int x = n.file.input(DType::kF32, {-1, 3, -1, -1});
    const int codes = n.conv(n.quantize(x, 4), {.in = 3, .out = 8, .kernel = 3, .padding = 1});
    n.file.output(n.dequantize(codes, 4, dtype));
    const std::unique_ptr<Plan> plan = load(n.file.bytes());
    Plan::Description description;
    CHECK(plan->describe({contiguous_input({2, 3, 9, 7})}, kSerial, &description).ok());
    *operations = description.operations.size();
    return run_image(*plan, 2, 9, 7).outputs[0];
  };
  size_t fused, separate;
  const std::vector<uint8_t> floats = outputs(DType::kF32, &fused);
  const std::vector<uint8_t> halves = outputs(DType::kBF16, &separate);
  CHECK_EQ(separate, fused + 1);
  for (size_t i = 0; i < floats.size() / 4; ++i) {
    float value;
    uint16_t bits;
    std::memcpy(&value, floats.data() + 4 * i, 4);
    std::memcpy(&bits, halves.data() + 2 * i, 2);
    CHECK_EQ(bits, qk::float_to_bfloat16(value));
  }
}

void planar_images_are_interleaved() {
  Rng rng(5);
  for_each_isa([&](Isa) {
    for (const int64_t channels : {1, 2, 3, 4, 16}) {
      for (const int64_t pixels : {1, 15, 16, 17, 47, 63, 64, 65, 129, 511, 513, 4097}) {
        CONTEXT("channels ", channels, ", pixels ", pixels);
        const bool per_channel = rng.chance(0.5);
        Guarded<float> x(2 * channels * pixels), scale(channels);
        Guarded<int32_t> zero_point(channels);
        Guarded<uint8_t> q(2 * channels * pixels);
        rng.fill(x);
        for (float& s : scale) s = rng.real(0.01f, 0.1f);
        for (int32_t& z : zero_point) z = static_cast<int32_t>(rng.integer(2, 200));
        const FloatImages images{.x = x.data(),
                                 .channels = channels,
                                 .batch_stride = channels * pixels,
                                 .channel_stride = pixels,
                                 .scale = scale.data(),
                                 .zero_point = zero_point.data(),
                                 .per_channel = per_channel,
                                 .qmin = 2,
                                 .qmax = 200};
        quantize_image({images, q.data(), 2, pixels}, test::threads(2));
        for (int64_t i = 0; i < q.size(); ++i) {
          const int64_t c = i % channels, p = i / channels % pixels, n = i / channels / pixels;
          const int64_t grid = per_channel ? c : 0;
          CHECK_EQ(static_cast<int32_t>(q[i]),
                   qk::quantize(x[(n * channels + c) * pixels + p], 1.0f / scale[grid],
                                zero_point[grid], 2, 200));
        }
      }
    }
  });
}

void input_layouts_do_not_matter() {
  const std::unique_ptr<Plan> plan = load(network_file());
  const int64_t batch = 2, height = 12, width = 8;
  const std::vector<float> x = image(batch, height, width);
  const Result expected = run_image(*plan, batch, height, width);
  // Channels last, every second element of a wider buffer.
  InputLayout strided = contiguous_input({batch, 3, height, width});
  strided.stride[0] = height * width * 3 * 2;
  strided.stride[1] = 2;
  strided.stride[2] = width * 3 * 2;
  strided.stride[3] = 3 * 2;
  std::vector<float> moved(x.size() * 2, -1.0f);
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t c = 0; c < 3; ++c) {
      for (int64_t i = 0; i < height * width; ++i) {
        moved[static_cast<size_t>(n * strided.stride[0] + c * 2 + i * 6)] =
            x[static_cast<size_t>((n * 3 + c) * height * width + i)];
      }
    }
  }
  CHECK(run(*plan, strided, moved.data(), kSerial) == expected);
}

void a_call_allocates_nothing() {
  const std::unique_ptr<Plan> plan = load(network_file());
  const std::vector<float> x = image(2, 16, 16);
  const std::vector<InputLayout> layouts{contiguous_input({2, 3, 16, 16})};
  std::vector<OutputSpec> specs;
  CHECK(plan->outputs(layouts, kSerial, &specs).ok());
  std::vector<std::vector<uint8_t>> memory;
  std::vector<void*> targets;
  for (const OutputSpec& spec : specs) memory.emplace_back(spec.bytes);
  for (auto& m : memory) targets.push_back(m.data());
  const void* source = x.data();
  CHECK(plan->run(layouts, &source, targets.data(), kSerial).ok());
  const int64_t before = allocations;
  for (int i = 0; i < 5; ++i) CHECK(plan->run(layouts, &source, targets.data(), kSerial).ok());
  CHECK_EQ(allocations.load(), before);
}

void many_threads_run_one_plan() {
  const std::unique_ptr<Plan> plan = load(network_file());
  std::vector<Result> expected;
  for (int64_t batch = 1; batch <= 3; ++batch) expected.push_back(run_image(*plan, batch, 12, 16));
  std::vector<std::thread> workers;
  for (int t = 0; t < 6; ++t) {
    workers.emplace_back([&, t] {
      for (int i = 0; i < 12; ++i) {
        const int64_t batch = 1 + (t + i) % 3;
        CHECK(run_image(*plan, batch, 12, 16) == expected[static_cast<size_t>(batch - 1)]);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
}

void a_forked_child_runs_the_plan() {
  const std::unique_ptr<Plan> plan = load(network_file());
  const Result expected = run_image(*plan, 1, 16, 16);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) _exit(run_image(*plan, 1, 16, 16) == expected ? 0 : 1);
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void shapes_come_and_go() {
  const std::unique_ptr<Plan> plan = load(network_file());
  std::vector<Result> expected;
  for (int round = 0; round < 2; ++round) {
    for (int64_t i = 0; i < 2 * Plan::kShapes; ++i) {
      const Result result = run_image(*plan, 1 + i % 2, 8 + 4 * (i % 5), 8 + 4 * i);
      if (round == 0) expected.push_back(result);
      CHECK(result == expected[static_cast<size_t>(i)]);
    }
  }
  CHECK_EQ(run_image(*plan, 0, 16, 16).outputs[0].size(), 0u);
}

void expect(const Error& error, ErrorKind kind, const char* part) {
  CHECK(error.kind == kind, error.message);
  CHECK(error.message.find(part) != std::string::npos, error.message);
}

void what_does_not_fit_is_named() {
  const std::vector<uint8_t> file = network_file();
  const std::unique_ptr<Plan> plan = load(file);
  std::vector<OutputSpec> specs;
  const auto outputs = [&](std::initializer_list<int64_t> size) {
    return plan->outputs({contiguous_input(size)}, kSerial, &specs);
  };
  expect(outputs({1, 4, 16, 16}), ErrorKind::kArgument, "must have shape [any, 3, any, any]");
  expect(outputs({1, 3, 16}), ErrorKind::kArgument, "got [1, 3, 16]");
  expect(outputs({1, 3, 2, 2}), ErrorKind::kArgument, "step");
  expect(outputs({1, 3, 18, 16}), ErrorKind::kArgument, "do not broadcast");
  expect(plan->outputs({}, kSerial, &specs), ErrorKind::kArgument, "expected 1 inputs, got 0");

  std::unique_ptr<Plan> other;
  const auto load_of = [&](std::vector<uint8_t> bytes, bool sealed) {
    if (sealed) seal(&bytes);
    return Plan::load(bytes.data(), static_cast<int64_t>(bytes.size()), &other);
  };
  expect(load_of({}, false), ErrorKind::kDamaged, "too short");
  std::vector<uint8_t> changed = file;
  changed[0] ^= 1;
  expect(load_of(changed, true), ErrorKind::kDamaged, "not a plan file");
  changed = file;
  changed[8] = plan::kFileVersion + 1;
  expect(load_of(changed, true), ErrorKind::kVersion, "has version 2");
  changed = file;
  changed.back() ^= 0x10;
  expect(load_of(changed, false), ErrorKind::kDamaged, "checksum");
  changed = file;
  changed.resize(file.size() - 64);
  expect(load_of(changed, false), ErrorKind::kDamaged, "bytes");
  CHECK(other == nullptr);

  const Isa before = isa_cap();
  if (isa_active() != Isa::kScalar) {
    set_isa_cap(Isa::kScalar);
    expect(outputs({1, 3, 16, 16}), ErrorKind::kState, "load the plan again");
    set_isa_cap(before);
  }
}

void scales_that_leave_the_float32_range_are_refused() {
  const auto load_of = [](StepKind kind, const PlanFile::Cells& cells) {
    NetworkWriter n(1);
    PlanFile& f = n.file;
    const int q = n.quantize(f.input(DType::kF32, {-1, 3, 4, 4}), 4);
    const bool pair = kind != StepKind::kAvgPool;
    f.output(
        pair ? f.step(kind, {q, q}, DType::kU8, 4, cells)
             : f.step(kind, {q}, DType::kU8, 4,
                      NetworkWriter::join(PlanFile::Cells{2, 2, 2, 2, 2, 0, 0, 0, 1, 0}, cells)));
    const std::vector<uint8_t> file = f.bytes();
    std::unique_ptr<Plan> plan;
    return Plan::load(file.data(), static_cast<int64_t>(file.size()), &plan);
  };
  const auto operand = NetworkWriter::operand;
  const auto grid = NetworkWriter::grid;
  const auto join = [](const auto&... lists) { return NetworkWriter::join(lists...); };
  const char* words = "scales whose formula leaves the float32 range";
  CHECK(load_of(StepKind::kAdd, join(operand(1e36f), operand(1.0f), grid(1.0f))).ok());
  for (const float a : {1.0f, 3e37f}) {
    expect(load_of(StepKind::kAdd, join(operand(a), operand(4e37f - a), grid(1.0f))),
           ErrorKind::kUnsupported, words);
  }
  CHECK(load_of(StepKind::kMul, join(operand(1e10f), operand(1e10f), grid(1.0f))).ok());
  expect(load_of(StepKind::kMul, join(operand(1e30f), operand(1e30f), grid(1.0f))),
         ErrorKind::kUnsupported, words);
  CHECK(load_of(StepKind::kAvgPool, join(operand(1e10f), grid(1e-10f))).ok());
  expect(load_of(StepKind::kAvgPool, join(operand(1e38f), grid(1e-37f))), ErrorKind::kUnsupported,
         words);
}

void steps_are_described_and_timed() {
  const std::unique_ptr<Plan> plan = load(network_file());
  const std::vector<InputLayout> layouts{contiguous_input({1, 3, 16, 16})};
  Plan::Description description;
  CHECK(plan->describe(layouts, kSerial, &description).ok());
  int64_t macs = 0;
  for (const OperationInfo& info : description.operations) {
    CHECK(!info.kind.empty() && !info.kernel.empty() && !info.output.empty());
    CHECK(info.output_offset < description.arena_bytes);
    macs += info.macs;
  }
  // The stem alone: 8 * 8 outputs of 20 channels, 27 products each.
  CHECK(macs > 8 * 8 * 20 * 27);
  std::vector<OutputSpec> specs;
  CHECK(plan->outputs(layouts, kSerial, &specs).ok());
  std::vector<std::vector<uint8_t>> memory;
  std::vector<void*> targets;
  for (const OutputSpec& spec : specs) memory.emplace_back(spec.bytes);
  for (auto& m : memory) targets.push_back(m.data());
  const std::vector<float> x = image(1, 16, 16);
  const void* source = x.data();
  std::vector<int64_t> step_ns;
  CHECK(plan->run(layouts, &source, targets.data(), kSerial, &step_ns).ok());
  CHECK_EQ(step_ns.size(), description.operations.size());
}

void living_buffers_never_overlap() {
  Rng rng(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<Lifetime> buffers(static_cast<size_t>(rng.integer(1, 40)));
    int64_t total = 0;
    for (Lifetime& b : buffers) {
      b.bytes = rng.integer(0, 5000);
      b.first = static_cast<int>(rng.integer(0, 30));
      b.last = b.first + static_cast<int>(rng.integer(0, 5));
      total += align_up(b.bytes);
    }
    const int64_t arena = place_buffers(&buffers);
    CHECK(arena <= total);
    for (const Lifetime& a : buffers) {
      CHECK(a.offset >= 0 && a.offset % kMemoryAlign == 0 && a.offset + a.bytes <= arena);
      for (const Lifetime& b : buffers) {
        const bool meet = &a != &b && a.first <= b.last && b.first <= a.last;
        CHECK(!meet || a.bytes == 0 || b.bytes == 0 || a.offset + a.bytes <= b.offset ||
              b.offset + b.bytes <= a.offset);
      }
    }
  }
}

}  // namespace

// `plan_test <path>` only writes the network, for examples/cpp.
int main(int argc, char** argv) {
  if (argc > 1) {
    const std::vector<uint8_t> file = network_file();
    std::ofstream(argv[1], std::ios::binary)
        .write(reinterpret_cast<const char*>(file.data()),
               static_cast<std::streamsize>(file.size()));
    return 0;
  }
  planar_images_are_interleaved();
  quantize_and_dequantize_are_the_formula();
  inputs_of_too_many_dimensions_are_an_error();
  layers_are_dequantized_to_every_float();
  every_isa_and_thread_count_gives_the_same_bits();
  slices_of_the_batch_give_the_same_bits();
  input_layouts_do_not_matter();
  a_call_allocates_nothing();
  many_threads_run_one_plan();
  a_forked_child_runs_the_plan();
  shapes_come_and_go();
  what_does_not_fit_is_named();
  scales_that_leave_the_float32_range_are_refused();
  steps_are_described_and_timed();
  living_buffers_never_overlap();
}
