"""Binary networks: signs with a straight-through gradient for training, products of packed signs for inference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.ops.eager import refuse_transforms
from qkernels.ops.expect import expect_sizes
from qkernels.ops.fake import register_fake

_ops = torch.ops.qkernels


def binary_sign(x: Tensor, is_weight: bool = False) -> Tensor:
    """+1 where `x >= 0`, else -1 (also for NaN); the gradient passes where |x| <= 1.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and layout.
        is_weight: the gradient also passes beyond 1 where it leads back (`x * grad > 0`).

    Returns:
        A tensor of the dtype, shape and layout of `x`.

    Raises:
        RuntimeError: `x` has another dtype.
    """
    refuse_transforms("binary_sign", x)
    return _ops.binary_sign.default(x, is_weight)


def binary_sign_backward(grad: Tensor, x: Tensor, is_weight: bool = False) -> Tensor:
    """The gradient of `binary_sign` by `x`: `grad` where it passes, else 0.

    Args:
        grad: the gradient of the output; dtype and shape of `x`.
        x, is_weight: the arguments of the forward.

    Raises:
        RuntimeError: an argument has the wrong dtype or shape; the message names it.
    """
    refuse_transforms("binary_sign_backward", grad, x)
    return _ops.binary_sign_backward.default(grad, x, is_weight)


def pack_signs(x: Tensor, axis: int) -> Tensor:
    """The signs of `x` along `axis` (the channels: 1 of an image, -1 of a matrix) as bits of int64 words.

    Returns:
        An int64 tensor with the other dimensions of `x` in order and a last one of `ceil(n / 64)` words. Bit `k % 64`
        of word `k // 64` is `x[k] >= 0`; bits beyond the last element are 0.

    Raises:
        RuntimeError: an argument has the wrong dtype or range; the message names it.
    """
    return _ops.pack_signs.default(x, axis)


def binary_weight_pack(weight: Tensor) -> Tensor:
    """The signs of a weight as `binary_linear` ([out, in]) and `binary_conv2d` ([out, in, height, width]) take them.

    The bytes are the same for every instruction set.
    """
    return _ops.binary_weight_pack.default(weight)


def binary_linear(input: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, in_features: int) -> Tensor:
    """`(sign(x) @ sign(w).T) * scale + bias` of packed signs, the sum exact.

    Args:
        input: packed activations, `pack_signs(x, -1)`.
        packed: `binary_weight_pack(weight)`.
        scale: float32, one an output; ones for the plain sums.
        bias: float32, one an output, or None.
        in_features: the number of signs in a row.

    Returns:
        float32 [..., out_features].

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or range; the message names it.
    """
    return _ops.binary_linear.default(input, packed, scale, bias, in_features)


def binary_conv2d(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """The convolution of packed signs, the sum exact; padding contributes 0, as in a float convolution of signs.

    Args:
        input: packed activations [N, H, W, words], `pack_signs(x, 1)`.
        packed: `binary_weight_pack(weight)`.
        scale, bias, in_channels: as in `binary_linear`.
        kernel_size, stride, padding, dilation: two numbers each.

    Returns:
        float32 [N, out_channels, H', W'] in channels-last memory.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or range; the message names it.
    """
    sizes = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    geometry = [expect_sizes("binary_conv2d", *size) for size in sizes.items()]
    return _ops.binary_conv2d.default(input, packed, scale, bias, in_channels, *geometry)


@register_fake("binary_sign")
def _(x, is_weight):
    return torch.empty_like(x)


@register_fake("binary_sign_backward")
def _(grad, x, is_weight):
    return torch.empty_like(x)


@register_fake("pack_signs")
def _(x, axis):
    shape = [n for d, n in enumerate(x.shape) if d != axis % x.dim()]
    return x.new_empty([*shape, (x.shape[axis] + 63) // 64], dtype=torch.int64)


@register_fake("binary_weight_pack")
def _(weight):
    words = (weight.shape[1] + 63) // 64
    for n in weight.shape[2:]:
        words = words * n
    return weight.new_empty([(weight.shape[0] + 31) // 32, words, 32], dtype=torch.int64)


@register_fake("binary_linear")
def _(input, packed, scale, bias, in_features):
    return input.new_empty([*input.shape[:-1], scale.numel()], dtype=torch.float32)


@register_fake("binary_conv2d")
def _(input, packed, scale, bias, in_channels, kernel_size, stride, padding, dilation):
    sizes = [
        (input.shape[1 + d] + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1) // stride[d] + 1
        for d in range(2)
    ]
    shape = [input.shape[0], scale.numel(), *sizes]
    return torch.empty(shape, dtype=torch.float32, device=input.device, memory_format=torch.channels_last)


def _keep(ctx, inputs, output):
    x, ctx.is_weight = inputs
    ctx.save_for_backward(x)


torch.library.register_autograd(
    "qkernels::binary_sign",
    lambda ctx, grad: (_ops.binary_sign_backward.default(grad, *ctx.saved_tensors, ctx.is_weight), None),
    setup_context=_keep,
)
