#include "csrc/plan/operations.h"

namespace qk::plan {
namespace {

// Cuts the outermost dimension of a walk. refs[k]: where operand k lies, element[k] its bytes.
template <int K>
bool take_walk(int64_t batch, int64_t count, const Ref* const (&refs)[K],
               const int64_t (&element)[K], StridedLayout<K>* layout) {
  if (layout->size[0] % batch != 0) return false;
  const int64_t image = layout->size[0] / batch;
  for (int k = 0; k < K; ++k) {
    if (layout->stride[k][0] * image * element[k] != refs[k]->image) return false;
  }
  layout->size[0] = count * image;
  return true;
}

class TakeImages {
 public:
  TakeImages(int64_t batch, int64_t count) : batch_(batch), count_(count) {}

  bool operator()(QuantizeOp& op) const {
    return take_grid({&op.q, &op.x}, {1, float_bytes(op.args.x_type)}, &op.args.grid);
  }
  bool operator()(DequantizeOp& op) const {
    return take_grid({&op.x, &op.q}, {float_bytes(op.args.x_type), 1}, &op.args.grid);
  }
  bool operator()(ImageOp& op) const { return take(&op.args.batch); }
  bool operator()(LinearOp& op) const {
    if (op.args.rows % batch_ != 0) return false;
    const int64_t rows = op.args.rows / batch_;
    const bool spaced =
        op.input.image == rows * op.args.input_row_stride &&
        (op.residual.base < 0 || op.residual.image == rows * op.args.residual_row_stride);
    if (spaced) op.args.rows = rows * count_;
    return spaced;
  }
  bool operator()(ConvOp& op) const { return take(&op.args.extent.batch); }
  bool operator()(PairOp& op) const {
    return take_walk<3>(batch_, count_, {&op.out, &op.a, &op.b}, {1, 1, 1}, &op.args.layout);
  }
  bool operator()(MoveOp& op) const {
    const int64_t element = op.args.element;
    return take_walk<2>(batch_, count_, {&op.out, &op.in}, {element, element}, &op.args.layout);
  }
  bool operator()(FillOp& op) const {
    if (op.bytes % batch_ != 0 || op.out.image != op.bytes / batch_) return false;
    op.bytes = op.bytes / batch_ * count_;
    return true;
  }
  bool operator()(MaxPoolOp& op) const { return take(&op.args.geometry.batch); }
  bool operator()(AvgPoolOp& op) const { return take(&op.args.geometry.batch); }
  bool operator()(ResizeOp& op) const { return take(&op.args.batch); }

 private:
  static int64_t float_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

  bool take(int64_t* images) const {
    if (*images != batch_) return false;
    *images = count_;
    return true;
  }
  bool take_grid(const Ref* const (&refs)[2], const int64_t (&element)[2], GridLayout* grid) const {
    return grid->channel_dim != 0 && take_walk<2>(batch_, count_, refs, element, &grid->strided);
  }

  int64_t batch_, count_;
};

}  // namespace

bool take_images(int64_t batch, int64_t count, Operation* operation) {
  return std::visit(TakeImages(batch, count), *operation);
}

}  // namespace qk::plan
