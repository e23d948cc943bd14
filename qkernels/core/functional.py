"""Calls of functions as modules of their own, so that something can be put around each of them.

`calls_to_modules` changes a traced graph: a call of `torch.add` becomes a call of a module `Add`, `F.relu` one of
`nn.ReLU`, and a module that is called several times becomes one module a call, whose parameters are copies: each is
folded and rounded on its own. The new modules stand in the module that calls them, with AIMET's names.
"""

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qkernels.core import operations as o
from qkernels.core.in_place import read_written, seen_later


class Functional(nn.Module):
    """A function as a module; the subclasses say which."""

    traced_as_leaf = True
    function: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self).function(*args, **kwargs)


def _functional(name: str, function: Any) -> type[Functional]:
    return type(name, (Functional,), {"function": staticmethod(function), "__module__": __name__})


def _concat(*tensors: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return torch.cat(tensors, dim)


def _arithmetic(operation: Any, function: Any) -> Any:
    """Of tensors or of sizes; options are torch's."""
    return lambda a, b, **options: function(a, b, **options) if options else operation(a, b)


Add = _functional("Add", _arithmetic(operator.add, torch.add))
Subtract = _functional("Subtract", _arithmetic(operator.sub, torch.sub))
Multiply = _functional("Multiply", _arithmetic(operator.mul, torch.mul))
Divide = _functional("Divide", _arithmetic(operator.truediv, torch.div))
FloorDivide = _functional("FloorDivide", operator.floordiv)
Pow = _functional("Pow", operator.pow)
MatMul, Concat = _functional("MatMul", torch.matmul), _functional("Concat", _concat)
Mean, Sum = _functional("Mean", torch.mean), _functional("Sum", torch.sum)
Exponential, Square = _functional("Exponential", torch.exp), _functional("Square", torch.square)
RSqrt, Where = _functional("RSqrt", torch.rsqrt), _functional("Where", torch.where)
Norm, CumSum = _functional("Norm", torch.norm), _functional("CumSum", torch.cumsum)
MaskedFill, Pad = _functional("MaskedFill", torch.masked_fill), _functional("Pad", F.pad)
Interpolate, GridSample = _functional("Interpolate", F.interpolate), _functional("GridSample", F.grid_sample)


class SplitSiLU(nn.Module):
    """x * sigmoid(x), whose two operations have quantizers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid, self.mul = nn.Sigmoid(), Multiply()

    def forward(self, x: torch.Tensor) -> Any:
        return self.mul(x, self.sigmoid(x))


FUNCTIONALS: dict[Any, type[Functional]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), Add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), Subtract),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), Multiply),
    **dict.fromkeys((operator.truediv, torch.div, "div"), Divide),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"), MatMul),
    **dict.fromkeys((operator.floordiv, torch.floor_divide, "floor_divide"), FloorDivide),
    **dict.fromkeys((operator.pow, torch.pow, "pow"), Pow),
    **dict.fromkeys((torch.mean, "mean"), Mean),
    **dict.fromkeys((torch.sum, "sum"), Sum),
    **dict.fromkeys((torch.exp, "exp"), Exponential),
    **dict.fromkeys((torch.square, "square"), Square),
    **dict.fromkeys((torch.rsqrt, "rsqrt"), RSqrt),
    **dict.fromkeys((torch.norm, "norm"), Norm),
    **dict.fromkeys((torch.cumsum, "cumsum"), CumSum),
    **dict.fromkeys((torch.masked_fill, "masked_fill"), MaskedFill),
    **dict.fromkeys((torch.cat, torch.concat), Concat),
    **{torch.where: Where, F.pad: Pad, torch._C._nn.pad: Pad},
    **{F.interpolate: Interpolate, F.grid_sample: GridSample},
}
OPERANDS = ("condition", "input", "other", "exponent", "mat2")
IN_PLACE = (operator.iadd, operator.isub, operator.imul, torch.relu_)
_ACTIVATIONS = "ReLU ReLU6 Sigmoid Tanh Softmax GELU SiLU Hardswish Hardsigmoid Hardtanh ELU SELU CELU Softplus Mish"
_NAMES = {name.lower(): getattr(nn, name) for name in (_ACTIVATIONS + " Softsign GLU Dropout").split()}
_NAMES |= {"log_softmax": nn.LogSoftmax, "leaky_relu": nn.LeakyReLU, "relu_": nn.ReLU}
for _kind, _stem in (("max_pool", "MaxPool"), ("avg_pool", "AvgPool"), ("adaptive_avg_pool", "AdaptiveAvgPool")):
    _NAMES |= {f"{_kind}{d}d": getattr(nn, f"{_stem}{d}d") for d in (1, 2, 3)}
MODULES: dict[Any, type[nn.Module]] = {
    target: cls
    for name, cls in _NAMES.items()
    for target in (getattr(F, name, None), getattr(torch, name, None), name)
    if target is not None
}


def calls_to_modules(traced: fx.GraphModule, note: Callable[[str, str], None]) -> None:
    """Gives `traced` a module for each call that there is one for; `note(why, name)` hears of it."""
    for node in list(traced.graph.nodes):
        if node.op in ("call_function", "call_method"):
            _to_module(traced, node, note)
    _one_module_a_call(traced, note)
    traced.graph.lint()
    traced.recompile()


def _is_in_place(node: fx.Node) -> bool:
    return node.target in IN_PLACE or (node.op == "call_method" and node.target.endswith("_"))


def _keeps_writing(node: fx.Node) -> bool:
    """Whether a call must go on writing in place; if not, whoever reads the overwritten tensor later reads the call."""
    written = node.args[0] if node.args else None
    if not isinstance(written, fx.Node):
        return True
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    if written.op == "get_attr" or seen_later(node, written, order) is not None:
        return True
    read_written(written, node, node, order)
    return False


def _to_module(prepared: fx.GraphModule, node: fx.Node, note: Callable[[str, str], None]) -> None:
    if _is_in_place(node) and (node.target in MODULES or node.target in FUNCTIONALS) and _keeps_writing(node):
        return
    if node.target in MODULES:
        cls, kwargs = MODULES[node.target], o.torch_names(node.kwargs)
        if "input" in kwargs and not node.args:
            node.args = (kwargs.pop("input"),)
        known = inspect.signature(cls).parameters
        kwargs = {k: v for k, v in kwargs.items() if k in known and not isinstance(v, fx.Node)}
        if any(isinstance(a, fx.Node) for a in node.args[1:]):
            return
        _, names = (o.METHODS if isinstance(node.target, str) else o.FUNCTIONS).get(node.target, ("", ""))
        names = names.split()[1:] or list(known)
        positional = {n: v for n, v in zip(names, node.args[1:], strict=False) if n in known}
        module, args, kwargs = cls(**positional, **kwargs), node.args[:1], {}
    elif node.target in FUNCTIONALS:
        module, args, kwargs = FUNCTIONALS[node.target](), node.args, o.torch_names(node.kwargs)
        args += tuple(kwargs.pop(name) for name in OPERANDS if name in kwargs)  # quantizers are told by position
        if isinstance(module, Concat):
            tensors = args[0] if args else kwargs.pop("tensors")
            kwargs = {"dim": args[1] if len(args) > 1 else kwargs.get("dim", 0)}
            args = tuple(tensors)
    else:
        return
    name = _inside(prepared, _caller(node), f"module_{node.name}")
    note("Functional", name)
    prepared.add_submodule(name, module)
    _replace_call(prepared, node, name, args, kwargs)


def _caller(node: fx.Node) -> str:
    """The path of the innermost module around a call of a function, or of the module that is called."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def _inside(prepared: fx.GraphModule, parent: str, name: str) -> str:
    """The path of `name` in the module `parent`, or in the model if none of that module's parts are in the graph."""
    kept = any(path == parent for path, _ in prepared.named_modules())
    return f"{parent}.{name}" if parent and kept else name


def _replace_call(prepared: fx.GraphModule, node: fx.Node, name: str, args: tuple, kwargs: dict) -> None:
    with prepared.graph.inserting_after(node):
        made = prepared.graph.call_module(name, args, kwargs)
    node.replace_all_uses_with(made)
    prepared.graph.erase_node(node)


def _one_module_a_call(prepared: fx.GraphModule, note: Callable[[str, str], None]) -> None:
    calls: Counter = Counter()
    for node in list(prepared.graph.nodes):
        if node.op != "call_module":
            continue
        module = prepared.get_submodule(node.target)
        count = calls[id(module)]
        calls[id(module)] += 1
        if count:
            parent, _, own = (_caller(node) or node.target).rpartition(".")
            name = _inside(prepared, parent, f"module_{own}_{node.name.rpartition('_')[2]}")
            note("Reused/Duplicate", name)
            prepared.add_submodule(name, copy.deepcopy(module))
            _replace_call(prepared, node, name, node.args, node.kwargs)
