#include "python/plan.h"

#include "csrc/plan/format.h"

namespace py = pybind11;

namespace qk::seam {

void bind_plan(py::module_& m) {
  m.def(
      "plan_checksum",
      [](const py::bytes& data, int64_t skip) {
        const std::string_view view = data;
        return plan::plan_checksum(view.data(), static_cast<int64_t>(view.size()), skip);
      },
      py::arg("data"), py::arg("skip") = -1,
      "The checksum of a plan file (csrc/plan/format.h); the 8 bytes at `skip` count as zero.");
}

}  // namespace qk::seam
