"""Operations that only move values, as reshape, permute, slice and expand steps; and what reads a shape.

Each function takes torch's own parameters by their names; values and sizes stand where torch has tensors and integers.
"""

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qkernels.errors import Unsupported
from qkernels.plan.layers import nearest
from qkernels.plan.steps import Dynamic, Network, Size, StepKind, Value


class Views:
    """Appends view steps for one node of the graph, named after it."""

    def __init__(self, network: Network, name: str):
        self.network, self.name = network, name

    # -- the four steps that everything is made of

    def _step(self, kind: StepKind, x: Value, attributes: Sequence[int], sizes: Sequence[Size | None]) -> Value:
        made = self.network.step(kind, self.name, [x], attributes, x.dtype, sizes)
        return made

    def _reshape(self, x: Value, sizes: Sequence[Size]) -> Value:
        sizes = list(sizes)
        scalars = map(self.network.scalar, sizes)
        return self._step(StepKind.RESHAPE, x, [len(sizes), *scalars], _inferred(x, sizes))

    def _permute(self, x: Value, dims: Sequence[int]) -> Value:
        if tuple(dims) == tuple(range(x.rank)):
            return x
        return self._step(StepKind.PERMUTE, x, [x.rank, *dims], [x.sizes[d] for d in dims])

    def _slice(self, x: Value, dim: int, start: Size, stop: Size, step: int = 1, count: Size | None = None) -> Value:
        """x[start:stop:step] on `dim`; `count`: how many that is, if it is known."""
        sizes: list[Size | None] = list(x.sizes)
        known, sizes[dim] = x.sizes[dim], count
        if known is not None and isinstance(start, int) and isinstance(stop, int):
            sizes[dim] = len(range(known)[start:stop:step])
        return self._step(StepKind.SLICE, x, [dim, *map(self.network.scalar, (start, stop)), step], sizes)

    # -- indices that a call decides

    def _start(self, index: Size, size: Size) -> Size:
        """An index that may count from the end, counted from the start."""
        self.network.scalar(index)
        if isinstance(index, Dynamic):
            return index - index.minimum(0).maximum(-1) * size
        return index if index >= 0 else size + index

    def _checked(self, size: Size, *margins: Size) -> Size:
        """`size`; a call in which a margin is negative is refused, by a division by zero."""
        if any(isinstance(margin, int) and margin < 0 for margin in margins):
            raise Unsupported("a size or an index that is out of range")
        least: Size | None = None
        for margin in margins:
            if isinstance(margin, Dynamic):
                least = margin if least is None else least.minimum(margin)
        return size if least is None else size + 0 // (least + 1).maximum(0)

    def _divided(self, size: Size, by: Size) -> Size:
        """`size // by`, without a rest."""
        return self._checked(size // by, -(size % by))

    def _known(self, x: Value, dim: int, what: str) -> int:
        """A size that is the same in every call."""
        if x.sizes[dim] is None:
            raise Unsupported(f"{what} along dimension {dim}, whose size is open, changes the structure of the network")
        return x.sizes[dim]

    # -- reshapes

    def reshape(self, x: Value, *shape: Any) -> Value:
        return self._reshape(x, _flat(shape))

    view = reshape

    def view_as(self, x: Value, other: Value) -> Value:
        return self._reshape(x, self.network.sizes(other))

    reshape_as = view_as

    def flatten(self, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
        if x.rank == 0:
            return self._reshape(x, [1])
        start, end = _dim(start_dim, x.rank), _dim(end_dim, x.rank)
        sizes = self.network.sizes(x)
        return x if start == end else self._reshape(
            x, [*sizes[:start], math.prod(sizes[start : end + 1]), *sizes[end + 1 :]]
        )  # fmt: skip

    def unflatten(self, x: Value, dim: int, sizes: Sequence[Size]) -> Value:
        dim, all_sizes, parts = _dim(dim, x.rank), self.network.sizes(x), list(sizes)
        if -1 in parts:
            rest = math.prod(p for p in parts if not (isinstance(p, int) and p == -1))
            parts[parts.index(-1)] = self._divided(all_sizes[dim], rest)
        return self._reshape(x, [*all_sizes[:dim], *parts, *all_sizes[dim + 1 :]])

    def squeeze(self, x: Value, dim: Any = None) -> Value:
        dims = range(x.rank) if dim is None else [_dim(d, x.rank) for d in _flat((dim,))]
        gone = {d for d in dims if self._known(x, d, "squeeze") == 1}
        return self._reshape(x, [s for d, s in enumerate(self.network.sizes(x)) if d not in gone])

    def unsqueeze(self, x: Value, dim: int) -> Value:
        sizes = list(self.network.sizes(x))
        sizes.insert(_dim(dim, x.rank + 1), 1)
        return self._reshape(x, sizes)

    # -- permutations

    def permute(self, x: Value, *dims: Any) -> Value:
        return self._permute(x, [_dim(d, x.rank) for d in _flat(dims)])

    def transpose(self, x: Value, dim0: int, dim1: int) -> Value:
        dims = list(range(x.rank))
        a, b = _dim(dim0, x.rank), _dim(dim1, x.rank)
        dims[a], dims[b] = b, a
        return self._permute(x, dims)

    def t(self, x: Value) -> Value:
        return self._permute(x, range(x.rank)[::-1])

    def movedim(self, x: Value, source: Any, destination: Any) -> Value:
        moved = dict(zip((_dim(d, x.rank) for d in _flat((destination,))), _flat((source,)), strict=True))
        moved = {to: _dim(d, x.rank) for to, d in moved.items()}
        others = iter(d for d in range(x.rank) if d not in moved.values())
        return self._permute(x, [moved[d] if d in moved else next(others) for d in range(x.rank)])

    def pixel_shuffle(self, x: Value, upscale_factor: int) -> Value:
        *batch, c, h, w = self.network.sizes(x)
        r, b = upscale_factor, len(batch)
        c = self._divided(c, r * r)
        split = self._reshape(x, [*batch, c, r, r, h, w])
        mixed = self._permute(split, [*range(b), b, b + 3, b + 1, b + 4, b + 2])
        return self._reshape(mixed, [*batch, c, h * r, w * r])

    def pixel_unshuffle(self, x: Value, downscale_factor: int) -> Value:
        *batch, c, h, w = self.network.sizes(x)
        r, b = downscale_factor, len(batch)
        h, w = self._divided(h, r), self._divided(w, r)
        split = self._reshape(x, [*batch, c, h, r, w, r])
        mixed = self._permute(split, [*range(b), b, b + 2, b + 4, b + 1, b + 3])
        return self._reshape(mixed, [*batch, c * (r * r), h, w])

    def channel_shuffle(self, x: Value, groups: int) -> Value:
        n, c, *spatial = self.network.sizes(x)
        split = self._reshape(x, [n, groups, self._divided(c, groups), *spatial])
        mixed = self._permute(split, [0, 2, 1, *range(3, x.rank + 1)])
        return self._reshape(mixed, [n, c, *spatial])

    # -- parts

    def chunk(self, x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
        dim = _dim(dim, x.rank)
        size = self._known(x, dim, "chunk")
        return self.split(x, -(-size // chunks) if size else [0] * chunks, dim)

    def split(self, x: Value, split_size_or_sections: Any = None, dim: int = 0, **kwargs: Any) -> tuple[Value, ...]:
        sections = kwargs.get("split_size", split_size_or_sections)
        dim = _dim(dim, x.rank)
        size = self._known(x, dim, "split")
        if isinstance(sections, int):
            count = max(-(-size // max(sections, 1)), 1)
            sections = [min(sections, size - i * sections) for i in range(count)]
        ends = list(itertools.accumulate(sections))
        rest = size - sum(sections)
        starts = [self._checked(start, *sections, rest, -rest) for start in [0, *ends][:-1]]
        pieces = zip(starts, ends, sections, strict=True)
        return tuple(self._slice(x, dim, start, end, count=count) for start, end, count in pieces)

    def unbind(self, x: Value, dim: int = 0) -> tuple[Value, ...]:
        return tuple(self.select(x, dim, i) for i in range(self._known(x, _dim(dim, x.rank), "unbind")))

    def select(self, x: Value, dim: int, index: Size) -> Value:
        dim = _dim(dim, x.rank)
        sizes = self.network.sizes(x)
        return self._reshape(self._one(x, dim, index), [s for d, s in enumerate(sizes) if d != dim])

    def _one(self, x: Value, dim: int, index: Size) -> Value:
        """The slice of one element."""
        size = self.network.size(x, dim)
        start = self._start(index, size)
        start = self._checked(start, start, size - 1 - start)
        return self._slice(x, dim, start, start + 1, count=1)

    def narrow(self, x: Value, dim: int, start: Size, length: Size) -> Value:
        dim = _dim(dim, x.rank)
        size = self.network.size(x, dim)
        start = self._start(start, size)
        start = self._checked(start, start, length, size - start - length)
        return self._slice(x, dim, start, start + length, count=length)

    def getitem(self, x: Any, index: Any) -> Any:
        if not isinstance(x, Value):
            return x[index]
        parts = list(index) if isinstance(index, tuple) else [index]
        for p in parts:
            if not (p is None or p is ... or isinstance(p, Size | slice)) or isinstance(p, bool):
                raise Unsupported(f"indexing with {'a tensor' if isinstance(p, Value) else repr(p)}")
        taken = sum(p is not None and p is not ... for p in parts)
        rest = [slice(None)] * (x.rank - taken)
        at = parts.index(...) if ... in parts else len(parts)
        parts = [*parts[:at], *rest, *parts[at + 1 :]]
        sizes: list[Size] = []
        dim = 0
        for part in parts:
            if part is None:
                sizes.append(1)
                continue
            if isinstance(part, Size):
                x = self._one(x, dim, part)
            else:
                x = self._sliced(x, dim, part)
                sizes.append(self.network.size(x, dim))
            dim += 1
        plain = all(isinstance(part, slice) for part in parts)
        return x if plain else self._reshape(x, sizes)

    def _sliced(self, x: Value, dim: int, part: slice) -> Value:
        if part == slice(None):
            return x
        if not isinstance(part.step, int | None):
            raise Unsupported("a slice whose step is not the same in every call")
        stop = self.network.size(x, dim) if part.stop is None else part.stop
        return self._slice(x, dim, part.start or 0, stop, part.step or 1)

    def expand(self, x: Value, *sizes: Any) -> Value:
        wanted = _flat(sizes)
        own = self.network.sizes(x)
        added = len(wanted) - len(own)
        x = self._reshape(x, [*(1,) * added, *own]) if added else x
        scalars = map(self.network.scalar, wanted)
        known = [k if isinstance(s, int) and s == -1 else s for s, k in zip(wanted, x.sizes, strict=True)]
        return self._step(StepKind.EXPAND, x, [len(wanted), *scalars], known)

    def expand_as(self, x: Value, other: Value) -> Value:
        return self.expand(x, *self.network.sizes(other))

    def same(self, x: Value, **_: Any) -> Value:
        """detach, clone, contiguous, identity: values never change. Islands see to their layouts (`lays_out`)."""
        return x

    # -- padding and resizing of codes

    def pad(self, x: Value, pad: Sequence[Size], mode: str = "constant", value: Any = None) -> Value:
        if mode != "constant":
            raise Unsupported(f"padding with mode={mode!r} outside of a convolution")
        if x.dtype not in (torch.uint8, torch.int8) and value not in (None, 0, 0.0):
            raise Unsupported(f"padding tensors of {x.dtype} with {value}")
        sizes: list[Size | None] = list(x.sizes)
        for pair, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
            dim = x.rank - 1 - pair
            fixed = isinstance(before, int) and isinstance(after, int) and sizes[dim] is not None
            sizes[dim] = sizes[dim] + before + after if fixed else None
        scalars = map(self.network.scalar, pad)
        return self._step(StepKind.PAD, x, [len(pad) // 2, *scalars, int(value or 0)], sizes)

    def interpolate(
        self,
        x: Value,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: Any = None,
        recompute_scale_factor: Any = None,
        antialias: bool = False,
    ) -> Value:
        if mode not in ("nearest", "nearest-exact") or recompute_scale_factor or x.dtype.is_floating_point:
            raise Unsupported(f"interpolate with mode={mode!r} on {x.dtype}")
        return nearest(self.network, self.name, x, size, scale_factor, mode)

    # -- shapes

    def size(self, x: Value, dim: int | None = None) -> Any:
        return self.network.sizes(x) if dim is None else self.network.size(x, _dim(dim, x.rank))

    def dim(self, x: Value) -> int:
        return x.rank

    def numel(self, x: Value) -> Size:
        return math.prod(self.network.sizes(x))

    def getattr(self, x: Value, name: str) -> Any:
        found: dict[str, Callable[[], Any]] = {
            "shape": lambda: self.size(x),
            "ndim": lambda: x.rank,
            "T": lambda: self.t(x),
            "mT": lambda: self.transpose(x, -2, -1),
        }
        if not isinstance(x, Value) or name not in found:
            raise Unsupported(f"reading the attribute {name!r}")
        return found[name]()


_MODULES: dict[type, tuple[str, tuple[str, ...]]] = {
    nn.Flatten: ("flatten", ("start_dim", "end_dim")),
    nn.Unflatten: ("unflatten", ("dim", "unflattened_size")),
    nn.PixelShuffle: ("pixel_shuffle", ("upscale_factor",)),
    nn.PixelUnshuffle: ("pixel_unshuffle", ("downscale_factor",)),
    nn.ChannelShuffle: ("channel_shuffle", ("groups",)),
    nn.Identity: ("same", ()),
}
_NAMES = (
    *("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "movedim"),
    *("chunk", "split", "unbind", "select", "narrow"),
)
_FUNCTIONS: dict[Any, str] = {
    **{getattr(torch, name): name for name in _NAMES},
    **{
        getattr(F, name): name for name in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "pad", "interpolate")
    },
    **dict.fromkeys((torch.clone, torch.detach), "same"),
    torch.swapaxes: "transpose",
    operator.getitem: "getitem",
    getattr: "getattr",
}
_METHODS = frozenset({*_NAMES, *["view", "view_as", "reshape_as", "expand", "expand_as", "size", "dim", "numel"]})
_SAME_METHODS = frozenset({"contiguous", "detach", "clone"})
_NO_VIEWS = frozenset({"size", "dim", "numel", "pad", "interpolate"})
_LAYING_OUT = frozenset({"pixel_shuffle", "pixel_unshuffle", "channel_shuffle"})
_ARITHMETIC = frozenset({operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg})


def lower_function(network: Network, name: str, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a function call, as values and sizes.

    Raises:
        Unsupported: no steps compute it.
    """
    first = args[0] if args else None
    if target in _ARITHMETIC and not any(isinstance(a, Value) for a in args):
        return _computed(target, args)
    if target not in _FUNCTIONS:
        raise Unsupported(f"the function {getattr(target, '__name__', target)} has no step")
    if target is not operator.getitem and not isinstance(first, Value):
        args = (kwargs.pop("input"), *args) if "input" in kwargs else args
    return _called(network, name, _FUNCTIONS[target], args, kwargs)


def lower_method(network: Network, name: str, target: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """As `lower_function`, for a method of a tensor."""
    if not isinstance(args[0], Value):
        raise Unsupported(f"the method {target} of something that is not a tensor")
    if target in _SAME_METHODS:
        return args[0]
    if target not in _METHODS:
        raise Unsupported(f"the method Tensor.{target} has no step")
    return _called(network, name, target, args, kwargs)


def lower_module(network: Network, name: str, module: nn.Module, args: Sequence[Any]) -> Any:
    """As `lower_function`, for a module of torch that only moves values."""
    if type(module) not in _MODULES:
        raise Unsupported(f"the module {type(module).__name__} runs in float")
    function, attributes = _MODULES[type(module)]
    return _called(network, name, function, [*args, *(getattr(module, a) for a in attributes)], {})


def is_view(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node of a graph only moves values, by the functions above: views and copies."""
    if node.op == "call_module":
        return type(modules[node.target]) in _MODULES
    if node.op == "call_method":
        return node.target in (_METHODS | _SAME_METHODS) - _NO_VIEWS
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    return node.op == "call_function" and _FUNCTIONS.get(node.target, "size") not in _NO_VIEWS


def lays_out(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether such a node is a copy that chooses where its values lie, by a rule that no step has."""
    if node.op == "call_module":
        return _MODULES[type(modules[node.target])][0] in _LAYING_OUT
    if node.op == "call_method":
        return node.target in ("contiguous", "clone")
    return node.target is torch.clone or _FUNCTIONS.get(node.target) in _LAYING_OUT


def _computed(target: Callable[..., Any], sizes: Sequence[Any]) -> Size:
    try:
        return target(*sizes)
    except TypeError as error:
        raise Unsupported(f"arithmetic on sizes with something that is not an integer: {error}") from error


def _called(network: Network, name: str, function: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    many = [kwargs.pop(word) for word in ("shape", "dims") if word in kwargs]  # what may also be given one by one
    try:
        return getattr(Views(network, name), function)(*args, *many, **kwargs)
    except TypeError as error:
        raise Unsupported(f"{function} with these arguments: {error}") from error


def _dim(dim: int, rank: int) -> int:
    if not isinstance(dim, int) or not -rank <= dim < rank:
        raise Unsupported(f"dimension {dim} of a tensor of rank {rank}")
    return dim % rank


def _flat(arguments: Sequence[Any]) -> list[Any]:
    """`f(1, 2)` and `f((1, 2))` mean the same."""
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        return list(arguments[0])
    return list(arguments)


def _inferred(x: Value, sizes: Sequence[Size]) -> list[Size | None]:
    """`sizes` with a -1 as the number that it must be, if that can be known."""
    known: list[Size | None] = [None if isinstance(s, int) and s == -1 else s for s in sizes]
    if None in known and all(isinstance(s, int) for s in (*x.sizes, *(k for k in known if k is not None))):
        rest = math.prod(k for k in known if k is not None)
        known[known.index(None)] = math.prod(x.sizes) // rest if rest else None
    return known
