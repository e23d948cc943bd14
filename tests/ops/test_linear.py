"""linear: exact sums and one rounding, the same bits as the reference and as torch's fbgemm engine, on every ISA."""

import dataclasses
import itertools

import pytest
import torch

from qkernels import ops, reference
from qkernels.ops import Epilogue, ResidualAdd
from qkernels.ops.epilogue import OUTPUT_DTYPES
from qkernels.testing import isa_cap, supported_isas

DTYPES = (torch.uint8, torch.int8)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def codes(g, dtype, *shape):
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).view(dtype)


def number(g, low, high):
    """A random integer in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=g))


@dataclasses.dataclass
class Layer:
    """The canonical arguments of one linear layer."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    bias: torch.Tensor | None
    input_scale: float
    input_zero_point: int
    input_dtype: torch.dtype
    epilogue: Epilogue

    @property
    def out_features(self):
        return self.weight.shape[0]

    def pack(self):
        return ops.linear_pack(*[getattr(self, f.name) for f in dataclasses.fields(self)])

    def run(self, x, residual=None, packed=None):
        packed = self.pack() if packed is None else packed
        return ops.linear(x, packed, self.out_features, self.epilogue.dtype, residual)

    def expected(self, x, residual=None):
        fields = [getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "input_dtype"]
        return reference.linear(x, *fields, residual)


def random_epilogue(g, dtype, table=False, residual=False, scale=0.5):
    low = torch.iinfo(dtype).min if dtype in DTYPES else 0
    qmin, qmax = low + number(g, 0, 20), low + 255 - number(g, 0, 20)
    added = ResidualAdd(0.3, number(g, 0, 127), 0.6, low + 70, low + number(g, 0, 20), low + 255)
    return Epilogue(
        dtype=dtype,
        scale=scale,
        zero_point=number(g, qmin, qmax),
        qmin=qmin,
        qmax=qmax,
        table=codes(g, dtype, 256) if table else None,
        residual=added if residual else None,
    )


def random_layer(g, n, k, dtype=torch.uint8, out=torch.uint8, zero_points=False, per_tensor=False, **epilogue):
    channels = 1 if per_tensor else n
    low = torch.iinfo(dtype).min
    return Layer(
        weight=codes(g, torch.int8, n, k),
        weight_scale=torch.rand(channels, generator=g) * 0.02 + 0.001,
        weight_zero_point=torch.randint(-128, 128, (channels,), generator=g, dtype=torch.int32)
        if zero_points
        else None,
        bias=torch.randn(n, generator=g) * 20,
        input_scale=0.037,
        input_zero_point=number(g, low, low + 255),
        input_dtype=dtype,
        epilogue=random_epilogue(g, out, **epilogue),
    )


@pytest.mark.parametrize("k", [0, 1, 3, 4, 5, 17, 33, 64])
def test_every_tile_edge_equals_the_reference(isa, k):
    g = generator(k)
    for n in (0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 130):
        for dtype in DTYPES:
            layer = random_layer(g, n, k, dtype)
            packed = layer.pack()
            x = codes(g, dtype, 25, k)
            expected = layer.expected(x)
            for m in range(26):
                assert torch.equal(layer.run(x[:m], packed=packed), expected[:m])


def test_2000_random_layers_equal_the_reference():
    g = generator(1)
    isas = supported_isas()
    for i in range(2000):
        out = (torch.uint8, *OUTPUT_DTYPES)[number(g, 0, 6)]
        integer = out in DTYPES
        layer = random_layer(
            g,
            number(g, 0, 150),
            number(g, 0, 100),
            DTYPES[number(g, 0, 1)],
            out,
            zero_points=number(g, 0, 3) == 0,
            per_tensor=number(g, 0, 3) == 0,
            table=integer and number(g, 0, 2) == 0,
            residual=integer and number(g, 0, 2) == 0,
            scale=(0.5, 0.01, 3.0)[number(g, 0, 2)],
        )
        if number(g, 0, 3) == 0:
            layer.bias = None
        x = codes(g, layer.input_dtype, number(g, 0, 20), layer.weight.shape[1])
        residual = None
        if layer.epilogue.residual is not None:
            residual = codes(g, DTYPES[number(g, 0, 1)], x.shape[0], layer.out_features)
        expected = layer.expected(x, residual)
        with isa_cap(isas[i % len(isas)]):
            assert torch.equal(layer.run(x, residual), expected), (i, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-128, -127, 127])
def test_extreme_values_do_not_saturate(isa, dtype, value):
    g = generator(2)
    for edge, zero_points in itertools.product((torch.iinfo(dtype).min, torch.iinfo(dtype).max), (False, True)):
        layer = random_layer(g, 70, 1021, dtype, torch.int32, zero_points=zero_points)
        layer.weight.fill_(value)
        x = torch.full((9, 1021), edge, dtype=dtype)
        assert torch.equal(layer.run(x), layer.expected(x))


