// Parses and checks a plan file. Nothing is believed: every offset, count, id, rank, dtype, grid
// and weight shape is checked before it is used, and the first complaint wins.
#include <bit>
#include <cstddef>
#include <cstring>

#include "csrc/base/integers.h"
#include "csrc/plan/model.h"
#include "csrc/plan/step_reader.h"

namespace qk::plan {
namespace {

static_assert(std::endian::native == std::endian::little, "the records are read as they lie");

constexpr const char* kSectionNames[kSectionCount] = {"strings", "metadata", "tensors", "values",
                                                      "scalars", "steps",    "cells",   "inputs",
                                                      "outputs", "data"};

// One section as an array of records.
template <typename T>
struct Records {
  const T* first = nullptr;
  int64_t count = 0;
  const T& operator[](int64_t i) const { return first[i]; }
};

class Reader {
 public:
  Reader(const uint8_t* bytes, int64_t size, Model* model)
      : bytes_(bytes), size_(size), model_(*model) {}

  Error read() {
    check_header() && read_tensors() && read_values() && read_scalars() && read_inputs() &&
        read_steps() && read_outputs() && check_order();
    return error_;
  }

 private:
  template <typename... Parts>
  bool fail(ErrorKind kind, const Parts&... parts) {
    if (error_.ok()) error_ = error(kind, "plan: ", parts...);
    return false;
  }
  template <typename... Parts>
  bool damaged(const Parts&... parts) {
    return fail(ErrorKind::kDamaged, parts...);
  }

  // ---- the file

  bool check_header() {
    if (size_ < static_cast<int64_t>(sizeof(FileHeader))) {
      return damaged("a file of ", size_, " bytes is too short for a plan");
    }
    const auto& header = *reinterpret_cast<const FileHeader*>(bytes_);
    if (std::memcmp(header.magic, kFileMagic, sizeof kFileMagic) != 0) {
      return damaged("not a plan file: it does not start with QKPLAN");
    }
    if (header.version != kFileVersion) {
      return fail(ErrorKind::kVersion, "the file has version ", header.version,
                  ", this qkernels reads version ", kFileVersion,
                  ": use the qkernels that wrote it, or compile the model again");
    }
    if (header.file_bytes != static_cast<uint64_t>(size_)) {
      return damaged("the file should have ", header.file_bytes, " bytes, it has ", size_);
    }
    if (plan_checksum(bytes_, size_, offsetof(FileHeader, checksum)) != header.checksum) {
      return damaged("the checksum does not fit the contents: the file was changed");
    }
    if (header.header_bytes != sizeof(FileHeader)) return damaged("header_bytes is wrong");
    constexpr int64_t kRecord[kSectionCount] = {1,
                                                1,
                                                sizeof(FileTensor),
                                                sizeof(FileValue),
                                                sizeof(FileScalar),
                                                sizeof(FileStep),
                                                8,
                                                sizeof(FileInput),
                                                4,
                                                1};
    constexpr int64_t kMost[kSectionCount] = {kLimit,      kLimit,    kMaxTensors, kMaxValues,
                                              kMaxScalars, kMaxSteps, kLimit,      kMaxIo,
                                              kMaxIo,      kLimit};
    int64_t at = sizeof(FileHeader);
    for (int s = 0; s < kSectionCount; ++s) {
      const FileSection section = header.sections[s];
      if (section.offset != static_cast<uint64_t>(at) ||
          section.bytes > static_cast<uint64_t>(size_ - at)) {
        return damaged("section ", kSectionNames[s], " is out of place");
      }
      const auto bytes = static_cast<int64_t>(section.bytes);
      if (bytes % kRecord[s] != 0 || bytes / kRecord[s] > kMost[s]) {
        return damaged("section ", kSectionNames[s], " has an impossible size of ", bytes,
                       " bytes");
      }
      at = align_up(at + bytes, kFileAlign);
      if (at > size_) return damaged("section ", kSectionNames[s], " ends outside of the file");
    }
    if (at != size_) return damaged("there is something behind the data");
    return text_of(section(Section::kMetadata).offset, section(Section::kMetadata).bytes,
                   &model_.metadata);
  }

  FileSection section(Section s) const {
    return reinterpret_cast<const FileHeader*>(bytes_)->sections[static_cast<int>(s)];
  }
  template <typename T>
  Records<T> records(Section s) const {
    const FileSection at = section(s);
    return {reinterpret_cast<const T*>(bytes_ + at.offset),
            static_cast<int64_t>(at.bytes / sizeof(T))};
  }

  bool text_of(uint64_t offset, uint64_t bytes, std::string* to) {
    to->assign(reinterpret_cast<const char*>(bytes_ + offset), bytes);
    return true;
  }
  bool read_name(uint32_t offset, uint32_t bytes, std::string* name) {
    const FileSection strings = section(Section::kStrings);
    if (uint64_t{offset} + bytes > strings.bytes) return damaged("a name lies outside of strings");
    return text_of(strings.offset + offset, bytes, name);
  }

