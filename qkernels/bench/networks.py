"""The networks that are timed, with random weights (time does not depend on them).

The usual ones are written out here, so that the command needs no torchvision; any other name is torchvision's.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qkernels.errors import InvalidArgument, Unsupported

# expansion, channels, repeats, stride (of the first), kernel
_MOBILENET_V2 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)
_EFFICIENTNET_LITE0 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class _Convolution(nn.Sequential):
    """Convolution, batch normalization and, unless None, an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: nn.Module | None = None,
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([] if activation is None else [activation]))


class _InvertedResidual(nn.Module):
    """Expand, depthwise, project; the input is added where the shape stays."""

    def __init__(self, inputs: int, expansion: int, outputs: int, stride: int, kernel: int) -> None:
        super().__init__()
        inner = inputs * expansion
        expand = [_Convolution(inputs, inner, 1, activation=nn.ReLU6())] if expansion > 1 else []
        depthwise = _Convolution(inner, inner, kernel, stride, inner, nn.ReLU6())
        self.layers = nn.Sequential(*expand, depthwise, _Convolution(inner, outputs, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class _Residual(nn.Module):
    """ResNet's basic block (two 3x3) or, with `expansion` 4, its bottleneck (1x1, 3x3, 1x1)."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        outputs = width * expansion
        if expansion == 1:
            layers = [_Convolution(inputs, width, 3, stride, activation=nn.ReLU()), _Convolution(width, outputs, 3)]
        else:
            reduce = _Convolution(inputs, width, 1, activation=nn.ReLU())
            middle = _Convolution(width, width, 3, stride, activation=nn.ReLU())
            layers = [reduce, middle, _Convolution(width, outputs, 1)]
        self.layers = nn.Sequential(*layers)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _Convolution(inputs, outputs, 1, stride)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layers(x) + self.shortcut(x))


class _Classifier(nn.Module):
    def __init__(self, features: nn.Module, channels: int, classes: int = 1000) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.flatten(self.pool(self.features(x)), 1))


def _mobile(rows: tuple[tuple[int, ...], ...]) -> nn.Module:
    layers: list[nn.Module] = [_Convolution(3, 32, 3, 2, activation=nn.ReLU6())]
    channels = 32
    for expansion, outputs, repeats, stride, kernel in rows:
        for i in range(repeats):
            layers.append(_InvertedResidual(channels, expansion, outputs, stride if i == 0 else 1, kernel))
            channels = outputs
    layers.append(_Convolution(channels, 1280, 1, activation=nn.ReLU6()))
    return _Classifier(nn.Sequential(*layers), 1280)


def _resnet(repeats: tuple[int, ...], expansion: int) -> nn.Module:
    layers: list[nn.Module] = [_Convolution(3, 64, 7, 2, activation=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate(repeats):
        width = 64 * 2**stage
        for i in range(count):
            layers.append(_Residual(channels, width, 2 if i == 0 and stage > 0 else 1, expansion))
            channels = width * expansion
    return _Classifier(nn.Sequential(*layers), channels)


NETWORKS = {
    "mobilenet_v2": lambda: _mobile(_MOBILENET_V2),
    "resnet18": lambda: _resnet((2, 2, 2, 2), 1),
    "resnet50": lambda: _resnet((3, 4, 6, 3), 4),
    "efficientnet_lite0": lambda: _mobile(_EFFICIENTNET_LITE0),
}


def constructor(name: str) -> Callable[[], nn.Module]:
    """What makes the network `name`.

    Raises:
        Unsupported: the name is torchvision's, which is not installed.
        InvalidArgument: nobody knows the name.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    try:
        import torchvision.models
    except ImportError as error:
        raise Unsupported(
            f"bench: {name!r} is not one of {sorted(NETWORKS)}; others come from torchvision, which is not installed"
        ) from error
    if name not in torchvision.models.list_models(torchvision.models):
        raise InvalidArgument(f"bench: {name!r} is neither one of {sorted(NETWORKS)} nor in torchvision.models")
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return lambda: torchvision.models.get_model(name, weights=None, **extra)


def float_network(name: str) -> nn.Module:
    """The network `name` in eval mode, always with the same weights; raises as `constructor` does.

    Weights are normal, as trained ones nearly are and as torchvision starts; some kernels' time depends on them.
    """
    make = constructor(name)
    torch.manual_seed(0)
    network = make()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
    return network.eval()


def images(batch: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
