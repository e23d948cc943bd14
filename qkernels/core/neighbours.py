"""What stands beside a call of a traced graph."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from torch import fx, nn

from qkernels.core.fusion import chain_from


def tensor_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensors that a call takes by position."""
    return [a for a in node.args if isinstance(a, fx.Node) and a.meta["value"].kind == "tensor"]


def places_around(node: fx.Node) -> Iterator[tuple[fx.Node, str, int]]:
    """Where modules write or read the inputs and the output of a call: (call, "input" or "output", number)."""
    sources = tensor_arguments(node)
    for call in (*sources, node):
        if call.op == "call_module":
            yield call, "output", 0
    for call in dict.fromkeys(reader for tensor in (*sources, node) for reader in tensor.users):
        for i, tensor in enumerate(tensor_arguments(call) if call.op == "call_module" else ()):
            if tensor is node or tensor in sources:
                yield call, "input", i


def inside_chains(
    traced: fx.GraphModule,
    groups: Iterable[Sequence[str]],
    modules: Mapping[str, nn.Module],
    kind_of: Callable[[nn.Module], str],
    passed: Collection[str],
    is_left_out: Callable[[nn.Module], bool],
) -> set[fx.Node]:
    """The calls whose output goes nowhere but into the next module of their group, or into one at `passed` before.

    Groups are as in `chain_from`; none begins with a module that `is_left_out`.
    """
    inside: set[fx.Node] = set()
    for group in groups:
        for node in traced.graph.nodes:
            if node.op != "call_module" or is_left_out(modules[node.target]):
                continue
            chain = chain_from(node, group, modules, kind_of, passed)
            inside.update(chain[:-1])
            inside.update(reader for part in chain[:-1] for reader in part.users if reader.target in passed)
    return inside