  // ---- the tables

  bool read_dtype(uint32_t code, const char* what, int64_t index, DType* dtype) {
    if (code > static_cast<uint32_t>(DType::kF16)) {
      return damaged(what, " ", index, " has the unknown dtype ", code);
    }
    *dtype = static_cast<DType>(code);
    return true;
  }

  bool read_tensors() {
    const auto tensors = records<FileTensor>(Section::kTensors);
    const FileSection data = section(Section::kData);
    for (int64_t i = 0; i < tensors.count; ++i) {
      const FileTensor& file = tensors[i];
      Tensor tensor;
      if (!read_dtype(file.dtype, "tensor", i, &tensor.dtype)) return false;
      if (file.rank > 5) return damaged("tensor ", i, " has rank ", file.rank);
      tensor.rank = static_cast<int>(file.rank);
      tensor.elements = 1;
      for (int d = 0; d < 5; ++d) {
        const int64_t size = tensor.dims[d] = file.dims[d];
        if (d >= tensor.rank) {
          if (size != 0) return damaged("tensor ", i, " has a size past its rank");
        } else if (size < 0 || size > kLimit ||
                   __builtin_mul_overflow(tensor.elements, size, &tensor.elements) ||
                   tensor.elements > kLimit) {
          return damaged("tensor ", i, " has an impossible size ", size);
        }
      }
      tensor.bytes = tensor.elements * dtype_bytes(tensor.dtype);
      if (file.bytes != static_cast<uint64_t>(tensor.bytes) || file.offset % kFileAlign != 0 ||
          file.offset > data.bytes || file.bytes > data.bytes - file.offset) {
        return damaged("tensor ", i, " lies outside of the data");
      }
      tensor.data = bytes_ + data.offset + file.offset;
      model_.tensors.push_back(tensor);
    }
    return true;
  }

  bool read_values() {
    const auto values = records<FileValue>(Section::kValues);
    for (int64_t i = 0; i < values.count; ++i) {
      const FileValue& file = values[i];
      Value value;
      if (!read_dtype(file.dtype, "value", i, &value.dtype)) return false;
      if (file.rank > kMaxRank) return damaged("value ", i, " has rank ", file.rank);
      if (file.reserved[0] != 0 || file.reserved[1] != 0) {
        return damaged("value ", i, " has reserved bits set");
      }
      value.rank = static_cast<int>(file.rank);
      if (!read_name(file.name_offset, file.name_bytes, &value.name)) return false;
      model_.values.push_back(std::move(value));
    }
    written_by_.assign(model_.values.size(), kNever);
    return true;
  }

  bool read_scalars() {
    const auto scalars = records<FileScalar>(Section::kScalars);
    for (int64_t i = 0; i < scalars.count; ++i) {
      const FileScalar& file = scalars[i];
      Scalar scalar{static_cast<ScalarOp>(file.op), static_cast<int>(file.value), file.a, file.b,
                    file.number};
      bool fits = true;
      if (file.op == static_cast<uint32_t>(ScalarOp::kConst)) {
        fits = file.value == 0 && file.a == 0 && file.b == 0;
      } else if (file.op == static_cast<uint32_t>(ScalarOp::kSize)) {
        fits = file.value < model_.values.size() && file.a >= 0 &&
               file.a < model_.values[file.value].rank && file.b == 0 && file.number == 0;
      } else if (file.op <= static_cast<uint32_t>(ScalarOp::kMax)) {
        fits = file.value == 0 && file.number == 0 && file.a >= 0 && file.a < i && file.b >= 0 &&
               file.b < i;
      } else {
        return fail(ErrorKind::kUnsupported, "scalar ", i, " has the unknown operation ", file.op);
      }
      if (!fits) return damaged("scalar ", i, " has an impossible operand");
      model_.scalars.push_back(scalar);
    }
    return true;
  }

  bool read_inputs() {
    const auto inputs = records<FileInput>(Section::kInputs);
    if (inputs.count < 1) return damaged("there is no input");
    for (int64_t i = 0; i < inputs.count; ++i) {
      const FileInput& file = inputs[i];
      if (file.value >= model_.values.size() || written_by_[file.value] != kNever ||
          file.rank != static_cast<uint32_t>(model_.values[file.value].rank)) {
        return damaged("input ", i, " names no value, one of another rank, or one twice");
      }
      ModelInput input{static_cast<int>(file.value), {}};
      for (int d = 0; d < kMaxRank; ++d) {
        input.dims[d] = file.dims[d];
        const bool fits = static_cast<uint32_t>(d) < file.rank
                              ? file.dims[d] >= -1 && file.dims[d] <= kLimit
                              : file.dims[d] == 0;
        if (!fits) return damaged("input ", i, " has an impossible size ", file.dims[d]);
      }
      written_by_[file.value] = kInput;
      model_.inputs.push_back(input);
    }
    return true;
  }

