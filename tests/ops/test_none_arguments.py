"""None in the place of a tensor, and other things that an op cannot take apart: named, without a line of C++."""

import subprocess
import sys

import pytest
import torch

from qkernels import ops
from qkernels.errors import InvalidArgument, InvalidType
from qkernels.ops.epilogue import Epilogue, ResidualAdd

X, ONE, ZERO = torch.randn(3, 4), torch.ones(1), torch.zeros(1, dtype=torch.int32)
CODES = torch.zeros(3, 4, dtype=torch.uint8)
WEIGHT = torch.zeros(3, 4, dtype=torch.int8)
PACKED = ops.linear_pack(WEIGHT, ONE, None, None, 1.0, 0, torch.uint8, Epilogue(torch.int32))
STATE = [ONE.clone(), ONE.clone(), ONE.clone(), ZERO.clone(), None]
GRID = None, 0, 255, False, 1e-9, None, "x"
STATISTICS = ops.BatchStatistics(*(torch.ones(4) for _ in range(4)), torch.ones(2))


def packed(epilogue: Epilogue) -> torch.Tensor:
    return ops.linear_pack(WEIGHT, ONE, None, None, 1.0, 0, torch.uint8, epilogue)


SEEN_BY_THE_OP = [
    (lambda: ops.quantize(None, ONE, ZERO, None, 0, 255, torch.uint8), "quantize: argument 1"),
    (lambda: ops.quantize(X, ONE, None, None, 0, 255, torch.uint8), "quantize: argument 3"),
    (lambda: ops.dequantize(CODES, None, ZERO, None), "dequantize: argument 2"),
    (lambda: ops.fake_quant(None, ONE, ZERO, None, 0, 255), "fake_quant: argument 1"),
    (lambda: ops.lsq(X, None, ONE, None, 0, 255, 1.0), "lsq: argument 2"),
    (lambda: ops.linear(None, PACKED, 3), "linear: argument 1"),
    (lambda: ops.linear(CODES, None, 3), "linear: argument 2"),
    (lambda: ops.conv(None, PACKED, None, 3, [1, 1], torch.uint8), "conv: argument 1"),
    (lambda: ops.linear_pack(None, ONE, None, None, 1.0, 0, torch.uint8, Epilogue()), "linear_pack: argument 1"),
    (lambda: ops.add(None, CODES, 0.1, 0, 0.1, 0, 0.1, 0, 0, 255, torch.uint8), "add: argument 1"),
    (lambda: ops.linear_rows(None, PACKED, ONE, ZERO, ONE, ZERO, None, 3), "linear_rows: argument 1"),
]


@pytest.mark.parametrize(("call", "message"), SEEN_BY_THE_OP, ids=[message for _, message in SEEN_BY_THE_OP])
def test_none_is_named_by_the_op(call, message):
    with pytest.raises(RuntimeError, match=rf"^{message} must be a tensor, got None$"):
        call()


