"""The checks of what a wrapper takes apart before its op could look at it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from qkernels.errors import InvalidType


def expect_tensor(op: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidType(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    return value


def expect_list(op: str, what: str, value: Any) -> list[Any]:
    """A list of what `value` holds; the schema of the op looks at each. `what`: the argument and its kind."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        raise InvalidType(f"{op}: {what}, got {value if isinstance(value, (int, float)) else type(value).__name__}")
    return list(value)


def expect_sizes(op: str, name: str, value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):  # in every call of a convolution: no message is made up
        return list(value)
    return expect_list(op, f"{name} must be a list of one integer a dimension", value)
