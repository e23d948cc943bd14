// Whole networks, layer by layer: the CUDA kernels on the emulator give the bytes of the CPU's
// kernels at every step, and at the end those of the compiled plan.
//
//   cuda_network_test [network.qkplan [open dimensions, in order: batch=2 others=16]]
//
// goes through a saved plan instead, with random inputs.
#include <fstream>
#include <iterator>

#include "csrc/plan/layouts.h"
#include "csrc/plan/plan.h"
#include "tests/csrc/plan_networks.h"
#include "tests/simt/network_steps.h"

using namespace qk;
using namespace qk::test;
using plan::InputLayout;

namespace {

// Where two tensors of one shape are not the same bytes.
struct Differences {
  int64_t count = 0;
  std::string first;

  Differences(const Activation& a, const Activation& b) {
    const auto bytes = static_cast<size_t>(plan::dtype_bytes(a.view.dtype));
    for_each_index(a.size(), [&](const int64_t* index) {
      if (std::memcmp(element(a, index), element(b, index), bytes) == 0) return;
      if (++count > 1) return;
      Sizes at{a.view.rank(), {}};
      std::copy_n(index, at.rank, at.dims);
      first = plan::text(at);
    });
  }
};

class Network {
 public:
  Network(std::string name, const std::vector<uint8_t>& file)
      : name_(std::move(name)), bytes_(allocate(static_cast<int64_t>(file.size()))) {
    const auto size = static_cast<int64_t>(file.size());
    std::copy(file.begin(), file.end(), bytes_.get());
    expect_ok(plan::read_model(bytes_.get(), size, &model_));
    expect_ok(plan::Plan::load(bytes_.get(), size, &plan_));
  }

  const plan::Model& model() const { return model_; }
  const std::set<std::string>& kernels() const { return runner_.kernels(); }

  // `sizes`: of the inputs.
  void check(const std::vector<Sizes>& sizes) {
    std::string where = name_;
    for (const Sizes& size : sizes) where += " " + plan::text(size);
    CONTEXT(where);
    values_.assign(model_.values.size(), {});
    std::vector<InputLayout> layouts;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const int value = model_.inputs[i].value;
      values_[value] = random_input(model_.values[value].dtype, sizes[i]);
      layouts.push_back({sizes[i], {}});
      std::copy_n(values_[value].view.stride, plan::kMaxRank, layouts.back().stride);
    }
    plan::Shapes shapes;
    expect_ok(plan::infer_shapes(model_, sizes, &shapes));
    const std::vector<View> views = plan::module_layouts(model_, shapes, layouts);
    const DataMovement movement(model_, shapes);
    for (const Step& step : model_.steps) {
      CONTEXT(where, ", step '", step.name, "' (", plan::step_kind_name(step.kind), ")");
      run_step(step, movement, views[step.output]);
    }
    CONTEXT(where);
    compare_with_plan(layouts);
  }

 private:
  static void expect_ok(const plan::Error& error) { CHECK(error.ok(), error.message); }

  Activation random_input(DType dtype, const Sizes& size) {
    View view;
    view.dtype = dtype;
    view.size = size;
    plan::set_contiguous(&view);
    const Activation x = new_activation(view);
    for_each_index(size, [&](const int64_t* index) {
      const float value = rng_.real(-4, 4);
      switch (dtype) {
        case DType::kF32:
          std::memcpy(element(x, index), &value, sizeof value);
          break;
        case DType::kU8:
        case DType::kS8:
          *element(x, index) = static_cast<uint8_t>(rng_.bits());
          break;
        default:
          CHECK(false, "an input of ", plan::dtype_name(dtype));
      }
    });
    return x;
  }

  void run_step(const Step& step, const DataMovement& movement, const View& out) {
    std::vector<Activation> inputs;
    for (const int value : step.inputs) inputs.push_back(values_[value]);
    if (DataMovement::does(step.kind)) {
      const Activation x = inputs.empty() ? Activation{} : inputs[0];
      values_[step.output] = movement.run(step, x, out);
      return;
    }
    simt::seed = rng_.bits();
    const Results results = runner_.run(step, inputs, out);
    expect_same(results.cuda, results.cpu, "CUDA and the CPU");
    values_[step.output] = results.cuda;
  }

  static void expect_same(const Activation& a, const Activation& b, const char* names) {
    const Differences differences(a, b);
    CHECK(differences.count == 0, "- ", names, " differ in ", differences.count, " of ",
          a.size().elements(), " elements of ", plan::text(a.size()), ", first at ",
          differences.first);
  }

