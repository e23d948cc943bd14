// Convolutions of bench/shapes/conv.txt on one thread, as fractions of the dot-product peak that
// the bench measures itself (more than 1 where there are fewer products: csrc/conv/winograd.h).
// Usage: bench_conv [shapes.txt [part of a name [residual]]]; with
// `residual` each adds another image to its output.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "bench/csrc/peak.h"
#include "bench/csrc/weights.h"
#include "csrc/conv/conv.h"

namespace {

using namespace qk;

template <typename F>
double best_ns(double budget_ns, const F& f) {
  double best = 1e30, total = 0;
  for (int i = 0; i < 5 || (total < budget_ns && i < 2000); ++i) {
    const double start = now_ns();
    f();
    const double time = now_ns() - start;
    if (time < best) best = time;
    total += time;
  }
  return best;
}

void bench(const std::string& name, const std::vector<int64_t>& v, Isa isa, bool has_residual) {
  ConvShape s;
  s.in_channels = v[1];
  s.out_channels = v[4];
  s.groups = v[10];
  ConvArgs args;
  args.extent.batch = v[0];
  for (int d = 1; d < 3; ++d) {
    s.kernel[d] = v[4 + d];
    s.stride[d] = v[7];
    s.pad_lo[d] = s.pad_hi[d] = v[8];
    s.dilation[d] = v[9];
    args.extent.in[d] = v[1 + d];
    const int64_t window = (s.kernel[d] - 1) * v[9] + 1;
    args.extent.out[d] = (v[1 + d] + 2 * v[8] - window) / v[7] + 1;
  }
  const std::vector<int8_t> weight =
      normal_weights(s.out_channels, s.in_per_group() * s.kernel_size());
  std::vector<float> scale(s.out_channels, 0.01f), bias(s.out_channels, 1.0f);
  Epilogue epilogue;
  if (has_residual) {
    epilogue.has_residual = 1;
    epilogue.residual = {.scale = 0.5f,
                         .offset = -1.5f,
                         .residual_scale = 0.3f,
                         .residual_offset = -0.9f,
                         .inv_scale = 1.0f / 0.7f,
                         .zero_point = 7,
                         .qmin = 0,
                         .qmax = 255,
                         .residual_zero_point = 3};
  }
  const ConvSource source = {s,  weight.data(), scale.data(), nullptr, false, bias.data(), 0.02f,
                             77, false,         0.5f,         epilogue};
  const int64_t bytes = packed_conv_bytes(source, isa);
  void* packed = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  pack_conv(source, isa, packed);
  if (view_packed_conv(packed, bytes, &args.packed) != Status::kOk) std::abort();
  const int64_t inputs = v[0] * args.extent.in_pixels() * s.in_channels;
  const int64_t outputs = v[0] * args.extent.out_pixels() * s.out_channels;
  std::vector<uint8_t> input(inputs), out(outputs), residual(has_residual ? outputs : 0, 50);
  for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<uint8_t>(i * 29);
  args.input = input.data();
  args.out = out.data();
  if (has_residual) args.residual = residual.data();
  args.workspace = std::aligned_alloc(64, (conv_workspace_bytes(args, kSerial) + 63) / 64 * 64);
  const double ns = best_ns(1e8, [&] { conv(args, kSerial); });
  const double macs = static_cast<double>(outputs * s.in_per_group() * s.kernel_size());
  std::printf("%-28s %9.1f us  %7.1f MAC/ns  %5.3f of peak\n", name.c_str(), ns / 1e3, macs / ns,
              macs / ns / peak(isa));
  std::free(args.workspace);
  std::free(packed);
}

}  // namespace

int main(int argc, char** argv) {
  const Isa isa = isa_active();
  std::printf("isa %s, peak %.1f MAC/ns\n", isa_name(isa), peak(isa));
  std::ifstream file(argc > 1 ? argv[1] : "bench/shapes/conv.txt");
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    if (line.empty() || line[0] == '#' || !(words >> name)) continue;
    if (argc > 2 && name.find(argv[2]) == std::string::npos) continue;
    std::vector<int64_t> v;
    for (int64_t number; words >> number;) v.push_back(number);
    if (v.size() == 11) bench(name, v, isa, argc > 3 && std::string(argv[3]) == "residual");
  }
  return 0;
}
