// Writes plan files for the C++ tests: the other side of csrc/plan/format.h.
#pragma once

#include <bit>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "csrc/plan/format.h"

namespace qk::test {

using plan::DType;
using plan::ScalarOp;
using plan::StepKind;

inline void seal(std::vector<uint8_t>* file) {
  auto* header = reinterpret_cast<plan::FileHeader*>(file->data());
  header->checksum = plan::plan_checksum(file->data(), static_cast<int64_t>(file->size()),
                                         offsetof(plan::FileHeader, checksum));
}

class PlanFile {
 public:
  using Cells = std::vector<int64_t>;

  static int64_t real(double value) { return std::bit_cast<int64_t>(value); }
  static void append(Cells* to, const Cells& from) {
    to->insert(to->end(), from.begin(), from.end());
  }

  int value(DType dtype, int rank) {
    plan::FileValue v{};
    v.dtype = static_cast<uint32_t>(dtype);
    v.rank = static_cast<uint32_t>(rank);
    values_.push_back(v);
    return static_cast<int>(values_.size()) - 1;
  }
  int input(DType dtype, std::initializer_list<int64_t> dims) {
    plan::FileInput in{};
    in.value = static_cast<uint32_t>(value(dtype, static_cast<int>(dims.size())));
    in.rank = static_cast<uint32_t>(dims.size());
    std::copy(dims.begin(), dims.end(), in.dims);
    inputs_.push_back(in);
    return static_cast<int>(in.value);
  }
  void output(int value) { outputs_.push_back(static_cast<uint32_t>(value)); }

  template <typename T>
  int tensor(DType dtype, std::initializer_list<int64_t> dims, const std::vector<T>& data) {
    plan::FileTensor t{};
    t.offset = data_.size();
    t.bytes = data.size() * sizeof(T);
    t.dtype = static_cast<uint32_t>(dtype);
    t.rank = static_cast<uint32_t>(dims.size());
    std::copy(dims.begin(), dims.end(), t.dims);
    const auto* bytes = reinterpret_cast<const uint8_t*>(data.data());
    data_.insert(data_.end(), bytes, bytes + t.bytes);
    data_.resize((data_.size() + 63) / 64 * 64);
    tensors_.push_back(t);
    return static_cast<int>(tensors_.size()) - 1;
  }

  int scalar(ScalarOp op, int value, int a, int b, int64_t number) {
    scalars_.push_back({static_cast<uint32_t>(op), static_cast<uint32_t>(value), a, b, number});
    return static_cast<int>(scalars_.size()) - 1;
  }
  int constant(int64_t number) { return scalar(ScalarOp::kConst, 0, 0, 0, number); }
  int size_of(int value, int dim) { return scalar(ScalarOp::kSize, value, dim, 0, 0); }

  // The value that the step writes.
  int step(StepKind kind, std::initializer_list<int> inputs, DType dtype, int rank,
           const Cells& attributes) {
    const int out = value(dtype, rank);
    plan::FileStep s{};
    s.kind = static_cast<uint32_t>(kind);
    s.inputs = static_cast<uint32_t>(inputs.size());
    s.outputs = 1;
    s.first_cell = cells_.size();
    for (const int in : inputs) cells_.push_back(in);
    cells_.push_back(out);
    append(&cells_, attributes);
    s.cells = static_cast<uint32_t>(cells_.size() - s.first_cell);
    const std::string name = "step" + std::to_string(steps_.size());
    s.name_offset = static_cast<uint32_t>(strings_.size());
    s.name_bytes = static_cast<uint32_t>(name.size());
    strings_ += name;
    steps_.push_back(s);
    return out;
  }

  std::vector<uint8_t> bytes() const {
    plan::FileHeader header{};
    std::memcpy(header.magic, plan::kFileMagic, sizeof header.magic);
    header.version = plan::kFileVersion;
    header.header_bytes = sizeof header;
    std::vector<uint8_t> file(sizeof header);
    int section = 0;
    const auto put = [&](const auto& records) {
      const size_t size = records.size() * sizeof(records[0]);
      header.sections[section++] = {file.size(), size};
      const auto* from = reinterpret_cast<const uint8_t*>(records.data());
      file.insert(file.end(), from, from + size);
      file.resize((file.size() + 63) / 64 * 64);
    };
    put(strings_);
    put(std::string("{}"));
    put(tensors_);
    put(values_);
    put(scalars_);
    put(steps_);
    put(cells_);
    put(inputs_);
    put(outputs_);
    put(data_);
    header.file_bytes = file.size();
    std::memcpy(file.data(), &header, sizeof header);
    seal(&file);
    return file;
  }

 private:
  std::string strings_;
  std::vector<plan::FileTensor> tensors_;
  std::vector<plan::FileValue> values_;
  std::vector<plan::FileScalar> scalars_;
  std::vector<plan::FileStep> steps_;
  std::vector<int64_t> cells_;
  std::vector<plan::FileInput> inputs_;
  std::vector<uint32_t> outputs_;
  std::vector<uint8_t> data_;
};

}  // namespace qk::test