def test_out_of_range_products_clamp_to_the_grid(isa):
    g = generator(3)
    layer = random_layer(g, 70, 40, scale=1e-12)
    x = codes(g, torch.uint8, 9, 40)
    assert torch.equal(layer.run(x), layer.expected(x))


@pytest.mark.skipif("avx512vnni" not in supported_isas(), reason="torch's fbgemm engine saturates without VNNI")
def test_equals_torch_fbgemm_on_ties():
    """Half of the layers have an output scale that is an even multiple of the accumulator's: many results are ties."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        outputs = 0
        for seed in range(40):
            g = generator(seed)
            m, n, k = number(g, 500, 900), number(g, 300, 500), number(g, 1, 70)
            layer = random_layer(g, n, k)
            layer.weight_scale = torch.rand(n, generator=g) * 0.02 + 0.001
            layer.input_scale = float(torch.rand((), generator=g) * 0.1)
            layer.bias = torch.randn(n, generator=g) if seed % 2 else None
            if seed % 4 < 2:
                layer.weight_scale = torch.full((n,), 0.03 * (seed + 1))
                layer.bias = None
            tie_scale = layer.input_scale * float(layer.weight_scale[0]) * 2 * number(g, 1, 40)
            layer.epilogue = Epilogue(scale=tie_scale, zero_point=number(g, 0, 127) * 2 + 1)
            x = codes(g, torch.uint8, m, k)
            qx = torch._make_per_tensor_quantized_tensor(x, layer.input_scale, layer.input_zero_point)
            zeros = torch.zeros(n, dtype=torch.long)
            qw = torch._make_per_channel_quantized_tensor(layer.weight, layer.weight_scale.double(), zeros, 0)
            packed = torch.ops.quantized.linear_prepack(qw, layer.bias)
            theirs = torch.ops.quantized.linear(qx, packed, tie_scale, layer.epilogue.zero_point).int_repr()
            assert torch.equal(layer.run(x), theirs)
            outputs += theirs.numel()
        assert outputs >= 10_000_000
    finally:
        torch.backends.quantized.engine = before


def test_any_number_of_threads_gives_the_same_bits(isa):
    g = generator(4)
    before = torch.get_num_threads()
    try:
        for m, n, k in ((1, 1000, 700), (7, 3000, 300), (301, 130, 500), (64, 64, 4096)):
            layer = random_layer(g, n, k)
            x, packed = codes(g, torch.uint8, m, k), layer.pack()
            expected = layer.expected(x)
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                assert torch.equal(layer.run(x, packed=packed), expected)
    finally:
        torch.set_num_threads(before)


def test_any_layout_of_the_input_is_accepted(isa):
    g = generator(5)
    layer = random_layer(g, 19, 23, residual=True)
    packed = layer.pack()
    base = codes(g, torch.uint8, 4, 5, 64)
    inputs = [
        base[..., :23],  # rows at one stride
        base[..., 3:26],  # unaligned
        base[::2, :, :23],  # two strides
        base[..., ::2][..., :23],  # a strided last dimension
        base[..., :23].transpose(0, 1),
        base[:1, :1, :23].expand(4, 5, 23),
        base[0, 0, :23],  # a vector
        base[:0, :, :23],
    ]
    for x in inputs:
        residual = codes(g, torch.int8, *x.shape[:-1], 38)[..., ::2]
        out = layer.run(x, residual, packed)
        assert out.shape == (*x.shape[:-1], 19)
        assert out.is_contiguous()
        assert torch.equal(out, layer.expected(x, residual))


def test_a_transposed_weight_packs_to_the_same_bytes(isa):
    layer = random_layer(generator(6), 37, 21)
    packed = layer.pack()
    layer.weight = layer.weight.T.contiguous().T
    assert torch.equal(layer.pack(), packed)


def test_the_largest_k_is_exact_and_one_more_is_refused(isa):
    layer = random_layer(generator(7), 3, 65793, out=torch.int32)
    layer.weight.fill_(-128)
    layer.input_zero_point = 0
    x = torch.full((2, 65793), 255, dtype=torch.uint8)
    assert (layer.run(x) == -255 * 128 * 65793).all()
    layer.weight = torch.zeros(3, 65794, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"linear_pack: K = 65794 .* could overflow"):
        layer.pack()


def test_packed_bytes_of_another_isa_are_refused():
    isas = supported_isas()
    if len(isas) < 2:
        pytest.skip("this machine has one instruction set")
    layer = random_layer(generator(8), 5, 7)
    with isa_cap("scalar"):
        packed = layer.pack()
    with pytest.raises(RuntimeError, match=r"linear: packed was made for another instruction set; .*linear_pack"):
        layer.run(codes(generator(0), torch.uint8, 2, 7), packed=packed)


def test_damaged_packed_bytes_are_refused(isa):
    layer = random_layer(generator(9), 5, 7)
    packed, x = layer.pack(), torch.zeros(2, 7, dtype=torch.uint8)
    flipped = packed.clone()
    flipped[0] ^= 1
    for bad in (flipped, packed[:-1], packed[:40], packed[64:], torch.zeros(4096, dtype=torch.uint8), packed[:0]):
        with pytest.raises(RuntimeError, match="linear: packed must be an unchanged result of linear_pack"):
            layer.run(x, packed=bad)
    for bad in (packed.view(torch.int8), packed.reshape(1, -1), packed.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match="linear: packed must be a dense uint8 vector"):
            layer.run(x, packed=bad)


BAD_ARGUMENTS = [
    ({"weight": torch.zeros(5, 7)}, "weight must be int8, got torch.float32"),
    ({"weight": torch.zeros(5, dtype=torch.int8)}, r"weight must have shape \[out_features, in_features\], got \[5\]"),
    ({"weight_scale": torch.ones(4)}, r"weight_scale must have 1 or 5 elements .* got shape \[4\]"),
    ({"weight_scale": torch.ones(5, dtype=torch.float64)}, "weight_scale must be torch.float32, got torch.float64"),
    ({"weight_scale": torch.tensor([1.0, 1, 0, 1, 1])}, "weight_scale must be positive.* got 0 at channel 2"),
    ({"weight_scale": torch.tensor([float("nan")])}, "weight_scale must be positive.* got nan"),
    ({"weight_zero_point": torch.zeros(5)}, "weight_zero_point must be torch.int32, got torch.float32"),
    ({"weight_zero_point": torch.zeros(3, dtype=torch.int32)}, "weight_zero_point must have 1 or 5 elements"),
    ({"weight_zero_point": torch.full((5,), 128, dtype=torch.int32)}, r"weight_zero_point must be in \[-128, 127\]"),
    ({"bias": torch.ones(4)}, r"bias must have shape \[5\], got \[4\]"),
    ({"bias": torch.ones(5, dtype=torch.int32)}, "bias must be torch.float32, got torch.int32"),
    ({"bias": torch.full((5,), float("inf"))}, "bias must be finite, got inf at channel 0"),
    ({"input_scale": 0.0}, "input_scale must be positive"),
    ({"input_scale": float("nan")}, "input_scale must be positive"),
    ({"input_scale": 1e-42}, "input_scale must be positive, finite and normal"),
    ({"input_scale": 1e-30, "weight_scale": torch.full((5,), 1e-30)}, "input_scale \\* weight_scale"),
    ({"input_scale": 1e-30, "epilogue": Epilogue(scale=1e20)}, "input_scale \\* weight_scale / output scale must be"),
    ({"input_zero_point": 256}, r"input_zero_point must be in \[0, 255\]"),
    ({"input_zero_point": -1}, r"input_zero_point must be in \[0, 255\]"),
    ({"input_dtype": torch.int32}, "input_dtype must be torch.uint8 or torch.int8, got torch.int32"),
    ({"epilogue": Epilogue(scale=-1.0)}, "the output scale must be positive"),
    ({"epilogue": Epilogue(zero_point=300)}, r"the output zero_point must be in \[0, 255\] for torch.uint8, got 300"),
    ({"epilogue": Epilogue(zero_point=0.5)}, "the output zero_point must be an integer, got 0.5"),
    ({"epilogue": Epilogue(qmin=-1)}, "qmin and qmax must satisfy"),
    (
        {"epilogue": Epilogue(dtype=torch.float64)},
        "output_dtype must be uint8, int8, int32, float32, bfloat16 or float16",
    ),
    ({"epilogue": Epilogue(table=torch.zeros(255, dtype=torch.uint8))}, r"table must have shape \[256\], got \[255\]"),
    ({"epilogue": Epilogue(table=torch.zeros(256, dtype=torch.int8))}, "table must be torch.uint8, got torch.int8"),
    (
        {"epilogue": Epilogue(dtype=torch.float32, table=torch.zeros(256, dtype=torch.uint8))},
        "a table or a residual needs an output_dtype of uint8 or int8",
    ),
    ({"epilogue": Epilogue(residual=ResidualAdd(0.0, 0, 1.0, 0, 0, 255))}, "the residual's scale must be positive"),
    ({"epilogue": Epilogue(residual=ResidualAdd(1.0, 0, 1.0, 300, 0, 255))}, "the residual's out_zero_point must be"),
    (
        {"epilogue": Epilogue(residual=ResidualAdd(3e37, 0, 1.0, 0, 0, 255))},
        r"255 \* the residual's scale must be finite in float32",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS)
def test_bad_layers_are_refused_by_name(change, message):
    layer = dataclasses.replace(random_layer(generator(10), 5, 7), **change)
    with pytest.raises(RuntimeError, match=f"linear_pack: .*{message}"):
        layer.pack()


def test_bad_inputs_are_refused_by_name():
    layer = random_layer(generator(11), 5, 7, residual=True)
    packed = layer.pack()
    x, residual = torch.zeros(2, 7, dtype=torch.uint8), torch.zeros(2, 5, dtype=torch.uint8)
    bad = [
        ((x.int(), packed, 5, torch.uint8, residual), "input must be torch.uint8"),
        ((x.view(torch.int8), packed, 5, torch.uint8, residual), "input must be torch.uint8, .*got torch.int8"),
        ((x[:, :6], packed, 5, torch.uint8, residual), r"input must have shape \[..., 7\], got \[2, 6\]"),
        ((x[0, 0], packed, 5, torch.uint8, residual), r"input must have shape \[..., 7\], got \[\]"),
        ((x, packed, 6, torch.uint8, residual), "out_features must be 5, as packed, got 6"),
        ((x, packed, 5, torch.int8, residual), "output_dtype must be the one that the weight was packed with"),
        ((x, packed, 5, torch.uint8, None), "residual must be given"),
        ((x, packed, 5, torch.uint8, residual[:1]), r"residual must have shape \[2, 5\], as the output, got \[1, 5\]"),
        (
            (x, packed, 5, torch.uint8, residual.float()),
            "residual must be torch.uint8 or torch.int8, got torch.float32",
        ),
    ]
    for call, message in bad:
        with pytest.raises(RuntimeError, match=f"linear: .*{message}"):
            ops.linear(*call)
    plain = random_layer(generator(12), 5, 7)
    with pytest.raises(RuntimeError, match="linear: residual must not be given"):
        plain.run(x, residual)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("scales", [1, 5])
def test_packing_for_a_grid_of_tensors_gives_the_bytes_of_packing_for_numbers(isa, scales, zero_points):
    weight = torch.randint(-128, 128, (5, 37), dtype=torch.int8)
    point = torch.randint(-9, 9, (scales,), dtype=torch.int32) if zero_points else None
    terms = weight, torch.rand(scales) + 0.1, point, torch.randn(5)
    by_number = ops.linear_pack(*terms, float(torch.tensor(0.3)), 7, torch.uint8, Epilogue(torch.float32))
    grid = torch.tensor([0.3]), torch.tensor([7], dtype=torch.int32)
    assert torch.equal(ops.pack_on_grid(*terms, *grid, torch.uint8), by_number)


def test_packing_for_a_grid_of_tensors_refuses_what_does_not_fit():
    weight, scale, point = torch.zeros(5, 3, dtype=torch.int8), torch.ones(5), torch.zeros(1, dtype=torch.int32)
    good = [weight, scale, None, None, torch.ones(1), point, torch.uint8]
    for index, value, words in [
        (0, weight.float(), "weight must be int8"),
        (1, torch.ones(4), "weight_scale must be torch.float32 with 1 or 5 elements"),
        (2, point, "weight_zero_point must be torch.int32 with 5 elements"),
        (3, torch.ones(4), "bias must be torch.float32 with 5 elements"),
        (4, torch.ones(2), "input_scale must be torch.float32 with 1 elements"),
        (5, torch.zeros(1), "input_zero_point must be torch.int32 with 1 elements"),
    ]:
        arguments = list(good)
        arguments[index] = value
        with pytest.raises(RuntimeError, match=f"pack_on_grid: {words}"):
            ops.pack_on_grid(*arguments)
    with pytest.raises(RuntimeError, match=r"pack_on_grid: geometry must be made by conv_geometry"):
        ops.pack_on_grid(*good, [1, 2])


def test_a_sum_of_zero_is_positive_zero_in_the_reference_too():
    x, weight = torch.full((2, 1), 3, dtype=torch.uint8), torch.tensor([[-3], [3]], dtype=torch.int8)
    grid, epilogue = (torch.ones(1), None, None, 0.5, 3), Epilogue(torch.float32)
    packed = ops.linear_pack(weight, *grid, torch.uint8, epilogue)
    for y in (ops.linear(x, packed, 2, torch.float32), reference.linear(x, weight, *grid, epilogue)):
        assert (y == 0).all()
        assert not torch.signbit(y).any()
