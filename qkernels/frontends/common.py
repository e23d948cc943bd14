"""What the front ends share: messages about names, and values that stand for example inputs."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def close_matches(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...` for a message about an unknown name."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 3, 0.5)
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    return f"; there are {sorted(known)}" if len(known) <= 20 else ""


def become(model: nn.Module, other: nn.Module) -> nn.Module:
    """Turns the object `model` into `other`, for everybody who holds it."""
    model.__class__ = other.__class__
    model.__dict__ = other.__dict__
    return model


def keep_containers(converted: nn.Module, original: nn.Module) -> nn.Module:
    """Gives the sequences and lists of `original` their class back, so that `converted.features[1]` works.

    A graph holds plain modules where the original had containers, and only those children that it calls; the others
    come back as Identity.
    """
    for path, container in original.named_modules():
        kind = next((k for k in (nn.Sequential, nn.ModuleList) if isinstance(container, k)), None)
        parent, _, leaf = path.rpartition(".")
        owner = _submodule(converted, parent)
        plain = None if owner is None else owner._modules.get(leaf)
        if kind is None or type(plain) is not nn.Module:
            continue
        made = kind()
        made.train(plain.training)
        for name in container._modules:
            made._modules[name] = plain._modules.get(name, nn.Identity())
        made._modules.update({k: m for k, m in plain._modules.items() if k not in made._modules})
        owner._modules[leaf] = made
    return converted


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    for name in path.split(".") if path else ():
        model = model._modules.get(name)
        if model is None:
            return None
    return model


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