  void compare_with_plan(const std::vector<InputLayout>& layouts) {
    std::vector<plan::OutputSpec> specs;
    expect_ok(plan_->outputs(layouts, kSerial, &specs));
    std::vector<Activation> outputs;
    std::vector<const void*> sources;
    std::vector<void*> targets;
    for (const plan::ModelInput& input : model_.inputs) {
      sources.push_back(values_[input.value].data());
    }
    for (const plan::OutputSpec& spec : specs) {
      View view;
      view.dtype = spec.dtype;
      view.size = spec.size;
      std::copy_n(spec.stride, plan::kMaxRank, view.stride);
      outputs.push_back(new_activation(view));
      targets.push_back(outputs.back().data());
    }
    expect_ok(plan_->run(layouts, sources.data(), targets.data(), kSerial));
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Activation& layerwise = values_[model_.outputs[i]];
      CHECK(layerwise.view.dtype == outputs[i].view.dtype && layerwise.size() == outputs[i].size());
      expect_same(layerwise, outputs[i],
                  text_of("output ", i, ": the layers and the plan").c_str());
    }
  }

  std::string name_;
  std::shared_ptr<uint8_t> bytes_;
  plan::Model model_;
  std::unique_ptr<plan::Plan> plan_;
  StepRunner runner_{model_};
  Rng rng_;
  std::vector<Activation> values_;
};

struct LayerOptions {
  int64_t stride = 1, padding = 0, dilation = 1, output_padding = 0, groups = 1;
  PaddingMode mode = PaddingMode::kZeros;
  bool transposed = false;
  DType output = DType::kU8;
  bool zero_points = false, with_table = false;
};

// Layers of any number of dimensions and any type of output.
struct LayerWriter : NetworkWriter {
  using NetworkWriter::NetworkWriter;

  static Cells grid_of(DType output, float scale) {
    return output == DType::kS8 ? Cells{PlanFile::real(scale), 5, -125, 122} : grid(scale);
  }

  int linear(int x, int rank, int64_t in, int64_t out, const LayerOptions& o = {},
             int residual = -1) {
    const int weight = file.tensor(DType::kS8, {out, in}, weights(out * in));
    return step(StepKind::kLinear, x, residual, o.output, rank,
                layer(weight, out, in, o, residual >= 0));
  }

  int conv(int x, int64_t in, int64_t out, const std::vector<int64_t>& kernel,
           const LayerOptions& o, int residual = -1) {
    const int64_t first = o.transposed ? in : out, second = (o.transposed ? out : in) / o.groups;
    int64_t taps = 1;
    for (const int64_t size : kernel) taps *= size;
    const size_t dims = kernel.size();
    const std::vector<int8_t> w = weights(first * second * taps);
    const int weight =
        dims == 1   ? file.tensor(DType::kS8, {first, second, taps}, w)
        : dims == 2 ? file.tensor(DType::kS8, {first, second, kernel[0], kernel[1]}, w)
                    : file.tensor(DType::kS8, {first, second, kernel[0], kernel[1], kernel[2]}, w);
    const Cells geometry =
        join(Cells{static_cast<int64_t>(dims)}, Cells(dims, o.stride), Cells(2 * dims, o.padding),
             Cells(dims, o.dilation), Cells(dims, o.output_padding),
             Cells{o.groups, o.transposed, static_cast<int64_t>(o.mode)});
    return step(StepKind::kConv, x, residual, o.output, static_cast<int>(dims) + 2,
                join(layer(weight, out, in / o.groups * taps, o, residual >= 0), geometry));
  }
  int conv2d(int x, int64_t in, int64_t out, int64_t kernel, const LayerOptions& o = {},
             int residual = -1) {
    return conv(x, in, out, {kernel, kernel}, o, residual);
  }

  int lookup(int x, int rank, DType output) {
    return file.step(StepKind::kLookup, {x}, output, rank, {file.tensor(output, {256}, table())});
  }
  int binary(StepKind kind, int a, int b, int rank, DType output) {
    return file.step(
        kind, {a, b}, output, rank,
        join(operand(), operand(0.05f), grid_of(output, kind == StepKind::kAdd ? 0.1f : 0.5f)));
  }
  int cat(int a, int b, int64_t dim, int rank, DType output) {
    std::vector<uint8_t> tables = table(true);
    const std::vector<uint8_t> other = table();
    tables.insert(tables.end(), other.begin(), other.end());
    return file.step(StepKind::kCat, {a, b}, output, rank,
                     {dim, file.tensor(output, {2, 256}, tables)});
  }
  // x[..., start::step] on `dim`.
  int slice(int x, int rank, DType dtype, int64_t dim, int64_t start, int64_t step = 1) {
    return file.step(StepKind::kSlice, {x}, dtype, rank,
                     {dim, constant(start), constant(INT64_MAX), step});
  }