SIZES = "must be a list of one integer a dimension"
IMAGE = torch.zeros(1, 4, 9, dtype=torch.uint8)
SEEN_BEFORE = [
    (lambda: ops.quantize_rows(None, 0, 255, False, torch.uint8), "quantize_rows: x must be a tensor, got None"),
    (lambda: ops.linear_rows(CODES, PACKED, None, ZERO, ONE, ZERO, None, 3), "linear_rows: row_scale must be a tens"),
    (lambda: ops.linear_rows(CODES, PACKED, ONE, ZERO, ONE, ZERO, 3, 3), "linear_rows: bias must be a tensor, got int"),
    (lambda: ops.observe_fake_quant(None, *STATE, *GRID), "observe_fake_quant: x must be a tensor, got NoneType"),
    (
        lambda: ops.batch_norm_fake_quant(X, None, None, STATISTICS, None, ZERO, 0, 255),
        "batch_norm_fake_quant: scale must be a tensor, got NoneType",
    ),
    (
        lambda: ops.batch_norm_fake_quant(X, None, None, STATISTICS, ONE, 0, 0, 255),
        "batch_norm_fake_quant: zero_point must be a tensor, got int",
    ),
    (lambda: ops.round_gradient(None, 8), "round_gradient: x must be a tensor, got NoneType"),
    (lambda: ops.round_gradient(X, 1.5), "round_gradient: bits must be an integer, got 1.5"),
    (lambda: ops.fake_quant(X, ONE, ZERO, 1, 0, 255, group_size=2.0), "fake_quant: group_size must be an integer, got"),
    (lambda: ops.lsq(X, ONE, ONE, 1, 0, 255, 1.0, group_size="2"), "lsq: group_size must be an integer, got '2'"),
    (lambda: packed(Epilogue("u8")), "linear_pack: epilogue.dtype must be a torch.dtype, got 'u8'"),
    (lambda: packed(Epilogue(scale=None)), "linear_pack: epilogue.scale must be a number, got None"),
    (lambda: packed(Epilogue(zero_point="3")), "linear_pack: epilogue.zero_point must be a number, got '3'"),
    (lambda: packed(Epilogue(residual=1)), "linear_pack: epilogue.residual must be a ResidualAdd, got int"),
    (
        lambda: packed(Epilogue(residual=ResidualAdd(1.0, 0, 1.0, None, 0, 255))),
        "linear_pack: epilogue.residual.out_zero_point must be a number, got None",
    ),
    (
        lambda: ops.linear_pack(WEIGHT, ONE, None, None, 1.0, 0, torch.uint8, WEIGHT),
        "linear_pack: epilogue must be an Epilogue, got Tensor",
    ),
    (
        lambda: ops.conv_pack(WEIGHT[..., None, None], ONE, None, None, 1.0, 0, torch.uint8, None),
        "conv_pack: epilogue must be an Epilogue, got NoneType",
    ),
    (
        lambda: ops.conv_pack(None, ONE, None, None, 1.0, 0, torch.uint8, Epilogue()),
        "conv_pack: weight must be a tensor, got NoneType",
    ),
    (lambda: ops.conv_geometry("a"), f"conv_geometry: kernel_size {SIZES}, got str"),
    (lambda: ops.conv_geometry(["a"]), "conv_geometry: sizes, stride, padding, dilation and groups must be integers"),
    (lambda: ops.conv_geometry([3], stride=None), f"conv_geometry: stride {SIZES}, got NoneType"),
    (lambda: ops.conv_geometry([3], transposed="no"), "conv_geometry: transposed must be True or False, got 'no'"),
    (lambda: ops.conv_output_size(7, [3]), f"conv_output_size: input_size {SIZES}, got 7"),
    (lambda: ops.conv_output_size([7], [3], padding=1.5), f"conv_output_size: padding {SIZES}, got 1.5"),
    (lambda: ops.conv_padding(1, 3), f"conv_padding: kernel_size {SIZES}, got 3"),
    (
        lambda: ops.conv_pack(WEIGHT[..., None], ONE, None, None, 1.0, 0, torch.uint8, Epilogue(), dilation=None),
        f"conv_pack: dilation {SIZES}, got NoneType",
    ),
    (lambda: ops.conv(IMAGE, PACKED, None, 3, None, torch.uint8), f"conv: output_size {SIZES}, got NoneType"),
    (lambda: ops.max_pool(IMAGE, 3, [1], [0], [1]), f"max_pool: kernel_size {SIZES}, got 3"),
    (
        lambda: ops.avg_pool(IMAGE, [3], [1], None, False, True, None, 0.1, 0, 0.1, 0, 0, 255, torch.uint8),
        f"avg_pool: padding {SIZES}, got NoneType",
    ),
    (
        lambda: ops.adaptive_avg_pool(IMAGE, None, 0.1, 0, 0.1, 0, 0, 255, torch.uint8),
        f"adaptive_avg_pool: output_size {SIZES}, got NoneType",
    ),
    (
        lambda: ops.binary_conv2d(X, X, ONE, None, 4, 3, [1, 1], [0, 0], [1, 1]),
        f"binary_conv2d: kernel_size {SIZES}, got 3",
    ),
    (lambda: ops.cat(CODES, CODES, 0), "cat: tensors must be a list of tensors, got Tensor"),
    (lambda: ops.foreach_fake_quant(None, [ONE], [ZERO], [None], 0, 1), "foreach_fake_quant: xs must be a list of ten"),
    (lambda: ops.foreach_fake_quant([3], [ONE], [ZERO], [None], 0, 1), "foreach_fake_quant: each of xs must be a tens"),
    (lambda: ops.foreach_fake_quant([X], [ONE], [ZERO], 0, 0, 1), "foreach_fake_quant: axes must be a list of dim"),
    (
        lambda: ops.foreach_fake_quant([X], [ONE], [ZERO], ["0"], 0, 1),
        "foreach_fake_quant: each of axes must be an int",
    ),
    (lambda: ops.conv_geometry([3], groups=1.5), "conv_geometry: sizes, stride, padding, dilation and groups must be"),
]


@pytest.mark.parametrize(("call", "message"), SEEN_BEFORE, ids=[message for _, message in SEEN_BEFORE])
def test_what_cannot_be_taken_apart_is_named(call, message):
    with pytest.raises(InvalidType, match=rf"^{message}"):
        call()


def test_unknown_ways_of_padding_are_named():
    with pytest.raises(InvalidArgument, match=r"^conv_geometry: padding_mode must be one of .*, got 'mirror'$"):
        ops.conv_geometry([3], padding_mode="mirror")
    with pytest.raises(InvalidArgument, match=r"^conv_padding: padding must be 'same', 'valid' or numbers, got 'some'"):
        ops.conv_padding("some", [3])


def test_lists_of_other_lengths_are_named():
    with pytest.raises(
        InvalidArgument, match=r"^foreach_fake_quant: axes must have one entry for each of xs, got 2 for 1$"
    ):
        ops.foreach_fake_quant([X], [ONE], [ZERO], [None, 0], 0, 1)


def test_messages_of_ops_begin_with_the_op_and_name_dtypes_as_torch_does():
    with pytest.raises(RuntimeError) as caught:
        ops.quantize(X, ONE, ZERO.float(), None, 0, 255, torch.uint8)
    assert str(caught.value) == "quantize: zero_point must be torch.int32, got torch.float32"
    with pytest.raises(RuntimeError) as caught:
        ops.quantize(X.double(), ONE, ZERO, None, 0, 255, torch.uint8)
    wanted = "torch.float32, torch.bfloat16 or torch.float16"
    assert str(caught.value) == f"quantize: x must be {wanted}, got torch.float64"


def test_none_leaves_no_backtrace_on_stderr():
    code = (
        "import torch\nfrom qkernels import ops\ntry:\n"
        "    ops.quantize(None, torch.ones(1), torch.zeros(1, dtype=torch.int32), None, 0, 255, torch.uint8)\n"
        "except RuntimeError:\n    pass"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
