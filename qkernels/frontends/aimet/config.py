"""The quantsim configuration: a JSON file or dict that says what is quantized by default and by ONNX operation."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from qkernels.core import functional as functions
from qkernels.core import operations as o
from qkernels.errors import InvalidArgument, Unsupported, close_matches
from qkernels.frontends.common import check_keys, check_words, from_json

DEFAULT: dict[str, Any] = {
    "defaults": {
        "ops": {"is_output_quantized": True},
        "params": {"is_quantized": True, "is_symmetric": True},
        "strict_symmetric": False,
        "per_channel_quantization": True,
    },
    "params": {"bias": {"is_quantized": False}},
    "op_type": {},
    "supergroups": [
        {"op_list": ["Conv", "Relu"]},
        {"op_list": ["ConvTranspose", "Relu"]},
        {"op_list": ["Conv", "Clip"]},
        {"op_list": ["Add", "Relu"]},
        {"op_list": ["Gemm", "Relu"]},
    ],
    "model_input": {"is_input_quantized": True},
    "model_output": {},
}
FLAGS = ("is_quantized", "is_symmetric")
OP_FLAGS = ("is_output_quantized", "is_input_quantized", "is_symmetric")
LIMITS = "encoding_constraints"
OP_KEYS = (*OP_FLAGS, "params", "per_channel_quantization", "supported_kernels", LIMITS)
PARAMS = ("weight", "bias", "running_mean", "running_var")
PADS = tuple(getattr(nn, f"{mode}Pad{d}d") for mode in ("Constant", "Reflection", "Replication") for d in (1, 2, 3))
# What AIMET has modules for and this package has none.
OTHERS = "Cast ChannelShuffle Cos Expand GRU GatherND LSTM MaxRoiPool MaxUnpool Mean NonMaxSuppression NonZero RNN"
OTHERS += " RMSNormalization ReduceMax ReduceMin Reshape RoiAlign ScatterElements ScatterND Sin Slice Split Tile TopK"
OP_TYPES: dict[str, tuple[type, ...]] = {
    "Conv": o.CONVS[:3],
    "ConvTranspose": o.CONVS[3:],
    "Gemm": (nn.Linear,),
    "MatMul": (functions.MatMul,),
    "Relu": (nn.ReLU,),
    "Clip": (nn.ReLU6,),
    "Add": (functions.Add,),
    "Sub": (functions.Subtract,),
    "Mul": (functions.Multiply,),
    "Div": (functions.Divide,),
    "Concat": (functions.Concat,),
    "ReduceMean": (functions.Mean,),
    "Where": (functions.Where,),
    "Sigmoid": (nn.Sigmoid,),
    "Tanh": (nn.Tanh,),
    "Softmax": (nn.Softmax,),
    "HardSwish": (nn.Hardswish,),
    "HardSigmoid": (nn.Hardsigmoid,),
    "Gelu": (nn.GELU,),
    "Elu": (nn.ELU,),
    "LeakyRelu": (nn.LeakyReLU,),
    "PRelu": (nn.PReLU,),
    "BatchNormalization": o.BATCH_NORMS,
    "LayerNormalization": (nn.LayerNorm,),
    "InstanceNormalization": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    "MaxPool": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "AveragePool": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "GlobalAveragePool": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    "Resize": (nn.Upsample,),
    "Pad": (*PADS, functions.Pad),
    "DepthToSpace": (nn.PixelShuffle,),
    "SpaceToDepth": (nn.PixelUnshuffle,),
    "GroupNormalization": (nn.GroupNorm,),
    "Softplus": (nn.Softplus,),
    "LogSoftmax": (nn.LogSoftmax,),
    "Gather": (nn.Embedding,),
    "Flatten": (nn.Flatten,),
    "Dropout": (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    **dict.fromkeys((*OTHERS.split(), "Transpose"), ()),
}


def op_type(module: nn.Module) -> str:
    """The ONNX operation of a module; its class name if it has none."""
    return next((name for name, classes in OP_TYPES.items() if isinstance(module, classes)), type(module).__name__)


@dataclass(frozen=True)
class Tensors:
    """What one kind of operation does with its tensors."""

    is_output_quantized: bool = False
    is_input_quantized: bool = False
    is_symmetric: bool = False
    params_quantized: bool = False
    params_symmetric: bool = False
    per_channel: bool = False
    bias_quantized: bool = False
    bias_symmetric: bool = False
    says_symmetric: bool = False  # for the type, which then holds for the producers of its inputs too
    limits: tuple[float, float | None] | None = None  # the ends that the output's range keeps


@dataclass(frozen=True)
class Config:
    """A configuration, read."""

    defaults: Tensors
    by_type: Mapping[str, Tensors] = field(default_factory=dict)
    strict_symmetric: bool = False
    supergroups: tuple[tuple[str, ...], ...] = ()
    input_quantized: bool = False
    output_quantized: bool | None = None

    def of(self, module: nn.Module) -> Tensors:
        return self.by_type.get(op_type(module), self.defaults)


def read_config(source: "str | Path | Mapping[str, Any] | None") -> Config:
    """The configuration of a file, a dict, "default" or None.

    Raises:
        InvalidArgument: a key is unknown or a value is not what it should be; the message says at which path.
        OSError: the file cannot be read, of the kind that the system says.
    """
    if source is None or source == "default":
        return _parse(DEFAULT)
    if not isinstance(source, (Mapping, str, Path)):
        raise InvalidArgument(f'config_file must be "default", a JSON file or a dict, got {source!r}')
    return _parse(from_json(source))


def _parse(config: Mapping[str, Any]) -> Config:
    check_keys(config, (*DEFAULT, "supergroup_pass_list"), "config")
    defaults = config.get("defaults", {})
    check_keys(
        defaults, (*DEFAULT["defaults"], "unsigned_symmetric", "supported_kernels", "hw_version"), "config.defaults"
    )
    check_keys(defaults.get("ops", {}), OP_FLAGS, "config.defaults.ops")
    base = _tensors(Tensors(), defaults, "config.defaults", ".ops")
    if _bool(defaults, "unsigned_symmetric", False, "config.defaults") and base.is_symmetric:
        raise Unsupported("config.defaults.unsigned_symmetric: AIMET has no such grids since 2.0; leave it out")
    base = replace(base, bias_quantized=base.params_quantized, bias_symmetric=base.params_symmetric)
    base = _named_params(base, config.get("params", {}), "config.params")
    by_type = {}
    check_keys(config.get("op_type", {}), OP_TYPES, "config.op_type")
    for name, values in config.get("op_type", {}).items():
        where = f"config.op_type.{name}"
        check_keys(values, OP_KEYS, where)
        said = {"says_symmetric": "is_symmetric" in values, "limits": _limits(name, values.get(LIMITS), where)}
        by_type[name] = replace(_tensors(base, {**values, "ops": values}, where), **said)
    groups = []
    for i, group in enumerate(config.get("supergroups", ())):
        check_keys(group, ["op_list"], f"config.supergroups[{i}]")
        check_words(group.get("op_list"), f"config.supergroups[{i}].op_list")
        for name in group["op_list"]:
            if name not in OP_TYPES:
                where = f"config.supergroups[{i}].op_list"
                raise InvalidArgument(f"{where}: unknown operation {name!r}{close_matches(name, OP_TYPES)}")
        groups.append(tuple(group["op_list"]))
    inputs, outputs = config.get("model_input", {}), config.get("model_output", {})
    check_keys(inputs, ["is_input_quantized"], "config.model_input")
    check_keys(outputs, ["is_output_quantized"], "config.model_output")
    output = _bool(outputs, "is_output_quantized", False, "config.model_output") if outputs else None
    return Config(
        base,
        by_type,
        _bool(defaults, "strict_symmetric", False, "config.defaults"),
        tuple(groups),
        _bool(inputs, "is_input_quantized", False, "config.model_input"),
        output,
    )


def _tensors(base: Tensors, values: Mapping[str, Any], where: str, ops_at: str = "") -> Tensors:
    ops, params = values.get("ops", {}), values.get("params", {})
    check_keys(params, (*FLAGS, *PARAMS), f"{where}.params")
    base = _named_params(base, {k: v for k, v in params.items() if k not in FLAGS}, f"{where}.params")
    params = {k: v for k, v in params.items() if k in FLAGS}
    per_channel = _bool(values, "per_channel_quantization", base.per_channel, where)
    return replace(
        base,
        **{flag: _bool(ops, flag, getattr(base, flag), where + ops_at) for flag in OP_FLAGS},
        params_quantized=_bool(params, "is_quantized", base.params_quantized, f"{where}.params"),
        params_symmetric=_bool(params, "is_symmetric", base.params_symmetric, f"{where}.params"),
        per_channel=per_channel,
    )


def _limits(name: str, values: Any, where: str) -> tuple[float, float | None] | None:
    if values is None:
        return None
    where = f"{where}.{LIMITS}"
    check_keys(values, ("min", "max"), where)
    ends = values.get("min"), values.get("max")
    if all(isinstance(end, (int, float)) for end in ends) and ends[0] < ends[1]:
        return ends
    if name == "Relu" and ends == (0, None):
        return ends
    raise Unsupported(f"{where}: needs numbers min < max, or for Relu min 0 alone, got {dict(values)!r}")


def _named_params(base: Tensors, params: Mapping[str, Any], where: str) -> Tensors:
    """`base` with what is said for parameters by their names."""
    check_keys(params, PARAMS, where)
    for name, values in params.items():
        here = f"{where}.{name}"
        check_keys(values, FLAGS, here)
        prefix = {"weight": "params", "bias": "bias"}.get(name, "params")
        said = {
            f"{prefix}_{flag[3:]}": _bool(values, flag, getattr(base, f"{prefix}_{flag[3:]}"), here) for flag in FLAGS
        }
        if name in ("weight", "bias"):  # statistics are never rounded
            base = replace(base, **said)
    return base


def _bool(values: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = values.get(key, default)
    if value in ("True", "False", True, False):
        return value in ("True", True)
    raise InvalidArgument(f'{where}.{key}: must be "True" or "False", got {value!r}')
