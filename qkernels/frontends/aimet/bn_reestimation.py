"""reestimate_bn_stats: running statistics of batch normalizations that stayed, over the rounded weights."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import islice
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qkernels.core.phases import evaluating
from qkernels.core.training import average_statistics, restore, running_statistics
from qkernels.errors import InvalidArgument


class Handle(ExitStack):
    """Puts back what was before, by `remove()` or at the end of a `with`."""

    remove = ExitStack.close


def reestimate_bn_stats(
    model: nn.Module,
    dataloader: Iterable[Any],
    num_batches: int = 100,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> Handle:
    """The mean of the statistics of the first `num_batches` batches; the rest of the model is in eval mode meanwhile.

    `forward_fn(model, batch)` runs a batch if it is not one call of the model.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise InvalidArgument("reestimate_bn_stats: the model has no batch normalization with running statistics")
    handle = Handle()
    handle.callback(restore, running_statistics(norms))
    with evaluating(model):
        average_statistics(model, norms, islice(dataloader, num_batches), forward_fn)
    return handle
