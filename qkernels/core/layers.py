"""Float layers with a quantized weight: torch's own layers with a Quantizer between the weight and the computation.

The layer keeps the original Parameters under their original names; `quantizers.weight` is what is added, and, where
the recipe asks for corrections, `weight_correction` and `bias_correction`. One that is trained may also carry the
batch normalization that follows it (`norm`). `quantizers.bias`, where somebody asks for it, rounds the bias (that of
the folded layer): the integer layer then adds the rounded numbers.

Batch normalization in training is simulated with one convolution. Where every channel has a symmetric grid of its own
the grid lies on the weight itself: scaling a channel scales its grid and leaves the codes alone, so nothing need be
scaled before. Otherwise the weight is scaled by gamma / sigma of the running statistics, quantized, and the output
scaled back.
"""

import copy
import math
from collections.abc import Collection
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels import ops
from qkernels.core.blocks import counts
from qkernels.core.integer import IntegerConv, IntegerForward, IntegerLinear, takes_integers
from qkernels.core.norm import Norm, scale_shift, watches_output
from qkernels.core.observers import describe_non_finite
from qkernels.core.qspec import MIN_SCALE, QParams
from qkernels.core.quantizer import ROUNDING, Limits, Quantizer
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import CalibrationError, InvalidState, Unsupported


