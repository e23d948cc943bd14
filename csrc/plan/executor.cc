#include <chrono>
#include <cstring>

#include "csrc/base/team.h"
#include "csrc/plan/program.h"

namespace qk::plan {
namespace {

constexpr int64_t kLongCallNs = 10'000'000;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

class Executor {
 public:
  // For the slice that starts at image `first`, in `lane`.
  Executor(uint8_t* const* bases, const Parallel& parallel, int64_t first = 0, int64_t lane = 0)
      : bases_(bases), parallel_(parallel), first_(first), lane_(lane) {}

  void run(const Operation& operation, int64_t* ns) const {
    const int64_t start = ns != nullptr ? now_ns() : 0;
    std::visit(*this, operation);
    if (ns != nullptr) *ns += now_ns() - start;
  }

  void operator()(const QuantizeOp& op) const {
    QuantizeArgs args = op.args;
    args.x = at(op.x);
    args.q = at(op.q);
    quantize(args, parallel_);
  }
  void operator()(const ImageOp& op) const {
    QuantizeImageArgs args = op.args;
    args.images.x = at(op.x);
    args.q = at(op.q);
    quantize_image(args, parallel_);
  }
  void operator()(const DequantizeOp& op) const {
    DequantizeArgs args = op.args;
    args.q = at(op.q);
    args.x = at(op.x);
    dequantize(args, parallel_);
  }
  void operator()(const LinearOp& op) const {
    LinearArgs args = op.args;
    args.input = at(op.input);
    args.out = at(op.out);
    args.residual = at(op.residual);
    args.workspace = at(op.workspace);
    linear(args, parallel_);
  }
  void operator()(const ConvOp& op) const {
    ConvArgs args = op.args;
    args.input = at(op.input);
    args.floats.x = at(op.floats);
    args.out = at(op.out);
    args.residual = at(op.residual);
    args.workspace = at(op.workspace);
    conv(args, parallel_);
  }
  void operator()(const PairOp& op) const {
    BinaryArgs args = op.args;
    args.a = at(op.a);
    args.b = at(op.b);
    args.out = at(op.out);
    binary(args, parallel_);
  }
  void operator()(const MoveOp& op) const {
    MoveArgs args = op.args;
    args.in = at(op.in);
    args.out = at(op.out);
    move(args, parallel_);
  }
  void operator()(const FillOp& op) const {
    std::memset(at(op.out), op.value, static_cast<size_t>(op.bytes));
  }
  void operator()(const MaxPoolOp& op) const {
    MaxPoolArgs args = op.args;
    args.q = at(op.q);
    args.out = at(op.out);
    max_pool(args, parallel_);
  }
  void operator()(const AvgPoolOp& op) const {
    AvgPoolArgs args = op.args;
    args.q = at(op.q);
    args.out = at(op.out);
    avg_pool(args, parallel_);
  }
  void operator()(const ResizeOp& op) const {
    ResizeArgs args = op.args;
    args.in = at(op.in);
    args.out = at(op.out);
    for (int d = 0; d < 3; ++d) args.index[d] = op.index[d].data();
    resize(args, parallel_);
  }

 private:
  uint8_t* at(const Ref& ref) const {
    return reinterpret_cast<uint8_t*>(
        reinterpret_cast<uintptr_t>(bases_[ref.base]) + static_cast<uintptr_t>(ref.offset) +
        static_cast<uintptr_t>(ref.image * first_) + static_cast<uintptr_t>(ref.lane * lane_));
  }

  uint8_t* const* bases_;
  const Parallel& parallel_;
  const int64_t first_, lane_;
};

// `lane`'s share of the slices.
void run_lane(const Program& program, const Slicing& slicing, uint8_t* const* bases,
              const Parallel& parallel, int64_t lane, int64_t* step_ns) {
  const int64_t slices = (slicing.batch + slicing.images - 1) / slicing.images;
  for (int64_t i = slices * lane / slicing.lanes; i < slices * (lane + 1) / slicing.lanes; ++i) {
    const int64_t first = i * slicing.images;
    const bool whole = first + slicing.images <= slicing.batch;
    const Operation* operations =
        whole ? program.operations.data() + slicing.begin : slicing.rest.data();
    const Executor executor(bases, parallel, first, lane);
    for (int k = 0; k < slicing.end - slicing.begin; ++k) {
      executor.run(operations[k], step_ns != nullptr ? step_ns + slicing.begin + k : nullptr);
    }
  }
}

void run_slicing(const Program& program, const Slicing& slicing, uint8_t* const* bases,
                 const Parallel& parallel, int64_t* step_ns) {
  if (slicing.lanes == 1) return run_lane(program, slicing, bases, parallel, 0, step_ns);
  const auto count = static_cast<int64_t>(program.operations.size());
  parallel.for_each_range(slicing.lanes, INT64_MAX, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      run_lane(program, slicing, bases, kSerial, lane,
               step_ns != nullptr ? step_ns + lane * count : nullptr);
    }
  });
}

void run_operations(const Program& program, uint8_t* const* bases, const Parallel& parallel,
                    int64_t* step_ns) {
  const Executor executor(bases, parallel);
  const auto count = static_cast<int>(program.operations.size());
  auto slicing = program.slicings.begin();
  for (int i = 0; i < count;) {
    if (slicing != program.slicings.end() && slicing->begin == i) {
      run_slicing(program, *slicing, bases, parallel, step_ns);
      i = slicing->end;
      ++slicing;
    } else {
      executor.run(program.operations[i], step_ns != nullptr ? step_ns + i : nullptr);
      ++i;
    }
  }
}

}  // namespace

void run_program(const Program& program, uint8_t* const* bases, const Parallel& parallel,
                 int64_t* step_ns) {
  if (program.work_ns < parallel.fork_ns) {
    Parallel alone = parallel;  // its number of threads: the memory is laid out for them
    alone.run = nullptr;
    return run_operations(program, bases, alone, step_ns);
  }
  // In a long call the forks of all operations are a small part, and a thread that wakes late joins
  // at the next one.
  if (program.work_ns > kLongCallNs) return run_operations(program, bases, parallel, step_ns);
  with_team(parallel, [&](const Parallel& team) { run_operations(program, bases, team, step_ns); });
}

}  // namespace qk::plan
