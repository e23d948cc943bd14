"""What a plan does in one step where the model has several, or in none: the bits stay those of the modules."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from networks import Dense, Fire, Shuffle, conv, converted, leaves

import qkernels
from qkernels.frontends import torch_ao
from qkernels.ops.plan import NativePlan

PADS_IMAGES = ("avx512vnni", "amx")  # whose first convolutions read a padded copy of the image


@pytest.fixture
def threads():
    """Sets the number of threads; restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def kinds(plan, *inputs):
    return [step["kind"] for step in plan.describe(*inputs)["steps"]]


def assert_same_bits(plan, model, *inputs):
    expected, got = leaves(model(*inputs)), leaves(plan(*inputs))
    for g, e in zip(got, expected, strict=True):
        assert (g.dtype, g.shape) == (e.dtype, e.shape)
        assert torch.equal(g, e)


def assert_same_bits_in_slices(plan, model, inputs, threads):
    """On slices of the batch of every size, on several threads."""
    expected = leaves(model(*inputs))
    for cache_bytes in (500, 4000, 30000, 0):
        native = NativePlan(plan._native.data, cache_bytes)
        for count in (1, 2, 3):
            threads(count)
            for got, e in zip(native(inputs), expected, strict=True):
                assert torch.equal(got, e), (cache_bytes, count)


# ---- quantize, into the first convolution

STEMS = {
    "stem": (nn.Conv2d(3, 16, 3, 2, 1), [(2, 3, 24, 24), (1, 3, 7, 5), (3, 3, 1, 33)]),
    "large_kernel": (nn.Conv2d(3, 8, 7, 2, 3), [(2, 3, 32, 32), (1, 3, 9, 70)]),
    "no_padding": (nn.Conv2d(3, 8, 5), [(2, 3, 12, 12), (3, 3, 5, 5), (1, 3, 6, 130)]),
    "rows_unpadded": (nn.Conv2d(3, 8, (3, 5), (2, 3), (0, 2)), [(2, 3, 12, 12), (1, 3, 3, 20)]),
    "strides_leave_columns": (nn.Conv2d(3, 8, 2, 5), [(2, 3, 12, 14), (1, 3, 5, 24)]),
    "reflect": (nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), [(2, 3, 9, 9), (1, 3, 2, 3)]),
    "replicate": (nn.Conv2d(3, 8, 3, 2, 2, padding_mode="replicate"), [(2, 3, 9, 9), (1, 3, 1, 4)]),
    "circular": (nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), [(2, 3, 9, 9), (1, 3, 2, 3)]),
    "one_channel": (nn.Conv2d(1, 8, 5, padding=2), [(2, 1, 28, 28), (5, 1, 6, 3)]),
    "wide": (nn.Conv2d(20, 24, 3, padding=1), [(2, 20, 9, 9), (1, 20, 14, 14)]),
    "conv1d": (nn.Conv1d(4, 8, 5, padding=2), [(2, 4, 30), (1, 4, 41)]),
    "conv3d": (nn.Conv3d(2, 8, 3, padding=1), [(2, 2, 5, 8, 8), (1, 2, 3, 4, 9)]),
}
# The rows of its windows are too long for AVX512-VNNI, and its planes too many for AMX.
NOT_FROM_PLANES = ("wide",)


def layouts(x):
    """The same numbers in memory of every kind: whole, channels last, parts of larger tensors."""
    yield x.contiguous()
    if x.dim() in (4, 5):
        yield x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    large = torch.zeros(2 * x.shape[0], x.shape[1] + 2, *x.shape[2:])
    large[::2, 1:-1] = x
    yield large[::2, 1:-1]
    gaps = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
    gaps[..., ::2] = x
    yield gaps[..., ::2]


@pytest.mark.parametrize("name", STEMS)
def test_first_convolution_quantizes_its_input(name, isa):
    layer, shapes = STEMS[name]
    dims = len(shapes[0]) - 2
    last = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](layer.out_channels, 4, 1)
    images = torch.randn(shapes[0])
    int8 = converted(nn.Sequential(layer, nn.ReLU(), last), images)
    plan = qkernels.compile(int8, images)
    for shape in shapes:
        for x in layouts(torch.randn(shape)):
            assert_same_bits(plan, int8, x)
    if name not in NOT_FROM_PLANES:
        first = ["quantize + conv"] if isa in PADS_IMAGES else ["quantize", "conv"]
        assert kinds(plan, images) == [*first, "conv"]
        assert kinds(plan, next(layouts(images[:1]))) == [*first, "conv"]


