"""Batch normalization as part of the layer before it, while that layer is trained."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qkernels import ops


class Freezable:
    """Mixin, in front of a batch normalization: while it is `frozen` it takes its running statistics in training too,
    and leaves them alone.
    """

    frozen: bool = False

    @property
    def live(self) -> bool:
        return self.training and not self.frozen

    def forward(self, input: Tensor) -> Tensor:
        if not (self.frozen and self.training) or self.running_mean is None:
            return super().forward(input)
        own = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(input, *own, training=False, eps=self.eps)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.frozen, dtype=torch.bool, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.frozen = bool(state)


class Norm(Freezable, _BatchNorm):
    """Live in training (batch statistics, running statistics updated); folded into the weight when frozen or in eval.

    One that `folds` is folded in training too, by running statistics that follow the batches.

    Parameters and buffers are those of the batch normalization that it was made of, under their names.
    """

    folds: bool = False

    @classmethod
    def of(cls, norm: nn.Module) -> "Norm":
        """The same function, with the same Parameters and buffers."""
        made = cls.__new__(cls)
        made.__dict__.update(norm.__dict__)
        for table in ("_parameters", "_buffers", "_modules"):
            made.__dict__[table] = dict(norm.__dict__[table])
        return made

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank: it was checked where the layer was."""

    def scale(self) -> Tensor:
        """The factor of each channel under the running statistics; differentiable by the weight."""
        inverse = torch.rsqrt(self.running_var + self.eps)
        return inverse if self.weight is None else self.weight * inverse

    def shift(self, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The bias of the folded layer; differentiable."""
        shift = -self.running_mean * scale if bias is None else (bias - self.running_mean) * scale
        return shift if self.bias is None else shift + self.bias

    def can_be_fused(self, x: Tensor) -> bool:
        """Whether `statistics` and an affine map are all that its forward does to `x`."""
        hooks = watches_output(self) or self._forward_pre_hooks
        if not self.live or hooks or self.momentum is None or self.running_mean is None:
            return False
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        if any(t is not None and t.dtype != torch.float32 for t in own) or x.dtype != torch.float32:
            return False
        return (x.is_cpu or x.is_cuda) and x.numel() // x.shape[1] > 1 and _is_channels_last(x)

    @torch.no_grad()
    def statistics(self, x: Tensor) -> ops.BatchStatistics:
        """Those of the batch; the running ones follow."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = self.running_mean, self.running_var, self.momentum, self.eps
        return ops.batch_norm_statistics(x, self.weight, self.bias, *running)


class FreeBatchNorm1d(Freezable, nn.BatchNorm1d):
    float_class = nn.BatchNorm1d


class FreeBatchNorm2d(Freezable, nn.BatchNorm2d):
    float_class = nn.BatchNorm2d


class FreeBatchNorm3d(Freezable, nn.BatchNorm3d):
    float_class = nn.BatchNorm3d


class FreeSyncBatchNorm(Freezable, nn.SyncBatchNorm):
    float_class = nn.SyncBatchNorm


FREE: dict[type[nn.Module], type[Freezable]] = {
    cls.float_class: cls for cls in (FreeBatchNorm1d, FreeBatchNorm2d, FreeBatchNorm3d, FreeSyncBatchNorm)
}


def make_freezable(module: nn.Module) -> None:
    """A batch normalization of torch's, one that no layer has taken in, gets the class that can be frozen."""
    module.__class__ = FREE.get(type(module), type(module))


def as_torch_norm(module: nn.Module) -> None:
    """Undoes `make_freezable`."""
    if type(module) in FREE.values():
        module.__class__ = module.float_class
        vars(module).pop("frozen", None)


def watches_output(module: nn.Module) -> bool:
    """Whether hooks see or change what `module` returns, or its gradient."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous() if x.dim() == 2 else x.movedim(1, -1).is_contiguous()


def scale_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode is x * scale + shift; both in float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    scale = weight / torch.sqrt(var + norm.eps)
    return scale, bias - mean * scale


def scaled_range(norm: nn.Module, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The ranges of the channels of a weight after `norm` is folded into it.

    A negative factor turns a range around; a symmetric one stays as it is, so that the grid keeps its codes.
    """
    scale, _ = scale_shift(norm)
    ends = torch.stack((low, high)) * (scale.abs() if symmetric else scale)
    return ends.amin(0), ends.amax(0)