class Prepared:
    """Mixin, in front of the float class. `float_class` is that class.

    Corrections are added to the Parameters wherever the weight is rounded, and by `convert` in any phase:
    `weight_correction` (in the layout of `rows`) chooses other codes than the nearest, `bias_correction` makes up for
    the mean error. Zero until learned.
    """

    float_class: ClassVar[type[nn.Module]]
    traced_as_leaf = True
    # It takes and returns what the float layer does, and `lowered()` is its integer layer.
    float_borders: ClassVar[bool] = False
    weight_correction: Tensor | None
    bias_correction: Tensor | None
    norm: Norm | None
    trained: bool
    # For a forward on integers: where the input got onto its grid, and whether a dropout takes it off in training
    source: tuple[Quantizer, bool] | None
    # ... and which Quantizer alone reads the output, behind which clamp
    reader: tuple[Quantizer, Limits] | None

    @classmethod
    def of(
        cls, layer: nn.Module, recipe: TensorRecipe, path: str, norm: nn.Module | None = None, trained: bool = False
    ) -> nn.Module:
        """A prepared layer with the Parameters, options and hooks of `layer`."""
        prepared = cls.__new__(cls)
        prepared.__dict__.update(layer.__dict__)
        for table in ("_parameters", "_buffers", "_modules"):
            prepared.__dict__[table] = dict(layer.__dict__[table])
        quantizer = Quantizer(recipe, f"{path}.weight", prepared.grid_count(recipe, path), trained, is_weight=True)
        prepared.quantizers = nn.ModuleDict({"weight": quantizer.to(layer.weight.device)})
        prepared.register_buffer("weight_correction", None)
        prepared.register_buffer("bias_correction", None)
        prepared.trained, prepared.source, prepared.reader = trained, None, None
        prepared.norm = None if norm is None else Norm.of(norm)
        return prepared

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refuses what `nn.SyncBatchNorm.convert_sync_batchnorm` puts in the place of the norm."""
        if name == "norm" and not isinstance(module, Norm):
            raise InvalidState(
                f"{self.quantizers['weight'].source}: its batch normalization is part of the layer and cannot become a "
                f"{type(module).__name__}: call convert_sync_batchnorm on the float model, before prepare_qat"
            )
        super().add_module(name, module)

    def grid_count(self, recipe: TensorRecipe, path: str) -> int:
        """How many grids the weight has, if it does not have one."""
        rows = self.rows(self.weight)
        if recipe.spec.block is None:
            return rows.shape[0]
        if rows.shape != self.weight.shape:
            raise Unsupported(f"{path}.weight: blocks of a transposed convolution; take one grid a channel")
        return math.prod(counts(rows.shape, recipe.spec.block, f"{path}.weight"))

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

    # -- what each class says

    def rows(self, weight: Tensor) -> Tensor:
        """The weight with the output channels first: where per-channel grids have their axis 0."""
        return weight

    def from_rows(self, rows: Tensor) -> Tensor:
        return rows

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the float layer computes, with this weight and bias."""
        raise NotImplementedError

    # -- forward

    def forward(self, input: Tensor) -> Tensor:  # the name that it has in torch's layers
        if self.norm is not None:
            return self.normalized(input)
        if not self._is_rounded():
            return self.run(input, self.rows(self.weight), self.rounded_bias(self.bias))
        return self.run(input, self._corrected_rows(), self.rounded_bias(self.corrected_bias()))

    def round_bias(self, recipe: TensorRecipe, path: str) -> None:
        """From now on the bias goes onto a grid of its own."""
        channels = self.rows(self.weight).shape[0]
        quantizer = Quantizer(recipe, f"{path}.bias", channels, self.trained, is_weight=True)
        self.quantizers["bias"] = quantizer.to(self.weight.device)

    def rounded_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or "bias" not in self.quantizers else self.quantizers["bias"](bias)

    def quantized_weight(self) -> Tensor:
        """The weight (folded, if there is a norm to fold) as the integers will stand for it."""
        quantizer, rows = self.quantizers["weight"], self._corrected_rows()
        if self.norm is None:
            return self.from_rows(quantizer(rows))
        scale = along(self.norm.scale(), rows)
        return self.from_rows(quantizer(rows) * scale if self.grid_is_on_weight() else quantizer(rows * scale))

    def normalized(self, x: Tensor) -> Tensor:
        """The layer and its batch normalization."""
        norm = self.norm
        if norm.live and norm.folds:
            with torch.no_grad():
                norm(self.compute(x, self.weight, self.bias))
        if not norm.live or norm.folds:
            return self.folded(x, self.quantized_weight(), self.folded_bias())
        rows = self.rows(self.weight)
        if self.grid_is_on_weight():
            return self.with_live_norm(self.run(x, rows, self.bias))
        scale = away_from_zero(norm.scale())
        y = self.run(x, rows * along(scale, rows), None) / self.along_output(scale)
        return self.with_live_norm(y if self.bias is None else y + self.along_output(self.bias))

    def with_live_norm(self, y: Tensor) -> Tensor:
        """Normalized by the statistics of the batch, and on the grid of its reader already if that is one step."""
        if self.reader is not None and not watches_output(self) and self.norm.can_be_fused(y):
            reader, clamp, joined = self.reader
            if reader.takes_norm(y, clamp):
                return reader.normalized(y, self.norm, clamp, joined)
        return self.norm(y)

    def run(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with a weight that goes onto its grid, on the integer kernels if it can."""
        quantizer = self.quantizers["weight"]
        if not self.runs_on_integers(x):
            return self.compute(x, self.from_rows(quantizer(rows)), bias)
        passes, (rounded, codes, grid) = quantizer.passes_gradients, quantizer.with_codes(rows)
        carrier, (scale, zero_point) = rows if passes else rounded, grid
        zero_point = None if self.has_no_zero_points(zero_point) else zero_point
        arguments = (self.from_rows(rounded.detach()), self.from_rows(codes), scale, zero_point, bias)
        return IntegerForward.apply(x, self.from_rows(carrier), bias, self, self.source[0], *arguments)

    def folded(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The layer with the norm folded into weight and bias: computed with the numbers that `convert` will take."""
        if not self.runs_on_integers(x):
            return self.compute(x, weight, bias)
        rows, number, (scale, zero_point, axis) = self.canonical_rows()
        spec = self.quantizers["weight"].spec
        codes = ops.quantize(rows, scale, zero_point, axis, spec.qmin, spec.qmax, spec.dtype)
        zero_point = None if self.has_no_zero_points(zero_point) else zero_point
        arguments = (weight.detach(), self.from_rows(codes), scale, zero_point, number)
        return IntegerForward.apply(x, weight, bias, self, self.source[0], *arguments)

    def has_no_zero_points(self, zero_point: Tensor) -> bool:
        """Whether the weight's zero points are 0: by the kind of grid or, where nothing waits for them, by value."""
        spec = self.quantizers["weight"].spec
        if spec.symmetric and spec.middle == 0:
            return True
        return zero_point.is_cpu and not bool(zero_point.any())

    def folded_bias(self) -> Tensor:
        return self.rounded_bias(self.norm.shift(self.norm.scale(), self.bias))

    def runs_on_integers(self, x: Tensor) -> bool:
        if self.source is None or (self.source[1] and self.training):
            return False
        return takes_integers(self, x, self.source[0])

    def along_output(self, channels: Tensor) -> Tensor:
        return channels.reshape(-1, *[1] * (self.weight.dim() - 2))

    def grid_is_on_weight(self) -> bool:
        """Whether the codes do not change when a channel is multiplied by a number, or it is multiplied afterwards."""
        quantizer, spec = self.quantizers["weight"], self.quantizers["weight"].spec
        if quantizer.rule is not None and quantizer.rule.reshapes:
            return True
        return spec.per_channel and spec.symmetric and spec.qmin == -spec.qmax and not self.norm.folds

    def corrected_bias(self) -> Tensor | None:
        if self.bias_correction is None:
            return self.bias
        return self.bias_correction if self.bias is None else self.bias + self.bias_correction

    def _corrected_rows(self) -> Tensor:
        rows = self.rows(self.weight)
        return rows if self.weight_correction is None else rows + self.weight_correction

    def _is_rounded(self) -> bool:
        return self.quantizers["weight"].state in ROUNDING

    # -- calibration and conversion

    def corrected_weight(self) -> Tensor:
        """What is rounded to nearest to get the codes."""
        return self.from_rows(self._corrected_rows())

    def observed_weight(self) -> Tensor:
        """What the weight's Quantizer gets to see."""
        rows = self.rows(self.weight)
        if self.norm is None or self.grid_is_on_weight():
            return rows
        return rows * along(self.norm.scale(), rows)

    def observe_weight(self) -> None:
        """Lets the weight's observer see the weight of now, and nothing else."""
        quantizer = self.quantizers["weight"]
        quantizer.observer.reset()
        quantizer.watch(self.observed_weight())

    def choose_weight_grid(self) -> None:
        """The first grid of a weight that is trained."""
        self.observe_weight()
        self.quantizers["weight"].choose(self.observed_weight().detach())

    def check_finite(self) -> None:
        """A learned grid would round NaN to a code without a word."""
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                path = self.quantizers["weight"].source.removesuffix(".weight")
                raise CalibrationError(f"convert: {path}.{name} has {describe_non_finite(tensor)}")

    def weight_qparams(self) -> QParams:
        """The grid of the weight, its axis in the layout of `weight`."""
        return self.canonical()[2]

    def canonical(self) -> tuple[Tensor, Tensor | None, QParams]:
        """Weight, bias and weight grid of the integer layer, the norm folded in; the weight of a trained layer lies on
        its grid already, so that the integers are those it was trained with.
        """
        of_weight = self.quantizers["weight"].qparams()
        rows, bias, (scale, zero_point, axis) = self.canonical_rows()
        grid = replace(of_weight, scale=scale.clone(), zero_point=zero_point.clone(), axis=axis)
        return self.from_rows(rows), bias, self.in_layout(grid)

    @torch.no_grad()
    def canonical_rows(self) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, int | None]]:
        """`canonical` with the output channels of the weight first; its grid (scale, zero point, axis) is not looked
        at, nothing waits for a device.
        """
        quantizer, bias = self.quantizers["weight"], self.corrected_bias()
        bias, grid = None if bias is None else bias.detach(), (*quantizer.grid(), quantizer.axis)
        if not self.trained and self.norm is None:
            return self._corrected_rows().detach(), self.rounded_bias(bias), grid
        rows = quantizer.on_grid(self.observed_weight())
        if self.norm is None:
            return rows, self.rounded_bias(bias), grid
        scale, shift = scale_shift(self.norm)
        bias = self.rounded_bias((shift if bias is None else bias.double() * scale + shift).to(torch.float32))
        if self.grid_is_on_weight():
            rows, new = rescaled(rows, grid[0], scale.to(torch.float32))
            grid = new, torch.zeros_like(new, dtype=torch.int32), 0
        return rows, bias, grid

    @torch.no_grad()
    def as_float(self) -> nn.Module:
        """The float layer with the weight of the simulation, for a place where no integers arrive."""
        weight = self.quantized_weight()
        bias = self.rounded_bias(self.corrected_bias()) if self.norm is None else self.folded_bias()
        layer = copy.copy(self)
        layer.__class__ = self.float_class
        layer._modules, layer._buffers = {}, {}
        layer._parameters = {"weight": nn.Parameter(weight.clone(), requires_grad=False), "bias": None}
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        return layer

    def in_layout(self, grid: QParams) -> QParams:
        """The grid of the rows with its axis in the layout of `weight`."""
        return grid


