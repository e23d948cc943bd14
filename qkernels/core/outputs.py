"""What a model returns, as tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from qkernels.errors import InvalidType


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists, mappings, dataclasses and what torch's pytree knows, in their order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from tensors(getattr(output, field.name))
    else:
        yield from (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def output_tensors(verb: str, output: Any) -> list[Tensor]:
    """The tensors of a model's output.

    Raises:
        InvalidType: there are none.
    """
    found = list(tensors(output))
    if not found:
        raise InvalidType(
            f"{verb}: the model's output must hold tensors, in tuples, lists, dicts or dataclasses, got a "
            f"{type(output).__name__} with none"
        )
    return found
