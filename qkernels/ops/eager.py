"""When a wrapper may leave the dispatcher's Python autograd aside.

`torch.library.register_autograd` costs tens of microseconds a call, more than the kernel takes on a small tensor. A
plain tensor outside of torch.compile goes through a `torch.autograd.Function` on the `_out` op instead, or straight to
it where no gradient is wanted. Everything else (torch.compile, fake tensors, subclasses) takes the registered op.
"""

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_eager(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return all(type(t) in _PLAIN for t in tensors)


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
