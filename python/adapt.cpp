#include "python/adapt.h"

namespace qk::seam {

std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    default:
      return torch::headeronly::toString(type);
  }
}

std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "the CPU";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  const bool same =
      t.is_cpu() ? like.is_cpu()
                 : t.is_cuda() && like.is_cuda() && t.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(same, op, ": ", name, " must be on ", device_text(like),
                  ", as the other tensors are, got ", device_text(t));
}

std::optional<int64_t> check_axis(const char* op, const Tensor& x, std::optional<int64_t> axis) {
  if (!axis.has_value()) return axis;
  const int64_t wrapped = *axis < 0 ? *axis + x.dim() : *axis;
  STD_TORCH_CHECK(wrapped >= 0 && wrapped < x.dim(), op, ": axis must be in [", -x.dim(), ", ",
                  x.dim() - 1, "] for a tensor of shape ", shape_text(x), ", got ", *axis);
  return wrapped;
}

ChannelSplit split_channels(const Tensor& x, std::optional<int64_t> axis) {
  if (!axis.has_value()) return {1, 1, x.numel()};
  ChannelSplit split{1, x.size(*axis), 1};
  for (int64_t d = 0; d < *axis; ++d) split.outer *= x.size(d);
  for (int64_t d = *axis + 1; d < x.dim(); ++d) split.inner *= x.size(d);
  return split;
}

GridView check_grid(const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                    std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  const int64_t channels = axis.has_value() ? x.size(*axis) : 1;
  check_device(op, "scale", scale, x);
  check_device(op, "zero_point", zero_point, x);
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, op,
                  ": scale must be torch.float32, got ", dtype_text(scale.scalar_type()));
  STD_TORCH_CHECK(zero_point.scalar_type() == ScalarType::Int, op,
                  ": zero_point must be torch.int32, got ", dtype_text(zero_point.scalar_type()));
  STD_TORCH_CHECK(scale.numel() == channels, op, ": scale must have ", channels,
                  axis.has_value() ? " elements (one a channel)" : " element (per tensor)",
                  ", got shape ", shape_text(scale));
  STD_TORCH_CHECK(zero_point.numel() == channels, op, ": zero_point must have ", channels,
                  axis.has_value() ? " elements (one a channel)" : " element (per tensor)",
                  ", got shape ", shape_text(zero_point));
  STD_TORCH_CHECK(qmin < qmax, op, ": qmin must be below qmax, got qmin ", qmin, " and qmax ",
                  qmax);
  GridView grid{torch::stable::contiguous(scale), torch::stable::contiguous(zero_point), nullptr,
                nullptr, channels};
  grid.scale = grid.scale_owner.const_data_ptr<float>();
  grid.zero_point = grid.zero_point_owner.const_data_ptr<int32_t>();
  if (!scale.is_cpu()) return grid;  // reading a GPU's values here would wait for the device
  for (int64_t c = 0; c < channels; ++c) {
    STD_TORCH_CHECK(std::isnormal(grid.scale[c]) && grid.scale[c] > 0, op,
                    ": scale must be positive, finite and normal, got ", grid.scale[c],
                    " at channel ", c);
    STD_TORCH_CHECK(grid.zero_point[c] >= qmin && grid.zero_point[c] <= qmax, op,
                    ": zero_point must be in [", qmin, ", ", qmax, "], got ", grid.zero_point[c],
                    " at channel ", c);
  }
  return grid;
}

}  // namespace qk::seam
