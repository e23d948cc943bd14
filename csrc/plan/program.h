// A network made ready for one set of input shapes: a straight list of operations whose arguments
// are complete except for the addresses of the arena, the inputs and the outputs.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "csrc/conv/conv.h"
#include "csrc/gemm/linear.h"
#include "csrc/image/image.h"
#include "csrc/plan/memory.h"
#include "csrc/plan/move.h"
#include "csrc/plan/shapes.h"
#include "csrc/pool/pool.h"
#include "csrc/quantize/quantize.h"

namespace qk::plan {

// An address that is known at the call: bases[base] + offset. Base 0 is the address space itself
// (constants), 1 the arena, then come the inputs and the outputs. In a slice, `image` more for each
// image before it, and `lane` more for each lane (see Slicing).
struct Ref {
  int base = 0;
  int64_t offset = 0, image = 0, lane = 0;
};

struct QuantizeOp {
  QuantizeArgs args;
  Ref x, q;
};
struct ImageOp {
  QuantizeImageArgs args;
  Ref x, q;
};
struct DequantizeOp {
  DequantizeArgs args;
  Ref q, x;
};
struct LinearOp {
  LinearArgs args;
  Ref input, out, residual, workspace;
};
struct ConvOp {
  ConvArgs args;
  Ref input, floats, out, residual, workspace;  // input or floats
};
struct PairOp {  // add and mul
  BinaryArgs args;
  Ref a, b, out;
};
struct MoveOp {
  MoveArgs args;
  Ref in, out;
};
struct FillOp {
  int value = 0;
  int64_t bytes = 0;
  Ref out;
};
struct MaxPoolOp {
  MaxPoolArgs args;
  Ref q, out;
};
struct AvgPoolOp {
  AvgPoolArgs args;
  Ref q, out;
};
struct ResizeOp {
  ResizeArgs args;
  std::vector<int64_t> index[3];
  Ref in, out;
};

using Operation = std::variant<QuantizeOp, ImageOp, DequantizeOp, LinearOp, ConvOp, PairOp, MoveOp,
                               FillOp, MaxPoolOp, AvgPoolOp, ResizeOp>;

// What a description of the plan says of one operation.
struct OperationInfo {
  int step = -1;  // of the model
  std::string kind, kernel;
  std::vector<std::string> inputs;  // such as "uint8 [1, 3, 224, 224]"
  std::string output;
  int64_t macs = 0, bytes = 0;  // read and written, weights included
  int64_t workspace = 0;
  int64_t output_offset = -1;  // in the arena; -1: in an output of the plan
  int64_t images = 0;          // of a slice; 0: the whole batch at once
};

// Where an output of the plan has to lie.
struct OutputSpec {
  DType dtype = DType::kF32;
  Sizes size;
  int64_t stride[kMaxRank] = {};
  int64_t bytes = 0;
};

// Operations [begin, end) run on a slice of the batch, one after the other, then on the next slice:
// what lies between them stays in the cache. With several threads there are as many lanes, and each
// runs slices on one thread, with memory of its own for what lies between.
struct Slicing {
  int begin = 0, end = 0;
  int64_t batch = 0, images = 0;
  int lanes = 1;
  std::vector<Operation> rest;  // for the last slice if it has fewer images
};

struct Program {
  std::vector<Operation> operations;
  std::vector<Slicing> slicings;    // in order
  std::vector<OperationInfo> info;  // one an operation
  std::vector<OutputSpec> outputs;
  int64_t arena_bytes = 0;
  int64_t work_ns = 0;  // an estimate: less than a fork costs runs on one thread
};

// An input's sizes and strides (in elements).
struct InputLayout {
  Sizes size;
  int64_t stride[kMaxRank] = {};

  bool operator==(const InputLayout& other) const {
    if (!(size == other.size)) return false;
    for (int d = 0; d < size.rank; ++d) {
      if (stride[d] != other.stride[d]) return false;
    }
    return true;
  }
};

// `packed`: one block a step, empty where the step has no weights. The program points into `model`,
// `constants` (the data of every tensor that is read at run time, by tensor) and `packed`. `cache`:
// the bytes of a thread's cache that activations should stay in.
Error make_program(const Model& model, const std::vector<Block>& packed,
                   const std::vector<const uint8_t*>& constants,
                   const std::vector<InputLayout>& inputs, int64_t cache, const Parallel& parallel,
                   Program* program);

// bases: see Ref. step_ns, if not nullptr, has a zero for each lane and operation (lane by lane);
// their times are added.
void run_program(const Program& program, uint8_t* const* bases, const Parallel& parallel,
                 int64_t* step_ns);

}  // namespace qk::plan
