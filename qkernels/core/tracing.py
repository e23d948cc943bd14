"""Tracing whatever goes on around it: autocast, and other threads, for while fx traces, it replaces `__call__` and
`__getattr__` of every `nn.Module` in the process.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn

_TRACING = threading.RLock()  # two traces at once would each restore what the other one put there


class Tracer(fx.Tracer):
    """Traces one at a time in the process; modules in other threads compute as they always do."""

    def trace(self, root: nn.Module | Callable, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _TRACING:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is a thread that does not trace."""
        return threading.get_ident() != self._thread

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs) if self.is_elsewhere else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self.is_elsewhere else super().getattr(attr, attr_val, parameter_proxy_cache)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, a model computes in the dtype of its parameters, as its grids and integers do."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
