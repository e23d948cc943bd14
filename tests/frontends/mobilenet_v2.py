"""The network of torch's tutorial on eager quantization: stubs, FloatFunctional, mean. Small, or as it is there."""

from torch import nn

# (inputs, outputs, stride, ratio) of each block; the channels of the first and the last convolution.
SMALL = ([(16, 24, 2, 3), (24, 24, 1, 3), (24, 32, 2, 3), (32, 32, 1, 3)], 16, 64)
_STAGES = [(1, 32, 16, 1, 1), (6, 16, 24, 2, 2), (6, 24, 32, 3, 2), (6, 32, 64, 4, 2), (6, 64, 96, 3, 1)]
_STAGES += [(6, 96, 160, 3, 2), (6, 160, 320, 1, 1)]
FULL = (
    [(b if i else a, b, 1 if i else stride, ratio) for ratio, a, b, count, stride in _STAGES for i in range(count)],
    32,
    1280,
)


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, ratio: int, functional: type):
        super().__init__()
        hidden = inputs * ratio
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([conv_bn_relu(inputs, hidden, 1)] if ratio > 1 else []),
            conv_bn_relu(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip_add = functional()

    def forward(self, x):
        return self.skip_add.add(x, self.conv(x)) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """`api` is torch.ao.quantization or the front end; `functional` its FloatFunctional."""

    def __init__(self, api, functional: type, classes: int = 10, layout: tuple = SMALL):
        super().__init__()
        self.api = (api.fuse_modules, api.fuse_modules_qat)
        blocks, first, last = layout
        self.features = nn.Sequential(
            conv_bn_relu(3, first, stride=2),
            *(InvertedResidual(*block, functional) for block in blocks),
            conv_bn_relu(blocks[-1][1], last, 1),
        )
        self.quant, self.dequant = api.QuantStub(), api.DeQuantStub()
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        x = self.features(self.quant(x)).mean([2, 3])
        return self.dequant(self.classifier(x))

    def fuse(self, is_qat: bool = False):
        fuse = self.api[is_qat]
        for module in self.modules():
            if type(module) is nn.Sequential and len(module) == 3 and type(module[2]) is nn.ReLU:
                fuse(module, ["0", "1", "2"], inplace=True)
            if type(module) is InvertedResidual:
                last = len(module.conv) - 2
                fuse(module.conv, [str(last), str(last + 1)], inplace=True)
        return self
