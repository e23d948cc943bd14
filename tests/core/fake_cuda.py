"""A GPU that does not exist: its tensors have no values, so that whatever asks for one is an error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextmanager
def on_fake_cuda(model: nn.Module) -> Iterator[Callable[..., Tensor]]:
    """`model` with its tensors there, and what makes others: `new(shape, dtype=torch.float32)`."""
    with FakeTensorMode(shape_env=ShapeEnv(allow_scalar_outputs=False), allow_non_fake_inputs=True):
        new = torch.empty(0, device="cuda").new_empty
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = new(buffer.shape, dtype=buffer.dtype)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(new(parameter.shape))
        yield new
