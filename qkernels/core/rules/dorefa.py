"""DoReFa: weights through tanh onto [-1, 1], activations clipped to [0, 1], gradients optionally in few bits too.

Zhou et al. 2016. Weights change by more than rounding: a batch norm behind the layer takes up their size.
"""

import torch
from torch import Tensor

from qkernels import ops
from qkernels.core.qspec import QSpec
from qkernels.core.rules.base import Rule, rule
from qkernels.errors import InvalidArgument


@rule("dorefa")
class DoReFa(Rule):
    """
    Args:
        gradient_bits: the gradient of an activation is rounded to so many bits, stochastically (with noise from torch's
            generator); None: it is not.
    """

    observes = False
    reshapes = True

    def __init__(
        self,
        spec: QSpec,
        channels: int | None = None,
        is_weight: bool = False,
        gradient_bits: int | None = None,
    ):
        super().__init__(spec, channels, is_weight)
        if gradient_bits is not None and not 1 <= gradient_bits <= 16:
            raise InvalidArgument(f"dorefa: gradient_bits must be from 1 to 16, got {gradient_bits}")
        self.gradient_bits = gradient_bits

    @torch.no_grad()
    def start(self, x: Tensor | None, scale: Tensor, zero_point: Tensor) -> None:
        spec = self.spec
        zero_point.copy_(torch.full_like(zero_point, spec.middle) if self.is_weight else self.end_or_middle(zero_point))
        scale.copy_(1.0 / (spec.qmax - zero_point).clamp(min=1).float())

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        spec = self.spec
        if self.is_weight:  # [-1, 1] for all channels: they share one grid
            return ops.dorefa_weight(x, scale[:1], zero_point[:1], spec.qmin, spec.qmax)
        y = ops.fake_quant(x, scale, zero_point, self.axis, spec.qmin, spec.qmax)
        return y if self.gradient_bits is None or not self.training else ops.round_gradient(y, self.gradient_bits)
