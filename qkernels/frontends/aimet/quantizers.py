"""Quantizers and quantized modules under AIMET's names, over the Quantizer of the core."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.core import functional
from qkernels.core.grids import Grid
from qkernels.core.qspec import MAX_BITS, QParams, QSpec
from qkernels.core.quantizer import Quantizer, State
from qkernels.core.recipe import TensorRecipe
from qkernels.errors import InvalidArgument, Unsupported

MIN_SCALE = 2.0**-23


def tensor_recipe(
    bitwidth: int,
    symmetric: bool,
    axis: int | None = None,
    signed: bool = False,
    strict: bool = False,
    observer: str = "minmax",
    options: tuple = (),
) -> TensorRecipe:
    """AIMET's kind of grid. `signed`: int8, for weights; else uint8. `strict`: as many codes on both sides."""
    if not isinstance(bitwidth, int) or not 2 <= bitwidth <= MAX_BITS:
        raise Unsupported(f"bitwidth must be from 2 to {MAX_BITS}, got {bitwidth!r}; more than 8 are only simulated")
    spec = QSpec.weight(bitwidth) if signed else QSpec.activation(bitwidth)
    ends = ends_of(bitwidth, signed, strict)
    spec = QSpec(spec.dtype, *ends, symmetric, axis is not None, axis or 0, MIN_SCALE, symmetric and not strict)
    return TensorRecipe(spec, observer, options, rule="range")


def ends_of(bitwidth: int, signed: bool, strict: bool) -> tuple[int, int]:
    """The lowest and the highest code."""
    lowest = -(2 ** (bitwidth - 1)) if signed else 0
    return lowest + strict, lowest + 2**bitwidth - 1


class QuantizeDequantize(Quantizer):
    """Rounds to a grid whose ends `min` and `max` are trained. `qmin` and `qmax` say bits and `signed` as well."""

    def __init__(self, shape: Sequence[int], bitwidth: int = 8, symmetric: bool = False, signed: bool = False, **how):
        if "qmin" in how and "qmax" in how:
            qmin, qmax = how.pop("qmin"), how.pop("qmax")
            bitwidth, signed, how["strict"] = (qmax - qmin).bit_length(), qmin < 0, qmin == -qmax
            if (qmin, qmax) != ends_of(bitwidth, signed, how["strict"]):
                raise Unsupported(f"QuantizeDequantize: no bitwidth has the codes from {qmin} to {qmax}")
        for name in how.keys() - {"axis", "strict", "observer", "options"}:
            raise Unsupported(f"QuantizeDequantize: {name} has no counterpart")
        wide = [i for i, n in enumerate(shape) if n != 1]
        if len(wide) > 1:
            raise Unsupported(f"QuantizeDequantize: one grid a tensor or a channel, got shape {tuple(shape)}")
        axis = how.pop("axis", wide[0] if wide else None)
        recipe = tensor_recipe(bitwidth, symmetric, axis, signed, **how)
        super().__init__(recipe, "", None if axis is None else shape[axis], trained=True, is_weight=signed)
        self.shape, self.how = tuple(shape), (bitwidth, symmetric, signed, {**how, "axis": axis})
        self.min, self.max = self.rule.low, self.rule.high
        self.state = State.FAKE_QUANT

    @classmethod
    def from_grid(cls, grid: Grid, shape: Sequence[int], axis: int | None) -> "QuantizeDequantize":
        """With this grid, for a tensor of `shape`: a weight with its channels at `axis`, or an activation."""
        wide = axis is not None and len(grid.scale) == shape[axis]
        ones = tuple(n if i == axis else 1 for i, n in enumerate(shape)) if wide else ()
        how = {"strict": grid.is_even, "axis": axis if wide else None}
        made = cls(ones, grid.bits, grid.symmetric, axis is not None, **how)
        spec = made.spec
        scale, offset = torch.tensor(grid.scale), torch.tensor(grid.offset)
        made.set_qparams(QParams(scale, spec.qmin - offset, made.axis, spec.qmin, spec.qmax, spec.dtype))
        return made

    @property
    def bitwidth(self) -> int:
        return self.how[0]

    @bitwidth.setter
    def bitwidth(self, bitwidth: int) -> None:
        self._become(bitwidth, self.symmetric)

    @property
    def symmetric(self) -> bool:
        return self.how[1]

    @symmetric.setter
    def symmetric(self, symmetric: bool) -> None:
        self._become(self.bitwidth, symmetric)

    def _become(self, bitwidth: int, symmetric: bool) -> None:
        """Another kind of grid on the same range; `min` and `max` are new Parameters."""
        ends = (self.min.detach(), self.max.detach()) if self.has_grid() else None
        source, device = self.source, self.min.device
        self.__init__(self.shape, bitwidth, symmetric, self.how[2], **self.how[3])
        self.to(device)
        self.source = self.observer.source = source
        if ends is not None:
            self.take_range(*ends)

    def choose(self) -> None:
        """Takes the grid of what was seen; training starts from the very ends that were seen."""
        super().choose()
        if not self.symmetric:
            low, high = self.observer.range()
            with torch.no_grad():
                self.min.copy_(low.clamp(max=0.0))
                self.max.copy_(torch.where(high > low, high.clamp(min=0.0), self.max))

    def choose_for(self, parameter: Tensor) -> None:
        """Takes the grid of a parameter. With a symmetric grid for each of its numbers it keeps them, as codes of 1."""
        if self.symmetric and self.axis is not None and parameter.numel() == self.shape[self.axis]:
            step = parameter.detach().abs().clamp(min=MIN_SCALE)
            self.take_range(self.spec.qmin * step, self.spec.qmax * step)
        else:
            self.watch(parameter)
            self.choose()

    def set_range(self, low: Any, high: Any) -> None:
        """Takes the range from `low` to `high`: numbers, or tensors of one for each grid."""
        self.take_range(*(torch.as_tensor(end, dtype=self.min.dtype).expand(self.shape) for end in (low, high)))

    @contextmanager
    def compute_encodings(self) -> Iterator[None]:
        """Inside, what passes is watched; at the end the range is that of all of it."""
        self.observer.reset()
        self.state = State.OBSERVE
        try:
            yield
            self.choose()
        finally:
            self.state = State.FAKE_QUANT

    def is_initialized(self) -> bool:
        return self.has_grid()

    def get_min(self) -> Tensor:
        return self.min.detach().float().reshape(self.shape)

    def get_max(self) -> Tensor:
        return self.max.detach().float().reshape(self.shape)

    def get_scale(self) -> Tensor:
        return self.qparams().scale.reshape(self.shape)

    def get_offset(self) -> Tensor:
        return -self.qparams().zero_point.reshape(self.shape).float()

    def freeze(self, requires_grad: bool = False) -> None:
        """Keeps the grid through compute_encodings; unless `requires_grad`, through training too."""
        self.state = State.FROZEN
        for parameter in (self.min, self.max):
            parameter.requires_grad_(requires_grad)

    def extra_repr(self) -> str:
        return f"shape={list(self.shape) or [1]}, bitwidth={self.bitwidth}, symmetric={self.symmetric}"

    def __repr__(self) -> str:
        return f"QuantizeDequantize({self.extra_repr()})"


