"""Straight-through: the gradient passes where nothing was clipped; the grid follows what is observed."""

from torch import Tensor

from qkernels import ops
from qkernels.core.rules.base import Rule, rule


@rule("ste")
class StraightThrough(Rule):
    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return ops.fake_quant(x, scale, zero_point, self.axis, self.spec.qmin, self.spec.qmax)
