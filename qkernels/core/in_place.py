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
    modules = dict(traced.named_modules(remove_duplicate=False))
    in_place = {path for path, module in modules.items() if getattr(module, "inplace", False) is True}
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        if not (node.op == "call_module" and node.target in in_place) and not _is_write(node):
            continue
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
            modules[node.target].inplace = False
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


def _is_write(node: fx.Node) -> bool:
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
    """Whether two views of one tensor share elements, by their layouts on the example; yes if these are not known."""
    layouts = [node.meta.get("layout") for node in (a, b)]
    if None in layouts:
        return True
    if any(0 in shape for shape, _, _ in layouts):
        return False
    last = (at + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) for shape, strides, at in layouts)
    places = torch.arange(1 + max(last))
    first, second = (places.as_strided(*layout).reshape(-1) for layout in layouts)
    mine = torch.zeros(len(places), dtype=torch.bool)
    mine[first] = True
    return bool(mine[second].any())


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
    for function in (getattr(room, name, None) for room in rooms):
        if function in FUNCTIONS:
            known = [n for n in FUNCTIONS[function][1].split() if n != "inplace"]
            if len(node.args) <= len(known) and node.kwargs.keys() <= set(known):
                return function
    return next((getattr(room, name) for room in rooms[1:] if hasattr(room, name)), None)


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
