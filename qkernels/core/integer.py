"""The integer kernels in the forward of a layer that is trained; its backward is that of the float layer.

The input and the weight lie on grids already, so quantizing them again gives their codes exactly. Products are summed
in int32 and dequantized; the gradients are those of the float layer at the dequantized input and weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels import ops
from qkernels.core.quantizer import Quantizer
from qkernels.ops.eager import once_differentiable


def takes_integers(layer: nn.Module, x: Tensor, source: Quantizer) -> bool:
    """Whether the forward of `layer` on `x` can run on the kernels now."""
    return (
        source.rounded
        and layer.quantizers["weight"].rounds
        and not (source.spec.simulated or layer.quantizers["weight"].spec.simulated)
        and (x.is_cpu or x.is_cuda)
        and x.dtype == torch.float32
        and x.numel() > 0
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not torch.is_autocast_enabled(x.device.type)
    )


class IntegerForward(torch.autograd.Function):
    """`layer` on `x` with a weight on its grid: integer forward, float backward.

    weight and bias carry the gradient; what is computed with follows: the weight on its grid, its codes, their grid and
    the bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: nn.Module,
        source: Quantizer,
        rounded: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        number: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, rounded)
        ctx.layer, ctx.weight = layer, weight
        grid = source.grid()
        arguments = codes, scale, zero_point, number, *grid, source.spec.dtype
        return layer.compute_integer(source.codes(x, grid), *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, rounded = ctx.saved_tensors  # once: what is recomputed is given once
        return _gradients(ctx, grad, x, rounded, ctx.weight)


@once_differentiable("forward='int8' of prepare_qat")
def _gradients(ctx: Any, grad: Tensor, x: Tensor, rounded: Tensor, _weight: Tensor) -> tuple:
    """Their second derivative would be one by the weight too, which therefore comes along."""
    return *ctx.layer.gradients(grad, x, rounded, ctx.needs_input_grad[:3]), *[None] * 7


class IntegerLinear:
    """What `IntegerForward` needs of a linear layer."""

    def has_integer_form(self) -> bool:
        return True

    def compute_integer(self, codes: Tensor, *arguments: Any) -> Tensor:
        return ops.linear(codes, ops.pack_on_grid(*arguments), self.out_features, torch.float32)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needed: tuple) -> tuple:
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if needed[0] else None,
            flat.t() @ x.reshape(-1, x.shape[-1]) if needed[1] else None,
            flat.sum(0) if needed[2] else None,
        )


class IntegerConv:
    """What `IntegerForward` needs of a convolution, transposed or not."""

    def has_integer_form(self) -> bool:
        return True

    def _padding(self) -> list[int]:
        """[before, after] for each spatial dimension, flat."""
        return ops.conv_padding(self.padding, self.kernel_size, self.dilation)

    def compute_integer(self, codes: Tensor, *arguments: Any) -> Tensor:
        padding = self._padding()
        form = (self.stride, padding, self.dilation, self.groups, self.transposed, self.padding_mode)
        geometry = ops.conv_geometry(self.kernel_size, *form)
        packed = ops.pack_on_grid(*arguments, geometry)
        size = ops.conv_output_size(
            codes.shape[2:],
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.transposed,
            self.output_padding if self.transposed else 0,
        )
        return ops.conv(codes, packed, None, self.out_channels, size, torch.float32, geometry)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needed: tuple) -> tuple:
        padding = self._padding()
        if self.padding_mode == "zeros" and padding[::2] == padding[1::2]:
            return self._gradients(grad, x, weight, padding[::2], needed)
        # torch's own convolution cannot be told this padding: it pads first, and so does this.
        sides = [side for d in range(len(padding) - 2, -1, -2) for side in padding[d : d + 2]]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        with torch.enable_grad():
            x = x.detach().requires_grad_(needed[0])
            padded = F.pad(x, sides, mode)
        grad_padded, *others = self._gradients(grad, padded.detach(), weight, [0] * len(self.kernel_size), needed)
        return torch.autograd.grad(padded, x, grad_padded)[0] if needed[0] else None, *others

    def _gradients(self, grad: Tensor, x: Tensor, weight: Tensor, padding: list[int], needed: tuple) -> tuple:
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [self.out_channels],
            self.stride,
            padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            needed,
        )
