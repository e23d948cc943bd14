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
REST = ("symmetric", "encoding_analyzer", "block_size", "zero_point_shift")  # the last arguments of AIMET's quantizer


def tensor_recipe(
    bitwidth: int,
    symmetric: bool,
    axis: int | None = None,
    is_weight: bool = False,
    strict: bool = False,
    observer: str = "minmax",
    options: tuple = (),
) -> TensorRecipe:
    """AIMET's kind of grid. `is_weight`: int8, else uint8. `strict`: as many codes on both sides."""
    if not isinstance(bitwidth, int) or not 2 <= bitwidth <= MAX_BITS:
        raise Unsupported(f"bitwidth must be from 2 to {MAX_BITS}, got {bitwidth!r}; more than 8 are only simulated")
    spec = QSpec.weight(bitwidth) if is_weight else QSpec.activation(bitwidth)
    ends = ends_of(bitwidth, is_weight, strict)
    spec = QSpec(spec.dtype, *ends, symmetric, axis is not None, axis or 0, MIN_SCALE, symmetric and not strict)
    return TensorRecipe(spec, observer, options, rule="range")


def ends_of(bitwidth: int, signed: bool, strict: bool) -> tuple[int, int]:
    """The lowest and the highest code."""
    lowest = -(2 ** (bitwidth - 1)) if signed else 0
    return lowest + strict, lowest + 2**bitwidth - 1


