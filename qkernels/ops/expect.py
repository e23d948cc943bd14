"""The check of what a wrapper takes apart before its op could look at it."""

from typing import Any

from torch import Tensor

from qkernels.errors import InvalidType


def expect_tensor(op: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidType(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    return value
