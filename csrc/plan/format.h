// The bytes of a saved plan: a whole integer network, flat and without code. Python writes them
// (qkernels/plan), Plan::load (plan.h) reads them; this file is the only interface between the two.
//
//   header | strings | metadata | tensors | values | scalars | steps | cells | inputs | outputs |
//   data
//
// Layout: little-endian, no padding inside records. The sections lie in this order without overlap;
//   each starts at a multiple of 64 bytes, directly after the one before it, and so does every
//   tensor inside `data`; gaps are zero. file_bytes is the end of `data`, rounded up to 64.
// Version: a reader takes exactly the versions it knows. New step kinds, dtypes or attributes are a
//   new version. There are no optional parts.
// Checksum: plan_checksum() of all bytes with the field `checksum` itself as zero. Any change
//   inside one aligned 8-byte word is found for certain, any other with probability 1 - 2^-64.
// Trust: a reader checks everything as if the file were hostile; the checksum is against accidents.
//
// What is in it:
//   strings   UTF-8, no terminators; names point into it
//   metadata  UTF-8 JSON for the writer's own use (structure of inputs and outputs, versions); the
//             executor hands it out and does not look inside
//   tensors   FileTensor[]: canonical weights, scales, zero points, biases, tables, constants;
//             contiguous, torch's dimension order
//   values    FileValue[]: what flows between steps
//   scalars   FileScalar[]: integers that may depend on the shapes of values
//   steps     FileStep[], in execution order
//   cells     8 bytes each: the operands and attributes of steps
//   inputs    FileInput[], in call order
//   outputs   uint32 value ids, in result order (a value may be an input, and may appear twice)
//
// Shapes are logical (torch's: N, C, *spatial). Layout in memory is the executor's business: the
// writer emits no copies or `contiguous`. Every value is written by exactly one step, or is an
// input; a step reads only inputs and values of earlier steps. Batch and spatial sizes are open
// until a call; ranks and channels of weighted layers are fixed.
#pragma once

#include <cstdint>

