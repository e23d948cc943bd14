#include "csrc/plan/plan.h"

#include <cstring>

#include "csrc/plan/weights.h"

namespace qk::plan {
namespace {

// The tensors that steps read when they run: all but those that packing takes in.
std::vector<bool> runtime_tensors(const Model& model) {
  std::vector<bool> used(model.tensors.size(), false);
  for (const Step& step : model.steps) {
    if (const auto* s = std::get_if<ConstantStep>(&step.attributes)) {
      used[s->tensor] = true;
    } else if (const auto* s = std::get_if<QuantizeStep>(&step.attributes)) {
      used[s->scale] = used[s->zero_point] = true;
    } else if (const auto* s = std::get_if<CatStep>(&step.attributes)) {
      used[s->tables] = true;
    } else if (const auto* s = std::get_if<LookupStep>(&step.attributes)) {
      used[s->table] = true;
    }
  }
  return used;
}

}  // namespace

InputLayout contiguous_input(std::initializer_list<int64_t> size) {
  InputLayout layout;
  if (size.size() > static_cast<size_t>(kMaxRank)) {
    layout.size.rank = -1;
    return layout;
  }
  View view;
  for (const int64_t n : size) view.size[view.size.rank++] = n;
  set_contiguous(&view);
  layout.size = view.size;
  std::memcpy(layout.stride, view.stride, sizeof layout.stride);
  return layout;
}

// An arena and the programs that were made for it. Used by one call at a time.
class Plan::Session {
 public:
  explicit Session(const Plan& plan) : plan_(plan) {
    bases_.resize(2 + plan.model_.inputs.size() + plan.model_.outputs.size());
  }

  // The program for these inputs: a known one, or a new one in the place of the one that was used
  // longest ago.
  Error prepare(const std::vector<InputLayout>& inputs, const Parallel& parallel,
                const Program** program) {
    for (const InputLayout& input : inputs) {
      if (input.size.rank < 0 || input.size.rank > kMaxRank) {
        return qk::plan::error(ErrorKind::kArgument, "plan: an input must have 0 to ", kMaxRank,
                               " dimensions");
      }
    }
    ++clock_;
    Entry* oldest = &entries_[0];
    for (Entry& entry : entries_) {
      if (entry.used > 0 && entry.threads == parallel.threads && entry.inputs == inputs) {
        entry.used = clock_;
        *program = &entry.program;
        return {};
      }
      if (entry.used < oldest->used) oldest = &entry;
    }
    Program made;
    const Error error = make_program(plan_.model_, plan_.packed_, plan_.constant_, inputs,
                                     plan_.cache_bytes_, parallel, &made);
    if (!error.ok()) return error;
    if (made.arena_bytes > arena_.bytes() && !arena_.allocate(made.arena_bytes)) {
      return qk::plan::error(ErrorKind::kMemory, "plan: no memory for an arena of ",
                             made.arena_bytes, " bytes");
    }
    *oldest = {inputs, parallel.threads, clock_, std::move(made)};
    *program = &oldest->program;
    return {};
  }

  void run(const Program& program, const void* const* inputs, void* const* outputs,
           const Parallel& parallel, int64_t* step_ns) {
    bases_[0] = nullptr;
    bases_[1] = arena_.data();
    const size_t count = plan_.model_.inputs.size();
    for (size_t i = 0; i < count; ++i) {
      // Inputs are only read.
      bases_[2 + i] = const_cast<uint8_t*>(static_cast<const uint8_t*>(inputs[i]));
    }
    for (size_t i = 0; i < plan_.model_.outputs.size(); ++i) {
      bases_[2 + count + i] = static_cast<uint8_t*>(outputs[i]);
    }
    run_program(program, bases_.data(), parallel, step_ns);
  }

 private:
  struct Entry {
    std::vector<InputLayout> inputs;
    int threads = 0;
    int64_t used = 0;  // 0: empty
    Program program;
  };

  const Plan& plan_;
  Block arena_;
  Entry entries_[kShapes];
  int64_t clock_ = 0;
  std::vector<uint8_t*> bases_;
};

// A session for the length of one call.
class Plan::Lease {
 public:
  explicit Lease(const Plan& plan) : plan_(plan), session_(plan.acquire()) {}
  ~Lease() { plan_.release(std::move(session_)); }
  Session* operator->() const { return session_.get(); }

