#include "csrc/plan/placement.h"

#include <algorithm>

#include "csrc/plan/kernel_names.h"
#include "csrc/plan/operations.h"

namespace qk::plan {
namespace {

class Placement {
 public:
  Placement(const Parallel& parallel, int64_t batch, int input_count, Draft* draft,
            Program* program)
      : parallel_(parallel),
        batch_(batch),
        input_count_(input_count),
        buffers_(draft->buffers),
        overwrites_(draft->overwrites),
        program_(*program) {}

  void run() {
    for (size_t i = 0; i < program_.slicings.size(); ++i) slice(static_cast<int>(i));
    merge_overwrites();
    for (const Slicing& slicing : program_.slicings) extend_lives(slicing);
    place_arena();
  }

 private:
  int root(int buffer) const {
    while (buffers_[buffer].merged_into >= 0) buffer = buffers_[buffer].merged_into;
    return buffer;
  }

  // ---- slices

  // Buffers that only this slicing uses shrink to one slice; its operations run on one slice.
  void slice(int index) {
    Slicing& slicing = program_.slicings[index];
    for (Buffer& buffer : buffers_) {
      if (buffer.home != Home::kArena || buffer.first < slicing.begin ||
          buffer.last >= slicing.end) {
        continue;
      }
      buffer.slicing = index;
      buffer.bytes = buffer.bytes / batch_ * slicing.images;
    }
    const int64_t rest = batch_ % slicing.images;
    for (int i = slicing.begin; i < slicing.end; ++i) {
      Operation& operation = program_.operations[i];
      if (rest > 0) slicing.rest.push_back(part(operation, rest, slicing));
      operation = part(operation, slicing.images, slicing);
      program_.info[i].images = slicing.images;
      if (const auto* conv = std::get_if<ConvOp>(&operation)) {
        program_.info[i].kernel =
            conv_kernel_name(conv->args, slicing.lanes > 1 ? 1 : parallel_.threads);
      }
    }
  }

  // The operation on a slice of `images`, with a workspace that is large enough.
  Operation part(Operation operation, int64_t images, const Slicing& slicing) {
    take_images(batch_, images, &operation);  // choose_slicings() has found that it can
    const Parallel& parallel = slicing.lanes > 1 ? kSerial : parallel_;
    const auto keep = [&](const Ref& workspace, int64_t needed) {
      if (workspace.base < 0) return;
      int64_t& bytes = buffers_[workspace.base].bytes;
      bytes = std::max(bytes, needed);
    };
    if (const auto* conv = std::get_if<ConvOp>(&operation)) {
      keep(conv->workspace, conv_workspace_bytes(conv->args, parallel));
    } else if (const auto* linear = std::get_if<LinearOp>(&operation)) {
      keep(linear->workspace, linear_workspace_bytes(linear->args, parallel));
    }
    return operation;
  }

  // ---- lives

  void merge_overwrites() {
    for (const Overwrite& o : overwrites_) {
      const int from = root(o.from), to = root(o.to);
      Buffer &a = buffers_[from], &b = buffers_[to];
      // One operand only: the other one is still to be read.
      if (from == to || to != o.to || a.home != Home::kArena || b.home != Home::kArena ||
          a.bytes != b.bytes || a.slicing != b.slicing || a.bytes < o.least ||
          a.last != o.operation) {
        continue;
      }
      b.merged_into = from;
      a.last = b.last;
    }
  }

  // What one slice leaves for later operations must survive the slices after it, and what the last
  // slice reads the slices before it.
  void extend_lives(const Slicing& slicing) {
    for (int i = slicing.begin; i < slicing.end; ++i) {
      for_each_ref(program_.operations[i], [&](const Ref& ref) {
        if (ref.base < 0 || buffers_[ref.base].slicing >= 0) return;
        Buffer& buffer = buffers_[root(ref.base)];
        buffer.first = std::min(buffer.first, slicing.begin);
        buffer.last = std::max(buffer.last, slicing.end - 1);
      });
    }
  }

