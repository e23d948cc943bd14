// The rows of the matrix A of a block: pointers to them in the image, in its padded copy or in
// copies of the windows that overhang it, and the places of its outputs.
#pragma once

#include <optional>

#include "csrc/conv/blocks.h"

namespace qk {

// Writes the rows of the padded image, from codes or from floats, which it quantizes.
class PaddedRows {
 public:
  PaddedRows(const ConvArgs& args, const PaddedImage& image);

  // What lies behind the last window is left as it is: it is read, but meets weights that count as
  // zero.
  void write(int64_t row, uint8_t* dst) const;

 private:
  // `count` pixels from pixel x on of row `row` of the input.
  void copy(int64_t row, int64_t x, int64_t count, uint8_t* dst) const;

  const ConvArgs& args_;
  const PaddedImage& image_;
  std::optional<ImageQuantizer> quantizer_;
};

// The part of the workspace that belongs to one thread.
struct Scratch {
  const uint8_t** pointers;
  int64_t* out_offset;       // bytes
  int64_t* residual_offset;  // bytes
  uint8_t* windows;
  uint8_t* codes;  // of a block of a set, to be dequantized
};

// What all threads read from the workspace.
struct Shared {
  const uint8_t* padding;
  const uint8_t* image;  // padded, if the plan asks for it
};

class BlockRows {
 public:
  BlockRows(const ConvArgs& args, const PhaseRun& run, const Shared& shared, const Scratch& scratch)
      : args_(args), run_(run), padding_(shared.padding), image_(shared.image), scratch_(scratch) {}

  // Fills the pointers of pixels [begin, end), for channels from `channel` on.
  void find(int64_t begin, int64_t end, int64_t channel);

  // Fills the pointers of the output rows that are pixels [begin, end), for channels from `channel`
  // on.
  void find_even(int64_t begin, int64_t end, int64_t channel);

  // The same where the rows of an image are joined: the pointers of its first pixel.
  void find_joined(int64_t begin, int64_t end);

  // Moves `count` pointers to the channels `bytes` further on.
  void move(int64_t count, int64_t bytes);

  // The places of the block's pixels in an output with gaps.
  void find_outputs(int64_t begin, int64_t end);

 private:
  int64_t source(int d, int64_t j, int64_t tap) const;

  // Whole rows of windows: inside the image the image itself, at its edges a copy.
  void find_runs(const uint8_t* image_row, const uint8_t** pointers, int64_t x0, int64_t x1,
                 uint8_t** windows) const;

  const uint8_t* copy_window(const uint8_t* image_row, int64_t x, uint8_t** windows) const;

  void find_tap(const uint8_t* image_row, const uint8_t** pointers, int64_t tap, int64_t x0,
                int64_t x1) const;

  const ConvArgs& args_;
  const PhaseRun& run_;
  const uint8_t* padding_;
  const uint8_t* image_;
  const Scratch& scratch_;
};

}  // namespace qk
