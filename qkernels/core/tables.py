"""256-entry tables: how every unary function runs on codes. Built in float64, rounded once."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.core.qspec import QParams
from qkernels.errors import InvalidArgument, Unsupported

# Unary functions by their torch name, with the options that they take.
UNARY: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "abs": (torch.abs, ()),
    "add_scalar": (torch.add, ("other",)),
    "binarize": (lambda x: torch.where(x >= 0, 1.0, -1.0).to(x), ()),
    "celu": (F.celu, ("alpha",)),
    "clamp": (torch.clamp, ("min", "max")),
    "elu": (F.elu, ("alpha",)),
    "exp": (torch.exp, ()),
    "gelu": (F.gelu, ("approximate",)),
    "hardshrink": (F.hardshrink, ("lambd",)),
    "hardsigmoid": (F.hardsigmoid, ()),
    "hardswish": (F.hardswish, ()),
    "hardtanh": (F.hardtanh, ("min_val", "max_val")),
    "leaky_relu": (F.leaky_relu, ("negative_slope",)),
    "logsigmoid": (F.logsigmoid, ()),
    "mish": (F.mish, ()),
    "mul_scalar": (torch.mul, ("other",)),
    "neg": (torch.neg, ()),
    "pow": (torch.pow, ("exponent",)),
    "relu": (F.relu, ()),
    "relu6": (F.relu6, ()),
    "requantize": (torch.Tensor.double, ()),
    "rsub_scalar": (torch.rsub, ("other",)),
    "rsqrt": (torch.rsqrt, ()),
    "selu": (F.selu, ()),
    "sigmoid": (torch.sigmoid, ()),
    "silu": (F.silu, ()),
    "softplus": (F.softplus, ("beta", "threshold")),
    "softshrink": (F.softshrink, ("lambd",)),
    "softsign": (F.softsign, ()),
    "sqrt": (torch.sqrt, ()),
    "square": (torch.square, ()),
    "tanh": (torch.tanh, ()),
    "tanhshrink": (F.tanhshrink, ()),
}


def codes_by_byte(dtype: torch.dtype) -> Tensor:
    """The code that each byte 0..255 stands for, as int64: table order."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).to(torch.int64)


def function_table(function: Callable[[Tensor], Tensor], input: QParams, output: QParams) -> Tensor:
    """`clamp(RNE(function((q - zi) * si) / so) + zo, qmin, qmax)` for each byte of q, all in float64 on the CPU.

    The table lies where `output` does.
    """
    (input_scale, input_zero_point), (scale, zero_point) = input.item(), output.item()
    x = (codes_by_byte(input.dtype) - input_zero_point).to(torch.float64) * input_scale
    y = function(x)
    if bool(torch.isnan(y).any()):
        raise Unsupported("table: the function is not defined everywhere on the input grid; leave it in float")
    codes = (torch.round(y / scale) + zero_point).clamp(output.qmin, output.qmax)
    return codes.to(output.scale.device, output.dtype)


def unary_table(name: str, options: Mapping[str, Any], input: QParams, output: QParams) -> Tensor:
    """The table of a function of `UNARY` by name; options that the function does not have are an error."""
    if name not in UNARY:
        raise InvalidArgument(f"unary_table: unknown function {name!r}; there are {sorted(UNARY)}")
    function, names = UNARY[name]
    if unknown := set(options) - set(names):
        raise InvalidArgument(f"unary_table: {name} takes {list(names)}, got {sorted(unknown)}")
    return function_table(lambda x: function(x, **options), input, output)


def requantize_table(input: QParams, output: QParams) -> Tensor:
    """The table that moves codes from one grid to another."""
    return unary_table("requantize", {}, input, output)
