// The compiled plan: addresses and shapes in, statuses to Python errors out. qkernels/plan checks
// tensors and allocates outputs.
#include "csrc/plan/plan.h"

#include "python/adapt.h"
#include "python/plan.h"

namespace py = pybind11;

namespace qk::seam {
namespace {

using plan::Error;
using plan::ErrorKind;
using plan::InputLayout;
using plan::Plan;

using Sizes = std::vector<int64_t>;
using Layout = std::pair<Sizes, Sizes>;              // sizes, strides
using Source = std::tuple<uintptr_t, Sizes, Sizes>;  // address, sizes, strides
using Target = std::pair<uintptr_t, int64_t>;        // address, bytes

const char* python_error(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kDamaged:
    case ErrorKind::kVersion:
      return "CheckpointError";
    case ErrorKind::kUnsupported:
      return "Unsupported";
    case ErrorKind::kState:
      return "InvalidState";
    default:
      return "InvalidArgument";
  }
}

void raise(const Error& error) {
  if (error.ok()) return;
  if (error.kind == ErrorKind::kMemory) {
    PyErr_SetString(PyExc_MemoryError, error.message.c_str());
  } else {
    const py::object type = py::module_::import("qkernels.errors").attr(python_error(error.kind));
    PyErr_SetString(type.ptr(), error.message.c_str());
  }
  throw py::error_already_set();
}

[[noreturn]] void raise_argument(const std::string& message) {
  raise(Error{ErrorKind::kArgument, message});
  throw py::error_already_set();
}

InputLayout layout_of(const Sizes& sizes, const Sizes& strides) {
  if (sizes.size() > plan::kMaxRank || sizes.size() != strides.size()) {
    raise_argument("plan: an input has " + std::to_string(sizes.size()) + " dimensions; at most " +
                   std::to_string(plan::kMaxRank) + " are possible");
  }
  InputLayout layout;
  layout.size.rank = static_cast<int>(sizes.size());
  for (size_t d = 0; d < sizes.size(); ++d) {
    layout.size[static_cast<int>(d)] = sizes[d];
    layout.stride[d] = strides[d];
  }
  return layout;
}

std::vector<InputLayout> layouts_of(const std::vector<Layout>& inputs) {
  std::vector<InputLayout> layouts;
  for (const auto& [sizes, strides] : inputs) layouts.push_back(layout_of(sizes, strides));
  return layouts;
}

Sizes list_of(const plan::Sizes& sizes) { return Sizes(sizes.dims, sizes.dims + sizes.rank); }

std::unique_ptr<Plan> load(const py::bytes& data, int64_t cache_bytes) {
  const std::string_view bytes = data;
  std::unique_ptr<Plan> loaded;
  Error error;
  {
    const py::gil_scoped_release released;
    error = Plan::load(bytes.data(), static_cast<int64_t>(bytes.size()), &loaded, cache_bytes);
  }
  raise(error);
  return loaded;
}

py::list inputs(const Plan& self) {
  py::list list;
  for (const plan::PlanInput& input : self.inputs()) {
    list.append(py::make_tuple(input.name, plan::dtype_name(input.dtype), list_of(input.size)));
  }
  return list;
}

std::vector<plan::OutputSpec> specs_of(const Plan& self, const std::vector<InputLayout>& layouts) {
  std::vector<plan::OutputSpec> specs;
  Error error;
  {
    const py::gil_scoped_release released;
    error = self.outputs(layouts, torch_threads(), &specs);
  }
  raise(error);
  return specs;
}

py::list output_specs(const Plan& self, const std::vector<Layout>& inputs) {
  py::list list;
  for (const plan::OutputSpec& spec : specs_of(self, layouts_of(inputs))) {
    list.append(py::make_tuple(plan::dtype_name(spec.dtype), list_of(spec.size),
                               Sizes(spec.stride, spec.stride + spec.size.rank)));
  }
  return list;
}

void run_on(const Plan& self, const std::vector<Source>& inputs, const std::vector<Target>& outputs,
            std::vector<int64_t>* step_ns) {
  std::vector<InputLayout> layouts;
  std::vector<const void*> from;
  std::vector<void*> to;
  for (const auto& [address, sizes, strides] : inputs) {
    layouts.push_back(layout_of(sizes, strides));
    from.push_back(reinterpret_cast<const void*>(address));
  }
  const std::vector<plan::OutputSpec> specs = specs_of(self, layouts);
  if (outputs.size() != specs.size()) {
    raise_argument("plan: expected memory for " + std::to_string(specs.size()) + " outputs, got " +
                   std::to_string(outputs.size()));
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].second < specs[i].bytes) {
      raise_argument("plan: output " + std::to_string(i) + " needs " +
                     std::to_string(specs[i].bytes) + " bytes, got " +
                     std::to_string(outputs[i].second));
    }
    to.push_back(reinterpret_cast<void*>(outputs[i].first));
  }
  Error error;
  {
    const py::gil_scoped_release released;
    error = self.run(layouts, from.data(), to.data(), torch_threads(), step_ns);
  }
  raise(error);
}