class QuantizeDequantize(Quantizer):
    """Rounds to a grid whose ends `min` and `max` are trained.

    Args:
        shape: of the grids, against that of a tensor from the right; one dimension at most is not 1.
        args, how: `bitwidth` and `symmetric`, or `qmin`, `qmax` and `symmetric`, in this order or by name.
        axis: the dimension of `shape` with the channels, where its size may be 1.
        is_weight: int8 holds the codes, else uint8. What `get_offset` counts from are the codes from `qmin` to `qmax`.
    """

    def __init__(self, shape: Sequence[int], *args: Any, axis: int | None = None, is_weight: bool = False, **how: Any):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        names = ("qmin", "qmax") if len(args) > 1 and type(args[1]) is int else ("bitwidth",)
        how |= dict(zip((*names, *REST), args, strict=False))
        if "qmin" in how and "qmax" in how:
            qmin, qmax = how.pop("qmin"), how.pop("qmax")
            how |= {"bitwidth": (qmax - qmin).bit_length(), "signed": qmin < 0, "strict": qmin == -qmax}
            if (qmin, qmax) != ends_of(how["bitwidth"], how["signed"], how["strict"]):
                raise Unsupported(f"QuantizeDequantize: no bitwidth has the codes from {qmin} to {qmax}")
        for name in how.keys() - {"bitwidth", "symmetric", "signed", "strict", "observer", "options"}:
            if how.pop(name):
                raise Unsupported(f"QuantizeDequantize: {name} has no counterpart")
        wide = [i for i, n in enumerate(shape) if n != 1]
        if len(wide) > 1:
            raise Unsupported(f"QuantizeDequantize: one grid a tensor or a channel, got shape {shape}")
        axis = wide[0] if wide else axis
        signed = how.pop("signed", how.get("symmetric", False))
        kind = {"bitwidth": 8, "symmetric": False, "axis": axis, "is_weight": is_weight} | how
        channels = None if axis is None else shape[axis]
        super().__init__(tensor_recipe(**kind), "", channels, trained=True, is_weight=is_weight)
        self.shape, self.kind, self.signed = shape, kind, signed
        self.min, self.max = self.rule.low, self.rule.high
        for end in (self.min, self.max):  # a script may limit a tensor to them
            end.data = end.data.reshape(shape)
        self.state, self.may_change, self.floor = State.FAKE_QUANT, True, None

    @classmethod
    def from_grid(cls, grid: Grid, shape: Sequence[int], axis: int) -> "QuantizeDequantize":
        """With this grid, for a weight of `shape` with its channels at `axis`."""
        wide = len(grid.scale) == shape[axis]
        ones = tuple(n if i == axis else 1 for i, n in enumerate(shape)) if wide else ()
        made = cls(ones, axis=axis if wide else None, is_weight=True)
        made.take_grid(grid)
        return made

    def take_grid(self, grid: Grid) -> None:
        """Takes this grid, with as many scales, and its kind; the Parameters and the state stay."""
        self._become(bitwidth=grid.bits, symmetric=grid.symmetric, strict=grid.is_even)
        self.signed, spec = grid.symmetric, self.spec
        scale, offset = torch.tensor(grid.scale), torch.tensor(grid.offset)
        self.set_qparams(QParams(scale, spec.qmin - offset, self.axis, spec.qmin, spec.qmax, spec.dtype))

    @property
    def bitwidth(self) -> int:
        return self.kind["bitwidth"]

    @bitwidth.setter
    def bitwidth(self, bitwidth: int) -> None:
        self._become(bitwidth=bitwidth)

    @property
    def symmetric(self) -> bool:
        return self.kind["symmetric"]

    @symmetric.setter
    def symmetric(self, symmetric: bool) -> None:
        self._become(symmetric=symmetric)

    @property
    def qmin(self) -> int:
        return ends_of(self.bitwidth, self.signed, self.kind.get("strict", False))[0]

    @property
    def qmax(self) -> int:
        return ends_of(self.bitwidth, self.signed, False)[1]

    def _become(self, **changed: Any) -> None:
        """Another kind of grid between the same ends."""
        kind = self.kind | changed
        self.change_kind(tensor_recipe(**kind))
        self.kind = kind

    def take_symmetry(self, symmetric: bool, strict: bool) -> None:
        """As `QuantizeDequantize(symmetric=symmetric)` would have made it."""
        self._become(symmetric=symmetric, strict=symmetric and strict)
        self.signed = symmetric

    def limit(self, low: float, high: float | None) -> None:
        """Keeps the range from `low` to `high` through calibration and training; without `high`, only the low end."""
        self._become(observer="minmax")
        if high is None:
            self.floor = low
            self.min.requires_grad_(False)
            return
        self.symmetric = self.symmetric or low == -high
        self.set_range(low, high)
        self.freeze()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.axis is None or x.dim() <= len(self.shape):
            return super().forward(x, *args, **kwargs)
        there, here = x.dim() - len(self.shape) + self.axis, self.axis
        return super().forward(x.movedim(there, here), *args, **kwargs).movedim(here, there)

    def choose(self, x: Tensor | None = None) -> None:
        """Takes the grid of what was seen; training starts from the very ends that were seen."""
        super().choose(x)
        if not self.symmetric:
            low, high = self.observer.range()
            with torch.no_grad():
                low, high = low.reshape(self.shape), high.reshape(self.shape)
                self.min.copy_(low.clamp(max=0.0))
                self.max.copy_(torch.where(high > low, high.clamp(min=0.0), self.max))
        if self.floor is not None:
            self.set_range(self.floor, None)

    def choose_for(self, parameter: Tensor) -> None:
        """Takes the grid of a parameter. With a symmetric grid for each of its numbers it keeps them, as codes of 1."""
        if self.symmetric and self.axis is not None and parameter.numel() == self.shape[self.axis]:
            step = parameter.detach().abs().clamp(min=MIN_SCALE).double()
            self.take_ends((self.spec.qmin - self.spec.middle) * step, (self.spec.qmax - self.spec.middle) * step)
        else:
            self.watch(parameter)
            self.choose()

    def set_range(self, low: Any, high: Any) -> None:
        """Takes the range from `low` to `high`: numbers, or tensors of one for each grid. None leaves an end alone."""
        given, count = ((low, self.min), (high, self.max)), self.min.numel()
        ends = [(now.detach() if end is None else torch.as_tensor(end).detach()).reshape(-1) for end, now in given]
        if any(end.numel() not in (1, count) for end in ends) or not bool((ends[0] <= ends[1]).all()):
            raise InvalidArgument(f"set_range: needs low <= high, one or {count} of each, got {low!r} and {high!r}")
        self.take_ends(*(end.expand(count) for end in ends))

    @contextmanager
    def compute_encodings(self) -> Iterator[None]:
        """Inside, what passes is watched; at the end the range is that of all of it."""
        if not self.is_overwrite_allowed():
            yield
            return
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
        """The lowest number of the grid; `min` itself need not lie on it."""
        return self._number_of(self.spec.qmin)

    def get_max(self) -> Tensor:
        return self._number_of(self.spec.qmax)

    def _number_of(self, code: int) -> Tensor:
        grid = self.qparams()
        return ((code - grid.zero_point) * grid.scale).reshape(self.shape)

    def get_scale(self) -> Tensor:
        return self.qparams().scale.reshape(self.shape)

    def get_offset(self) -> Tensor:
        return (self.spec.qmin - self.qmin - self.qparams().zero_point).reshape(self.shape).float()

    def allow_overwrite(self, mode: bool) -> None:
        """Whether calibration and encodings files may change the grid; `freeze` says no."""
        self.may_change = mode  # not the state: a frozen one is not trained either

    def is_overwrite_allowed(self) -> bool:
        return self.may_change

    def freeze(self, requires_grad: bool = False) -> None:
        """Keeps the grid through compute_encodings; unless `requires_grad`, through training too."""
        self.allow_overwrite(False)
        self.requires_grad_(requires_grad)

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
    found = {q for q in model.modules() if isinstance(q, QuantizeDequantize) and q.is_overwrite_allowed()}
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
