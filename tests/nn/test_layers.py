"""Converted layers as modules: they agree with their reference, survive copying, and refuse what they cannot take."""

import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qkernels.core.lowering import Clamp, LoweringUnit, lower, lowerable_kinds
from qkernels.core.qspec import QParams, QSpec, choose_qparams
from qkernels.errors import InvalidArgument, InvalidType, Unsupported
from qkernels.nn import (
    Dequantize,
    QAdaptiveAvgPool,
    QAdd,
    QCat,
    QConv,
    QInterpolate,
    QLayer,
    QLinear,
    QLookup,
    QMaxPool,
    QMul,
    Quantize,
)
from qkernels.testing import isa_cap

U8 = QParams.per_tensor(0.05, 131)
S8 = QParams.per_tensor(0.04, -3, -128, 127, torch.int8)


def weight_grid(channels, axis=0):
    return QParams(torch.linspace(0.004, 0.02, channels), torch.zeros(channels), axis, -127, 127, torch.int8)


def codes(*shape, dtype=torch.uint8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g).view(dtype)


def linear(output=U8, input=U8, clamp=None):
    torch.manual_seed(1)
    return QLinear(input, codes(24, 40, dtype=torch.int8), weight_grid(24), torch.randn(24), output, clamp)


def conv(output=U8, clamp=None, **options):
    torch.manual_seed(2)
    defaults = {
        "stride": [1, 1],
        "padding": [[1, 1], [1, 1]],
        "dilation": [1, 1],
        "groups": 1,
        "transposed": False,
        "output_padding": [0, 0],
        "padding_mode": "zeros",
    }
    weight = codes(16, 8, 3, 3, dtype=torch.int8)
    return QConv(U8, weight, weight_grid(16), torch.randn(16), output, clamp, {**defaults, **options})


WINDOW = {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "ceil_mode": False}

LAYERS = {
    "quantize": (lambda: Quantize(U8), lambda: (torch.randn(3, 8, 5, 5),)),
    "dequantize": (lambda: Dequantize(S8), lambda: (codes(3, 8, 5, 5, dtype=torch.int8),)),
    "linear": (linear, lambda: (codes(7, 40),)),
    "linear_float": (lambda: linear(None), lambda: (codes(7, 40),)),
    "linear_s8": (lambda: linear(S8, S8, Clamp(0.0)), lambda: (codes(2, 3, 40, dtype=torch.int8),)),
    "linear_residual": (
        lambda: linear().with_residual(S8, U8, [0.0, None]),
        lambda: (codes(7, 40), codes(7, 24, dtype=torch.int8)),
    ),
    "conv": (lambda: conv(clamp=Clamp(0.0, 6.0)), lambda: (codes(2, 8, 9, 7),)),
    "conv_table": (lambda: conv().with_table(codes(256), U8), lambda: (codes(2, 8, 9, 7),)),
    "conv_residual": (lambda: conv().with_residual(U8, U8, None), lambda: (codes(2, 8, 9, 7), codes(2, 16, 9, 7))),
    "add": (
        lambda: QAdd(U8, S8, U8, {"clamp": [0.0, None]}),
        lambda: (codes(2, 8, 5), codes(2, 8, 5, dtype=torch.int8)),
    ),
    "mul": (lambda: QMul(U8, U8, S8), lambda: (codes(2, 8, 5, 3), codes(2, 8, 1, 1))),
    "cat": (lambda: QCat([U8, U8], S8, 1), lambda: ([codes(2, 3, 5), codes(2, 4, 5)],)),
    "lookup": (lambda: QLookup(U8, S8, "hardswish"), lambda: (codes(2, 8, 5),)),
    "max_pool": (
        lambda: QMaxPool(U8, WINDOW),
        lambda: (codes(2, 8, 9, 7),),
    ),
    "adaptive_avg_pool": (
        lambda: QAdaptiveAvgPool(U8, S8, {"output_size": [1, None], "flatten": False}),
        lambda: (codes(2, 8, 9, 7),),
    ),
    "interpolate": (
        lambda: QInterpolate(S8, {"size": None, "scale_factor": [2.0, 2.0], "mode": "nearest"}),
        lambda: (codes(2, 8, 4, 3, dtype=torch.int8),),
    ),
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def made(request):
    make, inputs = LAYERS[request.param]
    return make(), inputs()


def test_forward_equals_the_plain_torch_definition(made, isa):
    layer, inputs = made
    got, expected = layer(*inputs), layer.reference_forward(*inputs)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_a_config_and_a_state_dict_rebuild_the_layer(made):
    layer, inputs = made
    expected = layer(*inputs)
    again = QLayer.from_config(layer.get_config())
    again.load_state_dict(layer.state_dict())
    assert type(again) is type(layer)
    assert torch.equal(again(*inputs), expected)
    assert again.in_qparams == layer.in_qparams
    assert again.out_qparams == layer.out_qparams


def test_copies_and_pickles_compute_the_same_and_carry_no_packed_bytes(made):
    layer, inputs = made
    fresh = len(pickle.dumps(layer))
    expected = layer(*inputs)
    assert len(pickle.dumps(layer)) == fresh
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(*inputs), expected)


