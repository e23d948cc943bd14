"""Calls of functions as modules of torch's that hold the same Parameters: what is quantized is a module."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkernels.core.operations import BATCH_NORMS, CONVS, operation


def call_module(traced: fx.GraphModule, node: fx.Node, module: nn.Module, inputs: tuple[fx.Node, ...]) -> None:
    """`node` becomes a call of `module`, which lies beside it from now on."""
    name = free_name(traced, node.name)
    traced.add_module(name, module.eval())
    node.op, node.target, node.args, node.kwargs = "call_module", name, inputs, {}


def modules_from_calls(traced: fx.GraphModule, modules: Mapping[str, nn.Module]) -> None:
    """F.linear, F.conv* and F.batch_norm on parameters become modules that hold the same parameters."""
    makers: dict[str, Callable] = {"linear": _linear_of, "conv": _conv_of, "batch_norm": _batch_norm_of}
    for node in list(traced.graph.nodes):
        if node.op != "call_function":
            continue
        op = operation(node, modules)
        if op is None or op.kind not in makers:
            continue
        options = {k: _attribute(traced, v) for k, v in op.options.items()}
        if any(isinstance(v, fx.Node) for v in options.values()):
            continue  # a computed weight: stays a call, in float
        module = makers[op.kind](node, options)
        if module is None:
            continue
        call_module(traced, node, module, op.inputs)


def _attribute(traced: fx.GraphModule, value: Any) -> Any:
    if isinstance(value, fx.Node) and value.op == "get_attr":
        found: Any = traced
        for part in value.target.split("."):
            found = getattr(found, part)
        return found
    return value


def _holding(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        if tensor is None or isinstance(tensor, nn.Parameter):
            setattr(module, name, tensor)
        else:
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return module


def _linear_of(node: fx.Node, options: dict) -> nn.Module | None:
    weight, bias = options.get("weight"), options.get("bias")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _holding(module, weight=weight, bias=bias)


def _conv_of(node: fx.Node, options: dict) -> nn.Module | None:
    weight, bias, groups = options.pop("weight", None), options.pop("bias", None), options.get("groups", 1)
    if not isinstance(weight, Tensor):
        return None
    transposed = "transpose" in getattr(node.target, "__name__", "")
    cls = CONVS[weight.dim() - 3 + (3 if transposed else 0)]
    channels = (weight.shape[0], weight.shape[1] * groups)
    if not transposed:
        channels = channels[::-1]
    module = cls(*channels, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **options)
    return _holding(module, weight=weight, bias=bias)


def _batch_norm_of(node: fx.Node, options: dict) -> nn.Module | None:
    mean, var = options.get("running_mean"), options.get("running_var")
    rank = len(node.meta["value"].shape)
    if options.get("training", False) is not False or mean is None or var is None or not 2 <= rank <= 5:
        return None
    weight, bias = options.get("weight"), options.get("bias")
    module = BATCH_NORMS[max(rank - 3, 0)](mean.numel(), eps=options.get("eps", 1e-5), device=mean.device)
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    _holding(module, weight=one if weight is None else weight, bias=zero if bias is None else bias)
    module.running_mean, module.running_var = mean.detach(), var.detach()
    return module


def free_name(traced: nn.Module, wanted: str) -> str:
    name, number = wanted, 1
    while hasattr(traced, name):
        name, number = f"{wanted}_{number}", number + 1
    return name
