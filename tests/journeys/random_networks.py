"""Networks with random structure: every operation that has an integer form, in any order, with shared tensors."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.GELU, nn.LeakyReLU, nn.Tanh, nn.Hardtanh)


def _swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat((second, first), 1)


FUNCTIONS = {
    "relu": F.relu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "clamp": lambda x: x.clamp(-0.5, 2.0),
    "affine": lambda x: x * 0.5 + 1.0,
    "neg": torch.neg,
    "add": torch.add,
    "add relu": lambda a, b: F.relu(a + b),
    "mul": torch.mul,
    "cat": lambda *tensors: torch.cat(tensors, 1),
    "swap halves": _swap_halves,
    "shuffle": lambda x: x.view(x.shape[0], 2, x.shape[1] // 2, x.shape[2], x.shape[3]).transpose(1, 2).flatten(1, 2),
}


class Call(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, *tensors: Tensor) -> Tensor:
        return FUNCTIONS[self.name](*tensors)

    def extra_repr(self) -> str:
        return self.name


class Gate(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class RandomNetwork(nn.Module):
    """Takes images [N, 3, H, W] of even height and width. A step reads one or more earlier tensors, as others may."""

    def __init__(self, seed: int, steps: int = 9):
        super().__init__()
        self._draw = random.Random(seed)
        self.steps, self.reads, self.channels = nn.ModuleList(), [], [3]
        for _ in range(steps):
            self._draw.choice((self._conv,) * 4 + (self._activation, self._unary, self._pool, self._cat, self._up)
                              + (self._pair,) * 2 + (self._gate, self._halves))()  # fmt: skip
        self.head = nn.Linear(self.channels[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step, reads in zip(self.steps, self.reads, strict=True):
            values.append(step(*(values[i] for i in reads)))
        return self.head(values[-1].mean((2, 3)))

    def extra_repr(self) -> str:
        return f"reads={self.reads}"

    def _add(self, step: nn.Module, channels: int, *reads: int) -> None:
        self.steps.append(step)
        self.reads.append(reads)
        self.channels.append(channels)

    def _some(self) -> int:
        """One of the latest tensors, most often the last. All have the same height and width."""
        return max(0, len(self.channels) - 1 - min(int(self._draw.expovariate(1.0)), 3))

    def _conv(self) -> None:
        d, x = self._draw, self._some()
        inputs = self.channels[x]
        groups = d.choice((1, 1, inputs, next(g for g in (4, 3, 2, 1) if inputs % g == 0)))
        outputs = groups * (d.choice((1, 2)) if groups == inputs else d.randint(1, max(1, 40 // groups)))
        kernel, dilation, padding_mode = d.choice((1, 3, 3, 5)), d.choice((1, 1, 2)), d.choice(("zeros", "replicate"))
        options = {"padding": kernel // 2 * dilation, "dilation": dilation, "padding_mode": padding_mode}
        parts: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=d.random() < 0.5, **options)]
        if d.random() < 0.5:
            parts.append(_batch_norm(outputs))
        if d.random() < 0.6:
            parts.append(d.choice(ACTIVATIONS)())
        self._add(nn.Sequential(*parts), outputs, x)

    def _activation(self) -> None:
        x = self._some()
        self._add(self._draw.choice(ACTIVATIONS)(), self.channels[x], x)

    def _unary(self) -> None:
        x = self._some()
        self._add(Call(self._draw.choice(list(FUNCTIONS)[:6])), self.channels[x], x)

    def _pool(self) -> None:
        x = self._some()
        self._add(self._draw.choice((nn.MaxPool2d, nn.AvgPool2d))(3, 1, 1), self.channels[x], x)

    def _pair(self) -> None:
        x = self._some()
        same = [i for i, channels in enumerate(self.channels) if channels == self.channels[x]]
        self._add(Call(self._draw.choice(("add", "add relu", "mul"))), self.channels[x], x, self._draw.choice(same))

    def _cat(self) -> None:
        reads = [self._some() for _ in range(self._draw.choice((2, 2, 3)))]
        if sum(self.channels[i] for i in reads) <= 64:
            self._add(Call("cat"), sum(self.channels[i] for i in reads), *reads)

    def _up(self) -> None:
        x = self._some()
        c = self.channels[x]
        up = self._draw.choice((nn.ConvTranspose2d(c, c, 2, 2), nn.Upsample(scale_factor=2)))
        self._add(nn.Sequential(nn.Conv2d(c, c, 2, 2), up), c, x)

    def _gate(self) -> None:
        x = self._some()
        self._add(Gate(self.channels[x]), self.channels[x], x)

    def _halves(self) -> None:
        x = self._some()
        if self.channels[x] % 2 == 0:
            self._add(Call(self._draw.choice(("swap halves", "shuffle"))), self.channels[x], x)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    """One that has seen data; some gammas are negative."""
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.uniform_(norm.weight, -1.0, 1.5)
    return norm