def test_quantizing_in_the_convolution_works_in_slices(threads):
    images = torch.randn(7, 3, 30, 26)
    int8 = converted(nn.Sequential(conv(3, 16, 3, 2), conv(16, 8), conv(8, 8, act=None)), images)
    assert_same_bits_in_slices(qkernels.compile(int8, images), int8, [images], threads)


def test_padded_images_of_a_large_batch_are_made_in_groups(threads):
    images = torch.randn(5, 3, 300, 300)
    int8 = converted(nn.Sequential(conv(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1)), images[:1])
    plan = qkernels.compile(int8, images[:1])
    for count in (1, 3):
        threads(count)
        assert_same_bits(plan, int8, images)


def test_codes_that_others_read_too_are_made_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.a(x), self.b(x)

    images = torch.randn(2, 3, 12, 12)
    int8 = converted(Twice(), images)
    plan = qkernels.compile(int8, images)
    assert_same_bits(plan, int8, images)
    assert kinds(plan, images) == ["quantize", "conv", "conv"]


# ---- dequantize, into the last layer


class Quantized(nn.Module):
    """torch.ao's border: the output is quantized, then float again."""

    def __init__(self, body):
        super().__init__()
        self.quant, self.body, self.dequant = torch_ao.QuantStub(), body, torch_ao.DeQuantStub()

    def forward(self, x):
        return self.dequant(self.body(self.quant(x)))


LAST = {
    "pointwise": (nn.Conv2d(8, 21, 1), (3, 3, 17, 9), True),
    "conv": (nn.Conv2d(8, 70, 3, 2, 1), (3, 3, 17, 9), True),
    "groups": (nn.Conv2d(8, 60, 3, padding=1, groups=2), (3, 3, 17, 9), True),
    "transposed": (nn.ConvTranspose2d(8, 5, 3, 2, 1), (3, 3, 17, 9), True),
    "transposed_with_holes": (nn.ConvTranspose2d(8, 5, 2, 3), (3, 3, 17, 9), False),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (3, 3, 17, 9), False),
    "relu": (nn.Sequential(nn.Conv2d(8, 13, 3), nn.ReLU()), (3, 3, 17, 9), True),
    "linear": (nn.Linear(8, 100), (3, 3), True),
    "many_rows": (nn.Linear(8, 100), (700, 3), True),
    "sequence": (nn.Linear(8, 33), (3, 20, 3), True),
}


def quantized_output(name):
    layer, shape, fused = LAST[name]
    first = nn.Linear(3, 8) if isinstance(layer, nn.Linear) else nn.Conv2d(3, 8, 3, padding=1)
    model = Quantized(nn.Sequential(first, nn.ReLU(), layer)).eval()
    model.qconfig = torch_ao.get_default_qconfig("qnnpack")
    x = torch.randn(shape)
    prepared = torch_ao.prepare(model)
    prepared(x)
    return torch_ao.convert(prepared), x, fused


@pytest.mark.parametrize("name", LAST)
def test_last_layer_dequantizes_its_output(name, isa):
    model, x, fused = quantized_output(name)
    plan = qkernels.compile(model, x)
    for batch in (x, x[:1], torch.randn_like(x)):
        assert_same_bits(plan, model, batch)
    last = kinds(plan, x)[-1]
    assert last.endswith(" + dequantize") if fused else last == "dequantize"


@pytest.mark.parametrize("name", LAST)
def test_dequantizing_in_the_layer_works_in_slices(name, threads):
    model, x, _ = quantized_output(name)
    assert_same_bits_in_slices(qkernels.compile(model, x), model, [x], threads)


# ---- concatenations


def outputs_in_cats(plan, *inputs):
    """By layer: whether its output lies in a concatenation."""
    return {s["name"]: " in " in s["output"] for s in plan.describe(*inputs)["steps"] if s["kind"] != "cat"}


@pytest.mark.parametrize("name", ["dense", "fire", "shuffle"])
def test_blocks_write_where_they_are_read(name, isa, threads):
    blocks = {
        "dense": (nn.Sequential(conv(3, 16), nn.MaxPool2d(2), Dense(16, 8, 4), nn.Conv2d(48, 8, 1)), 0, 0),
        "fire": (nn.Sequential(conv(3, 16), Fire(16, 4, 8), Fire(20, 4, 8), nn.Conv2d(20, 8, 1)), 0, 0),
        # Half of the channels pass: into the concatenation, and all are mixed.
        "shuffle": (nn.Sequential(conv(3, 32), Shuffle(32), Shuffle(32), nn.Conv2d(32, 8, 1)), 2, 2),
    }
    model, cats, copies = blocks[name]
    images = torch.randn(3, 3, 18, 14)
    int8 = converted(model, images)
    plan = qkernels.compile(int8, images)
    assert_same_bits(plan, int8, images)
    assert_same_bits(plan, int8, torch.randn(1, 3, 7, 9))
    found = kinds(plan, images)
    assert (found.count("cat"), found.count("copy")) == (cats, copies)
    assert_same_bits_in_slices(plan, int8, [images], threads)


