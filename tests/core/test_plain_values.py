"""What a model reads of a tensor besides its numbers: a tensor of codes gives what the float tensor would."""

import pytest
import torch
from torch import nn

import qkernels

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Both convolutions are integer, so that `y` is codes; `read(self, y, z)` is float."""

    def __init__(self, read):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("position", torch.linspace(-1, 1, 288).reshape(1, 8, 6, 6))
        self.read = read

    def forward(self, x):
        y = self.a(x)
        return self.read(self, y, self.b(y))


def converted(read, x=X):
    torch.manual_seed(0)
    model = Net(read).eval()
    prepared = qkernels.calibrate(qkernels.prepare(model, x), [x])
    return model, prepared, qkernels.convert(prepared)


def sqnr(expected, got):
    expected, got = expected.detach(), got.detach()
    return float(10 * torch.log10(expected.square().sum() / (expected - got).square().sum()))


READS = {
    "to": lambda s, y, z: torch.softmax(z, 1) + s.position.to(y.dtype),
    "type": lambda s, y, z: torch.softmax(z, 1).type(y.dtype),
    "full": lambda s, y, z: torch.full((1, 8, 1, 1), 0.3, dtype=y.dtype) * torch.softmax(z, 1),
    "item": lambda s, y, z: z * y[0, 0, 0, 0].item(),
    "is_floating_point": lambda s, y, z: z * (2 + y.is_floating_point()),
    "element_size": lambda s, y, z: z * y.element_size(),
    "stride": lambda s, y, z: torch.as_strided(s.position, (1, 8, 6, 6), y.stride()) + torch.softmax(z, 1),
    "stride of a view": lambda s, y, z: torch.as_strided(s.position, (6, 6), y.permute(0, 2, 3, 1).stride()[1:3]) + z,
    "as_strided": lambda s, y, z: y.as_strided((1, 8, 6, 6), (288, 36, 6, 1)) + torch.softmax(z, 1),
}


@pytest.mark.parametrize("name", READS)
def test_values_are_those_of_the_float_tensor(name):
    model, prepared, int8 = converted(READS[name])
    assert sum(getattr(m, "kind", "") == "conv" for m in int8.modules()) == 2
    assert qkernels.verify(prepared, int8, [X]).total_mismatches == 0
    assert sqnr(model(X), int8(X)) > 25


def test_numbers_and_dtypes_may_be_outputs(tmp_path):
    model, _, int8 = converted(lambda s, y, z: (z, y.dtype, y.flatten().tolist(), y.stride(), y.shape))
    expected, got = model(X), int8(X)
    assert got[1] is torch.float32
    assert torch.tensor(got[2]).sub(torch.tensor(expected[2])).abs().max() < 0.1
    assert got[3:] == expected[3:]


def test_a_dtype_is_a_constant_of_the_graph(tmp_path):
    _, _, int8 = converted(READS["to"])
    assert not any(n.target is getattr for n in int8.graph.nodes)
    assert not any(getattr(m, "kind", "") == "dequantize" for m in int8.modules())
    qkernels.save(int8, tmp_path / "model.qk")
    assert torch.equal(qkernels.load(tmp_path / "model.qk")(X), int8(X))


def test_sizes_are_read_of_codes():
    _, _, int8 = converted(lambda s, y, z: z.exp().reshape(y.shape[0], y.size(1), -1) * y.numel() / y.dim())
    assert not any(getattr(m, "kind", "") == "dequantize" for m in int8.modules())


def test_seeing_a_tensor_as_a_dtype_is_float():
    model, _, int8 = converted(lambda s, y, z: s.b(y.view(torch.float32).relu()))
    assert sqnr(model(X), int8(X)) > 25
