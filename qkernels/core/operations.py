"""What torch calls an operation, and what we call it.

`_table` is the one place that knows under which names torch offers an operation: module classes, functions, methods.
Everything later speaks of kinds ("conv", "add", "relu", ...), the same kinds as `qkernels.core.lowering`.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Weighted kinds carry a quantized weight; clamps only narrow a range and fuse into what is before them; same-grid kinds
# select values, so that codes keep their meaning; PASS moves values by a torch function that also takes integers.
WEIGHTED = frozenset({"linear", "conv"})
CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
SAME_GRID = frozenset({"max_pool", "interpolate"})
AVERAGES = frozenset({"avg_pool", "adaptive_avg_pool", "mean"})
ARITHMETIC = frozenset({"add", "mul", "cat"}) | AVERAGES
PASS = "pass"
PAD = "pad"
# torch takes the names of numpy too, and its own dropouts another one than those of torch.nn.functional.
OTHER_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
OTHER_NAMES["train"] = "training"
DROPOUT = "dropout"  # gone before calibration; in training it is there, and on a grid it counts as PASS


DROPOUTS: dict[Any, type[nn.Module]] = {  # functions, and what they do as modules
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.dropout: nn.Dropout,
    torch.feature_dropout: nn.Dropout2d,
    torch.alpha_dropout: nn.AlphaDropout,
    torch.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


def output_channels(layer: nn.Module) -> int:
    """Of a layer of a weighted kind."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@dataclass(frozen=True)
class Value:
    """What a node gave on the example: "tensor", "sequence" (of tensors), "other" (sizes, numbers, None) or "mixed"."""

    kind: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, result: Any) -> "Value":
        if isinstance(result, Tensor):
            return cls("tensor", tuple(result.shape), result.dtype)
        if isinstance(result, (tuple, list)) and result and all(isinstance(r, Tensor) for r in result):
            return cls("sequence", (), result[0].dtype)
        return cls("other" if _is_plain(result) else "mixed")

    @property
    def is_float(self) -> bool:
        return self.dtype == torch.float32


def _is_plain(result: Any) -> bool:
    """Whether no numbers of a tensor can be in it."""
    if isinstance(result, (tuple, list)):
        return all(_is_plain(r) for r in result)
    return isinstance(result, (type(None), bool, int, float, str, slice, torch.dtype, torch.device))


