"""What an op gives on tensors without contents: for torch.compile, torch.export and the meta device."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the rule of `qkernels::op`: takes the op's arguments, returns empty tensors as the op would.

    torch asks the rule instead of the kernel as soon as one tensor is on the meta device. Where the others are not,
    nothing would be computed and nobody told: that is a RuntimeError, as other mixtures of devices are.
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(rule)
        def checked(*args: Any, **kwargs: Any) -> Any:
            names = (argument.name for argument in getattr(torch.ops.qkernels, op).default._schema.arguments)
            _expect_no_lone_meta(op, {**dict(zip(names, args, strict=False)), **kwargs})
            return rule(*args, **kwargs)

        return torch.library.register_fake(f"qkernels::{op}")(checked)

    return register


def _expect_no_lone_meta(op: str, arguments: dict[str, Any]) -> None:
    first = None
    for name, value in arguments.items():
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            first = tensor if first is None else first
            if tensor.is_meta != first.is_meta:
                places = f"must be on {first.device}, as the other tensors are, got {tensor.device}"
                raise RuntimeError(f"{op}: {name} {places}")