  // ---- addresses

  // Lanes run at their own pace: what a slicing uses alone lies in a block of its own for each.
  void place_arena() {
    std::vector<int64_t> offset(buffers_.size(), 0);
    const int slicings = static_cast<int>(program_.slicings.size());
    std::vector<Lifetime> blocks(slicings);
    for (int i = 0; i < slicings; ++i) {
      const Slicing& slicing = program_.slicings[i];
      lane_bytes_.push_back(place_buffers_of(i, nullptr, &offset));
      blocks[i] = {lane_bytes_[i] * slicing.lanes, slicing.begin, slicing.end - 1};
    }
    program_.arena_bytes = place_buffers_of(-1, &blocks, &offset);
    const auto resolve = [&](Ref& ref) {
      if (ref.base < 0) {
        ref = {};
        return;
      }
      const int index = root(ref.base);
      const Buffer& buffer = buffers_[index];
      switch (buffer.home) {
        case Home::kConstant:
          ref.base = 0;
          ref.offset += static_cast<int64_t>(reinterpret_cast<uintptr_t>(buffer.data));
          break;
        case Home::kInput:
          ref.base = 2 + buffer.index;
          break;
        case Home::kOutput:
          ref.base = 2 + input_count_ + buffer.index;
          break;
        case Home::kArena:
          ref.base = 1;
          ref.offset += offset[index];
          if (buffer.slicing < 0) break;
          ref.offset += blocks[buffer.slicing].offset;
          ref.image = 0;
          ref.lane = lane_bytes_[buffer.slicing];
          break;
      }
    };
    for (Operation& operation : program_.operations) for_each_ref(operation, resolve);
    for (Slicing& slicing : program_.slicings) {
      for (Operation& operation : slicing.rest) for_each_ref(operation, resolve);
    }
    for (OperationInfo& info : program_.info) {
      Ref at{static_cast<int>(info.output_offset), 0};
      resolve(at);
      info.output_offset = at.base == 1 ? at.offset : -1;
    }
  }

  // Offsets for the buffers of one slicing, or (-1) for all others together with `blocks`; returns
  // the bytes they take.
  int64_t place_buffers_of(int slicing, std::vector<Lifetime>* blocks,
                           std::vector<int64_t>* offset) const {
    std::vector<Lifetime> lifetimes;
    if (blocks != nullptr) lifetimes = *blocks;
    const size_t first = lifetimes.size();
    std::vector<size_t> owners;
    for (size_t i = 0; i < buffers_.size(); ++i) {
      const Buffer& buffer = buffers_[i];
      if (buffer.home != Home::kArena || buffer.merged_into >= 0 || buffer.last < 0 ||
          buffer.slicing != slicing) {
        continue;
      }
      owners.push_back(i);
      lifetimes.push_back({buffer.bytes, buffer.first, buffer.last});
    }
    const int64_t bytes = place_buffers(&lifetimes);
    for (size_t i = 0; i < first; ++i) (*blocks)[i].offset = lifetimes[i].offset;
    for (size_t i = 0; i < owners.size(); ++i) {
      (*offset)[owners[i]] = lifetimes[first + i].offset;
    }
    return bytes;
  }

  const Parallel& parallel_;
  const int64_t batch_;
  const int input_count_;
  std::vector<Buffer>& buffers_;
  const std::vector<Overwrite>& overwrites_;
  Program& program_;
  std::vector<int64_t> lane_bytes_;  // of a lane's block, by slicing
};

}  // namespace

void place(const Parallel& parallel, int64_t batch, int64_t cache, int input_count, Draft* draft,
           Program* program) {
  program->slicings = choose_slicings(*program, *draft, batch, cache, parallel.threads);
  Placement(parallel, batch, input_count, draft, program).run();
}

}  // namespace qk::plan