def along(channels: Tensor, rows: Tensor) -> Tensor:
    return channels.reshape(-1, *[1] * (rows.dim() - 1))


def away_from_zero(scale: Tensor) -> Tensor:
    """`scale` with its smallest magnitudes raised: a channel that gamma has switched off can still be divided by."""
    floor = scale.detach().abs().amax() * 2.0**-10
    floor = torch.where(floor > 0, floor, torch.ones_like(floor))
    return torch.where(scale.abs() >= floor, scale, torch.where(scale < 0, -floor, floor))


def rescaled(rows: Tensor, step: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rows on a symmetric grid, each multiplied by its element of `scale`: the same codes up to their sign; and the new
    steps of the grid.

    A row that vanishes becomes zero on the old grid.
    """
    factor = scale.abs()
    alive = step * factor >= MIN_SCALE
    new = torch.where(alive, step * factor, step)
    codes = torch.round(rows / along(step, rows)) * along(torch.sign(scale) * alive, rows)
    return codes * along(new, rows), new


class PreparedLinear(IntegerLinear, Prepared, nn.Linear):
    float_class = nn.Linear

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _PreparedConv(IntegerConv, Prepared):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class PreparedConv1d(_PreparedConv, nn.Conv1d):
    float_class = nn.Conv1d


class PreparedConv2d(_PreparedConv, nn.Conv2d):
    float_class = nn.Conv2d


class PreparedConv3d(_PreparedConv, nn.Conv3d):
    float_class = nn.Conv3d


class _PreparedConvTranspose(IntegerConv, Prepared):
    """The weight is [in_channels, out_channels / groups, ...], one block of rows a group."""

    def rows(self, weight: Tensor) -> Tensor:
        group = self.in_channels // self.groups
        blocks = weight.reshape(self.groups, group, self.out_channels // self.groups, *weight.shape[2:])
        return blocks.transpose(1, 2).reshape(self.out_channels, group, *weight.shape[2:])

    def from_rows(self, rows: Tensor) -> Tensor:
        group = self.out_channels // self.groups
        blocks = rows.reshape(self.groups, group, self.in_channels // self.groups, *rows.shape[2:])
        return blocks.transpose(1, 2).reshape(self.in_channels, group, *rows.shape[2:])

    def in_layout(self, grid: QParams) -> QParams:
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