@dataclass(frozen=True)
class Operation:
    """What a node computes: its kind, its tensor inputs, and its other arguments by their torch names."""

    kind: str
    inputs: tuple[fx.Node, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None

    @property
    def has_computed_options(self) -> bool:
        """Whether an option, or a number in one, is known only when the model runs."""
        found: list[fx.Node] = []
        fx.map_arg(dict(self.options), found.append)
        return bool(found)


def _table() -> tuple[dict[Any, tuple[str, str]], dict[str, tuple[str, str]], dict[type, str]]:
    """Functions and methods -> (kind, parameter names in order); module classes -> kind."""
    functions: dict[Any, tuple[str, str]] = {}
    methods: dict[str, tuple[str, str]] = {}
    modules: dict[type, str] = {}

    def row(kind: str, parameters: str, *targets: Any) -> None:
        for target in targets:
            if isinstance(target, str):
                methods[target] = (kind, parameters)
            elif isinstance(target, type):
                modules[target] = kind
            else:
                functions[target] = (kind, parameters)

    conv = "input weight bias stride padding dilation groups"
    conv_transpose = "input weight bias stride padding output_padding groups dilation"
    row("linear", "input weight bias", nn.Linear, F.linear)
    row("conv", conv, nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d)
    row("conv", conv_transpose, *CONVS[3:], F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    row("batch_norm", "input running_mean running_var weight bias training momentum eps", *BATCH_NORMS, F.batch_norm)
    row("add", "input other alpha", operator.add, operator.iadd, torch.add, "add", "add_")
    row("sub", "input other alpha", operator.sub, operator.isub, torch.sub, "sub", "sub_")
    row("mul", "input other", operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
    row("div", "input other rounding_mode", operator.truediv, operator.itruediv, torch.div, "div", "div_")
    row("cat", "tensors dim", torch.cat, torch.concat, torch.concatenate)

    pool = "input kernel_size stride padding dilation ceil_mode return_indices"
    row("max_pool", pool, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d)
    row("max_pool", pool, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)
    pool = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
    row("avg_pool", pool, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
    row("adaptive_avg_pool", "input output_size", nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    row("adaptive_avg_pool", "input output_size", F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    row("mean", "input dim keepdim dtype", torch.mean, "mean")
    interpolate = "input size scale_factor mode align_corners recompute_scale_factor antialias"
    row("interpolate", interpolate, nn.Upsample, nn.UpsamplingNearest2d, F.interpolate)

    row("relu", "input inplace", nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_")
    row("relu6", "input inplace", nn.ReLU6, F.relu6)
    row("hardtanh", "input min_val max_val inplace", nn.Hardtanh, F.hardtanh)
    row("clamp", "input min max", torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_")
    row("hardswish", "input inplace", nn.Hardswish, F.hardswish)
    row("hardsigmoid", "input inplace", nn.Hardsigmoid, F.hardsigmoid)
    row("sigmoid", "input", nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_")
    row("tanh", "input", nn.Tanh, torch.tanh, F.tanh, "tanh", "tanh_")
    row("silu", "input inplace", nn.SiLU, F.silu)
    row("gelu", "input approximate", nn.GELU, F.gelu)
    row("elu", "input alpha inplace", nn.ELU, F.elu)
    row("leaky_relu", "input negative_slope inplace", nn.LeakyReLU, F.leaky_relu)
    row("selu", "input inplace", nn.SELU, F.selu)
    row("celu", "input alpha inplace", nn.CELU, F.celu)
    row("softplus", "input beta threshold", nn.Softplus, F.softplus)
    row("mish", "input inplace", nn.Mish, F.mish)
    row("logsigmoid", "input", nn.LogSigmoid, F.logsigmoid)
    row("softsign", "input", nn.Softsign, F.softsign)
    row("tanhshrink", "input", nn.Tanhshrink, F.tanhshrink)
    row("hardshrink", "input lambd", nn.Hardshrink, F.hardshrink)
    row("softshrink", "input lambd", nn.Softshrink, F.softshrink)
    for name in ("exp", "sqrt", "rsqrt", "abs", "neg", "square"):
        row(name, "input", getattr(torch, name), name)
    row("neg", "input", operator.neg)
    row("abs", "input", operator.abs)
    row("pow", "input exponent", operator.pow, torch.pow, "pow")

    row(PASS, "input", nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
    row(PASS, "input", torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze)
    row(PASS, "input", torch.chunk, torch.split, torch.unbind, torch.movedim, torch.narrow, torch.unflatten, torch.tile)
    row(PASS, "input", operator.getitem, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, torch.flip, torch.roll)
    row(PASS, "input", "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split")
    row(PASS, "input", "unbind", "movedim", "narrow", "unflatten", "expand", "repeat", "contiguous", "t", "select")
    row(PASS, "input", "flip", "roll", "detach", "clone", "view_as", "reshape_as", "expand_as")
    row("identity", "input", nn.Identity)
    row(DROPOUT, "input p training inplace", *DROPOUTS)
    row(DROPOUT, "input", *DROPOUTS.values())
    row(PAD, "input pad mode value", F.pad, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
    return functions, methods, modules


FUNCTIONS, METHODS, MODULES = _table()


def operation(node: fx.Node, modules: Mapping[str, nn.Module]) -> Operation | None:
    """What `node` computes if it is in the table; None if not."""
    if node.op == "call_module":
        module = modules[node.target]
        kind = MODULES.get(
            getattr(type(module), "float_class", type(module))
        )  # a prepared layer counts as its float class
        inputs = tuple(a for a in node.args if isinstance(a, fx.Node))
        if kind is None or node.kwargs or len(inputs) != 1 or len(node.args) != 1:
            return None
        return Operation(kind, inputs, {}, module)
    if node.op == "call_function":
        found = FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        found = METHODS.get(node.target)
    else:
        found = None
    return None if found is None else _call(node, *found)


def torch_names(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments by torch's own names."""
    return {OTHER_NAMES.get(name, name): value for name, value in kwargs.items()}


def _call(node: fx.Node, kind: str, parameters: str) -> Operation | None:
    named = torch_names(node.kwargs)
    if kind == PASS:
        first = node.args[0] if node.args else named.get("input")
        is_pass = isinstance(first, fx.Node) and not any(map(is_dtype, (*node.args, *named.values())))
        return Operation(PASS, (first,)) if is_pass else None
    names = parameters.split()
    if len(node.args) > len(names) or not named.keys() <= set(names):
        return None
    bound = dict(zip(names, node.args, strict=False)) | named
    if kind == "cat":
        tensors = bound.pop("tensors", None)
        if not isinstance(tensors, (tuple, list)) or not all(isinstance(t, fx.Node) for t in tensors):
            return None
        return Operation(kind, tuple(tensors), bound)
    if kind in ("add", "sub", "mul", "div"):
        return _arithmetic(node, kind, bound)
    exponent = bound.get("exponent")
    if kind == "pow" and not (isinstance(exponent, int) and exponent > 0):
        return None  # not defined everywhere
    first = bound.pop("input", None)
    bound.pop("inplace", None)
    return Operation(kind, (first,), bound) if isinstance(first, fx.Node) else None


def is_dtype(value: Any) -> bool:
    """Whether the argument is a dtype, or reads that of a tensor: codes seen as another dtype are other numbers."""
    if isinstance(value, fx.Node):
        return value.target is getattr and value.args[1] == "dtype"
    return isinstance(value, torch.dtype)


def reads_shape_only(node: fx.Node) -> bool:
    """Whether the node reads of a tensor what its codes have too: sizes and where it lies."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel", "nelement", "get_device")
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "is_cuda", "is_cpu")
    return node.op == "call_function" and node.target in (len, torch.numel)


def reads_memory(node: fx.Node) -> bool:
    """Whether the result depends on where the elements of a tensor lie in memory."""
    return node.target in ("stride", "is_contiguous", "storage_offset", "as_strided", torch.as_strided)


def is_contiguous_call(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "contiguous"


def _arithmetic(node: fx.Node, kind: str, bound: dict) -> Operation | None:
    """add and mul of two tensors; with a number as one operand (and sub, div by a number) a unary function."""
    a, b = bound.get("input"), bound.get("other")
    if bound.get("alpha", 1) != 1 or bound.get("rounding_mode") is not None:
        return None
    nodes = tuple(v for v in (a, b) if isinstance(v, fx.Node))
    tensors = tuple(n for n in nodes if n.meta["value"].kind == "tensor")
    if len(tensors) == 2:
        return Operation(kind, tensors)
    numbers = [v for v in (a, b) if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(tensors) != 1 or len(numbers) != 1:
        return None
    number, tensor_first = float(numbers[0]), a is tensors[0]
    if kind == "add" or (kind == "sub" and tensor_first):
        return Operation("add_scalar", tensors, {"other": number if kind == "add" else -number})
    if kind == "sub":
        return Operation("rsub_scalar", tensors, {"other": number})
    if kind == "mul" or (kind == "div" and tensor_first and number != 0.0):
        return Operation("mul_scalar", tensors, {"other": number if kind == "mul" else 1.0 / number})
    return None
