"""What the front ends share: messages about names, and values that stand for example inputs."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.core.layers import PREPARED
from qkernels.errors import InvalidArgument

WEIGHTED = tuple(PREPARED)  # the classes of layers whose weight can be rounded


def close_matches(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...` for a message about an unknown name."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 3, 0.5)
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    return f"; there are {sorted(known)}" if len(known) <= 20 else ""


def check_keys(entry: Any, known: Iterable[str], where: str) -> None:
    """Refuses what is no dict, and keys that mean nothing."""
    if not isinstance(entry, Mapping):
        raise InvalidArgument(f"{where}: must be a dict, got {entry!r}")
    for key in entry:
        if key not in known:
            raise InvalidArgument(f"{where}.{key}: unknown key{close_matches(str(key), known)}")


def check_one_of(value: Any, known: Iterable[Any], where: str) -> None:
    if value not in known:
        raise InvalidArgument(f"{where}: must be one of {list(known)}, got {value!r}")


def with_names(modules: Mapping[str, nn.Module], names: Iterable[str], where: str) -> set[str]:
    """The paths `names`, all of which must exist."""
    for name in names:
        if name not in modules:
            raise InvalidArgument(f"{where}: the model has no module {name!r}{close_matches(name, modules)}")
    return set(names)


def with_types(modules: Mapping[str, nn.Module], names: Iterable[str], known: Iterable[type], where: str) -> set[str]:
    """The paths of the modules whose class has one of `names`; "default" stands for `WEIGHTED`.

    The classes `known` may be named though the model has none of them.
    """
    names, types = set(names), {path: type(m).__name__ for path, m in modules.items()}
    there = {*types.values(), *(cls.__name__ for cls in known), "default"}
    for name in names - there:
        raise InvalidArgument(f"{where}: no module is a {name!r}{close_matches(name, there)}")
    if "default" in names:
        names |= {cls.__name__ for cls in WEIGHTED}
    return {path for path, name in types.items() if name in names}


def outline(value: Any) -> Any:
    """Arguments with (shape, dtype, device) in the place of each tensor: what remains of an example."""
    if isinstance(value, Tensor):
        return _Outline(tuple(value.shape), value.dtype, value.device)
    if isinstance(value, Mapping):
        return {k: outline(v) for k, v in value.items()}
    return type(value)(outline(v) for v in value) if type(value) in (tuple, list) else value


class _Outline(tuple):
    def __new__(cls, *parts: Any) -> "_Outline":
        return super().__new__(cls, parts)


def example(value: Any) -> Any:
    """Arguments of the kinds that an outline remembers, with arbitrary numbers."""
    if isinstance(value, _Outline):
        shape, dtype, device = value
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype, device=device)
        return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(device)
    if isinstance(value, Mapping):
        return {k: example(v) for k, v in value.items()}
    return type(value)(example(v) for v in value) if type(value) in (tuple, list) else value
