"""Integer grids: `QSpec` says what kind of grid is wanted, `QParams` is one grid, `choose_qparams` goes between them.

Meaning of a grid: `x = (q - zero_point) * scale` for `qmin <= q <= qmax`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels import ops
from qkernels.core.blocks import from_rows, to_rows
from qkernels.errors import InvalidArgument, InvalidType, QKernelsError, Unsupported, boolean, integer

# More than 8 bits are int32, as far as float32 gives the very codes. They are simulated, without integer layers.
INTEGER_RANGE = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int32: (-(2**21), 2**21)}
DTYPE_NAMES = {torch.uint8: "uint8", torch.int8: "int8", torch.int32: "int32"}
MAX_BITS = 21
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# The product and the quotient of two scales must stay normal float32 numbers, and a bias divided by such a
# product finite: that holds for scales in [2**-50, 2**50].
MIN_SCALE, MAX_SCALE = 2.0**-50, 2.0**50


@dataclass(frozen=True)
class QSpec:
    """A wanted kind of grid.

    Attributes:
        dtype: torch.uint8 or torch.int8, the dtype that holds the codes; torch.int32 for grids of more than 256 codes.
        qmin, qmax: the codes in use; a narrower range than the dtype's is allowed (4 bit: qmax - qmin = 15).
        symmetric: the zero point is the middle of the range instead of wherever the data wants it.
        per_channel: one grid for each index of `axis` instead of one for the tensor.
        axis: the channel dimension, used if `per_channel`.
        min_scale: no grid is finer than this.
        uneven: a symmetric range with one more code below zero than above uses it: each end is divided by its own
            number of codes, where otherwise both are divided by (qmax - qmin) / 2.
        block: with `per_channel`, one grid for each block of this size (see `qkernels.core.blocks`) instead.
    """

    dtype: torch.dtype = torch.uint8
    qmin: int = 0
    qmax: int = 255
    symmetric: bool = False
    per_channel: bool = False
    axis: int = 0
    min_scale: float = MIN_SCALE
    uneven: bool = False
    block: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.dtype not in INTEGER_RANGE:
            raise InvalidArgument(
                f"QSpec: dtype must be torch.uint8 or torch.int8 (torch.int32 for more than 8 bits), got {self.dtype}"
            )
        for name in ("qmin", "qmax", "axis"):
            object.__setattr__(self, name, integer(f"QSpec: {name}", getattr(self, name)))
        for name in ("symmetric", "per_channel", "uneven"):
            boolean(f"QSpec: {name}", getattr(self, name))
        object.__setattr__(self, "block", _block("QSpec", self.block))
        if self.block is not None:
            sizes = self.block[:-1] if self.block[-1:] == (0,) else self.block
            if not self.per_channel or self.axis or not all(n == -1 or n > 0 for n in sizes):
                raise InvalidArgument(
                    "QSpec: a block needs per_channel=True, axis=0 and sizes that are positive or -1 (0 at the end), "
                    f"got {self.block}"
                )
        low, high = INTEGER_RANGE[self.dtype]
        if not low <= self.qmin < self.qmax <= high:
            raise InvalidArgument(
                f"QSpec: need {low} <= qmin < qmax <= {high} for {self.dtype}, got qmin={self.qmin}, qmax={self.qmax}"
            )
        if not isinstance(self.min_scale, (int, float)) or not MIN_SCALE <= self.min_scale <= MAX_SCALE:
            raise InvalidArgument(f"QSpec: min_scale must be in [2**-50, 2**50], got {self.min_scale!r}")

    @property
    def simulated(self) -> str:
        """Why no integer layer computes on such a grid; empty if one does."""
        if self.block is not None:
            return f"there is no integer layer for a grid for each block of {list(self.block)}"
        if self.dtype is torch.int32:
            return f"there is no integer layer for grids of {self.qmax - self.qmin + 1} codes, only for 8 bits"
        return ""

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return (self.qmin + self.qmax + 1) // 2

    @classmethod
    def activation(cls, bits: int = 8, dtype: torch.dtype = torch.uint8, symmetric: bool = False) -> "QSpec":
        """One affine grid for the whole tensor; 8 bit uint8 unless told otherwise. More than 8 bits are int32."""
        qmin, qmax = _bit_range(bits, dtype)
        return cls(_holding(bits, dtype), qmin, qmax, symmetric)

    @classmethod
    def weight(cls, bits: int = 8, per_channel: bool = True) -> "QSpec":
        """Symmetric int8 in [-127, 127] (narrow, so that w and -w have the same code), one grid a channel."""
        _, qmax = _bit_range(bits, torch.int8)
        return cls(_holding(bits, torch.int8), -qmax, qmax, symmetric=True, per_channel=per_channel)

    @classmethod
    def even(cls, bits: int = 8, signed: bool = True, is_weight: bool = False, **kind: Any) -> "QSpec":
        """Signed codes from 1 - 2**(bits - 1), as many on both sides of zero; or unsigned ones.

        Unsigned weights get the same grid with its codes moved down by `2**(bits - 1)`: kernels take int8.
        """
        centred = signed or is_weight
        half = 2 ** (_checked_bits(bits, least=2 if centred else 1) - 1)
        if centred:
            return cls(_holding(bits, torch.int8), 1 - half if signed else -half, half - 1, **kind)
        return cls(_holding(bits, torch.uint8), 0, 2 * half - 1, **kind)

    def to_config(self) -> dict:
        config = asdict(self) | {"dtype": DTYPE_NAMES[self.dtype]}
        return config if self.block is None else config | {"block": list(self.block)}

    @classmethod
    def from_config(cls, config: dict) -> "QSpec":
        with _reading("QSpec"):
            return cls(**config | {"dtype": dtype_named(config["dtype"])})


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Around a `from_config`, whose argument may be anything."""
    try:
        yield
    except QKernelsError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InvalidType(f"{name}.from_config: config must be what to_config gives ({error!r})") from error