def test_inference_mode_gives_the_same(made):
    layer, inputs = made
    with torch.inference_mode():
        inside = layer(*inputs)
    assert torch.equal(inside, layer(*inputs))


def test_half_keeps_the_grids_in_float32(made):
    layer, inputs = made
    expected = layer(*inputs)
    assert torch.equal(layer.half().bfloat16()(*inputs), expected)


def test_the_description_shows_the_grids(made):
    layer, _ = made
    assert "int8(0.0" in repr(layer)


def test_the_description_leaves_out_what_is_usual():
    layer = conv(clamp=Clamp(0.0), stride=[2, 1])
    assert layer.extra_repr() == (
        "8, 16, kernel_size=[3, 3], stride=[2, 1], padding=[[1, 1], [1, 1]], clamp=[0.0, None]; "
        "uint8(0.05, 131) -> uint8(0.05, 131)"
    )


def test_a_float_input_is_refused_with_what_to_do(made):
    layer, inputs = made
    if isinstance(layer, Quantize):
        pytest.skip("takes floats")
    floats = [[t.float() for t in x] if isinstance(x, list) else x.float() for x in inputs]
    layer.name = "body.3"
    with pytest.raises(InvalidType, match=r"'body.3': input0? must be torch.u?int8, got torch.float32") as raised:
        layer(*floats)
    assert "quantize it first" in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


def test_integer_tensors_are_refused_by_quantize():
    with pytest.raises(InvalidType, match="must be a float tensor"):
        Quantize(U8)(codes(3))


def test_a_residual_must_be_given_exactly_when_converted_with_one():
    with pytest.raises(InvalidType, match="expected a residual"):
        linear().with_residual(U8, U8, None)(codes(7, 40))
    with pytest.raises(InvalidType, match="expected no residual"):
        linear()(codes(7, 40), codes(7, 24))


# ---- what is derived follows what it is derived from ----


def test_writing_a_buffer_in_place_takes_effect():
    layer, x = linear(), codes(7, 40)
    before = layer(x)
    layer.weight.neg_()
    layer.bias.mul_(-1)
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), layer.reference_forward(x))


def test_loading_another_calibration_takes_effect():
    layer, x = linear(), codes(7, 40)
    layer(x)
    other = linear(QParams.per_tensor(0.11, 7))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_replacing_a_buffer_takes_effect():
    layer, x = conv(), codes(2, 8, 9, 7)
    layer(x)
    layer.bias = layer.bias + 1
    assert torch.equal(layer(x), layer.reference_forward(x))


def test_buffers_made_in_inference_mode_work():
    with torch.inference_mode():
        layer = linear()
        first = layer(codes(7, 40))
    assert torch.equal(layer(codes(7, 40)), first)


def test_packed_weights_follow_the_instruction_set():
    layer, x = linear(), codes(7, 40)
    expected = layer(x)
    with isa_cap("scalar"):
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)


def test_packing_happens_once():
    layer, x = linear(), codes(7, 40)
    layer(x)
    first = layer.derived()
    layer(x)
    assert layer.derived() is first


def test_many_threads_calling_a_fresh_layer_agree():
    layer, x = conv(), codes(2, 8, 9, 7)
    expected = copy.deepcopy(layer)(x)
    results = [None] * 16
    start = threading.Barrier(16)

    def call(i):
        start.wait()
        results[i] = layer(x)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(r, expected) for r in results)
    gc.collect()


# ---- fusing keeps the codes ----


def test_a_fused_table_gives_the_codes_of_the_separate_lookup():
    first, x = conv(), codes(2, 8, 9, 7)
    second = QLookup(first.out_qparams, QParams.per_tensor(0.03, 9, 3, 250), "hardswish")
    assert torch.equal(first.with_table(second.table, second.out_qparams)(x), second(first(x)))
    with pytest.raises(InvalidArgument, match=r"must keep the dtype torch\.uint8"):
        first.with_table(QLookup(U8, S8, "hardswish").table, S8)


