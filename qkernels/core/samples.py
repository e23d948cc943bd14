"""`Samples`: inputs of the calibration, kept for what is done after it."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Call = tuple[tuple, dict]


class Samples:
    """Copies of the first calls of a model, whole, as many as it takes for `wanted` samples.

    A sample is an index of dimension 0 of the first tensor. Only calls are kept whose arguments look like those of the
    first one, but for the number of samples.
    """

    def __init__(self, wanted: int):
        self.wanted, self.count = wanted, 0
        self.calls: list[Call] = []
        self._looks: Any = None

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the model."""
        if self.count >= self.wanted:
            return
        leaves, structure = tree_flatten((args, kwargs))
        size = _batch_size(leaves)
        looks = (structure, [_looks(leaf, size) for leaf in leaves])
        if self._looks is None:
            self._looks = looks
        if looks != self._looks:
            return
        kept = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.calls.append(tree_unflatten(kept, structure))
        self.count += size

    def first(self, count: int) -> list[Call]:
        """As many calls as it takes for `count` samples."""
        found = 0
        for i, call in enumerate(self.calls):
            if found >= count:
                return self.calls[:i]
            found += _batch_size(tree_flatten(call)[0])
        return self.calls


def _batch_size(leaves: list) -> int:
    return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), 1)


def _is_batch(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


def _looks(leaf: Any, size: int) -> Any:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    shape = tuple(leaf.shape[1:]) if _is_batch(leaf, size) else tuple(leaf.shape)
    return leaf.dtype, _is_batch(leaf, size), shape