 private:
  int step(StepKind kind, int x, int residual, DType output, int rank, const Cells& cells) {
    return residual >= 0 ? file.step(kind, {x, residual}, output, rank, cells)
                         : file.step(kind, {x}, output, rank, cells);
  }

  // WEIGHTS and EPILOGUE of csrc/plan/format.h; the grid is as wide as a sum of so many products.
  Cells layer(int weight, int64_t channels, int64_t products, const LayerOptions& o,
              bool residual) {
    constexpr int kGrid = 6, kTable = 10, kSum = 14;  // where weighted() has them
    const bool codes = plan::is_code(o.output);
    Cells cells = weighted(weight, channels, o.zero_points, codes, false, residual);
    const auto put = [&cells](const Cells& part, int at) {
      std::copy(part.begin(), part.end(), cells.begin() + at);
    };
    const float scale = 0.02f * std::sqrt(static_cast<float>(products));
    if (codes) put(grid_of(o.output, scale), kGrid);
    if (o.with_table) cells[kTable] = file.tensor(o.output, {256}, table());
    if (residual) put(grid_of(o.output, scale), kSum);
    return cells;
  }
};

// Every CUDA kernel of convolution. Input [N, 3, H, W].
std::vector<uint8_t> convolutions() {
  using enum plan::DType;
  LayerWriter n(11);
  PlanFile& f = n.file;
  int x = n.quantize(f.input(kF32, {-1, 3, -1, -1}), 4);
  // A stem, tiles with residuals and tables, groups of whole chunks.
  x = n.conv2d(x, 3, 16, 3, {.stride = 2, .padding = 1});
  x = f.step(StepKind::kMaxPool, {x}, kU8, 4, {2, 3, 3, 1, 1, 1, 1, 1, 1, 0});
  x = n.conv2d(x, 16, 32, 3, {.padding = 1, .output = kS8});
  x = n.conv2d(x, 32, 32, 3, {.padding = 1, .with_table = true}, x);
  x = n.conv2d(x, 32, 32, 3, {.padding = 1, .groups = 2, .output = kS8, .with_table = true}, x);
  // Padding modes.
  x = n.conv2d(x, 32, 16, 3, {.padding = 1, .mode = PaddingMode::kReflect});
  x = n.conv2d(x, 16, 16, 3, {.padding = 2, .dilation = 2, .mode = PaddingMode::kReplicate});
  x = n.conv2d(x, 16, 32, 3, {.padding = 1, .mode = PaddingMode::kCircular, .output = kS8});
  x = n.conv2d(x, 32, 48, 1, {.stride = 2});
  // Depthwise, and groups of 4, 8 and 12 channels.
  x = n.conv2d(x, 48, 48, 3, {.padding = 1, .groups = 48, .output = kS8});
  x = n.conv2d(x, 48, 96, 3, {.padding = 1, .groups = 48, .zero_points = true});
  x = n.conv2d(x, 96, 48, 3, {.padding = 1, .groups = 24, .output = kS8});
  x = n.conv2d(x, 48, 48, 3, {.padding = 1, .groups = 6, .zero_points = true}, x);
  x = n.conv2d(x, 48, 48, 3, {.padding = 1, .groups = 4, .output = kS8});
  // One tap: linear, in whole chunks and gathered.
  x = n.conv2d(x, 48, 48, 1, {}, x);
  x = n.conv2d(x, 48, 20, 1, {.output = kS8, .with_table = true});
  x = n.conv2d(x, 20, 20, 1, {}, x);
  // A bottleneck, whose long sums are split.
  x = n.conv2d(x, 20, 128, 1, {.output = kS8});
  x = n.conv2d(x, 128, 128, 3, {.padding = 1});
  x = n.conv2d(x, 128, 20, 3, {.padding = 1});
  // Groups that are no chunks, rows of the window, weight zero points.
  x = n.conv2d(x, 20, 20, 3, {.padding = 1, .groups = 2, .output = kS8});
  x = n.conv2d(x, 20, 16, 3, {.padding = 1, .output = kS8, .zero_points = true});
  x = n.conv2d(x, 16, 16, 3, {.padding = 1, .output = kS8, .zero_points = true}, x);
  // One and three dimensions.
  const int batch = f.size_of(x, 0), height = f.size_of(x, 2), width = f.size_of(x, 3);
  const int line =
      f.step(StepKind::kReshape, {x}, kS8, 3, {3, batch, n.constant(16), n.constant(-1)});
  const int smooth = n.conv(line, 16, 16, {3}, {.padding = 1}, line);
  const int volume = f.step(StepKind::kReshape, {smooth}, kU8, 5,
                            {5, batch, n.constant(8), n.constant(2), height, width});
  f.output(n.conv(volume, 8, 6, {2, 3, 3}, {.padding = 1, .output = kBF16}));
  // Transposed: tiles, depthwise, and outputs that receive no input.
  const int up =
      n.conv2d(x, 16, 16, 3, {.stride = 2, .padding = 1, .output_padding = 1, .transposed = true});
  f.output(n.conv2d(up, 16, 16, 3, {.stride = 2, .groups = 16, .transposed = true}));
  f.output(n.conv2d(up, 16, 5, 2, {.stride = 3, .transposed = true, .output = kS8}));
  f.output(n.conv2d(x, 16, 5, 2, {.stride = 3, .transposed = true, .output = kS32}));
  return f.bytes();
}

