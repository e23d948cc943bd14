"""When a wrapper may leave the dispatcher's Python autograd aside, and which derivatives there are not.

`torch.library.register_autograd` costs tens of microseconds a call, more than the kernel takes on a small tensor. A
plain tensor outside of torch.compile goes through a `torch.autograd.Function` on the `_out` op instead, or straight to
it where no gradient is wanted. Everything else (torch.compile, fake tensors, subclasses, torch.vmap) takes the
registered op.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from qkernels.errors import InvalidArgument

_PLAIN = (Tensor, nn.Parameter)
_functorch = torch._C._functorch
_DIFFERENTIATING = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)


def is_eager(op: str, *tensors: Tensor) -> bool:
    """Also refuses what `refuse_transforms` does."""
    if torch.compiler.is_compiling() or _is_transformed(op, tensors):
        return False
    return all(type(t) in _PLAIN for t in tensors)


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def refuse_transforms(op: str, *tensors: Tensor) -> None:
    """An error where torch.func or forward-mode AD would differentiate `op`: torch would drop the tangent silently."""
    if not torch.compiler.is_compiling():
        _is_transformed(op, tensors)


def expect_no_graph(op: str, name: str, out: Tensor) -> None:
    """Refuses an `out` whose gradient would still be that of what it held before."""
    if isinstance(out, Tensor) and out.requires_grad and torch.is_grad_enabled():
        raise InvalidArgument(f"{op}: {name} must not require a gradient: detach() it, or call under torch.no_grad()")


def note_written(*tensors: Tensor | None) -> None:
    """Tells autograd that the op has written them: a backward that still needs what they held becomes an error."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def _is_transformed(op: str, tensors: tuple[Tensor, ...]) -> bool:
    in_func = torch._C._are_functorch_transforms_active()
    if not in_func and forward_ad._current_level < 0:
        return False
    tracked = in_func and any(level.key() in _DIFFERENTIATING for level in _functorch.get_interpreter_stack())
    if any(_is_differentiated(t, tracked) for t in tensors):
        raise NotImplementedError(
            f"{op}: its gradient is for torch.autograd alone (backward, torch.autograd.grad); torch.func.grad, vjp and "
            "jvp and torch.autograd.forward_ad cannot differentiate it: detach() what needs no derivative"
        )
    return True


def _is_differentiated(t: Tensor, tracked: bool) -> bool:
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_gradtrackingtensor(t):
            return True
        t = _functorch.get_unwrapped(t)
    return (tracked and needs_grad(t)) or forward_ad.unpack_dual(t).tangent is not None


def once_differentiable(op: str) -> Callable[[Callable], Callable]:
    """For a backward that is not to be differentiated.

    The error of torch's decorator of this name hangs beside the graph: `torch.autograd.grad` for chosen inputs misses
    it and leaves out a part of the second derivative. This one lies between the results and what they are computed
    from: incoming gradients and saved tensors, which the backward has as arguments.
    """

    def decorate(backward: Callable) -> Callable:
        def wrapped(ctx, *tensors):
            with torch.no_grad():
                results = backward(ctx, *tensors)
            if not needs_grad(*tensors):
                return results
            return tuple(None if result is None else _Last.apply(op, result, *tensors) for result in results)

        return wrapped

    return decorate


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, result, *sources):
        ctx.op = op
        return result.view_as(result)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(f"{ctx.op}: its gradient cannot be differentiated again; leave create_graph out")
