"""Linear layers whose activations are quantized when they arrive: a grid for each row, no calibration.

Such a layer takes and returns float tensors. Its weight gets its grid in `prepare`; the simulation rounds the rows of
its input as the integer layer will.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qkernels import ops
from qkernels.core.layers import Prepared
from qkernels.core.lowering import LoweringUnit, lower
from qkernels.core.operations import Operation
from qkernels.core.qspec import QSpec
from qkernels.core.quantizer import State
from qkernels.core.recipe import Override

LARGEST_K = {False: 65_793, True: 33_025}  # by whether the weight has zero points


class PreparedDynamicLinear(Prepared, nn.Linear):
    float_class = nn.Linear
    float_borders = True
    activation: QSpec

    def has_integer_form(self) -> bool:
        return False

    def choose_grid(self) -> None:
        """Puts the weight onto its grid: nothing else is needed before `convert`."""
        self.observe_weight()
        self.quantizers["weight"].choose()
        self.quantizers["weight"].state = State.FAKE_QUANT

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantizers["weight"](self.weight)
        return self.compute(self.rounded(x) if self._is_rounded() else x, weight, self.bias)

    def rounded(self, x: Tensor) -> Tensor:
        """The values that the codes of the rows stand for."""
        spec = self.activation
        codes, scale, zero_point = ops.quantize_rows(x, spec.qmin, spec.qmax, spec.symmetric, spec.dtype)
        return ((codes.to(torch.float32) - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).to(x.dtype)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def lowered(self) -> nn.Module:
        """The integer layer."""
        weight, bias, grid = self.canonical()
        options = {"activation": self.activation}
        return lower(LoweringUnit("dynamic_linear", (), None, self, options, weight, bias, grid))


def why_not_dynamic(node: fx.Node, op: Operation, rule: Override) -> str | None:
    """Why an operation of a recipe that quantizes activations when they arrive stays float."""
    if op.kind != "linear":
        return "the recipe quantizes activations when they arrive, which only linear layers do"
    if type(op.module) is not nn.Linear:
        return f"a {type(op.module).__name__} does not quantize its input when it arrives"
    most = LARGEST_K[not rule.weight.spec.symmetric]
    if op.module.in_features > most:
        return f"sums {op.module.in_features} products; an int32 accumulator surely holds {most}"
    return None