// Both types of codes in one network, and linear. Inputs [N, 7, H, W], W even, and [N, T, 24].
std::vector<uint8_t> images_and_tokens() {
  using enum plan::DType;
  using Cells = PlanFile::Cells;
  LayerWriter n(12);
  PlanFile& f = n.file;
  const int image = f.input(kF32, {-1, 7, -1, -1}), tokens = f.input(kF32, {-1, -1, 24});
  const auto pool = [&](StepKind kind, int x, DType output, const Cells& windows) {
    return f.step(kind, {x}, output, 4, n.join(windows, n.operand(), n.grid_of(output, 0.1f)));
  };
  // A grid a channel.
  const std::vector<float> scales{0.05f, 0.06f, 0.07f, 0.08f, 0.04f, 0.03f, 0.09f};
  const std::vector<int32_t> points{-3, 0, 7, 100, -100, 1, 2};
  const Cells channels{1, f.tensor(kF32, {7}, scales), f.tensor(kS32, {7}, points)};
  const int q = f.step(StepKind::kQuantize, {image}, kS8, 4, n.join(channels, Cells{-125, 122}));
  f.output(f.step(StepKind::kDequantize, {q}, kF16, 4, channels));
  const int codes = n.lookup(n.lookup(q, 4, kU8), 4, kS8);
  // Pools.
  const int peaks = f.step(StepKind::kMaxPool, {codes}, kS8, 4, {2, 3, 2, 2, 2, 1, 0, 1, 2, 1});
  const int means = pool(StepKind::kAvgPool, peaks, kU8, {2, 3, 3, 1, 1, 1, 1, 0, 1, 0});
  f.output(pool(StepKind::kAvgPool, codes, kS8, {2, 2, 3, 2, 1, 0, 1, 1, 0, 5}));
  f.output(pool(StepKind::kAdaptiveAvgPool, codes, kU8, {2, n.constant(3), -1}));
  // Operands of either type, broadcast, strided, joined.
  const int gate = pool(StepKind::kAdaptiveAvgPool, means, kS8, {2, n.constant(1), n.constant(1)});
  const int gated = n.binary(StepKind::kMul, means, gate, 4, kS8);
  const int sum = n.binary(StepKind::kAdd, peaks, gated, 4, kU8);
  f.output(n.cat(sum, gated, 1, 4, kU8));
  const int even = n.slice(codes, 4, kS8, 3, 0, 2), odd = n.slice(codes, 4, kS8, 3, 1, 2);
  const int pairs = n.binary(StepKind::kAdd, even, odd, 4, kS8);
  f.output(n.cat(pairs, n.lookup(odd, 4, kU8), 3, 4, kS8));
  const int wide = f.step(StepKind::kExpand, {gate}, kS8, 4,
                          {4, n.constant(-1), n.constant(-1), f.size_of(sum, 2), n.constant(5)});
  const int resized =
      f.step(StepKind::kInterpolate, {sum}, kU8, 4, {2, 1, 1, f.size_of(sum, 2), n.constant(5)});
  const int cropped =
      f.step(StepKind::kPad, {n.binary(StepKind::kMul, wide, resized, 4, kS8)}, kS8, 4,
             {2, n.constant(-1), n.constant(2), n.constant(1), n.constant(0), -7});
  const int pixels = f.step(StepKind::kPermute, {cropped}, kS8, 4, {4, 0, 2, 3, 1});
  f.output(n.linear(pixels, 4, 7, 12));
  // Many rows and few.
  const int embedded = n.linear(n.quantize(tokens, 3), 3, 24, 32, {.output = kS8});
  const int mixed = n.linear(embedded, 3, 32, 32, {.output = kS8, .with_table = true}, embedded);
  const int hidden = n.linear(mixed, 3, 32, 512, {.zero_points = true});
  const int narrow = n.linear(hidden, 3, 512, 512, {.output = kS8});
  const int back = n.linear(narrow, 3, 512, 48);
  const int last = n.linear(back, 3, 48, 48, {.with_table = true}, back);
  f.output(n.linear(last, 3, 48, 20, {.output = kF16}));
  const auto last_token = [&](int x, DType dtype, int64_t size) {
    return f.step(StepKind::kReshape, {n.slice(x, 3, dtype, 1, -1)}, dtype, 2,
                  {2, n.constant(-1), n.constant(size)});
  };
  f.output(n.linear(last_token(mixed, kS8, 32), 2, 32, 10, {.output = kS32, .zero_points = true}));
  const int token = last_token(last, kU8, 48);
  f.output(n.dequantize(n.linear(token, 2, 48, 48, {}, token), 2, kBF16));
  const int bias = f.step(StepKind::kConstant, {}, kU8, 2,
                          {f.tensor(kU8, {48, 1}, std::vector<uint8_t>(48, 150))});
  const int turned = f.step(StepKind::kPermute, {last}, kU8, 3, {3, 0, 2, 1});
  f.output(n.binary(StepKind::kAdd, turned, bias, 3, kS8));
  return f.bytes();
}

