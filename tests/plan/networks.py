"""Small networks with the structure of the known ones, and how they are converted."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels


def converted(model: nn.Module, *example: Tensor, **options) -> nn.Module:
    """`model` in int8, calibrated on the example."""
    torch.manual_seed(1)
    prepared = qkernels.prepare(model.eval(), example, **options)
    with qkernels.calibrating(prepared), torch.no_grad():
        prepared(*example)
    return qkernels.convert(prepared)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type | None = nn.ReLU):
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), *([act()] if act else []))


class Head(nn.Module):
    def __init__(self, body: nn.Module, channels: int, classes: int = 10):
        super().__init__()
        self.body, self.pool, self.linear = body, nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x):
        return self.linear(torch.flatten(self.pool(self.body(x)), 1))


class Residual(nn.Module):
    """ResNet's block, with a projected shortcut where the shape changes."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.layers = nn.Sequential(conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3, act=None))
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride, act=None)

    def forward(self, x):
        return F.relu(self.layers(x) + (x if self.shortcut is None else self.shortcut(x)))


class Inverted(nn.Module):
    """The block of MobileNetV2, EfficientNet and MNASNet; with a gate, that of MobileNetV3 and RegNet-Y."""

    def __init__(self, inputs, outputs, stride=1, kernel=3, act=nn.ReLU6, gate=None):
        super().__init__()
        inner = inputs * 4
        self.expand, self.depthwise = conv(inputs, inner, 1, act=act), conv(inner, inner, kernel, stride, inner, act)
        self.project = conv(inner, outputs, 1, act=None)
        self.gate = gate and nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, 8, 1), nn.ReLU(), nn.Conv2d(8, inner, 1), gate()
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = self.project(y if self.gate is None else y * self.gate(y))
        return x + y if self.adds else y


class FusedResidual(nn.Module):
    """EfficientNetV2's: the sum reads two activations through tables, and both end there."""

    def __init__(self, channels):
        super().__init__()
        self.layer = conv(channels, channels, act=nn.SiLU)

    def forward(self, x):
        return x + self.layer(x)


class Fire(nn.Module):
    """SqueezeNet's block; GoogLeNet's has the same two kinds of branches."""

    def __init__(self, inputs, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 1, 1, ceil_mode=True)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x)), self.pool(x)], 1)


class Shuffle(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass, then they are mixed, by sizes read from the tensor."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(conv(half, half, 1), conv(half, half, 3, 1, half, None), conv(half, half, 1))

    def forward(self, x):
        kept, taken = x.chunk(2, dim=1)
        x = torch.cat((kept, self.branch(taken)), dim=1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width)
        return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class Dense(nn.Module):
    """DenseNet: every layer reads the concatenation of all before it; batch normalization comes first."""

    def __init__(self, inputs, growth, layers):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(inputs + i * growth) for i in range(layers))
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs + i * growth, growth, 3, padding=1, bias=False) for i in range(layers)
        )

    def forward(self, x):
        features = [x]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        return F.avg_pool2d(torch.cat(features, 1), 2)


class UNet(nn.Module):
    """Down, up by a transposed convolution and by nearest interpolation, with concatenated skips."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(3, 8), conv(8, 16)
        self.bottom = conv(16, 16)
        self.up1, self.up2 = nn.ConvTranspose2d(16, 16, 2, 2), nn.Upsample(scale_factor=2)
        self.merge1, self.merge2, self.out = conv(32, 8), conv(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        d = self.merge1(torch.cat([self.up1(c), b], 1))
        return self.out(self.merge2(torch.cat([self.up2(d), a], 1)))


class TwoInputs(nn.Module):
    """Two arguments, results of several kinds."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.linear = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, left, right):
        hidden = F.relu(self.a(left)) + F.relu(self.b(right))
        return {"scores": self.linear(hidden), "rest": (hidden, [left, None])}


def network(name: str) -> tuple[nn.Module, list[tuple[int, ...]], list[tuple[int, ...]]]:
    """A network, the shapes of its example, and other shapes that it takes."""
    torch.manual_seed(0)
    stem = conv(3, 16, 3, 2)
    square, other = [(2, 3, 24, 24)], [(1, 3, 31, 20)]
    images = {
        "vgg": (nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 16), nn.MaxPool2d(2)), 16),
        "resnet": (nn.Sequential(conv(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1), Residual(16, 16), Residual(16, 24, 2)), 24),
        "mobilenet_v2": (nn.Sequential(stem, Inverted(16, 16), Inverted(16, 24, 2), Inverted(24, 24)), 24),
        "mobilenet_v3": (nn.Sequential(stem, Inverted(16, 16, 1, 5, nn.Hardswish, nn.Hardsigmoid)), 16),
        "efficientnet": (nn.Sequential(stem, Inverted(16, 24, 2, 5, nn.SiLU, nn.Sigmoid)), 24),
        "efficientnet_v2": (nn.Sequential(conv(3, 16, 3, 2, act=nn.SiLU), FusedResidual(16), conv(16, 24)), 24),
        "regnet": (nn.Sequential(stem, conv(16, 32, 3, 2, 4), conv(32, 32, 3, 1, 2)), 32),
        "squeezenet": (nn.Sequential(stem, Fire(16, 4, 8), Fire(20, 6, 10)), 26),
        "shufflenet": (nn.Sequential(stem, Shuffle(16), Shuffle(16)), 16),
        "densenet": (nn.Sequential(stem, Dense(16, 8, 3), conv(40, 16, 1)), 16),
    }
    if name in images:
        return Head(*images[name]), square, other
    others = {
        "unet": (UNet(), [(2, 3, 16, 24)], [(1, 3, 20, 8)]),
        "mlp": (nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5)),
                [(4, 13)], [(1, 13)]),
        "mlp_sequence": (nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)), [(2, 5, 12)], [(3, 1, 12)]),
        "conv1d": (nn.Sequential(nn.Conv1d(4, 8, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 6, 3),
                                 nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, 3)), [(2, 4, 30)], [(1, 4, 41)]),
        "conv3d": (nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(8, 4, 1),
                                 nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)),
                   [(2, 2, 6, 8, 8)], [(1, 2, 7, 5, 9)]),
        "segmentation": (nn.Sequential(conv(3, 8, 3, 2), conv(8, 8), nn.ConvTranspose2d(8, 4, 3, 2, 1, 1)),
                         square, other),
        "two_inputs": (TwoInputs(), [(4, 6), (4, 4)], [(1, 6), (1, 4)]),
    }  # fmt: skip
    return others[name]


NETWORKS = (
    *("vgg", "resnet", "mobilenet_v2", "mobilenet_v3", "efficientnet", "efficientnet_v2"),
    *("regnet", "squeezenet", "shufflenet"),
    *("densenet", "unet", "mlp", "mlp_sequence", "conv1d", "conv3d", "segmentation", "two_inputs"),
)


def tensors(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def leaves(result) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (tuple, list)):
        return [leaf for r in result for leaf in leaves(r)]
    return [] if result is None else [result]
