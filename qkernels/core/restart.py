"""Optimizers and schedulers as they were when they were made, so that a training can start anew."""

import copy
import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Groups = list[dict[str, Any]]

# The groups of an optimizer and its state by Parameter; of a scheduler those of its optimizer and its own state.
_firsts: WeakKeyDictionary[Optimizer | LRScheduler, tuple[Groups, dict]] = WeakKeyDictionary()


def remember(made: Optimizer | LRScheduler) -> None:
    """Keeps the state that `made` has now, unless one is kept already."""
    if made not in _firsts:
        optimizer = made if isinstance(made, Optimizer) else made.optimizer
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        state = made.state if made is optimizer else made.state_dict()
        _firsts[made] = copy.deepcopy(groups), {key: copy.deepcopy(value) for key, value in state.items()}


def remembered(cls: Callable) -> Callable:
    """Makes what `cls` makes, and remembers it if it is an optimizer or a scheduler."""

    @functools.wraps(cls, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        made = cls(*args, **kwargs)
        if isinstance(made, (Optimizer, LRScheduler)):
            remember(made)
        return made

    return make


def restart(made: Optimizer | LRScheduler) -> None:
    """Brings the kept state back. Parameters stay in the groups where they are, those that joined since, too.

    Begin with the optimizers: what a scheduler keeps of their groups is what its own beginning made of them.
    """
    groups, state = _firsts[made]
    state = {key: copy.deepcopy(value) for key, value in state.items()}
    if isinstance(made, Optimizer):
        made.state.clear()
        made.state.update(state)
    else:
        made.load_state_dict(state)
    optimizer = made if isinstance(made, Optimizer) else made.optimizer
    for group, first in zip(optimizer.param_groups, groups, strict=False):  # groups may have been added
        group.update(copy.deepcopy(first))
