"""Buffers that a model's own forward writes to: what a graph, which computes from its inputs alone, does not do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class _Kept(NamedTuple):
    path: str
    module: nn.Module
    name: str
    tensor: Tensor | None
    numbers: Tensor | None

    def is_unchanged(self) -> bool:
        now = self.module._buffers.get(self.name)
        if now is None or self.numbers is None:
            return now is self.tensor
        if now.shape != self.numbers.shape or now.dtype != self.numbers.dtype:
            return False
        return bool(((now == self.numbers) | ((now != now) & (self.numbers != self.numbers))).all())

    def restore(self) -> None:
        if self.is_unchanged() and self.module._buffers.get(self.name) is self.tensor:
            return
        self.module._buffers[self.name] = self.tensor
        if self.tensor is not None and self.numbers is not None:
            with torch.no_grad():
                self.tensor.resize_(self.numbers.shape).copy_(self.numbers)


def _snapshot(model: nn.Module) -> list[_Kept]:
    return [
        _Kept(f"{path}.{name}" if path else name, module, name, t, None if t is None or is_lazy(t) else t.clone())
        for path, module in model.named_modules()
        for name, t in module._buffers.items()
    ]


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """After the block every buffer is the tensor that it was before, with the numbers that it had."""
    kept = _snapshot(model)
    try:
        yield
    finally:
        for buffer in kept:
            buffer.restore()


@contextmanager
def buffers_watched(model: nn.Module) -> Iterator[list[str]]:
    """A list that holds, after the block, the paths of the buffers that it changed."""
    kept, changed = _snapshot(model), []
    yield changed
    changed += [buffer.path for buffer in kept if not buffer.is_unchanged()]
