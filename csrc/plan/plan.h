// A compiled network: the C++ interface.
//
//   std::unique_ptr<Plan> plan;
//   Error error = Plan::load(bytes, size, &plan);           // a saved plan, see format.h
//   const InputLayout image = contiguous_input({1, 3, 224, 224});
//   error = plan->outputs({image}, threads, &specs);        // sizes and strides of what comes out
//   error = plan->run({image}, inputs, outputs, threads);   // addresses in, nothing allocated
//
// Threads: a Plan is immutable after load; any number of threads may call it at once. Each running
//   call has an arena of its own from a small pool. No locks: a process may fork at any time. The
//   work inside a call is shared out over `parallel`, which the caller owns (csrc/base/parallel.h).
// Memory: load copies what it needs; `bytes` may go away. The first call with a new set of shapes
//   plans them and grows the arena; later calls with one of the last kShapes sets allocate nothing.
// Numbers: the bits of the operations of qkernels.ops, for every instruction set and any number of
//   threads.
// Errors: every function that can fail returns an Error; nothing throws but std::bad_alloc.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "csrc/base/cpu.h"
#include "csrc/base/parallel.h"
#include "csrc/plan/error.h"
#include "csrc/plan/program.h"

namespace qk::plan {

struct PlanInput {
  std::string name;
  DType dtype = DType::kF32;
  Sizes size;  // -1: any
};

// A dense input in torch's dimension order; one of more than 6 dimensions is refused by every plan.
InputLayout contiguous_input(std::initializer_list<int64_t> size);

class Plan {
 public:
  // Sets of shapes that each arena remembers, and arenas that wait for the next call.
  static constexpr int kShapes = 8, kIdle = 64;

  // Packs the weights for the active instruction set. `cache_bytes`: what the activations of a
  // slice of the batch may fill (see Slicing); 0: most of this machine's L2.
  static Error load(const void* bytes, int64_t size, std::unique_ptr<Plan>* plan,
                    int64_t cache_bytes = 0);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  Isa isa() const { return isa_; }
  const std::string& metadata() const { return model_.metadata; }
  const std::vector<PlanInput>& inputs() const { return inputs_; }
  int64_t output_count() const { return static_cast<int64_t>(model_.outputs.size()); }
  int64_t packed_bytes() const;

  // Sizes, strides and dtypes of the outputs for inputs of these sizes and strides.
  Error outputs(const std::vector<InputLayout>& inputs, const Parallel& parallel,
                std::vector<OutputSpec>* specs) const;

  // inputs[i] is laid out as layouts[i] says and has the dtype of inputs()[i]; outputs[k] is
  // memory for what outputs() says. step_ns, if not nullptr, gets the nanoseconds of every
  // operation of describe(), a lane's share where slices run side by side.
  Error run(const std::vector<InputLayout>& layouts, const void* const* inputs,
            void* const* outputs, const Parallel& parallel,
            std::vector<int64_t>* step_ns = nullptr) const;

  struct Description {
    std::vector<OperationInfo> operations;  // `step` indexes step_names
    int64_t arena_bytes = 0;
  };
  Error describe(const std::vector<InputLayout>& inputs, const Parallel& parallel,
                 Description* description) const;
  const std::string& step_name(int step) const { return model_.steps[step].name; }

 private:
  class Session;
  class Lease;

  Plan() = default;
  Error pack(const uint8_t* bytes, int64_t size);
  Error check_isa() const;
  std::unique_ptr<Session> acquire() const;
  void release(std::unique_ptr<Session> session) const;

  Isa isa_ = Isa::kScalar;
  int64_t cache_bytes_ = 0;
  Model model_;  // its tensors point into constants_ or nowhere
  std::vector<Block> packed_;
  Block constants_;
  std::vector<const uint8_t*> constant_;  // by tensor; nullptr: only needed for packing
  std::vector<PlanInput> inputs_;
  mutable std::atomic<Session*> idle_[kIdle] = {};
};

}  // namespace qk::plan