void run(const Plan& self, const std::vector<Source>& inputs, const std::vector<Target>& outputs) {
  run_on(self, inputs, outputs, nullptr);
}

std::vector<int64_t> profile(const Plan& self, const std::vector<Source>& inputs,
                             const std::vector<Target>& outputs) {
  std::vector<int64_t> step_ns;
  run_on(self, inputs, outputs, &step_ns);
  return step_ns;
}

py::dict describe(const Plan& self, const std::vector<Layout>& inputs) {
  const Parallel threads = torch_threads();
  Plan::Description description;
  raise(self.describe(layouts_of(inputs), threads, &description));
  py::list steps;
  for (const plan::OperationInfo& info : description.operations) {
    py::dict step;
    step["name"] = info.step < 0 ? std::string() : self.step_name(info.step);
    step["kind"] = info.kind;
    step["kernel"] = info.kernel;
    step["inputs"] = info.inputs;
    step["output"] = info.output;
    step["macs"] = info.macs;
    step["bytes"] = info.bytes;
    step["workspace_bytes"] = info.workspace;
    step["arena_offset"] = info.output_offset;
    step["images"] = info.images;
    steps.append(step);
  }
  py::dict result;
  result["steps"] = steps;
  result["arena_bytes"] = description.arena_bytes;
  result["packed_bytes"] = self.packed_bytes();
  result["threads"] = threads.threads;
  result["isa"] = isa_name(self.isa());
  return result;
}

}  // namespace

void bind_plan(py::module_& m) {
  m.def(
      "plan_checksum",
      [](const py::bytes& data, int64_t skip) {
        const std::string_view view = data;
        return plan::plan_checksum(view.data(), static_cast<int64_t>(view.size()), skip);
      },
      py::arg("data"), py::arg("skip") = -1,
      "The checksum of a plan file (csrc/plan/format.h); the 8 bytes at `skip` count as zero.");
  py::class_<Plan>(m, "Plan",
                   "A compiled network (csrc/plan/plan.h), from the bytes of a plan file.")
      .def(py::init(&load), py::arg("data"), py::arg("cache_bytes") = 0)
      .def_property_readonly("isa", [](const Plan& self) { return isa_name(self.isa()); })
      .def_property_readonly("metadata", &Plan::metadata)
      .def_property_readonly("inputs", &inputs, "[(name, dtype, sizes; -1: any)]")
      .def_property_readonly("output_count", &Plan::output_count)
      .def("output_specs", &output_specs, py::arg("inputs"),
           "[(sizes, strides)] of the inputs -> [(dtype, sizes, strides)] of the outputs")
      .def("run", &run, py::arg("inputs"), py::arg("outputs"),
           "Inputs [(address, sizes, strides)], outputs [(address, bytes)] as output_specs says")
      .def("profile", &profile, py::arg("inputs"), py::arg("outputs"),
           "A run that returns the nanoseconds of every step of describe()")
      .def("describe", &describe, py::arg("inputs"));
}

}  // namespace qk::seam
