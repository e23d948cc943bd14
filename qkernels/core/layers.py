"""Float layers with a quantized weight: torch's own layers with a Quantizer between the weight and the computation.

The layer keeps the original Parameters under their original names; `quantizers.weight` is what is added, and, where
the recipe asks for corrections, `weight_correction` and `bias_correction`.
"""

from collections.abc import Collection
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.core.qspec import QParams
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.recipe import TensorRecipe


class Prepared:
    """Mixin, in front of the float class. `float_class` is that class.

    Corrections are added to the Parameters while the weight is rounded: `weight_correction` (in the layout of `rows`)
    chooses other codes than the nearest, `bias_correction` makes up for the mean error. Zero until learned.
    """

    float_class: ClassVar[type[nn.Module]]
    weight_correction: Tensor | None
    bias_correction: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module, recipe: TensorRecipe, path: str) -> nn.Module:
        """A prepared layer with the Parameters, options and hooks of `layer`."""
        prepared = cls.__new__(cls)
        prepared.__dict__.update(layer.__dict__)
        for table in ("_parameters", "_buffers", "_modules"):
            prepared.__dict__[table] = dict(layer.__dict__[table])
        channels = prepared.rows(layer.weight).shape[0]
        prepared.quantizers = nn.ModuleDict(
            {"weight": Quantizer(recipe, f"{path}.weight", channels).to(layer.weight.device)}
        )
        prepared.register_buffer("weight_correction", None)
        prepared.register_buffer("bias_correction", None)
        return prepared

    def with_corrections(self, names: Collection[str]) -> "Prepared":
        """The layer itself with room for what the corrections `names` will find."""
        rows = self.rows(self.weight.detach())
        if "adaround" in names:
            self.weight_correction = torch.zeros_like(rows)
        if "bias" in names:
            self.bias_correction = rows.new_zeros(rows.shape[0])
        return self

    def corrections(self) -> dict[str, Tensor]:
        """What was corrected, by name; empty if the recipe asks for nothing."""
        return {name: c for name in ("weight_correction", "bias_correction") if (c := getattr(self, name)) is not None}

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.quantized_weight(), self.corrected_bias())

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the float layer computes, with this weight and bias."""
        raise NotImplementedError

    def rows(self, weight: Tensor) -> Tensor:
        """The weight with the output channels first: where per-channel grids have their axis 0."""
        return weight

    def from_rows(self, rows: Tensor) -> Tensor:
        return rows

    def quantized_weight(self) -> Tensor:
        """The weight as the integers will stand for it."""
        return self.from_rows(self.quantizers["weight"](self._corrected_rows()))

    def corrected_weight(self) -> Tensor:
        """What is rounded to nearest to get the codes."""
        return self.from_rows(self._corrected_rows())

    def corrected_bias(self) -> Tensor | None:
        if self.bias_correction is None or not self._is_rounded():
            return self.bias
        return self.bias_correction if self.bias is None else self.bias + self.bias_correction

    def _corrected_rows(self) -> Tensor:
        rows = self.rows(self.weight)
        return rows if self.weight_correction is None or not self._is_rounded() else rows + self.weight_correction

    def _is_rounded(self) -> bool:
        return self.quantizers["weight"].state in (State.FAKE_QUANT, State.FROZEN)

    def weight_qparams(self) -> QParams:
        """The grid of the weight, its axis in the layout of `weight`."""
        return self.quantizers["weight"].qparams()

    def observe_weight(self) -> None:
        """Lets the weight's observer see the weight of now, and nothing else."""
        quantizer = self.quantizers["weight"]
        quantizer.observer.reset()
        quantizer.observer.observe(self.rows(self.weight))


class PreparedLinear(Prepared, nn.Linear):
    float_class = nn.Linear

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _PreparedConv(Prepared):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class PreparedConv1d(_PreparedConv, nn.Conv1d):
    float_class = nn.Conv1d


class PreparedConv2d(_PreparedConv, nn.Conv2d):
    float_class = nn.Conv2d


class PreparedConv3d(_PreparedConv, nn.Conv3d):
    float_class = nn.Conv3d


class _PreparedConvTranspose(Prepared):
    """The weight is [in_channels, out_channels / groups, ...], one block of rows a group."""

    def rows(self, weight: Tensor) -> Tensor:
        group = self.in_channels // self.groups
        blocks = weight.reshape(self.groups, group, self.out_channels // self.groups, *weight.shape[2:])
        return blocks.transpose(1, 2).reshape(self.out_channels, group, *weight.shape[2:])

    def from_rows(self, rows: Tensor) -> Tensor:
        group = self.out_channels // self.groups
        blocks = rows.reshape(self.groups, group, self.in_channels // self.groups, *rows.shape[2:])
        return blocks.transpose(1, 2).reshape(self.in_channels, group, *rows.shape[2:])

    def weight_qparams(self) -> QParams:
        grid = super().weight_qparams()
        axis = None if grid.axis is None else 1
        return QParams(grid.scale, grid.zero_point, axis, grid.qmin, grid.qmax, grid.dtype)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
        return convolve(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)


class PreparedConvTranspose1d(_PreparedConvTranspose, nn.ConvTranspose1d):
    float_class = nn.ConvTranspose1d


class PreparedConvTranspose2d(_PreparedConvTranspose, nn.ConvTranspose2d):
    float_class = nn.ConvTranspose2d


class PreparedConvTranspose3d(_PreparedConvTranspose, nn.ConvTranspose3d):
    float_class = nn.ConvTranspose3d


PREPARED: dict[type[nn.Module], type[Prepared]] = {
    cls.float_class: cls
    for cls in (
        PreparedLinear,
        PreparedConv1d,
        PreparedConv2d,
        PreparedConv3d,
        PreparedConvTranspose1d,
        PreparedConvTranspose2d,
        PreparedConvTranspose3d,
    )
}