  bool read_outputs() {
    const auto outputs = records<uint32_t>(Section::kOutputs);
    if (outputs.count < 1) return damaged("there is no output");
    for (int64_t i = 0; i < outputs.count; ++i) {
      if (outputs[i] >= model_.values.size() || written_by_[outputs[i]] == kNever) {
        return damaged("output ", i, " names no value, or one that is never written");
      }
      model_.outputs.push_back(static_cast<int>(outputs[i]));
    }
    return true;
  }

  // ---- steps

  bool read_steps() {
    const auto steps = records<FileStep>(Section::kSteps);
    const auto cells = records<int64_t>(Section::kCells);
    for (int64_t i = 0; i < steps.count; ++i) {
      const FileStep& file = steps[i];
      Step step;
      if (file.kind >= kStepKinds) {
        return fail(ErrorKind::kUnsupported, "step ", i, " has the unknown kind ", file.kind,
                    ": use the qkernels that wrote the file");
      }
      step.kind = static_cast<StepKind>(file.kind);
      if (!read_name(file.name_offset, file.name_bytes, &step.name)) return false;
      if (file.inputs > kMaxOperands || file.outputs != 1 ||
          uint64_t{file.inputs} + file.outputs > file.cells ||
          file.first_cell > static_cast<uint64_t>(cells.count) ||
          file.cells > static_cast<uint64_t>(cells.count) - file.first_cell) {
        error_ = step_error(i, step, "has an impossible number of operands or attributes");
        return false;
      }
      error_ = read_step(model_, written_by_, i, cells.first + file.first_cell, file.cells,
                         static_cast<int>(file.inputs), &step);
      if (!error_.ok()) return false;
      written_by_[step.output] = i;
      model_.steps.push_back(std::move(step));
    }
    return true;
  }

  // ---- scalars against steps

  // A scalar may ask for the size of a value only after the step that writes it.
  bool check_order() {
    std::vector<int64_t>& after = model_.scalar_after;
    after.assign(model_.scalars.size(), kInput);
    for (size_t i = 0; i < after.size(); ++i) {
      const Scalar& s = model_.scalars[i];
      if (s.op == ScalarOp::kSize) {
        after[i] = written_by_[s.value];
      } else if (s.op != ScalarOp::kConst) {
        after[i] = after[s.a] > after[s.b] ? after[s.a] : after[s.b];
      }
    }
    for (int64_t i = 0; i < static_cast<int64_t>(model_.steps.size()); ++i) {
      const Step& step = model_.steps[i];
      for (const int s : scalars_of(step)) {
        if (s >= 0 && after[s] >= i) {
          error_ = step_error(i, step, "needs the size of a value that is not known yet");
          return false;
        }
      }
    }
    return true;
  }

  static std::vector<int> scalars_of(const Step& step) {
    std::vector<int> found;
    if (const auto* s = std::get_if<PoolStep>(&step.attributes)) {
      found.assign(s->size, s->size + 3);
    } else if (const auto* s = std::get_if<InterpolateStep>(&step.attributes)) {
      if (s->sized) found.assign(s->size + 3 - s->dims, s->size + 3);
    } else if (const auto* s = std::get_if<PadStep>(&step.attributes)) {
      found.assign(s->amounts, s->amounts + 2 * s->pairs);
    } else if (const auto* s = std::get_if<SliceStep>(&step.attributes)) {
      found = {s->start, s->stop};
    } else if (const auto* s = std::get_if<ShapeStep>(&step.attributes)) {
      if (step.kind != StepKind::kPermute) found.assign(s->items, s->items + s->rank);
    }
    return found;
  }

  const uint8_t* bytes_;
  int64_t size_;
  Model& model_;
  Error error_;
  std::vector<int64_t> written_by_;  // step index, kInput or kNever
};

}  // namespace

const char* dtype_name(DType type) {
  constexpr const char* kNames[] = {"uint8", "int8", "int32", "float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(type)];
}

const char* step_kind_name(StepKind kind) {
  constexpr const char* kNames[] = {
      "constant",    "quantize", "dequantize", "linear",   "conv",     "add",
      "mul",         "cat",      "lookup",     "max_pool", "avg_pool", "adaptive_avg_pool",
      "interpolate", "pad",      "reshape",    "permute",  "slice",    "expand"};
  return kNames[static_cast<int>(kind)];
}

Error read_model(const uint8_t* bytes, int64_t size, Model* model) {
  return Reader(bytes, size, model).read();
}

}  // namespace qk::plan