class QuantizationMixin:
    """A module with quantizers on its inputs, parameters and output; each may be None."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        quantizers = list(self.input_quantizers)
        args = tuple(q(a) if q is not None else a for q, a in zip_longest_args(quantizers, args))
        rounded = {name: q(getattr(self, name)) for name, q in self.param_quantizers.items() if q is not None}
        try:
            self.__dict__.update(rounded)  # in front of the Parameters of these names
            output = super().forward(*args, **kwargs)
        finally:
            for name in rounded:
                del self.__dict__[name]
        quantizer = self.output_quantizers[0]
        return output if quantizer is None else quantizer(output)


def zip_longest_args(quantizers: list, args: tuple) -> Iterator[tuple[Any, Any]]:
    """Each argument with its quantizer; those behind the tensors have none."""
    return ((quantizers[i] if i < len(quantizers) else None, a) for i, a in enumerate(args))


def quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`Quantized<name>`: `cls` with quantizers."""
    name = f"Quantized{cls.__name__}"
    if name not in globals():
        globals()[name] = type(name, (QuantizationMixin, cls), {"__module__": __name__, "float_type": cls})
    found = globals()[name]
    if found.float_type is not cls:
        raise Unsupported(f"there are two module classes named {cls.__name__}; rename one")
    return found


def __getattr__(name: str) -> Any:
    """The quantized classes of torch.nn by name, for pickle."""
    if name.startswith("Quantized"):
        cls = getattr(nn, name[9:], None) or getattr(functional, name[9:], None)
        if inspect.isclass(cls):
            return quantized_class(cls)
    raise AttributeError(name)


def make_quantized(module: nn.Module, tensor_inputs: int) -> None:
    """Turns the module itself into its quantized class, with no quantizers yet."""
    module.__class__ = quantized_class(type(module))
    module.param_quantizers = nn.ModuleDict()
    for name, _ in module.named_parameters(recurse=False):
        module.param_quantizers[name] = None
    if "bias" in module._parameters and module.bias is None and "weight" in module.param_quantizers:
        module.param_quantizers["bias"] = None
    module.input_quantizers = nn.ModuleList([None] * tensor_inputs)
    module.output_quantizers = nn.ModuleList([None])


def make_float(module: nn.Module) -> None:
    """The opposite."""
    module.__class__ = type(module).float_type
    for name in ("param_quantizers", "input_quantizers", "output_quantizers"):
        delattr(module, name)


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, QuantizationMixin)


@contextmanager
def compute_encodings(model: nn.Module) -> Iterator[None]:
    """Parameters get their grids at once, activations at the end of the block, inside which they are watched and pass.

    Frozen quantizers keep their grids.
    """
    found = {q for q in model.modules() if isinstance(q, QuantizeDequantize) and q.state is not State.FROZEN}
    if not any(isinstance(q, QuantizeDequantize) for q in model.modules()):
        raise InvalidArgument("compute_encodings: the model has no quantizers; give sim.model")
    for quantizer in found:
        quantizer.observer.reset()
    weights = set()
    for module in filter(is_quantized, model.modules()):
        for name, quantizer in module.param_quantizers.items():
            if quantizer in found:
                quantizer.choose_for(getattr(module, name))
                weights.add(quantizer)
    try:
        for quantizer in found - weights:
            quantizer.state = State.OBSERVE
        with torch.no_grad():
            yield
        for quantizer in found - weights:
            if quantizer.observer.has_data():
                quantizer.choose()
    finally:
        for quantizer in found:
            quantizer.state = State.FAKE_QUANT