void networks_give_the_same_bytes_at_every_step() {
  std::set<std::string> kernels;
  const auto check = [&](const char* name, const std::vector<uint8_t>& file,
                         const std::vector<std::vector<Sizes>>& calls) {
    Network network(name, file);
    for (const std::vector<Sizes>& sizes : calls) network.check(sizes);
    kernels.insert(network.kernels().begin(), network.kernels().end());
  };
  check("network_file", network_file(), {{{4, {1, 3, 16, 16}}}, {{4, {3, 3, 8, 12}}}});
  check("convolutions", convolutions(), {{{4, {1, 3, 12, 10}}}, {{4, {2, 3, 9, 7}}}});
  check("images_and_tokens", images_and_tokens(),
        {{{4, {1, 7, 6, 8}}, {3, {1, 9, 24}}}, {{4, {3, 7, 5, 6}}, {3, {3, 5, 24}}}});
  for (const char* kernel :
       {"linear: dot products", "linear: gathered bytes", "linear: tiles", "linear: tiles, K split",
        "conv: depthwise", "conv: fill", "conv: gathered bytes", "conv: narrow groups",
        "conv: rows of the window", "conv: tiles", "conv: tiles, K split"}) {
    for (const char* codes : {", u8", ", s8"}) {
      CHECK(kernels.count(std::string(kernel) + codes) == 1, kernel, codes, " is in no network");
    }
  }
}

// `open`: the sizes of open dimensions, in the order of the inputs.
void check_file(const char* path, const std::vector<int64_t>& open) {
  std::ifstream stream(path, std::ios::binary);
  CHECK(stream.good(), "cannot open ", path);
  Network network(path, {std::istreambuf_iterator<char>(stream), {}});
  std::vector<Sizes> sizes;
  size_t next = 0;
  for (const plan::ModelInput& input : network.model().inputs) {
    Sizes& size = sizes.emplace_back();
    size.rank = network.model().values[input.value].rank;
    for (int d = 0; d < size.rank; ++d) {
      size[d] = input.dims[d];
      if (size[d] < 0) size[d] = next < open.size() ? open[next++] : d == 0 ? 2 : 16;
    }
  }
  network.check(sizes);
  std::cout << path << ": " << network.model().steps.size()
            << " steps and the plan give the same bytes. Kernels of linear and convolution:\n";
  for (const std::string& kernel : network.kernels()) std::cout << "  " << kernel << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    std::vector<int64_t> open;
    for (int i = 2; i < argc; ++i) {
      open.push_back(std::atoll(argv[i]));
      CHECK(open.back() > 0, argv[i], " is no size");
    }
    check_file(argv[1], open);
    return 0;
  }
  for_each_isa([](Isa) { networks_give_the_same_bytes_at_every_step(); });
  // Compute capability 7.5: other instructions and fewer tiles.
  simt::device = {7, 5, 40, 64 << 10, 64 << 10};
  networks_give_the_same_bytes_at_every_step();
}
