// Runs a saved plan without Python: loads it, gives it random images, prints what comes out and how
// long a call takes.
//
//   run_plan network.qkplan [threads=1] [size of open dimensions: batch=1 others=224]
//
// In Python, plan.save("network.qkplan") writes the file. This program links csrc/ only; the thread
// pool below is the caller's own, handed over as a qk::Parallel.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "csrc/plan/plan.h"

namespace {

using qk::Parallel;
using qk::plan::DType;
using qk::plan::Error;
using qk::plan::InputLayout;
using qk::plan::OutputSpec;
using qk::plan::Plan;
using qk::plan::PlanInput;

// Sleeping workers that take equal parts of each task range; the caller takes the first. For one
// caller at a time: threads that call a plan at once need a pool each.
class Pool : public Parallel {
 public:
  explicit Pool(int count) {
    threads = count;
    run = [](const Parallel& self, int64_t tasks, Body body, void* context) {
      // A Pool is only ever passed as itself, and is no constant.
      const_cast<Pool&>(static_cast<const Pool&>(self)).start(tasks, body, context);
    };
    for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

 private:
  void start(int64_t tasks, Body body, void* context) {
    {
      const std::lock_guard lock(mutex_);
      tasks_ = tasks;
      body_ = body;
      context_ = context;
      running_ = threads - 1;
      ++round_;
    }
    wake_.notify_all();
    take(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

  void take(int part) const {
    const int64_t begin = tasks_ * part / threads, end = tasks_ * (part + 1) / threads;
    if (begin < end) body_(context_, begin, end);
  }

  void work(int part) {
    for (int64_t seen = 0;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
        if (stopping_) return;
        seen = round_;
      }
      take(part);
      {
        const std::lock_guard lock(mutex_);
        --running_;
      }
      done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  int64_t tasks_ = 0, round_ = 0;
  Body body_ = nullptr;
  void* context_ = nullptr;
  int running_ = 0;
  bool stopping_ = false;
};

[[noreturn]] void stop(const std::string& message) {
  std::fprintf(stderr, "run_plan: %s\n", message.c_str());
  std::exit(1);
}

void check(const Error& error) {
  if (!error.ok()) stop(error.message);
}

int64_t number(const char* text, int64_t most) {
  const int64_t value = std::atoll(text);
  if (value < 1 || value > most) {
    stop(std::string(text) + " must be a number from 1 to " + std::to_string(most));
  }
  return value;
}

// Dense, the open dimensions as the command line says.
InputLayout layout_of(const PlanInput& input, int64_t batch, int64_t size) {
  InputLayout layout;
  layout.size = input.size;
  for (int d = 0; d < layout.size.rank; ++d) {
    if (layout.size[d] == -1) layout.size[d] = d == 0 ? batch : size;
  }
  int64_t stride = 1;
  for (int d = layout.size.rank - 1; d >= 0; --d) {
    layout.stride[d] = stride;
    stride *= layout.size[d];
  }
  return layout;
}

// Floats in [-1, 1), or codes.
std::vector<uint8_t> random_input(const InputLayout& layout, DType dtype) {
  const size_t count = static_cast<size_t>(layout.size.elements());
  std::vector<uint8_t> bytes(count * static_cast<size_t>(qk::plan::dtype_bytes(dtype)));
  uint64_t state = 1;
  for (size_t i = 0; i < bytes.size(); i += dtype == DType::kF32 ? 4 : 1) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    if (dtype == DType::kF32) {
      const float value = static_cast<float>(state >> 40) * 0x1p-23f - 1.0f;
      std::copy_n(reinterpret_cast<const uint8_t*>(&value), 4, bytes.data() + i);
    } else {
      bytes[i] = static_cast<uint8_t>(state >> 56);
    }
  }
  return bytes;
}

void print_output(const OutputSpec& spec, const std::vector<uint8_t>& bytes) {
  std::printf("%s %s:", qk::plan::dtype_name(spec.dtype), qk::plan::text(spec.size).c_str());
  const int64_t shown = std::min<int64_t>(spec.size.elements(), 5);
  for (int64_t i = 0; i < shown; ++i) {
    switch (spec.dtype) {
      case DType::kF32:
        std::printf(" %g", reinterpret_cast<const float*>(bytes.data())[i]);
        break;
      case DType::kS32:
        std::printf(" %d", reinterpret_cast<const int32_t*>(bytes.data())[i]);
        break;
      case DType::kS8:
        std::printf(" %d", reinterpret_cast<const int8_t*>(bytes.data())[i]);
        break;
      case DType::kU8:
        std::printf(" %d", bytes[static_cast<size_t>(i)]);
        break;
      default:  // the bits of a half
        std::printf(" 0x%04x", reinterpret_cast<const uint16_t*>(bytes.data())[i]);
    }
  }
  std::printf("%s\n", spec.size.elements() > shown ? " ..." : "");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) stop("usage: run_plan network.qkplan [threads] [batch] [size]");
  const int threads = static_cast<int>(number(argc > 2 ? argv[2] : "1", 1024));
  const int64_t batch = number(argc > 3 ? argv[3] : "1", 65536);
  const int64_t size = number(argc > 4 ? argv[4] : "224", 65536);

  std::ifstream stream(argv[1], std::ios::binary);
  if (!stream || !std::filesystem::is_regular_file(argv[1])) {
    stop(std::string("cannot open ") + argv[1]);
  }
  const std::vector<char> file{std::istreambuf_iterator<char>(stream), {}};
  std::unique_ptr<Plan> plan;
  check(Plan::load(file.data(), static_cast<int64_t>(file.size()), &plan));

  Pool pool(threads);
  std::vector<InputLayout> layouts;
  std::vector<std::vector<uint8_t>> input_bytes, output_bytes;
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  for (const PlanInput& input : plan->inputs()) layouts.push_back(layout_of(input, batch, size));
  std::vector<OutputSpec> specs;
  check(plan->outputs(layouts, pool, &specs));  // refuses what the plan does not take
  for (size_t i = 0; i < layouts.size(); ++i) {
    input_bytes.push_back(random_input(layouts[i], plan->inputs()[i].dtype));
  }
  for (const auto& bytes : input_bytes) inputs.push_back(bytes.data());
  for (const OutputSpec& spec : specs) output_bytes.emplace_back(static_cast<size_t>(spec.bytes));
  for (auto& bytes : output_bytes) outputs.push_back(bytes.data());

  double best = 1e30;
  for (int i = 0; i < 20; ++i) {
    const auto start = std::chrono::steady_clock::now();
    check(plan->run(layouts, inputs.data(), outputs.data(), pool));
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  for (size_t i = 0; i < specs.size(); ++i) print_output(specs[i], output_bytes[i]);
  std::printf("%s, %d threads: %.3f ms a call (best of 20)\n", qk::isa_name(plan->isa()), threads,
              best);
}