class Branches(nn.Module):
    """Parts of a concatenation that something else reads too."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(3, 8), nn.Conv2d(47, 4, 1)
        self.pointwise, self.window, self.given = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 7, 1)
        self.after_pointwise, self.after_window = nn.Conv2d(5, 2, 1), nn.Conv2d(6, 2, 3)
        self.after_pool = nn.Conv2d(5, 2, 1)
        self.twice, self.up = nn.Conv2d(8, 4, 3, padding=1), nn.ConvTranspose2d(8, 5, 3, 1, 1)

    def forward(self, x):
        x = self.first(x)
        a, b, c, d = self.pointwise(x), self.window(x), self.given(x), self.twice(x)
        pooled, mean = F.max_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1)
        joined = self.last(torch.cat([a, b, c, d, pooled, mean, d, self.up(x)], 1))
        return joined, self.after_pointwise(a), self.after_window(b), c, self.after_pool(F.max_pool2d(a, 2))


def test_values_live_in_a_concatenation_if_all_others_can_read_them_there(isa):
    images = torch.randn(2, 3, 20, 12)
    int8 = converted(Branches(), images)
    plan = qkernels.compile(int8, images)
    assert_same_bits(plan, int8, images)
    assert_same_bits(plan, int8, torch.randn(3, 3, 9, 31))
    inside = outputs_in_cats(plan, images)
    expected = {"pointwise": True, "window": False, "given": False, "twice": True, "up": True}
    assert {name: inside[name] for name in expected} == expected
    assert sum(inside.values()) == 5  # these three and both pools


class Growing(nn.Module):
    """Concatenations of concatenations: each longer one begins with the one before, and one is a result too."""

    def __init__(self):
        super().__init__()
        self.first = conv(3, 8)
        self.layers = nn.ModuleList(nn.Conv2d(n, 4, 3, padding=1) for n in (8, 12, 16))
        self.norms = nn.ModuleList(nn.Conv2d(n, n, 1, groups=n) for n in (8, 12, 16))
        self.last, self.other = nn.Conv2d(20, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.first(x)
        parts = [x]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            joined = torch.cat(parts, 1) if len(parts) > 1 else x
            parts.append(layer(norm(joined)))
        # Two that begin alike and go on differently, and one of a whole concatenation.
        return self.last(torch.cat(parts, 1)), self.other(torch.cat([x, parts[1], parts[3]], 1))


def test_longer_concatenations_hold_shorter_ones(isa, threads):
    images = torch.randn(3, 3, 10, 6)
    int8 = converted(Growing(), images)
    plan = qkernels.compile(int8, images)
    assert_same_bits(plan, int8, images)
    assert_same_bits_in_slices(plan, int8, [images], threads)
    assert kinds(plan, images).count("cat") == 3  # of the branch off, whose parts live elsewhere


class Progressive(nn.Module):
    """A concatenation is the first, or the last, part of the next one."""

    def __init__(self):
        super().__init__()
        self.first = conv(3, 8)
        self.layers = nn.ModuleList(nn.Conv2d(n, 4, 1) for n in (8, 12, 16, 20))
        self.last = nn.Conv2d(24, 4, 3)

    def forward(self, x):
        x = self.first(x)
        for i, layer in enumerate(self.layers):
            x = torch.cat([x, layer(x)] if i % 2 == 0 else [layer(x), x], 1)
        return self.last(x)


def test_concatenations_grow_in_place(isa, threads):
    images = torch.randn(3, 3, 10, 6)
    int8 = converted(Progressive(), images)
    plan = qkernels.compile(int8, images)
    assert_same_bits(plan, int8, images)
    assert_same_bits_in_slices(plan, int8, [images], threads)
    assert "cat" not in kinds(plan, images)


class Nested(nn.Module):
    """A concatenation is a part of the next one; what is joined twice is there twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(3, 8), conv(8, 4), conv(12, 6)
        self.last = nn.Conv2d(38, 4, 1)

    def forward(self, x):
        a = self.first(x)
        b = torch.cat([a, self.second(a)], 1)
        c = torch.cat([self.third(b), b], 1)
        return self.last(torch.cat([b, a, c], 1))


def test_parts_of_parts(isa, threads):
    images = torch.randn(3, 3, 10, 6)
    int8 = converted(Nested(), images)
    plan = qkernels.compile(int8, images)
    assert_same_bits(plan, int8, images)
    assert_same_bits_in_slices(plan, int8, [images], threads)
