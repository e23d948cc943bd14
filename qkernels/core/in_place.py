"""Writing in place, in a graph: calls that overwrite a tensor become ordinary ones, whose result is read instead.

A converted graph holds a value in up to two forms, float and integer: what is written to one is not seen in the other.
"""

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qkernels.core.operations import DROPOUT, FUNCTIONS, MODULES


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What may share memory with its first argument. `reshape`, `flatten` and `contiguous` do for most tensors.
_VIEWS = _words(
    "getitem view view_as reshape reshape_as flatten unflatten squeeze unsqueeze transpose swapaxes swapdims permute "
    "movedim moveaxis t expand expand_as broadcast_to narrow select chunk split tensor_split unbind diagonal unfold "
    "as_strided detach requires_grad_ contiguous to type_as float cpu dropout stochastic_depth"
)
_VIEW_ATTRIBUTES = _words("T mT H mH data real imag")
_VIEW_MODULES = (nn.Flatten, nn.Unflatten)

_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in _words("add and floordiv lshift matmul mod mul or pow rshift sub truediv xor")
}
_COMPARISONS = _words(
    "eq ne lt le gt ge not_equal less less_equal greater greater_equal logical_and logical_or logical_xor logical_not"
)
_OTHER_MEANING = _words("bernoulli resize resize_as")  # without the underscore


def drop_in_place(traced: fx.GraphModule) -> str | None:
    """In-place calls become ordinary ones; whoever reads the overwritten tensor later reads the result.

    Returns why that cannot be, if it cannot: the graph is of no use then.
    """
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in [n for n in order if is_write(n)]:
        written = node.kwargs.get("out") or (node.args[0] if node.args else node.kwargs.get("input"))
        if not isinstance(written, fx.Node):
            return f"{node.name} writes in place to several tensors"
        base = _base(written)
        if base.op == "get_attr":
            return f"{node.name} writes to {base.target}, which belongs to the model"
        seen = seen_later(node, written, order)
        if seen is not None:
            return f"{node.name} writes in place to what shares its memory with {seen.name}, which is read later"
        if node.op == "call_module":
            traced.get_submodule(node.target).inplace = False
        elif not _make_functional(node, written):
            return f"{node.name} writes in place by {_name(node)}, for which there is no form that does not"
        read_written(written, _in_dtype_of(written, node, order), node, order)
    return None


