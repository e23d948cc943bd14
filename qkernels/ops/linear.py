"""Linear layers on integers: pack the weight once, then run."""

import torch
from torch import Tensor

from qkernels import _C
from qkernels.ops.epilogue import OUTPUT_DTYPES, Epilogue, schema_arguments
from qkernels.ops.fake import register_fake

_ops = torch.ops.qkernels


def linear_pack(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: float,
    input_zero_point: int,
    input_dtype: torch.dtype,
    epilogue: Epilogue,
) -> Tensor:
    """Lays a weight out for the kernels of the active instruction set, with all grids and the epilogue.

    Args:
        weight: int8 [out_features, in_features], on the device where it will run. On CUDA packing waits for the device.
        weight_scale: float32, positive and normal; 1 element, or one an output feature.
        weight_zero_point: int32 in [-128, 127], 1 element or one an output feature; None: 0 (the fastest).
        bias: float32 [out_features] or None.
        input_scale, input_zero_point, input_dtype: the grid of the input; uint8 or int8.
        epilogue: what happens to the int32 sums, see `Epilogue`.

    Returns:
        Opaque bytes for `linear`: valid in this version of qkernels, for this instruction set. They are never state:
        keep the arguments and pack again.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or range, or in_features is so large that the int32 sums
            could overflow; the message names it.

    Example:
        >>> weight = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
        >>> epilogue = Epilogue(dtype=torch.int32)
        >>> packed = linear_pack(weight, torch.ones(1), None, None, 1.0, 10, torch.uint8, epilogue)
        >>> linear(torch.tensor([[11, 12]], dtype=torch.uint8), packed, 2, torch.int32).tolist()
        [[5, 11]]
    """
    return _ops.linear_pack.default(
        weight,
        weight_scale,
        weight_zero_point,
        bias,
        input_scale,
        input_zero_point,
        input_dtype,
        *schema_arguments("linear_pack", epilogue),
    )


def linear(
    input: Tensor, packed: Tensor, out_features: int, dtype: torch.dtype = torch.uint8, residual: Tensor | None = None
) -> Tensor:
    """`epilogue(sum over k of (input[..., k] - za) * (weight[n, k] - zw[n]))`, exact in int32 up to the epilogue.

    Args:
        input: [..., in_features] of the packed input dtype. Rows at one stride are read where they lie; any other
            layout is copied.
        packed: the result of `linear_pack`.
        out_features, dtype: as packed; they give the shape and dtype of the result.
        residual: uint8 or int8 of the shape of the result, if and only if the epilogue has a residual.

    Returns:
        A contiguous tensor [..., out_features] of `dtype`: the same bits on every instruction set and for any number of
        threads, and those of torch's fbgemm engine with per-channel weights on a machine with VNNI.

    Raises:
        RuntimeError: `packed` is damaged or was made for something else, or an argument has the wrong dtype or shape.
    """
    return _ops.linear.default(input, packed, residual, out_features, dtype)


@register_fake("linear_pack")
def _(
    weight, weight_scale, weight_zero_point, bias, input_scale, input_zero_point, input_dtype, epilogue, dtype, table
):
    out_features, in_features = weight.shape
    if weight.device.type == "cuda":  # the length says what a launch must know: csrc/gemm/cuda_pack.h
        facts = (OUTPUT_DTYPES.index(dtype), input_dtype == torch.int8, weight_zero_point is not None)
        sizes = (int(out_features), int(in_features))
        return weight.new_empty(_C.packed_linear_bytes_cuda(*sizes, *facts, len(epilogue) == 10), dtype=torch.uint8)
    return weight.new_empty(_C.packed_linear_bytes(int(out_features), int(in_features)), dtype=torch.uint8)


@register_fake("linear")
def _(input, packed, residual, out_features, output_dtype):
    return input.new_empty((*input.shape[:-1], out_features), dtype=output_dtype)
