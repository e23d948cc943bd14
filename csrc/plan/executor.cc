#include <chrono>
#include <cstring>

#include "csrc/plan/program.h"

namespace qk::plan {
namespace {

class Executor {
 public:
  Executor(uint8_t* const* bases, const Parallel& parallel) : bases_(bases), parallel_(parallel) {}

  void operator()(const QuantizeOp& op) const {
    QuantizeArgs args = op.args;
    args.x = at(op.x);
    args.q = at(op.q);
    quantize(args, parallel_);
  }
  void operator()(const ImageOp& op) const {
    QuantizeImageArgs args = op.args;
    args.x = at(op.x);
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
    linear(args, parallel_);
  }
  void operator()(const ConvOp& op) const {
    ConvArgs args = op.args;
    args.input = at(op.input);
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
    return reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(bases_[ref.base]) +
                                      static_cast<uintptr_t>(ref.offset));
  }

  uint8_t* const* bases_;
  const Parallel& parallel_;
};

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

void run_program(const Program& program, uint8_t* const* bases, const Parallel& parallel,
                 int64_t* step_ns) {
  const Executor executor(bases, parallel);
  for (size_t i = 0; i < program.operations.size(); ++i) {
    const int64_t start = step_ns != nullptr ? now_ns() : 0;
    std::visit(executor, program.operations[i]);
    if (step_ns != nullptr) step_ns[i] = now_ns() - start;
  }
}

}  // namespace qk::plan
