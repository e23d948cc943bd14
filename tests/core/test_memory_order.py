"""The exact model stores tensors as the converted one: floats behind them are summed in memory order."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels
from qkernels.core.exact import ReferenceLayer, by_reference

MIDDLES = {
    "cat": lambda s, y: s.b(torch.cat([y[:, :4], y[:, 4:].sigmoid()], 1)),
    "cat of contiguous tensors": lambda s, y: s.b(torch.cat([y.flatten(2), y.flatten(2)], 2)[..., None]),
    "add": lambda s, y: s.b(y + y.sigmoid()),
    "add broadcast": lambda s, y: s.b(y.mean((2, 3), keepdim=True) + y),
    "mul": lambda s, y: s.b(y.permute(0, 1, 3, 2) * y.sigmoid().permute(0, 1, 3, 2)),
    "lookup": lambda s, y: s.b(y.permute(0, 1, 3, 2).sigmoid()),
    "interpolate": lambda s, y: s.b(F.interpolate(y, scale_factor=2)),
    "max_pool": lambda s, y: s.b(F.max_pool2d(y, 2)),
    "mean": lambda s, y: s.b(y.mean((2, 3), keepdim=True)),
    "linear": lambda s, y: s.l(y.transpose(1, 3)),
}
READERS = {
    "mean": lambda s, y: y.mean((1, 2, 3)),
    "sum": lambda s, y: y.exp().sum(-1),
    "norm": lambda s, y: F.normalize(y.flatten(1)),
}


class Net(nn.Module):
    def __init__(self, middle, read):
        super().__init__()
        self.a, self.b, self.l = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)
        self.middle, self.read = middle, read

    def forward(self, x):
        return self.read(self, self.middle(self, self.a(x)))


def batches():
    g = torch.Generator().manual_seed(1)
    yield (x := torch.randn(2, 3, 16, 16, generator=g))
    yield x[:1]
    yield x.to(memory_format=torch.channels_last)
    yield x[:1, :, :1]
    yield x[:, :, :1, :1]
    yield torch.randn(3, 16, 16, 3, generator=g).permute(0, 3, 2, 1)


@pytest.mark.parametrize("middle", MIDDLES)
def test_strides_of_every_layer_and_bits_of_every_reader(middle):
    for read in READERS.values():
        torch.manual_seed(0)
        first = next(batches())
        prepared = qkernels.calibrate(qkernels.prepare(Net(MIDDLES[middle], read).eval(), first), [first])
        int8 = qkernels.convert(prepared)
        for x in batches():
            if middle == "max_pool" and x.shape[2] == 1:
                continue
            assert strides(int8, x) == strides(by_reference(int8), x)
            assert qkernels.verify(prepared, int8, [x]).total_mismatches == 0


def strides(model, x):
    found, handles = [], []
    wrapped = {id(m.layer) for m in model.modules() if isinstance(m, ReferenceLayer)}
    for path, module in model.named_modules():
        if path and id(module) not in wrapped:
            note = lambda m, args, y, path=path: found.append((path, y.shape, y.stride()))  # noqa: E731
            handles.append(module.register_forward_hook(note))
    model(x)
    for handle in handles:
        handle.remove()
    return found


def test_contiguous_is_kept_for_the_float_reader():
    class Complex(Net):
        def forward(self, x):
            y = self.a(x).contiguous()
            return self.b(y), torch.view_as_complex(y.unflatten(-1, (-1, 2))).abs()

    x = next(batches())
    prepared = qkernels.calibrate(qkernels.prepare(Complex(None, None).eval(), x), [x])
    int8 = qkernels.convert(prepared)
    assert qkernels.verify(prepared, int8, [x]).total_mismatches == 0
    (call,) = [n for n in int8.graph.nodes if n.target == "contiguous"]
    assert getattr(int8.get_submodule(call.args[0].target), "kind", "") == "dequantize"  # the codes stay as they lie
