// From steps to operations: what program.cc and lower_*.cc share. lower_*.cc holds one family of
// steps each; program.cc the buffers, the views and the order of it all.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "csrc/plan/operations.h"
#include "csrc/plan/placement.h"

namespace qk::plan {

// Of one operation, for its description: multiply-adds, and bytes.
struct Cost {
  int64_t macs = 0, weights = 0, workspace = 0;
};

inline bool is_signed(const View& view) { return view.dtype == DType::kS8; }
ConvExtent extent_of(const View& in, const View& out);

class Builder {
 public:
  Builder(const Model& model, const std::vector<Block>& packed,
          const std::vector<const uint8_t*>& constants, int64_t cache, const Parallel& parallel,
          Program* program)
      : model_(model),
        packed_(packed),
        constants_(constants),
        cache_(cache),
        parallel_(parallel),
        program_(*program) {}

  Error build(const std::vector<InputLayout>& inputs);

 private:
  // ---- buffers and views

  int new_buffer(Home home, int64_t bytes, int index = 0, const uint8_t* data = nullptr);
  void place_input(int i, const InputLayout& layout);
  // `layout`: how the modules lay it out.
  void place_output(int i, const View& layout);
  // The output of the current step, without memory yet.
  View output_view(const Step& step) const;
  void allocate(View* view) { view->buffer = new_buffer(Home::kArena, bytes_of(*view)); }
  // A view that fills its buffer: dense, from the start.
  bool fills_buffer(const View& view) const;
  const View& input(const Step& step, int i) const { return views_[step.inputs[i]]; }
  static Ref ref(const View& view);
  void touch(int buffer);
  void find_readers();
  // The packed weights of the convolution at `index`.
  const PackedConvHeader* packed_conv(int index) const;

  // ---- what lies in a concatenation

  bool writes_slices(const Step& step) const;
  bool reads_slices(const Step& step, int value) const;
  void find_parts_of_cats();
  // The place of value `value` in the output of the cat that it is part of.
  View part_of_cat(int value);
  // Memory for the output of a step that writes channels last: in a cat, or of its own.
  void allocate_pixels(const Step& step, View* out);
  // Tells in the description of the last operation that its output lies in a cat.
  void mention_cat(const Step& step);

  // `view` itself, or a copy with the strides of `wanted`, whose dtype does not matter.
  View with_strides(const View& view, View wanted);
  View as_channels_last(const View& view);
  // Channels last, perhaps with a gap between pixels.
  View as_pixels(const View& view, int64_t* stride);
  View as_contiguous(const View& view);
  View as_dense(const View& view);
  View as_rows(const View& view, int64_t* stride);

  // ---- operations

  void emit(Operation operation, const std::string& kind, const std::string& kernel,
            std::initializer_list<const View*> reads, const View& write, const Cost& cost = {});
  void emit_move(const View& from, const View& to, const uint8_t* table, const char* kind);
  // The operation emitted next may write `to` over `from`, if nothing reads `from` later and it
  // has `least` bytes.
  void may_overwrite(const View& from, const View& to, std::initializer_list<const View*> others,
                     int64_t least = 0);

  // ---- steps

  void lower(const Step& step);
  GridLayout grid_layout(const QuantizeStep& s, const View& out, const View& in) const;
  // Whether what the step quantizes is images whose codes will lie channels innermost.
  bool is_image(const Step& step) const;
  FloatImages images_of(const Step& step) const;
  // The step that quantizes the input of `conv`, if the convolution does that itself where it pads
  // its input: nobody else reads the codes.
  const Step* quantized_by(const Step& conv) const;
  // The step that dequantizes the output of `step`, if that is a layer which does it itself: nobody
  // else reads the codes.
  const Step* dequantized_by(const Step& step) const;
  // Where the layer `step` writes, and what it then does to its codes.
  View* stored(const Step& step, DequantizedOutput* floats);
  void lower_quantize(const Step& step, View* out);
  void lower_dequantize(const Step& step, View* out);
  void lower_linear(const Step& step);
  void lower_conv(const Step& step);
  void lower_binary(const Step& step, View* out);
  void lower_lookup(const Step& step, View* out);
  void lower_max_pool(const Step& step, View* out);
  void lower_avg_pool(const Step& step, View* out);
  void lower_interpolate(const Step& step, View* out);
  void lower_cat(const Step& step, View* out);
  void lower_pad(const Step& step, View* out);
  void lower_permute(const Step& step, View* out);
  void lower_reshape(const Step& step, View* out);
  void lower_slice(const Step& step, View* out);
  void lower_expand(const Step& step, View* out);

  const Model& model_;
  const std::vector<Block>& packed_;
  const std::vector<const uint8_t*>& constants_;
  const int64_t cache_;
  const Parallel& parallel_;
  Program& program_;
  Shapes shapes_;
  std::vector<View> views_;  // by value
  // By value: the step that writes it, the last that reads it (-1: none), and how often it is read,
  // as an output of the plan too.
  std::vector<int> writer_, reader_, readers_;
  std::vector<bool> wants_channels_last_;
  std::vector<int> cat_of_;  // by value: the step in whose output it is written, or -1
  // By value, of a cat: its first inputs, which an earlier cat has joined.
  std::vector<int> prefix_;
  Draft draft_;
  int step_index_ = 0;
};

}  // namespace qk::plan
