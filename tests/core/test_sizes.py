"""Sizes that are equal in every call: an addition joins the layer before it only then. Sizes computed in a call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.core.sizes import Size


def converted(model, x):
    torch.manual_seed(0)
    prepared = qkernels.calibrate(qkernels.prepare(model.eval(), x), [x])
    return prepared, qkernels.convert(prepared)


def residuals(int8):
    return sum("residual" in getattr(m, "_grids", {}) for m in int8.modules())


class Net(nn.Module):
    def __init__(self, calls, **layers):
        super().__init__()
        self.calls = calls
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.calls(self, x)


def conv(i, o, k=1, stride=1, **options):
    return nn.Conv2d(i, o, k, stride, k // 2, **options)


def linears():
    return {name: nn.Linear(8, 8) for name in "abc"}


def convs():
    return {"a": conv(3, 8), "b": conv(3, 8), "c": conv(8, 8)}


BY_CHANCE = {
    "spatial": (lambda s, x: s.c(s.a(x) + s.b(F.adaptive_avg_pool2d(x, 1))), convs, (4, 3, 1, 1), (2, 3, 5, 5)),
    "mean": (lambda s, x: s.c(s.b(x.mean((2, 3), keepdim=True)) + s.a(x)), convs, (2, 3, 1, 1), (2, 3, 5, 5)),
    "batch": (lambda s, x: s.c(s.a(x) + s.b(x[:1])), linears, (1, 8), (4, 8)),
    "batch, other order": (lambda s, x: s.c(s.b(x[:1]) + s.a(x)), linears, (1, 8), (4, 8)),
    "strides": (
        lambda s, x: s.c(s.a(x)[:, :, :1, :1] + s.b(x)),
        lambda: {"a": conv(3, 8, 3, 2), "b": conv(3, 8, 3, 1), "c": conv(8, 8)},
        (2, 3, 1, 1),
        (2, 3, 6, 6),
    ),
}


@pytest.mark.parametrize("name", BY_CHANCE)
def test_sizes_equal_by_chance_are_not_merged(name):
    calls, layers, example, other = BY_CHANCE[name]
    model, x = Net(calls, **layers()), torch.randn(other)
    prepared, int8 = converted(model, torch.randn(example))
    assert residuals(int8) == 0
    assert int8(x).shape == model(x).shape
    assert qkernels.verify(prepared, int8, [x]).total_mismatches == 0


class Basic(nn.Module):
    """A residual block of ResNet, with a stride and a wider shortcut."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.a, self.b = conv(i, o, 3, stride), conv(o, o, 3)
        self.shortcut = conv(i, o, 1, stride) if stride > 1 or i != o else nn.Identity()

    def forward(self, x):
        return torch.relu(self.b(torch.relu(self.a(x))) + self.shortcut(x))


class Inverted(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(8, 24), nn.ReLU6(), conv(24, 24, 3, groups=24), nn.ReLU6(), conv(24, 8))

    def forward(self, x):
        return x + self.body(x)


SHUFFLE = {"a": conv(3, 8), "b": conv(8, 8, 3), "c": conv(8, 8)}
ALWAYS = {
    "resnet": (lambda: nn.Sequential(Basic(3, 8, 2), nn.MaxPool2d(3, 2, 1), Basic(8, 8, 1), Basic(8, 16, 2)), 3),
    "head": (lambda: nn.Sequential(Basic(3, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)), 1),
    "mobilenet": (lambda: nn.Sequential(conv(3, 8, 3, 2), Inverted(), Inverted(), conv(8, 8)), 2),
    "the input itself": (lambda: Net(lambda s, x: s.b(x + s.a(x)), a=conv(3, 3, 3), b=conv(3, 3)), 1),
    "padded before": (
        lambda: Net(
            lambda s, x: s.c(s.a(F.pad(x, (0, 1, 0, 1))) + s.b(x)),
            a=nn.Conv2d(3, 8, 3, 2),
            b=conv(3, 8, 1, 2),
            c=conv(8, 8),
        ),
        0,  # (n + 1 - 3) // 2 + 1 is not (n - 1) // 2 + 1
    ),
    "padded to the same size": (
        lambda: Net(
            lambda s, x: s.c(s.a(F.pad(x, (0, 2, 1, 1))) + s.b(x)), a=nn.Conv2d(3, 8, 3), b=conv(3, 8), c=conv(8, 8)
        ),
        1,
    ),
    "reshaped": (
        lambda: Net(
            lambda s, x: s.c((y := s.a(x)) + s.b(y.flatten(2).reshape(y.shape[0], 8, y.shape[2], y.size(3)))), **SHUFFLE
        ),
        1,
    ),
    "permuted": (
        lambda: Net(lambda s, x: s.c((y := s.a(x)) + s.b(y.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2))), **SHUFFLE),
        1,
    ),
    "cat": (
        lambda: Net(lambda s, x: s.c(s.a(torch.cat([x, x], 1)) + s.b(x)), a=conv(6, 8), b=conv(3, 8), c=conv(8, 8)),
        1,
    ),
    "gate": (lambda: Net(lambda s, x: s.c(s.b((y := s.a(x)) * y.mean((2, 3), True).sigmoid()) + y), **SHUFFLE), 1),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ALWAYS)
def test_sizes_equal_in_every_call_are_merged(name, batch):
    make, merged = ALWAYS[name]
    prepared, int8 = converted(make(), torch.randn(batch, 3, 16, 16))
    assert residuals(int8) == merged
    if merged:
        other = [torch.randn(3, 3, 22, 19), torch.randn(1, 3, 32, 32)]
        assert qkernels.verify(prepared, int8, other).total_mismatches == 0


def test_formulas():
    n = Size("n")
    assert (n + 2 - 3) // 2 + 1 == (n - 1) // 2 + 1 == (n + 1) // 2
    assert (n // 2 + 1) // 3 == (n + 2) // 6
    assert n + 2 - 2 == n == 1 * n * 1
    assert n * 2 != n
    assert n - Size("m") != Size("m") - n
    assert n + Size("m") == Size("m") + n


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_interpolation_to_a_computed_size(dims):
    def calls(s, x):
        y = s.a(x)
        size = tuple(y.shape[2 + d] * 2 + 1 for d in range(dims))
        return s.b(F.interpolate(y, size=size, mode="nearest"))

    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = Net(calls, a=layer(3, 8, 3), b=layer(8, 4, 1))
    x, other = torch.randn(2, 3, *[6] * dims), torch.randn(1, 3, *range(5, 5 + dims))
    prepared, int8 = converted(model, x)
    assert next(row for row in prepared.report if row.kind == "interpolate").integer
    assert not any(getattr(m, "kind", "") == "dequantize" for m in int8.modules())
    assert int8(other).shape == model(other).shape
    assert qkernels.verify(prepared, int8, [x, other]).total_mismatches == 0
    plan = qkernels.compile(int8, x)
    assert torch.equal(plan(x), int8(x))
    assert torch.equal(plan(other), int8(other))