 private:
  const Plan& plan_;
  std::unique_ptr<Session> session_;
};

std::unique_ptr<Plan::Session> Plan::acquire() const {
  for (std::atomic<Session*>& slot : idle_) {
    if (slot.load(std::memory_order_relaxed) == nullptr) continue;
    if (Session* session = slot.exchange(nullptr, std::memory_order_acquire)) {
      return std::unique_ptr<Session>(session);
    }
  }
  return std::make_unique<Session>(*this);
}

void Plan::release(std::unique_ptr<Session> session) const {
  for (std::atomic<Session*>& slot : idle_) {
    Session* expected = nullptr;
    if (slot.compare_exchange_strong(expected, session.get(), std::memory_order_release,
                                     std::memory_order_relaxed)) {
      session.release();
      return;
    }
  }
}

Plan::~Plan() {
  for (std::atomic<Session*>& slot : idle_) delete slot.load(std::memory_order_acquire);
}

Error Plan::load(const void* bytes, int64_t size, std::unique_ptr<Plan>* plan,
                 int64_t cache_bytes) {
  std::unique_ptr<Plan> made(new Plan);
  made->cache_bytes_ = cache_bytes > 0 ? cache_bytes : l2_cache_bytes() / 4 * 3;
  const auto* data = static_cast<const uint8_t*>(bytes);
  Block aligned;
  if (reinterpret_cast<uintptr_t>(data) % kMemoryAlign != 0) {
    if (!aligned.allocate(size)) {
      return error(ErrorKind::kMemory, "plan: no memory for a file of ", size, " bytes");
    }
    std::memcpy(aligned.data(), data, static_cast<size_t>(size));
    data = aligned.data();
  }
  const Error error = made->pack(data, size);
  if (error.ok()) *plan = std::move(made);
  return error;
}

Error Plan::pack(const uint8_t* bytes, int64_t size) {
  if (Error error = read_model(bytes, size, &model_); !error.ok()) return error;
  isa_ = isa_active();
  packed_.resize(model_.steps.size());
  for (size_t i = 0; i < model_.steps.size(); ++i) {
    if (!std::holds_alternative<WeightedStep>(model_.steps[i].attributes)) continue;
    Error error = pack_weights(model_, model_.steps[i], isa_, &packed_[i]);
    if (!error.ok()) return error;
  }
  const std::vector<bool> used = runtime_tensors(model_);
  int64_t total = 0;
  for (size_t i = 0; i < used.size(); ++i) {
    if (used[i]) total += align_up(model_.tensors[i].bytes);
  }
  if (!constants_.allocate(total)) {
    return error(ErrorKind::kMemory, "plan: no memory for constants of ", total, " bytes");
  }
  constant_.assign(used.size(), nullptr);
  uint8_t* at = constants_.data();
  for (size_t i = 0; i < used.size(); ++i) {
    Tensor& tensor = model_.tensors[i];
    if (used[i]) {
      if (tensor.bytes > 0) std::memcpy(at, tensor.data, static_cast<size_t>(tensor.bytes));
      constant_[i] = at;
      at += align_up(tensor.bytes);
    }
    tensor.data = nullptr;
  }
  for (const ModelInput& input : model_.inputs) {
    const Value& value = model_.values[input.value];
    PlanInput described{value.name, value.dtype, {}};
    described.size.rank = value.rank;
    for (int d = 0; d < value.rank; ++d) described.size[d] = input.dims[d];
    inputs_.push_back(described);
  }
  return {};
}

int64_t Plan::packed_bytes() const {
  int64_t bytes = constants_.bytes();
  for (const Block& block : packed_) bytes += block.bytes();
  return bytes;
}

Error Plan::check_isa() const {
  if (isa_active() == isa_) return {};
  return error(ErrorKind::kState, "plan: its weights are packed for ", isa_name(isa_), ", but ",
               isa_name(isa_active()), " is active: load the plan again");
}

Error Plan::outputs(const std::vector<InputLayout>& inputs, const Parallel& parallel,
                    std::vector<OutputSpec>* specs) const {
  if (Error error = check_isa(); !error.ok()) return error;
  const Lease session(*this);
  const Program* program;
  if (Error error = session->prepare(inputs, parallel, &program); !error.ok()) return error;
  *specs = program->outputs;
  return {};
}

Error Plan::run(const std::vector<InputLayout>& layouts, const void* const* inputs,
                void* const* outputs, const Parallel& parallel,
                std::vector<int64_t>* step_ns) const {
  if (Error error = check_isa(); !error.ok()) return error;
  const Lease session(*this);
  const Program* program;
  if (Error error = session->prepare(layouts, parallel, &program); !error.ok()) return error;
  if (step_ns == nullptr) {
    session->run(*program, inputs, outputs, parallel, nullptr);
    return {};
  }
  const size_t count = program->operations.size();
  const auto lanes = static_cast<size_t>(parallel.threads > 1 ? parallel.threads : 1);
  step_ns->assign(count * lanes, 0);
  session->run(*program, inputs, outputs, parallel, step_ns->data());
  for (const Slicing& slicing : program->slicings) {
    for (int i = slicing.begin; i < slicing.end; ++i) {
      for (size_t lane = 1; lane < lanes; ++lane) (*step_ns)[i] += (*step_ns)[lane * count + i];
      (*step_ns)[i] /= slicing.lanes;
    }
  }
  step_ns->resize(count);
  return {};
}

Error Plan::describe(const std::vector<InputLayout>& inputs, const Parallel& parallel,
                     Description* description) const {
  if (Error error = check_isa(); !error.ok()) return error;
  const Lease session(*this);
  const Program* program;
  if (Error error = session->prepare(inputs, parallel, &program); !error.ok()) return error;
  description->operations = program->info;
  description->arena_bytes = program->arena_bytes;
  return {};
}

}  // namespace qk::plan
