"""Small networks that together have every kind of integer layer, each with the shape of its input."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mobile(nn.Sequential):
    """A stem, a depthwise and a pointwise convolution, a transposed and a reflecting one."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            *(nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.ReLU6(), nn.Conv2d(32, 64, 1), nn.Hardswish()),
            *(nn.ConvTranspose2d(64, 32, 2, 2), nn.ReLU()),
            *(nn.Conv2d(32, 48, 3, 1, 1, padding_mode="reflect"), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
        )


class SqueezeExcitation(nn.Module):
    """A residual block whose channels are scaled by what is in them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(8, 32, 1), nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.expand(x)
        x = x + self.project(y * self.excite(self.squeeze(y)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Branches(nn.Module):
    """A concatenation of a grouped convolution, an average and a sum; behind it a grouped transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=2), nn.ReLU6())
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(32, 16, 1), nn.SiLU())
        self.peak = nn.MaxPool2d(3, 1, 1)
        self.up = nn.ConvTranspose2d(80, 16, 2, 2, groups=4)
        self.head = nn.Conv2d(16, 8, 3, 1, 1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.up(torch.cat([self.grouped(x), self.pooled(x), self.peak(x) + x], 1)))
        x = F.interpolate(self.head(x), scale_factor=2.0, mode="nearest")
        return F.adaptive_avg_pool2d(F.hardswish(x), (3, 2))


class Sequence(nn.Module):
    """Convolutions in one dimension, then linear layers on each step with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv1d(16, 32, 5, 2, 2), nn.AvgPool1d(3, 2, 1)
        self.up = nn.ConvTranspose1d(32, 32, 3, 2)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.pool(F.gelu(self.conv(x)))).transpose(1, 2)
        return x + self.second(F.gelu(self.first(x)))


class Volume(nn.Sequential):
    """Convolutions and pools in three dimensions."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv3d(3, 16, 3, 1, 1), nn.LeakyReLU(0.1), nn.MaxPool3d(2)),
            *(nn.Conv3d(16, 16, (1, 3, 3), groups=16), nn.ReLU(), nn.AdaptiveAvgPool3d(1)),
            *(nn.Flatten(), nn.Linear(16, 5)),
        )


class Residual(nn.Module):
    """What is trained: batch norms, clamps, a residual, a concatenation, tables; no pool whose windows overlap, as the
    backward of those adds up in any order on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.left = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.right = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Hardswish())
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = torch.cat([x + self.left(x), self.right(x)], 1)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mobile": (Mobile, (2, 3, 33, 35)),
    "squeeze-excitation": (SqueezeExcitation, (2, 3, 17, 19)),
    "branches": (Branches, (2, 3, 17, 19)),
    "sequence": (Sequence, (2, 16, 40)),
    "volume": (Volume, (2, 3, 8, 9, 10)),
}
TRAINED = (Residual, (4, 3, 12, 10))
# Of few layers, where each takes its time.
TRACED = (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), (2, 3, 8, 8))


def float_network(make: Callable[[], nn.Module]) -> nn.Module:
    """In eval mode, with the same weights each time, and with running statistics that are not those of a beginning."""
    torch.manual_seed(3)
    network = make()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            module.num_batches_tracked.fill_(1)
    return network.eval()


def batches(shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for _ in range(count)]
