"""conv: the bits of the reference on every ISA, of torch's fbgemm engine where it is exact, and clear errors."""

import random
import re

import pytest
import torch
import torch.nn.functional as F

from qkernels import ops, reference
from qkernels.ops.epilogue import OUTPUT_DTYPES, Epilogue, ResidualAdd
from qkernels.testing import supported_isas

FLOAT_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def run(x, canonical, geometry, output_padding=0, residual=None):
    """(ours, the reference) for the canonical arguments of conv_pack."""
    weight, epilogue = canonical[0], canonical[-1]
    stride, padding, dilation, groups, transposed, _ = geometry
    size = ops.conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation, transposed, output_padding)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    packed = ops.conv_pack(*canonical, *geometry)
    ours = ops.conv(x, packed, residual, channels, size, epilogue.dtype)
    return ours, reference.conv(x, *canonical, *geometry, size, residual)


def random_codes(shape, dtype, generator):
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, dtype=dtype, generator=generator)


def random_case(seed):
    """Any mix of rank, groups, stride, dilation, asymmetric padding, mode, dtypes and epilogue."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    dims = rng.choice([1, 2, 2, 3])
    transposed = rng.random() < 0.3
    mode = "zeros" if transposed else rng.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    groups = rng.choice([1, 1, 2, 3, 33])
    per_in, per_out = (
        (rng.choice([1, 1, 3, 8]), rng.choice([1, 1, 2, 9]))
        if groups > 1
        else (rng.choice([1, 3, 16, 37]), rng.choice([1, 7, 64, 70]))
    )
    kernel = [rng.choice([1, 2, 3, 3, 5]) for _ in range(dims)]
    stride = [rng.choice([1, 1, 2, 3]) for _ in range(dims)]
    dilation = [rng.choice([1, 1, 2]) for _ in range(dims)]
    padding = [rng.randrange(0, 3) for _ in range(2 * dims)]
    spatial = [rng.randrange(5, 11) + d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    output_padding = [rng.randrange(0, max(s, d)) for s, d in zip(stride, dilation, strict=True)] if transposed else 0
    in_dtype = rng.choice([torch.uint8, torch.int8])
    out_dtype = rng.choice([torch.uint8, *OUTPUT_DTYPES])
    shape = [groups * per_in, per_out, *kernel] if transposed else [groups * per_out, per_in, *kernel]
    channels = groups * per_out
    x = random_codes([rng.randrange(1, 3), groups * per_in, *spatial], in_dtype, gen)
    in_info = torch.iinfo(in_dtype)
    scales = torch.rand(1 if rng.random() < 0.3 else channels, generator=gen) * 0.02 + 0.001
    zero_points = None
    if rng.random() < 0.15:
        zero_points = torch.randint(-128, 128, scales.shape, dtype=torch.int32, generator=gen)
    bias = torch.randn(channels, generator=gen) if rng.random() < 0.7 else None
    epilogue = Epilogue(out_dtype)
    if not out_dtype.is_floating_point and out_dtype != torch.int32:
        info = torch.iinfo(out_dtype)
        zp = rng.randrange(info.min, info.max + 1)
        table = random_codes([256], out_dtype, gen) if rng.random() < 0.3 else None
        add = ResidualAdd(0.03, 7, 0.05, zp, info.min, info.max) if rng.random() < 0.3 else None
        epilogue = Epilogue(out_dtype, rng.uniform(0.05, 3.0), zp, info.min, info.max, table, add)
    input_grid = (rng.uniform(0.001, 0.1), rng.randrange(in_info.min, in_info.max + 1), in_dtype)
    canonical = (random_codes(shape, torch.int8, gen), scales, zero_points, bias, *input_grid, epilogue)
    geometry = (stride, padding, dilation, groups, transposed, mode)
    residual = None
    if epilogue.residual is not None:
        size = ops.conv_output_size(spatial, kernel, stride, padding, dilation, transposed, output_padding)
        residual = random_codes([x.shape[0], channels, *size], rng.choice([torch.uint8, torch.int8]), gen)
    return x, canonical, geometry, output_padding, residual


@pytest.mark.parametrize("block", range(5))
def test_random_configurations_equal_the_reference(isa, block):
    for seed in range(block * 30, block * 30 + 30):
        ours, expected = run(*random_case(seed))
        assert torch.equal(ours, expected), f"seed {seed}"


def simple(weight_shape, groups=1, dims=2, dtype=torch.uint8, **epilogue):
    gen = torch.Generator().manual_seed(7)
    weight = random_codes(weight_shape, torch.int8, gen)
    scale = torch.rand(weight_shape[0], generator=gen) * 0.01 + 0.001
    values = Epilogue(dtype, **({"scale": 2.0, "zero_point": 131} | epilogue))
    canonical = (weight, scale, None, torch.randn(weight_shape[0], generator=gen), 0.03, 77, torch.uint8, values)
    return canonical, ([1] * dims, [1] * (2 * dims), [1] * dims, groups, False, "zeros")


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("groups", [1, 64])
def test_extreme_codes_do_not_saturate(isa, value, weight, groups):
    canonical, geometry = simple([64, 64 // groups, 3, 3], groups, dtype=torch.int32)
    canonical = (torch.full_like(canonical[0], weight), *canonical[1:])
    ours, expected = run(torch.full((1, 64, 6, 7), value, dtype=torch.uint8), canonical, geometry)
    assert torch.equal(ours, expected)


LONG_LAYERS = {  # weight, groups, input dtype
    "groups of 4200": ((16, 2, 2100), 16, torch.uint8),
    "groups of 8400": ((16, 2, 4200), 16, torch.uint8),
    "groups of 65,793": ((16, 3, 21931), 16, torch.uint8),
    "7310 channels": ((16, 7310, 3, 3), 1, torch.uint8),
    "14,563 channels of int8": ((16, 14563, 3, 3), 1, torch.int8),
}


@pytest.mark.parametrize("layer", LONG_LAYERS)
def test_only_k_must_fit_however_a_path_lays_it_out(isa, layer):
    """A path that merges groups or pads channels has longer columns than K."""
    shape, groups, dtype = LONG_LAYERS[layer]
    canonical, geometry = simple(list(shape), groups, len(shape) - 2, dtype=torch.int32)
    canonical = (torch.full_like(canonical[0], -128), *canonical[1:5], 0, dtype, canonical[-1])
    x = torch.full((1, shape[1] * groups, *(k + 1 for k in shape[2:])), torch.iinfo(dtype).max, dtype=dtype)
    ours, expected = run(x, canonical, geometry)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("shape", "groups", "zero_point"), [((16, 16, 3, 3), 1, 0), ((16, 1, 3, 3), 16, 0), ((16, 1, 3, 3), 16, 1)]
)
@pytest.mark.parametrize("output_scale", [1e20, 1e9, 1e-20])
def test_a_multiplier_that_is_not_normal_is_refused_by_every_kernel(isa, shape, groups, zero_point, output_scale):
    grid = torch.full((1,), 1e15 if output_scale < 1 else 1e-15), torch.tensor([zero_point], dtype=torch.int32)
    input_scale = float(grid[0])
    with pytest.raises(RuntimeError, match=r"conv_pack: .* must be finite and normal in float32"):
        ops.conv_pack(
            torch.ones(shape, dtype=torch.int8),
            *grid,
            None,
            input_scale,
            0,
            torch.uint8,
            Epilogue(scale=output_scale),
            1,
            1,
            1,
            groups,
        )


@pytest.mark.parametrize("groups", [1, 8])
def test_results_larger_than_int32_saturate(isa, groups):
    canonical, geometry = simple([8, 8 // groups, 3, 3], groups, scale=1e-30)
    ours, expected = run(torch.full((1, 8, 5, 5), 200, dtype=torch.uint8), canonical, geometry)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(("weight_shape", "groups"), [((24, 24, 3, 3), 1), ((24, 1, 3, 3), 24), ((24, 3, 1, 1), 8)])
def test_layout_of_the_input_and_threads_do_not_matter(isa, weight_shape, groups):
    canonical, geometry = simple(list(weight_shape), groups)
    if weight_shape[2] == 1:
        geometry = (geometry[0], [0] * 4, *geometry[2:])
    packed = ops.conv_pack(*canonical, *geometry)
    x = random_codes((3, 24, 37, 41), torch.uint8, torch.Generator().manual_seed(1))
    inputs = [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
    inputs.append(F.pad(x, (1, 2))[..., 1:-2])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results += [ops.conv(v, packed, None, 24, [37, 41], torch.uint8) for v in inputs]
    finally:
        torch.set_num_threads(before)
    expected = run(x, canonical, geometry)[1]
    for result in results:
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result, expected)


def test_a_large_map_runs_in_many_strips_and_threads(isa):
    for shape, groups in (((48, 1, 5, 5), 48), ((32, 16, 3, 3), 1)):
        canonical, geometry = simple(list(shape), groups)
        x = random_codes((1, shape[1] * groups, 60, 333), torch.uint8, torch.Generator().manual_seed(2))
        ours, expected = run(x, canonical, geometry)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (2, 4), (3, 5)])
def test_small_maps_of_many_images_equal_the_reference(isa, kernel, mode):
    """Here a kernel may see the pixels of an image, its padding between the rows included, as one stretch."""
    rng, gen = random.Random(4), torch.Generator().manual_seed(4)
    for height, width, batch, channels in ((7, 7, 1, 67), (7, 7, 25, 16), (4, 4, 3, 80), (5, 9, 2, 12), (9, 3, 3, 130)):
        weight = random_codes([channels, channels, *kernel], torch.int8, gen)
        table = rng.choice([None, random_codes([256], torch.uint8, gen)])
        add = rng.choice([None, ResidualAdd(0.03, 7, 0.05, 120, 0, 255)])
        zero_points = rng.choice([None, torch.randint(-128, 128, (channels,), dtype=torch.int32, generator=gen)])
        dtype = torch.uint8 if table is not None or add is not None else rng.choice([torch.uint8, torch.float32])
        scale = torch.rand(channels, generator=gen) * 0.01 + 0.001
        epilogue = Epilogue(dtype, 2.0, 131, 0, 255, table, add) if dtype == torch.uint8 else Epilogue(dtype)
        canonical = (weight, scale, zero_points, None, 0.03, 77, torch.uint8, epilogue)
        padding = [kernel[0] // 2, (kernel[0] - 1) // 2, kernel[1] // 2, (kernel[1] - 1) // 2]
        dilation = [rng.choice([1, 2]) if kernel[0] == 3 else 1, 1]
        padding[:2] = [p * dilation[0] for p in padding[:2]]
        geometry = ([1, 1], padding, dilation, 1, False, mode)
        x = random_codes([batch, channels, height, width], torch.uint8, gen)
        residual = None if add is None else random_codes(x.shape, torch.uint8, gen)
        before = torch.get_num_threads()
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                ours, expected = run(x, canonical, geometry, residual=residual)
                assert torch.equal(ours, expected), (height, width, batch, threads)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize(("weight_shape", "groups"), [((4, 3, 3, 3), 1), ((6, 1, 3, 3), 6)])
def test_empty_batch(isa, weight_shape, groups):
    canonical, geometry = simple(list(weight_shape), groups)
    ours, _ = run(torch.empty(0, weight_shape[1] * groups, 5, 5, dtype=torch.uint8), canonical, geometry)
    assert ours.shape == (0, weight_shape[0], 3 + 2, 5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_small_values_equal_a_float_convolution(isa, dims):
    gen = torch.Generator().manual_seed(dims)
    x = torch.randint(0, 9, (2, 5, *[7] * dims), dtype=torch.uint8, generator=gen)
    weight = torch.randint(-4, 5, (6, 5, *[3] * dims), dtype=torch.int8, generator=gen)
    canonical = (weight, torch.ones(1), None, None, 1.0, 0, torch.uint8, Epilogue(torch.float32))
    ours, _ = run(x, canonical, ([2] * dims, [1] * (2 * dims), [1] * dims, 1, False, "zeros"))
    assert torch.equal(ours, FLOAT_CONVS[dims](x.float(), weight.float(), stride=2, padding=1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("output_padding", [0, 1])
def test_transposed_small_values_equal_torch(isa, dims, output_padding):
    gen = torch.Generator().manual_seed(dims)
    x = torch.randint(0, 9, (2, 6, *[4] * dims), dtype=torch.uint8, generator=gen)
    weight = torch.randint(-4, 5, (6, 2, *[3] * dims), dtype=torch.int8, generator=gen)
    canonical = (weight, torch.ones(4), None, None, 1.0, 0, torch.uint8, Epilogue(torch.float32))
    ours, _ = run(x, canonical, ([2] * dims, [1] * (2 * dims), [1] * dims, 2, True, "zeros"), [output_padding] * dims)
    conv = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    assert torch.equal(ours, conv(x.float(), weight.float(), None, 2, 1, output_padding, 2))


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_string_padding_is_torchs(kernel):
    gen = torch.Generator().manual_seed(kernel)
    x = torch.randint(0, 9, (1, 3, 8, 9), dtype=torch.uint8, generator=gen)
    weight = torch.randint(-4, 5, (2, 3, kernel, kernel), dtype=torch.int8, generator=gen)
    canonical = (weight, torch.ones(1), None, None, 1.0, 0, torch.uint8, Epilogue(torch.float32))
    for padding in ("same", "valid"):
        pads = ops.conv_padding(padding, [kernel, kernel], 2)
        ours, _ = run(x, canonical, ([1, 1], pads, [2, 2], 1, False, "zeros"))
        assert torch.equal(ours, F.conv2d(x.float(), weight.float(), padding=padding, dilation=2))


FBGEMM_SHAPES = [  # C, O, kernel, stride, padding, dilation, groups, size
    (64, 64, 3, 1, 1, 1, 1, 56),
    (32, 96, 1, 1, 0, 1, 1, 56),
    (3, 32, 3, 2, 1, 1, 1, 112),
    (96, 96, 3, 1, 1, 1, 96, 56),
    (96, 96, 3, 2, 1, 1, 96, 57),
    (48, 48, 5, 1, 2, 1, 48, 40),
    (64, 64, 3, 1, 1, 1, 16, 40),
    (24, 40, 3, 1, 2, 2, 1, 40),
]


@pytest.mark.skipif("avxvnni" not in supported_isas(), reason="fbgemm saturates int16 sums without VNNI")
@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="torch without fbgemm")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", FBGEMM_SHAPES)
@pytest.mark.parametrize("relu", [False, True])
def test_same_bits_as_torch_fbgemm_per_channel(shape, relu):
    c, o, k, stride, pad, dil, groups, size = shape
    gen = torch.Generator().manual_seed(c + o + k)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        for zero_point, out_zero_point in ((77, 131), (128, 3), (0, 128)):
            # The output scale is a multiple of the product of scales on half of the channels: ties everywhere.
            input_scale = float(torch.rand(1, generator=gen) * 0.1 + 0.01)
            scale = torch.rand(o, generator=gen) * 0.02 + 0.001
            scale[::2] = scale[0]
            out_scale = float(torch.tensor(input_scale) * scale[0] * 64)
            weight = random_codes((o, c // groups, k, k), torch.int8, gen)
            bias = torch.randn(o, generator=gen)
            x = random_codes((4, c, size, size), torch.uint8, gen).to(memory_format=torch.channels_last)
            if groups == c:  # fbgemm's depthwise kernels saturate int16 sums even with VNNI, ours never do
                x = x // 2
            qx = torch._make_per_tensor_quantized_tensor(x, input_scale, zero_point)
            qw = torch._make_per_channel_quantized_tensor(weight, scale.double(), torch.zeros(o, dtype=torch.long), 0)
            packed = torch.ops.quantized.conv2d_prepack(qw, bias, [stride] * 2, [pad] * 2, [dil] * 2, groups)
            theirs = torch.ops.quantized.conv2d_relu if relu else torch.ops.quantized.conv2d
            expected = theirs(qx, packed, out_scale, out_zero_point).int_repr()
            low = out_zero_point if relu else 0
            epilogue = Epilogue(torch.uint8, out_scale, out_zero_point, low, 255)
            canonical = (weight, scale, None, bias, input_scale, zero_point, torch.uint8, epilogue)
            mine = ops.conv_pack(*canonical, stride, pad, dil, groups)
            assert torch.equal(ops.conv(x, mine, None, o, expected.shape[2:], torch.uint8), expected)
    finally:
        torch.backends.quantized.engine = before


PACK_ERRORS = {
    "weight must be int8, got torch.float32": {"weight": torch.zeros(4, 2, 3, 3)},
    "weight must have 3, 4 or 5 dimensions": {"weight": torch.zeros(4, 2, dtype=torch.int8)},
    "weight must not be empty": {"weight": torch.zeros(0, 2, 3, 3, dtype=torch.int8)},
    "groups must be positive and divide": {"groups": 3},
    "weight_scale must have 1 or 4 elements": {"weight_scale": torch.ones(3)},
    "weight_scale must be positive, finite and normal, got 0": {"weight_scale": torch.zeros(4)},
    "weight_scale must be positive, finite and normal, got nan": {"weight_scale": torch.full((4,), float("nan"))},
    "weight_scale must be positive, finite and normal, got inf": {"weight_scale": torch.full((4,), float("inf"))},
    "weight_scale must be positive, finite and normal, got 9.99": {"weight_scale": torch.full((4,), 1e-40)},
    "weight_zero_point must be in [-128, 127], got 300": {
        "weight_zero_point": torch.full((4,), 300, dtype=torch.int32)
    },
    "weight_zero_point must be torch.int32": {"weight_zero_point": torch.zeros(4)},
    "bias must have shape [4]": {"bias": torch.zeros(5)},
    "bias must be finite": {"bias": torch.full((4,), float("inf"))},
    "input_scale must be positive, finite and normal": {"input_scale": 0.0},
    "input_zero_point must be in [0, 255]": {"input_zero_point": 256},
    "input_dtype must be torch.uint8 or torch.int8": {"input_dtype": torch.int32},
    "output_dtype must be uint8, int8, int32, float32, bfloat16 or float16": {"epilogue": Epilogue(torch.float64)},
    "the output scale must be positive": {"epilogue": Epilogue(scale=-1.0)},
    "the output zero_point must be in [0, 255]": {"epilogue": Epilogue(zero_point=256)},
    "qmin and qmax must satisfy": {"epilogue": Epilogue(qmax=256)},
    "table must have shape [256]": {"epilogue": Epilogue(table=torch.zeros(255, dtype=torch.uint8))},
    "a table or a residual needs an output_dtype of uint8": {
        "epilogue": Epilogue(torch.float32, table=torch.zeros(256, dtype=torch.uint8))
    },
    "stride must be at least 1, got 0": {"stride": 0},
    "stride must have 2 elements": {"stride": [1]},
    "dilation must be at least 1, got 0": {"dilation": [1, 0]},
    "padding must be at least 0, got -1": {"padding": -1},
    "padding must have 4 elements": {"padding": [1, 2, 3]},
    "padding_mode must be 'zeros', 'reflect', 'replicate' or 'circular', got 'mirror'": {"padding_mode": "mirror"},
    "padding_mode of a transposed convolution must be 'zeros'": {"transposed": True, "padding_mode": "reflect"},
    "could overflow the int32 accumulator": {"weight": torch.full((4, 66_000, 1, 1), 127, dtype=torch.int8)},
    "must be finite and normal in float32": {"input_scale": 1e-30, "weight_scale": torch.full((4,), 1e-30)},
}


@pytest.mark.parametrize("message", PACK_ERRORS)
def test_bad_pack_arguments_are_refused_by_name(message):
    good = {
        "weight": torch.zeros(4, 2, 3, 3, dtype=torch.int8),
        "weight_scale": torch.ones(4),
        "weight_zero_point": None,
        "bias": None,
        "input_scale": 1.0,
        "input_zero_point": 0,
        "input_dtype": torch.uint8,
        "epilogue": Epilogue(),
    }
    ops.conv_pack(**good)
    with pytest.raises(RuntimeError, match="conv_pack: .*" + re.escape(message)):
        ops.conv_pack(**(good | PACK_ERRORS[message]))


CONV_ERRORS = {
    "input must be torch.uint8, as it was": {"input": torch.zeros(1, 2, 5, 5, dtype=torch.int8)},
    "input must be [N, 2, 2 spatial dimensions]": {"input": torch.zeros(1, 3, 5, 5, dtype=torch.uint8)},
    "output_size must have 2 elements": {"output_size": [3]},
    "output_size must be positive and fit": {"output_size": [3, 4]},
    "output_dtype must be the one": {"output_dtype": torch.int8},
    "out_channels must be 4, as packed, got 5": {"out_channels": 5},
    "packed must be a dense uint8 vector": {"packed": torch.zeros(5000)},
    "packed must be an unchanged result": {"packed": torch.zeros(5000, dtype=torch.uint8)},
    "packed must start at a multiple of 64 bytes": {"packed": torch.zeros(5001, dtype=torch.uint8)[1:]},
    "residual must not be given": {"residual": torch.zeros(1, 4, 3, 3, dtype=torch.uint8)},
}


def good_conv_arguments():
    packed = ops.conv_pack(
        torch.zeros(4, 2, 3, 3, dtype=torch.int8), torch.ones(4), None, None, 1.0, 0, torch.uint8, Epilogue()
    )
    return {
        "input": torch.zeros(1, 2, 5, 5, dtype=torch.uint8),
        "packed": packed,
        "residual": None,
        "out_channels": 4,
        "output_size": [3, 3],
        "output_dtype": torch.uint8,
    }


@pytest.mark.parametrize("message", CONV_ERRORS)
def test_bad_arguments_are_refused_by_name(message):
    good = good_conv_arguments()
    ops.conv(**good)
    with pytest.raises(RuntimeError, match="conv: .*" + re.escape(message)):
        ops.conv(**(good | CONV_ERRORS[message]))


def test_a_truncated_or_foreign_packed_tensor_is_refused(isa):
    good = good_conv_arguments()
    for size in (0, 1, 63, good["packed"].numel() - 1):
        with pytest.raises(RuntimeError, match="conv: packed must be"):
            ops.conv(**(good | {"packed": good["packed"][:size].clone()}))


@pytest.mark.parametrize(("mode", "size"), [("reflect", 2), ("circular", 1)])
def test_padding_beyond_the_input_is_refused(mode, size):
    weight = torch.zeros(1, 1, 1, dtype=torch.int8)
    epilogue = Epilogue(torch.int32)
    packed = ops.conv_pack(
        weight, torch.ones(1), None, None, 1.0, 0, torch.uint8, epilogue, padding=2, padding_mode=mode
    )
    with pytest.raises(RuntimeError, match=f"{mode} padding must be"):
        ops.conv(torch.zeros(1, 1, size, dtype=torch.uint8), packed, None, 1, [size + 4], torch.int32)