namespace qk::plan {

inline constexpr char kFileMagic[8] = {'Q', 'K', 'P', 'L', 'A', 'N', '\r', '\n'};
inline constexpr uint32_t kFileVersion = 1;
inline constexpr int64_t kFileAlign = 64;
inline constexpr int kMaxRank = 6;
// Sizes of tables that a reader accepts.
inline constexpr int64_t kMaxSteps = 65536, kMaxValues = 65536, kMaxTensors = 262144,
                         kMaxScalars = 65536, kMaxOperands = 4096, kMaxIo = 256;

enum class Section : int {
  kStrings,
  kMetadata,
  kTensors,
  kValues,
  kScalars,
  kSteps,
  kCells,
  kInputs,
  kOutputs,
  kData
};
inline constexpr int kSectionCount = 10;

struct FileSection {
  uint64_t offset, bytes;  // from the start of the file; without the gap behind it
};

struct FileHeader {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;  // sizeof(FileHeader)
  uint64_t file_bytes;
  uint64_t checksum;
  FileSection sections[kSectionCount];
};
static_assert(sizeof(FileHeader) == 192);

// Types of values and tensors. The numbers are those of gemm/epilogue.h's OutputType.
enum class DType : uint32_t { kU8 = 0, kS8 = 1, kS32 = 2, kF32 = 3, kBF16 = 4, kF16 = 5 };

struct FileTensor {
  uint64_t offset, bytes;  // from the start of `data`
  uint32_t dtype, rank;
  int64_t dims[5];  // 0 past rank
};
static_assert(sizeof(FileTensor) == 64);

struct FileValue {
  uint32_t name_offset, name_bytes;
  uint32_t dtype, rank;
  // The grid, for descriptions; 0 and 0 if the value is float. Steps carry their own numbers.
  float scale;
  int32_t zero_point;
  uint32_t reserved[2];  // 0
};
static_assert(sizeof(FileValue) == 32);

// An integer known at the latest when the shapes of a call are. `a` and `b` are earlier scalars.
// Division rounds down, as Python's; an overflow or a division by zero makes the call an error.
enum class ScalarOp : uint32_t {
  kConst = 0,     // number
  kSize = 1,      // the size of dimension `a` (>= 0) of value `value`
  kAdd = 2,       // a + b
  kSub = 3,       // a - b
  kMul = 4,       // a * b
  kFloorDiv = 5,  // a // b
  kMod = 6,       // a % b, sign of b
  kMin = 7,
  kMax = 8,
};
struct FileScalar {
  uint32_t op, value;
  int32_t a, b;
  int64_t number;  // unused fields are 0
};
static_assert(sizeof(FileScalar) == 24);

// cells[first_cell ...]: the ids of `inputs` input values, of `outputs` output values, then the
// attributes of the kind; `cells` of them in all.
struct FileStep {
  uint32_t kind, inputs, outputs, cells;
  uint64_t first_cell;
  uint32_t name_offset, name_bytes;  // the layer's path in the model
};
static_assert(sizeof(FileStep) == 32);

struct FileInput {
  uint32_t value, rank;
  int64_t dims[kMaxRank];  // required sizes, -1: any; 0 past rank
};
static_assert(sizeof(FileInput) == 56);

// The steps. Each line lists the attribute cells in order. A cell is an int64 unless marked f: a
// float64 that is exactly a float32. T: index of a tensor, -1 for none where that is allowed.
// S: index of a scalar. d: number of spatial dimensions (1..3), itself a cell; [d] repeats a cell.
// Dimensions are counted from 0 and never negative. Codes are u8 or s8 values.
//
//   GRID     := scale f, zero_point, qmin, qmax
//   OPERAND  := scale f, zero_point
//   WEIGHTS  := weight T(s8), weight_scale T(f32 [1] or [N]), weight_zero_point T(s32, like
//               weight_scale) or -1, bias T(f32 [N]) or -1, input OPERAND
//   EPILOGUE := GRID, table T([256], dtype of the output) or -1, residual 0 | 1, and if 1:
//               residual OPERAND, sum GRID
//               (qkernels/ops/epilogue.py; the output type is the dtype of the output value. If
//               that is float or s32: GRID is 1, 0, 0, 255, no table, no residual)
//
// Where an operation of qkernels.ops has the name, it is that operation, to the bit.
enum class StepKind : uint32_t {
  // The value is a tensor of the plan. Attributes: tensor T
  kConstant = 0,
  // float -> codes. axis (-1: per tensor), scale T(f32 [1] or [channels]), zero_point T(s32),
  // qmin, qmax
  kQuantize = 1,
  // codes -> f32. axis (-1: per tensor), scale T(f32), zero_point T(s32)
  kDequantize = 2,
  // inputs x [, residual]. WEIGHTS, EPILOGUE. Weight [N, K]; over the last dimension of x.
  kLinear = 3,
  // inputs x [, residual]. WEIGHTS, EPILOGUE, d, stride [d], padding before and after [d pairs],
  // dilation [d], output_padding [d] (0 unless transposed), groups, transposed 0 | 1,
  // padding_mode (0 zeros, 1 reflect, 2 replicate, 3 circular). Weight in torch's layout.
  kConv = 4,
  // inputs a, b, broadcasting as torch does. a OPERAND, b OPERAND, GRID
  kAdd = 5,
  kMul = 6,
  // any number of inputs. dim, tables T([inputs, 256], dtype of the output)
  kCat = 7,
  // table T([256], dtype of the output)
  kLookup = 8,
  // d, kernel [d], stride [d], padding [d], dilation [d], ceil_mode 0 | 1
  kMaxPool = 9,
  // d, kernel [d], stride [d], padding [d], ceil_mode, count_include_pad, divisor_override (0:
  // none), input OPERAND, GRID
  kAvgPool = 10,
  // d, output size S or -1 (as many as the input has) [d], input OPERAND, GRID. A mean over the
  // spatial dimensions is output size 1, then a kReshape if they are dropped.
  kAdaptiveAvgPool = 11,
  // Nearest neighbour. d, exact 0 | 1 (mode "nearest-exact"), sized 0 | 1; if sized: size S [d];
  // else scale_factor (float64) [d]
  kInterpolate = 12,
  // F.pad with a constant: pairs, then before S, after S for each pair (the LAST dimension first,
  // as F.pad takes them; negative amounts crop), value (the code; for a float value: 0)
  kPad = 13,

  // The view kinds keep elements and dtype; any dtype.
  // rank, size S [rank]; one scalar may be -1: inferred
  kReshape = 14,
  // rank, dims [rank]: dimension i of the output is dims[i] of the input
  kPermute = 15,
  // x[..., start:stop:step] on `dim`. dim, start S, stop S, step (>= 1). Python's rules: negative
  // counts from the end, out of range is clamped. Chunk and split are one step an output.
  kSlice = 16,
  // rank, size S [rank]; -1: as it is
  kExpand = 17,
};
inline constexpr uint32_t kStepKinds = 18;

// The 64-bit checksum of `bytes` bytes; see file head. `skip` is the offset of 8 bytes that count
// as zero, or -1.
uint64_t plan_checksum(const void* data, int64_t bytes, int64_t skip);

}  // namespace qk::plan
