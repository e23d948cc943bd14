"""Sizes of tensors as formulas in the sizes of the model's arguments: which of them are equal in every call.

On one example sizes may be equal by chance: a batch of one, an image of one pixel. A formula is equal to nothing but
the same formula, and a size that is open is never taken for 1.
"""

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qkernels.core import operations as o
from qkernels.core.registry import is_layer
from qkernels.core.tables import UNARY


@dataclass(frozen=True)
class Size:
    """floor((of + plus) / by), where `of` stands for an integer: a size of an argument, or a formula by its parts."""

    of: Hashable
    plus: int = 0
    by: int = 1

    def __add__(self, other: Any) -> "Size":
        if isinstance(other, int):
            return Size(self.of, self.plus + other * self.by, self.by)
        return Size(("+", frozenset((self, other))))

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Size":
        return self + -other if isinstance(other, int) else Size(("-", self, other))

    def __rsub__(self, other: Any) -> "Size":
        return Size(("-", other, self))

    def __mul__(self, other: Any) -> "Size":
        return self if isinstance(other, int) and other == 1 else Size(("*", frozenset((self, other))))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> "Size":
        if isinstance(other, int) and other > 0:
            return Size(self.of, self.plus, self.by * other)
        return Size(("//", self, other))

    def __rfloordiv__(self, other: Any) -> "Size":
        return Size(("//", other, self))


Sizes = tuple[int | Size, ...]

_SAME_MODULES = (nn.LayerNorm, nn.GroupNorm, nn.Softmax, nn.LogSoftmax, nn.PReLU, *o.BATCH_NORMS)
_SAME_FUNCTIONS = (F.layer_norm, F.group_norm, F.softmax, torch.softmax, F.log_softmax, F.normalize)
_SAME_METHODS = ("contiguous", "clone", "detach", "softmax", "float", "to", "type_as")
_SAME_KINDS = frozenset(UNARY) | {o.DROPOUT, "identity"}
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.floordiv)


def sizes_of(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, Sizes]:
    """The sizes of the tensors of a converted graph, as far as they can be told."""
    return _Walk(modules).run(graph)


def broadcast(a: Sizes, b: Sizes) -> Sizes:
    """The sizes of an elementwise operation on two tensors."""
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    return tuple(_wider(x, y) for x, y in pairs)


def _wider(a: Any, b: Any) -> Any:
    if a == b or b == 1:
        return a
    if a == 1 or isinstance(b, int):
        return b
    return a if isinstance(a, int) else Size(("broadcast", frozenset((a, b))))


class _Walk:
    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = modules
        self.known: dict[Size, int] = {}  # what a layer insists on
        self.found: dict[fx.Node, Any] = {}  # of a tensor its sizes; what is computed from sizes; None: neither

    def run(self, graph: fx.Graph) -> dict[fx.Node, Sizes]:
        for node in graph.nodes:
            if node.op != "output":
                found = self._sizes(node)
                self.found[node] = self._unnamed(node) if found is None else found
        tensors = {n: s for n, s in self.found.items() if isinstance(s, tuple) and _kind(n) != "other"}
        return {n: tuple(self.known.get(s, s) for s in sizes) for n, sizes in tensors.items()}

    def _unnamed(self, node: fx.Node) -> Sizes | None:
        """Sizes that are equal to no other ones."""
        if _kind(node) != "tensor":
            return None
        return tuple(Size((node.name, d)) for d in range(len(node.meta["value"].shape)))

    def _sizes(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return None
        if node.op == "get_attr":
            return tuple(node.meta["value"].shape) if _kind(node) == "tensor" else None
        args = fx.map_arg(node.args, self.found.__getitem__)
        inputs = [self.found[n] for n in node.all_input_nodes]
        if any(found is None for found in inputs):
            return None
        if node.op != "call_module":
            return self._call(node, args)
        module = self.modules[node.target]
        if is_layer(module):
            for dim, number in module.input_sizes().items():
                if isinstance(args[0][dim], Size):
                    self.known[args[0][dim]] = number
            return tuple(module.output_sizes(*args))
        return args[0] if isinstance(module, _SAME_MODULES) or self._keeps_sizes(node) else None

    def _keeps_sizes(self, node: fx.Node) -> bool:
        op = o.operation(node, self.modules)
        return op is not None and op.kind in _SAME_KINDS

    def _call(self, node: fx.Node, args: tuple) -> Any:
        """Of a function or method, some of which only read sizes or compute with them."""
        target, x = node.target, args[0] if args else None
        if target in _SAME_FUNCTIONS or (node.op == "call_method" and target in _SAME_METHODS):
            return x
        if _kind(node) == "other":
            return self._number(node, args)
        if target in (operator.add, operator.mul, torch.add, torch.mul):
            pair = [a if isinstance(a, tuple) else () for a in args]
            return broadcast(*pair)
        if self._keeps_sizes(node):
            return self.found[node.all_input_nodes[0]]  # `1 - x` begins with a number
        if target is F.pad:
            return _padded(x, args[1])
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        view = _VIEWS.get(name)
        if view is None or node.kwargs or not all(isinstance(a, int | Size) for a in _flat(args[1:])):
            return None
        return view(x, *args[1:])

    def _number(self, node: fx.Node, args: tuple) -> Any:
        """What is read of sizes or computed from them."""
        if node.target is getattr and args[1] == "shape":
            return args[0]
        if node.op == "call_method" and node.target == "size":
            return args[0][args[1]] if len(args) > 1 else args[0]
        if node.target is operator.getitem and isinstance(args[1], int):
            return args[0][args[1]]
        is_formula = node.target in _ARITHMETIC and all(isinstance(a, int | Size) for a in args)
        return node.target(*args) if is_formula else None


def _kind(node: Any) -> str:
    return getattr(node.meta.get("value"), "kind", "") if isinstance(node, fx.Node) else ""


def _padded(x: Sizes, amounts: Sequence[Any]) -> Sizes:
    sizes = list(x)
    for pair in range(len(amounts) // 2):
        sizes[-1 - pair] = sizes[-1 - pair] + amounts[2 * pair] + amounts[2 * pair + 1]
    return tuple(sizes)


def _permuted(x: Sizes, *dims: Any) -> Sizes:
    return tuple(x[d] for d in _flat(dims))


def _transposed(x: Sizes, a: int, b: int) -> Sizes:
    sizes = list(x)
    sizes[a], sizes[b] = x[b], x[a]
    return tuple(sizes)


def _reshaped(x: Sizes, *sizes: Any) -> Sizes:
    """The size that -1 stands for is a formula of all the others."""
    wanted = _flat(sizes)
    return tuple(Size(("rest", x, wanted)) if isinstance(s, int) and s == -1 else s for s in wanted)


def _flattened(x: Sizes, start: int = 0, end: int = -1) -> Sizes:
    start, end = start % len(x), end % len(x)
    return x if start == end else (*x[:start], Size(("flat", x[start : end + 1])), *x[end + 1 :])


def _flat(values: Sequence[Any]) -> tuple:
    return tuple(values[0]) if len(values) == 1 and isinstance(values[0], (tuple, list)) else tuple(values)


_VIEWS = {
    "permute": _permuted,
    "transpose": _transposed,
    "reshape": _reshaped,
    "view": _reshaped,
    "flatten": _flattened,
}
