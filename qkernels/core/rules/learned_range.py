"""The ends of the range are learned: scale and zero point follow from them, as in AIMET."""

import torch
from torch import Tensor, nn

from qkernels import ops
from qkernels.core.qspec import MAX_SCALE, QSpec
from qkernels.core.rules.base import Rule, rule


@rule("range")
class LearnedRange(Rule):
    """`scale = (high - low) / (qmax - qmin)`; affine: `zero_point = qmin - low / scale`, rounded once.

    A zero point at an end of the codes stays there, as in AIMET: the ends of the range then only learn their distance.

    The ends are float64: those of a float32 grid fit exactly, and give the very same grid back. They may have any shape
    with as many elements as there are channels.
    """

    observes = False

    def __init__(self, spec: QSpec, channels: int | None = None, is_weight: bool = False):
        super().__init__(spec, channels, is_weight)
        self.low = nn.Parameter(torch.zeros(self.size, dtype=torch.float64, device="cpu"))
        self.high = nn.Parameter(torch.zeros(self.size, dtype=torch.float64, device="cpu"))

    @torch.no_grad()
    def start(self, x: Tensor | None, scale: Tensor, zero_point: Tensor) -> None:
        for end, code in ((self.low, self.spec.qmin), (self.high, self.spec.qmax)):
            end.copy_(((code - zero_point) * scale.double()).reshape(end.shape))

    def grid(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        steps = self.spec.qmax - self.spec.qmin
        low, high = self.low.reshape(-1), self.high.reshape(-1)
        scale = ((high - low) / steps).clamp(self.spec.min_scale, MAX_SCALE).to(torch.float32)
        if self.spec.symmetric:
            return scale, zero_point.to(torch.float32)
        zero_point = (self.spec.qmin - low / scale).to(torch.float32)
        codes = torch.round(zero_point.detach())
        inside = (codes > self.spec.qmin) & (codes < self.spec.qmax)
        return scale, torch.where(inside, zero_point, zero_point.detach())

    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return ops.lsq(x, scale, zero_point, self.axis, self.spec.qmin, self.spec.qmax, 1.0)
