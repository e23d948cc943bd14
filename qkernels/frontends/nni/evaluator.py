"""How NNI's quantizers reach the user's training and evaluation loops."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qkernels.core.restart import remember, remembered, restart
from qkernels.errors import InvalidArgument, InvalidType, Unsupported

SCHEDULER = LRScheduler
trace = remembered  # `compress` starts where what it wraps began


def model_wrapper(cls: type) -> type:
    """NNI's decorator for models. Returns `cls`."""
    return cls


class TorchEvaluator:
    """Calls `training_func(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs)`.

    Args:
        training_func: the training loop; called with positional arguments.
        optimizers: one optimizer over the parameters of the model, or several (passed on as a list).
        training_step: `training_step(batch, model)` returns the loss (or a tuple or dict that starts with it).
        lr_schedulers: one, several or None.
        dummy_input: arguments of the model, for what needs a graph.
        evaluating_func: `evaluating_func(model)`, for calibration after training.
    """

    def __init__(
        self,
        training_func: Callable,
        optimizers: Optimizer | list[Optimizer],
        training_step: Callable,
        lr_schedulers: Any = None,
        dummy_input: Any = None,
        evaluating_func: Callable | None = None,
    ):
        self.optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
        if not self.optimizers or not all(isinstance(o, Optimizer) for o in self.optimizers):
            raise InvalidType(f"TorchEvaluator: optimizers must be torch optimizers, got {optimizers!r}")
        several = isinstance(lr_schedulers, (list, tuple))
        self.schedulers = list(lr_schedulers) if several else [lr_schedulers] if lr_schedulers is not None else []
        if not all(isinstance(s, LRScheduler) for s in self.schedulers):
            raise InvalidType(f"TorchEvaluator: lr_schedulers must be torch schedulers or None, got {lr_schedulers!r}")
        for made in (*self.optimizers, *self.schedulers):
            remember(made)
        self.training_func, self.training_step = training_func, training_step
        self.lr_schedulers, self.dummy_input, self.evaluating_func = lr_schedulers, dummy_input, evaluating_func

    def train(self, model: nn.Module, max_steps: int | None, max_epochs: int | None) -> None:
        """Runs the user's loop; optimizers and schedulers start anew, as in NNI, which makes new ones."""
        for made in (*self.optimizers, *self.schedulers):
            restart(made)
        optimizers = self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers
        self.training_func(model, optimizers, self.training_step, self.lr_schedulers, max_steps, max_epochs)

    def evaluate(self, model: nn.Module) -> Any:
        if self.evaluating_func is None:
            raise InvalidArgument("TorchEvaluator: this quantizer calibrates by evaluating_func, which is None")
        return self.evaluating_func(model)


def _other(name: str) -> type:
    def refuse(self, *args: Any, **kwargs: Any) -> None:
        raise Unsupported(f"{name}: wrap the loop in a function and use TorchEvaluator")

    return type(name, (), {"__init__": refuse, "__doc__": "Not available; use TorchEvaluator."})


LightningEvaluator = _other("LightningEvaluator")
TransformersEvaluator = _other("TransformersEvaluator")
DeepspeedTorchEvaluator = _other("DeepspeedTorchEvaluator")