def seen_later(node: fx.Node, written: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """What else shares the memory of `written`, to which the node writes in place, and is read later."""
    pending = [_base(written)]
    while pending:
        alias = pending.pop()
        views = [user for user in alias.users if _is_view(user) and user.args[0] is alias]
        if alias is written:
            pending += [view for view in views if order[view] < order[node]]
            continue
        pending += views
        if _overlap(alias, written) and any(order[u] > order[node] for u in alias.users if u not in views):
            return alias
    return None


def read_written(written: fx.Node, result: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> None:
    """Whoever reads `written` after the node has overwritten it, reads `result`."""
    for user in list(written.users):
        if user is not result and order[user] > order[node]:
            user.replace_input_with(written, result)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_write(node: fx.Node) -> bool:
    """Whether the node is known to overwrite a tensor; it has its value already."""
    if node.op == "call_module":
        return getattr(node.graph.owning_module.get_submodule(node.target), "inplace", False) is True
    if node.op not in ("call_function", "call_method") or isinstance(node.target, type):
        return False
    if node.target in _OPERATORS:
        return node.meta["value"].kind == "tensor"  # of sizes and tuples it makes new ones
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = _name(node)
    by_name = name.endswith("_") and not name.endswith("__") and name not in _VIEWS
    return by_name or node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None


def _is_view(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(node.target)
        return isinstance(module, _VIEW_MODULES) or MODULES.get(type(module)) in ("identity", DROPOUT)
    if node.target is getattr:
        return node.args[1] in _VIEW_ATTRIBUTES
    return node.op in ("call_function", "call_method") and _name(node) in _VIEWS


def _base(node: fx.Node) -> fx.Node:
    """The tensor that the node is a view of, or the node."""
    while _is_view(node):
        node = node.args[0]
    return node


def _overlap(a: fx.Node, b: fx.Node) -> bool:
    """Whether two views of one tensor may share elements at some size: no only where they are pieces of one cut."""
    first, second = _views_to(a), _views_to(b)
    if any(_name(node) == "as_strided" for node in (*first, *second)):
        return True  # it reaches beyond what it is a view of
    for one, other in zip(first, second, strict=False):
        if _what_is_viewed(one) != _what_is_viewed(other):
            return not _are_apart(one, other)
    return True


def _views_to(node: fx.Node) -> list[fx.Node]:
    """The views that lead from the base of the node to the node."""
    found: list[fx.Node] = []
    while _is_view(node):
        found.append(node)
        node = node.args[0]
    return found[::-1]


def _what_is_viewed(view: fx.Node) -> tuple:
    return view.op, view.target, view.args[1:], view.kwargs


def _are_apart(a: fx.Node, b: fx.Node) -> bool:
    """Whether two views of the same share no element, whatever its size."""
    source = a.args[0]
    if _name(source) in ("chunk", "split", "unbind") and _is_view(source):
        pieces = [view.args[1] for view in (a, b) if _name(view) == "getitem" and isinstance(view.args[1], int)]
        return len(pieces) == 2 and (pieces[0] < 0) == (pieces[1] < 0)
    rank = len(source.meta["value"].shape)
    first, second = _ranges(a, rank), _ranges(b, rank)
    return any(_is_before(*pair) or _is_before(*pair[::-1]) for pair in zip(first, second, strict=False))


def _is_before(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Whether the range `a` ends where `b` starts or earlier: places counted from different ends say nothing."""
    end, start = a[1], b[0]
    if isinstance(end, int) and isinstance(start, int):
        return (end < 0) == (start < 0) and end <= start
    return end is not None and end is start


def _ranges(view: fx.Node, rank: int) -> list[tuple[Any, Any]]:
    """Where a piece starts and ends in each dimension, as slices say it; nothing if the view cuts out no piece."""
    name, args = _name(view), view.args[1:]
    ranges: list[tuple[Any, Any]] = [(0, None)] * rank
    if name == "getitem":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        if any(type(i) not in (int, slice, type(...), type(None)) for i in index):
            return []
        index = tuple(i for i in index if i is not None)
        hidden = rank - sum(i is not ... for i in index)
        at = index.index(...) if ... in index else len(index)
        index = (*index[:at], *[slice(None)] * hidden, *index[at + 1 :])
        return [(i.start or 0, i.stop) if isinstance(i, slice) else _piece(i, 1) for i in index]
    if name in ("narrow", "select") and not view.kwargs and all(type(a) is int for a in args):
        ranges[args[0]] = _piece(args[1], args[2] if name == "narrow" else 1)
        return ranges
    return []


def _piece(start: int, length: int) -> tuple[int, int | None]:
    end = start + length
    return start, None if start < 0 and end == 0 else end


def _make_functional(node: fx.Node, written: fx.Node) -> bool:
    """Turns the node into a call that computes what it writes; False if there is none."""
    name = _name(node)
    if node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
    elif node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.kwargs.get("out") is not None:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
        return name not in _COMPARISONS and _is_like(written, node, *node.all_input_nodes)
    elif name == "copy_":
        source = node.args[1] if len(node.args) > 1 else node.kwargs.get("src")
        node.op, node.target, node.args, node.kwargs = "call_method", "clone", (source,), {}
        return _is_like(written, source) and source.meta["value"].shape == written.meta["value"].shape
    elif name == "zero_":
        node.op, node.target, node.args = "call_function", torch.zeros_like, (written,)
    elif name == "fill_":
        value = node.args[1] if len(node.args) > 1 else node.kwargs.get("value")
        node.op, node.target, node.args, node.kwargs = "call_function", torch.full_like, (written, value), {}
        return isinstance(value, (int, float))
    else:
        target = _other_form(node, name.removesuffix("_"))
        node.target = node.target if target is None else target
        return target is not None
    return True


def _is_like(written: fx.Node, result: Any, *operands: fx.Node) -> bool:
    """Whether a result has the shape and, with its operands, the dtype of what it is written to."""
    if not isinstance(result, fx.Node) or result.meta["value"].shape != written.meta["value"].shape:
        return False
    values = [node.meta["value"] for node in (result, *operands)]
    return all(value.kind == "tensor" and value.dtype == written.meta["value"].dtype for value in values)


def _other_form(node: fx.Node, name: str) -> Any:
    """The method or function of torch that computes what the in-place one of `name` and an underscore writes."""
    if isinstance(node.target, torch._ops.OpOverload) or name in _OTHER_MEANING:
        return None
    if node.op == "call_method":
        return name if callable(getattr(torch.Tensor, name, None)) else None
    rooms = (F, torch, torch._C._nn)
    if not any(getattr(room, _name(node), None) is node.target for room in rooms):
        return None  # somebody else's function of such a name
    for function in (getattr(room, name, None) for room in rooms):
        if function in FUNCTIONS:
            known = [n for n in FUNCTIONS[function][1].split() if n != "inplace"]
            if len(node.args) <= len(known) and node.kwargs.keys() <= set(known):
                return function
    return next((found for room in rooms[1:] if callable(found := getattr(room, name, None))), None)


def _in_dtype_of(written: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    """The result of the node, which computes what it wrote, in the dtype in which that is kept."""
    if node.op == "call_module" or written.meta["value"].kind != "tensor":
        return node
    kept = computed = written.meta["value"].dtype
    for operand in node.all_input_nodes:
        if operand.meta["value"].kind == "tensor":
            computed = torch.promote_types(computed, operand.meta["value"].dtype)
    computed = torch.bool if _name(node) in _COMPARISONS else computed
    if computed == kept:
        return node
    with node.graph.inserting_after(node):
        cast = node.graph.call_method("to", (node, kept))
    cast.meta, order[cast] = dict(node.meta), order[node]
    node.meta["value"] = replace(node.meta["value"], dtype=computed)
    node.replace_all_uses_with(cast, lambda user: user is not cast)
    return cast