def test_a_fused_residual_gives_the_codes_of_the_separate_addition():
    first, x, r = linear(clamp=Clamp(0.0)), codes(7, 40), codes(7, 24, dtype=torch.int8)
    second = QAdd(first.out_qparams, S8, QParams.per_tensor(0.09, 40), {"clamp": [0.0, None]})
    fused = first.with_residual(S8, second.out_qparams, [0.0, None])
    assert torch.equal(fused(x, r), second(first(x), r))
    assert fused.out_qparams == second.out_qparams


def test_merged_padding_gives_the_codes_of_the_separate_padding():
    layer, x = conv(stride=[2, 2], padding=[[0, 0], [1, 0]]), codes(2, 8, 9, 7)
    zero = U8.item()[1]
    amounts = (0, 1, 2, 3)  # as F.pad takes them, the last dimension first
    merged = layer.with_padding(amounts, zero)
    assert merged.options["padding"] == [[2, 3], [1, 1]]
    assert torch.equal(merged(x), layer(F.pad(x, amounts, value=zero)))
    assert layer.with_padding(amounts, zero + 1) is None
    assert layer.with_padding((-1, 0), zero) is None
    assert layer.with_padding((0, 0, 0, 0, 1, 0), zero) is None


def test_only_one_thing_can_be_fused():
    with pytest.raises(InvalidArgument, match="fused already"):
        conv().with_residual(U8, U8, None).with_table(codes(256), U8)
    assert not linear(None).can_fuse()


# ---- lowering: the layer approximates the float unit ----


@torch.no_grad()
def lowered_close(unit, float_function, *floats, tolerance=1.0):
    """Runs the lowered layer on quantized inputs; its output is within `tolerance` steps of the float result."""
    layer = lower(unit)
    quantized = [grid.quantize(x) for grid, x in zip(unit.inputs, floats, strict=True)]
    exact = float_function(*(grid.dequantize(q) for grid, q in zip(unit.inputs, quantized, strict=True)))
    got = layer(quantized) if unit.kind == "cat" else layer(*quantized)
    grid = layer.out_qparams
    result = got if grid is None else grid.dequantize(got)
    step = 1e-4 if grid is None else grid.item()[0]
    assert result.shape == exact.shape
    ends = [float((end - grid.item()[1]) * step) for end in (grid.qmin, grid.qmax)] if grid else [-1e9, 1e9]
    assert float((result - exact.clamp(*ends)).abs().max()) <= tolerance * step
    return layer


def weighted_unit(module, kind, clamp=None, output=U8, axis=0):
    spec = QSpec(torch.int8, -127, 127, True, True, axis)
    flat = module.weight.detach().movedim(axis, 0).flatten(1)
    grid = choose_qparams(spec, flat.amin(1), flat.amax(1))
    unit = LoweringUnit(kind, (U8,), output, module, {}, module.weight, module.bias, grid, clamp)
    quantized = copy.deepcopy(module)
    quantized.weight.data = grid.dequantize(grid.quantize(module.weight.detach()))
    return unit, quantized


def test_lowered_linear_follows_the_float_module():
    module = nn.Linear(20, 12)
    unit, quantized = weighted_unit(module, "linear", Clamp(0.0, 6.0))
    lowered_close(unit, lambda x: F.relu6(quantized(x)), torch.randn(5, 20), tolerance=0.51)
    unit, quantized = weighted_unit(module, "linear", output=None)
    lowered_close(unit, quantized, torch.randn(5, 20))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(6, 8, 5, padding=2, padding_mode="reflect"), (2, 6, 11)),
        (nn.Conv2d(6, 8, 4, padding="same", dilation=2), (2, 6, 11, 9)),
        (nn.Conv2d(6, 12, 3, stride=2, groups=6, padding="valid", bias=False), (2, 6, 11, 9)),
        (nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 6, 7)),
    ],
)
def test_lowered_convolution_follows_the_float_module(module, shape):
    unit, quantized = weighted_unit(module, "conv", Clamp(0.0))
    lowered_close(unit, lambda x: F.relu(quantized(x)), torch.randn(shape), tolerance=0.51)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.ConvTranspose1d(6, 8, 4, stride=2, padding=1), (2, 6, 7)),
        (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (2, 6, 7, 5)),
    ],
)
def test_lowered_transposed_convolution_has_scales_per_output_channel(module, shape):
    unit, quantized = weighted_unit(module, "conv", axis=1)
    lowered_close(unit, quantized, torch.randn(shape), tolerance=0.51)


