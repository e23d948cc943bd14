"""Cross-layer equalization: equal ranges, the same function."""

import pytest
import torch
from torch import nn

from qkernels.core.equalize import absorb_bias, equalizable, equalize, equalize_network
from qkernels.core.fusion import folded
from qkernels.core.graph import trace
from qkernels.errors import InvalidArgument


def chain(*layers):
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, nn.modules.conv._ConvNd):
            channels = torch.rand(layer.weight.shape[0]) * 10 + 0.01
            layer.weight.data.mul_(channels.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    return nn.Sequential(*layers).eval()


def depthwise(channels, cls=nn.Conv2d):
    return cls(channels, channels, 3, groups=channels)


def convolutions(model):
    return [m for m in model if isinstance(m, nn.modules.conv._ConvNd)]


def ranges(model):
    """Of the channels between each two layers: the largest weight that writes one and the largest that reads it."""
    found = []
    for first, second in zip(convolutions(model), convolutions(model)[1:], strict=False):
        written = first.weight.transpose(0, 1) if first.transposed and first.groups == 1 else first.weight
        read = second.weight if second.transposed or second.groups > 1 else second.weight.transpose(0, 1)
        found.append([w.detach().abs().flatten(1).amax(1) for w in (written, read)])
    return found


CHAINS = {
    "relu": (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
    "nothing between": (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, bias=False)),
    "prelu": (nn.Conv2d(3, 8, 3, bias=False), nn.PReLU(8), nn.Conv2d(8, 4, 3)),
    "identity": (nn.Conv2d(3, 8, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(8, 4, 3)),
    "depthwise": (nn.Conv2d(3, 8, 3), nn.ReLU(), depthwise(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    "depthwise first": (depthwise(3), nn.ReLU(), nn.Conv2d(3, 4, 1)),
    "transposed": (nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)),
    "transposed, then not": (nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_equal_ranges_and_the_same_function(name):
    model, x = chain(*CHAINS[name]), torch.randn(2, 3, 12, 12)
    expected = model(x).detach()
    chains = equalize_network(trace(model, (x,)), {})
    paths = tuple(str(i) for i, m in enumerate(model) if isinstance(m, nn.modules.conv._ConvNd))
    assert chains == [paths]
    for written, read in ranges(model):
        torch.testing.assert_close(written, read, rtol=1e-5, atol=0)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_one_dimension():
    model, x = chain(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), torch.randn(2, 3, 12)
    expected = model(x)
    assert equalize_network(trace(model, (x,)), {}) == [("0", "2")]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_neighbouring_chains_share_a_layer_and_other_groups_end_one():
    def found(*layers):
        model = chain(*layers)
        return equalizable(trace(model, (torch.randn(1, 4, 32, 32),)))

    conv = lambda: nn.Conv2d(4, 4, 3)  # noqa: E731
    assert found(conv(), conv(), conv()) == [("0", "1"), ("1", "2")]
    assert found(conv(), depthwise(4), conv(), conv()) == [("0", "1", "2"), ("2", "3")]
    assert found(conv(), depthwise(4), depthwise(4), conv()) == [("2", "3")]
    assert found(conv(), nn.Conv2d(4, 4, 3, groups=2), conv(), conv()) == [("2", "3")]
    assert found(conv(), depthwise(4)) == []
    assert found(conv(), nn.ReLU6(), conv()) == []
    assert found(conv(), nn.MaxPool2d(2), conv()) == []


def test_what_others_read_too_stays():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.a(x)
            return self.c(self.b(x)) + x

    class Twice(Fork):
        def forward(self, x):
            return self.b(self.a(self.a(x)))

    class Tied(Fork):
        def forward(self, x):
            return self.c(self.b(self.a(x)))

    tied = Tied().eval()
    tied.c.weight = tied.a.weight
    assert equalizable(trace(tied, (torch.randn(1, 4, 8, 8),))) == []
    assert equalizable(trace(Fork().eval(), (torch.randn(1, 4, 8, 8),))) == [("b", "c")]
    assert equalizable(trace(Twice().eval(), (torch.randn(1, 4, 8, 8),))) == []


def test_a_norm_without_parameters_leaves_nothing_to_absorb():
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
    before = first.bias.clone(), second.bias.clone()
    absorb_bias(first, second, torch.ones(8), nn.BatchNorm2d(8, affine=False), clamped=False)
    assert torch.equal(first.bias, before[0])
    assert torch.equal(second.bias, before[1])


def test_channels_of_zeros_stay_as_they_are():
    model = chain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model[0].weight.data[2] = 0
    model[2].weight.data[:, 5] = 0
    (factor,) = equalize(convolutions(model))
    assert factor[2] == 1 == factor[5]
    assert all(torch.isfinite(m.weight).all() for m in convolutions(model))


def test_absorbed_biases_leave_the_function_for_inputs_within_three_deviations():
    first, norm, second = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8).eval(), nn.Conv2d(8, 4, 1)
    norm.bias.data.uniform_(2, 6)
    norm.weight.data.uniform_(0.2, 0.5)
    x = torch.randn(64, 3, 4, 4)
    norm.train()(first(x))
    norm.momentum = None
    norm.reset_running_stats()
    norm(first(x))
    first = folded(first, norm.eval())
    model = nn.Sequential(first, nn.ReLU(), second)
    with torch.no_grad():
        expected, before = model(x), first.bias.clone()
        absorb_bias(first, second, torch.ones(8), norm, clamped=True)
        moved = before - first.bias
        torch.testing.assert_close(moved, (norm.bias - 3 * norm.weight).clamp(min=0))
        difference = (model(x) - expected).abs()
    assert moved.min() > 0.4
    assert (difference < 1e-5).float().mean() > 0.95


def test_layers_that_do_not_follow_each_other_are_refused():
    with pytest.raises(InvalidArgument, match=r"channels \[8, 4\]"):
        equalize([nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3)])
    with pytest.raises(InvalidArgument, match="two or three convolutions"):
        equalize([nn.Conv2d(3, 8, 3), nn.Linear(8, 4)])
