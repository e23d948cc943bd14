// Normative: the formula of image.h, one byte at a time.
#include "csrc/image/image.h"

namespace qk {

void interleave_scalar(const InterleaveRun& run) {
  for (int64_t c = 0; c < run.channels; ++c) {
    const uint8_t* plane = run.planes + c * run.plane_stride;
    for (int64_t i = 0; i < run.n; ++i) run.out[i * run.pixel_stride + c] = plane[i];
  }
}

}  // namespace qk