POOLS = [
    ("max_pool", nn.MaxPool2d(3, 2, 1), (2, 6, 9, 8)),
    ("max_pool", nn.MaxPool1d(2), (2, 6, 9)),
    ("avg_pool", nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 6, 9, 8)),
    ("avg_pool", nn.AvgPool3d(2, ceil_mode=True), (2, 6, 5, 4, 3)),
    ("adaptive_avg_pool", nn.AdaptiveAvgPool2d((1, None)), (2, 6, 9, 8)),
    ("adaptive_avg_pool", nn.AdaptiveAvgPool1d(3), (2, 6, 7)),
    ("interpolate", nn.Upsample(scale_factor=2), (2, 6, 4, 3)),
]


@pytest.mark.parametrize(("kind", "module", "shape"), POOLS)
def test_lowered_pools_follow_the_float_module(kind, module, shape):
    lowered_close(LoweringUnit(kind, (U8,), U8, module), module, torch.randn(shape), tolerance=0.51)


@pytest.mark.parametrize(("dim", "keepdim"), [((2, 3), False), ([-1, -2], True)])
def test_lowered_mean_follows_torch(dim, keepdim):
    options = {"dim": dim, "keepdim": keepdim}
    unit = LoweringUnit("mean", (U8,), U8, None, options)
    lowered_close(unit, lambda x: x.mean(dim, keepdim), torch.randn(2, 6, 9, 8), tolerance=0.51)


def test_a_mean_over_other_dims_is_unsupported():
    with pytest.raises(Unsupported, match="spatial"):
        lower(LoweringUnit("mean", (U8,), U8, None, {"dim": 1}))


def test_lowered_arithmetic_follows_torch():
    a, b = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 5, 5)
    lowered_close(LoweringUnit("add", (U8, S8), U8), torch.add, a, b, tolerance=0.51)
    lowered_close(LoweringUnit("add", (U8, S8), U8, clamp=Clamp(0.0)), lambda x, y: F.relu(x + y), a, b, tolerance=0.51)
    lowered_close(LoweringUnit("mul", (U8, S8), U8), torch.mul, a, b, tolerance=0.51)
    lowered_close(
        LoweringUnit("cat", (U8, S8), U8, options={"dim": 1}), lambda *t: torch.cat(t, 1), a, b, tolerance=0.51
    )


def test_alpha_of_an_addition_is_unsupported():
    with pytest.raises(Unsupported, match="alpha"):
        lower(LoweringUnit("add", (U8, U8), U8, options={"alpha": 2}))


UNARY = [
    ("relu", nn.ReLU(), {}),
    ("hardtanh", nn.Hardtanh(-0.5, 0.7), {}),
    ("clamp", None, {"min": -1.0, "max": 1.5}),
    ("clamp", None, {"min": 0.25, "max": None}),
    ("hardswish", nn.Hardswish(), {}),
    ("gelu", nn.GELU(approximate="tanh"), {}),
    ("elu", nn.ELU(0.7), {}),
    ("leaky_relu", nn.LeakyReLU(0.3), {}),
    ("silu", None, {}),
    ("sigmoid", None, {}),
    ("add_scalar", None, {"other": 0.3}),
    ("mul_scalar", None, {"other": -1.5}),
    ("requantize", None, {}),
]
FUNCTIONS = {
    "clamp": torch.clamp,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "add_scalar": torch.add,
    "mul_scalar": torch.mul,
    "requantize": torch.clone,
}


@pytest.mark.parametrize(("kind", "module", "options"), UNARY)
def test_lowered_unary_functions_follow_torch(kind, module, options):
    def function(x):
        return module(x) if module is not None else FUNCTIONS[kind](x, **options)

    lowered_close(LoweringUnit(kind, (S8,), U8, module, options), function, torch.randn(500), tolerance=0.51)


def test_a_function_undefined_on_the_grid_is_unsupported():
    with pytest.raises(Unsupported, match="not defined"):
        lower(LoweringUnit("sqrt", (U8,), U8))


def test_an_unknown_kind_says_what_there_is():
    with pytest.raises(NotImplementedError, match="'fft'"):
        lower(LoweringUnit("fft", (U8,), U8))
    assert {"linear", "conv", "add", "relu"} <= lowerable_kinds()


def test_the_padding_of_same_is_torchs():
    unit, quantized = weighted_unit(nn.Conv1d(3, 4, 4, padding="same"), "conv")
    layer = lowered_close(unit, quantized, torch.randn(1, 3, 8), tolerance=0.51)
    assert layer.options["padding"] == [[1, 2]]