def _block(name: str, block: Any) -> tuple[int, ...] | None:
    if block is not None and not isinstance(block, Iterable):
        raise InvalidType(f"{name}: block must be None or a tuple of sizes, got {block!r}")
    return None if block is None else tuple(integer(f"{name}: a size in block", size) for size in block)


def _checked_bits(bits: int, least: int = 2) -> int:
    if not isinstance(bits, int) or isinstance(bits, bool) or not least <= bits <= MAX_BITS:
        raise InvalidArgument(f"QSpec: bits must be an integer from {least} to {MAX_BITS}, got {bits!r}")
    return bits


def _bit_range(bits: int, dtype: torch.dtype) -> tuple[int, int]:
    _checked_bits(bits)
    if dtype == torch.uint8:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _holding(bits: int, dtype: torch.dtype) -> torch.dtype:
    return dtype if bits <= 8 else torch.int32


def dtype_named(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InvalidArgument(f"dtype must be one of {sorted(DTYPES)}, got {name!r}")
    return DTYPES[name]


@dataclass(frozen=True, eq=False)
class QParams:
    """One grid: a value. `scale` float32 and `zero_point` int32 have one element, or one a channel of `axis`.

    >>> grid = QParams.per_tensor(0.5, 128)
    >>> grid.quantize(torch.tensor([-1.0, 0.25, 1.0]))
    tensor([126, 128, 130], dtype=torch.uint8)
    """

    scale: Tensor
    zero_point: Tensor
    axis: int | None = None
    qmin: int = 0
    qmax: int = 255
    dtype: torch.dtype = torch.uint8
    block: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("scale", "zero_point"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                got = type(value).__name__
                raise InvalidType(f"QParams: {name} must be a tensor (QParams.per_tensor takes numbers), got {got}")
        object.__setattr__(self, "block", _block("QParams", self.block))
        if self.axis is not None:
            object.__setattr__(self, "axis", integer("QParams: axis", self.axis))
        scale = self.scale.detach().to(torch.float32).reshape(-1)
        given = self.zero_point.detach().reshape(-1)
        zero_point = given.to(torch.int32)
        if given.dtype is not torch.int32 and not torch.equal(given.to(torch.float64), zero_point.to(torch.float64)):
            raise InvalidArgument(f"QParams: zero_point must be integers, got {given.tolist()}")
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)
        spec = QSpec(self.dtype, self.qmin, self.qmax)  # checks the range
        object.__setattr__(self, "qmin", spec.qmin)
        object.__setattr__(self, "qmax", spec.qmax)
        if scale.numel() != zero_point.numel() or not scale.numel() or (self.axis is None and scale.numel() != 1):
            raise InvalidArgument(
                f"QParams: scale and zero_point must have the same number of elements, one at least (and 1 if axis is "
                f"None), got {scale.numel()} and {zero_point.numel()} with axis={self.axis}"
            )
        tiny = torch.finfo(torch.float32).tiny
        if not bool(((scale >= tiny) & torch.isfinite(scale)).all()):
            raise InvalidArgument(f"QParams: scale must be positive, finite and normal, got {scale.tolist()}")
        if not bool(((zero_point >= self.qmin) & (zero_point <= self.qmax)).all()):
            raise InvalidArgument(
                f"QParams: zero_point must be in [{self.qmin}, {self.qmax}], got {zero_point.tolist()}"
            )

    @classmethod
    def per_tensor(
        cls, scale: float, zero_point: int, qmin: int = 0, qmax: int = 255, dtype: torch.dtype = torch.uint8
    ) -> "QParams":
        zero_point = integer("QParams.per_tensor: zero_point", zero_point)
        try:
            scale = float(scale)
        except (TypeError, ValueError):
            raise InvalidType(f"QParams.per_tensor: scale must be a number, got {scale!r}") from None
        # float64 holds every code, and leaves it to the check to find what is none
        numbers = (torch.tensor([n], dtype=torch.float64, device="cpu") for n in (scale, zero_point))
        return cls(*numbers, None, qmin, qmax, dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """`clamp(RNE(x / scale) + zero_point, qmin, qmax)` as codes of `dtype`."""
        self._check_integers("quantize", x, "x")
        return ops.quantize(x, self.scale, self.zero_point, self.axis, self.qmin, self.qmax, self.dtype)

    def dequantize(self, q: Tensor) -> Tensor:
        """`(q - zero_point) * scale` in float32."""
        self._check_integers("dequantize", q, "q")
        return ops.dequantize(q, self.scale, self.zero_point, self.axis, torch.float32)

    def _check_integers(self, verb: str, tensor: Any, name: str) -> None:
        if not isinstance(tensor, Tensor):
            raise InvalidType(f"QParams.{verb}: {name} must be a tensor, got {type(tensor).__name__}")
        if self.block is not None or self.dtype is torch.int32:
            raise Unsupported(f"QParams.{verb}: {self.qmax - self.qmin + 1} codes, block {self.block}: only simulated")

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The floating-point numbers that the codes stand for, in one pass."""
        rows = x if self.block is None else to_rows(x, self.block)
        y = ops.fake_quant(rows, self.scale, self.zero_point, self.axis, self.qmin, self.qmax)
        return y if self.block is None else from_rows(y, x.shape, self.block)

    def item(self) -> tuple[float, int]:
        """(scale, zero_point) of a per-tensor grid as numbers."""
        if self.axis is not None:
            raise InvalidArgument("QParams.item: a per-channel grid has no single scale")
        return float(self.scale), int(self.zero_point)

    def narrowed(self, qmin: int, qmax: int) -> "QParams":
        """The same grid with fewer codes, as a fused clamp leaves it; the zero point must stay inside."""
        return QParams(self.scale, self.zero_point, self.axis, qmin, qmax, self.dtype, self.block)

    def __eq__(self, other) -> bool:
        return isinstance(other, QParams) and self.to_config() == other.to_config()

    def __hash__(self) -> int:
        return hash(
            (self.axis, self.block, self.qmin, self.qmax, self.dtype, *self.scale.tolist(), *self.zero_point.tolist())
        )

    def to_config(self) -> dict:
        """A json-able form that keeps every bit (a float32 is exact as a Python float)."""
        return {
            "scale": self.scale.tolist(),
            "zero_point": self.zero_point.tolist(),
            "axis": self.axis,
            "qmin": self.qmin,
            "qmax": self.qmax,
            "dtype": DTYPE_NAMES[self.dtype],
            **({} if self.block is None else {"block": list(self.block)}),
        }

    @classmethod
    def from_config(cls, config: dict) -> "QParams":
        with _reading("QParams"):
            return cls(
                torch.tensor(config["scale"], dtype=torch.float32, device="cpu"),
                torch.tensor(config["zero_point"], dtype=torch.float64, device="cpu"),  # no fraction is cut off
                config["axis"],
                config["qmin"],
                config["qmax"],
                dtype_named(config["dtype"]),
                config.get("block"),
            )


def choose_qparams(spec: QSpec, low: Tensor, high: Tensor) -> QParams:
    """The grid of kind `spec` that covers [low, high] and has zero on it exactly.

    affine:    scale = (high - low) / (qmax - qmin), zero_point = qmin - RNE(low / scale)
    symmetric: scale = max(-low, high) / ((qmax - qmin) / 2), zero_point = the middle; see `QSpec.uneven`
    all in float32, [low, high] first widened to contain zero. An empty range (all zero) gets scale 1.
    """
    low, high = low.detach().to(torch.float32).reshape(-1), high.detach().to(torch.float32).reshape(-1)
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
        raise InvalidArgument(f"choose_qparams: need finite low <= high, got {low.tolist()} and {high.tolist()}")
    axis = spec.axis if spec.per_channel else None
    return QParams(*grid_values(spec, low, high), axis, spec.qmin, spec.qmax, spec.dtype, spec.block)


def grid_values(spec: QSpec, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """`choose_qparams` as tensors, unchecked: (scale float32, zero_point int32). For training, where nothing waits."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    steps = spec.qmax - spec.qmin
    if spec.symmetric and spec.uneven:
        scale = torch.maximum(-low / (spec.middle - spec.qmin), high / (spec.qmax - spec.middle))
    else:
        scale = torch.maximum(-low, high) / (steps / 2) if spec.symmetric else (high - low) / float(steps)
    scale = torch.where(scale > 0, scale.clamp(spec.min_scale, MAX_SCALE), torch.ones_like(scale))
    if spec.symmetric:
        return scale, torch.full_like(scale, spec.middle, dtype=torch.int32)
    return scale, (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax).to(torch.int32)
